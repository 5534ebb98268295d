"""JobArgs and a resolved config -> one PyTorchJob, complete: every default of the operator is written out. Pure.

Read with the training operator 1.9: the container must be called `pytorch`, the master has exactly one replica,
nprocPerNode is a whole number as text (with `auto` WORLD_SIZE is wrong), keys and policies are not checked by
the API server, and labels of the job are not copied to its pods.
"""

from __future__ import annotations

from typing import Any, Final

from opensloth import __version__
from runner.errors import UsageError
from runner.pod import pod_template
from runner.quantities import parse_duration
from runner.spec import OWN_PREFIX, JobArgs

API_VERSION: Final = "kubeflow.org/v1"
CONFIG_LIMIT_BYTES: Final = 200 * 1024
"""All annotations of an object together may have 256 KiB."""
QUEUE_LABEL: Final = "kueue.x-k8s.io/queue-name"
Manifest = dict[str, Any]


def render_pytorchjob(run: str, name: str, content: str, config_text: str, job: JobArgs) -> Manifest:
    """The object that a submit creates.

    run: its name; content: hex SHA-256 (identity.content_hash); config_text: run_config.dump with the pods' paths.
    Raises UsageError when the config is too large for an annotation.
    """
    size = len(config_text.encode())
    if size > CONFIG_LIMIT_BYTES:
        raise UsageError(
            f"the resolved config has {size:,} bytes; an object takes {CONFIG_LIMIT_BYTES:,}",
            "shorten the chat_template or the list of datasets",
        )
    labels = {
        "app.kubernetes.io/name": "opensloth",
        "app.kubernetes.io/instance": run,
        "app.kubernetes.io/managed-by": "oslo",
        f"{OWN_PREFIX}name": name,
        f"{OWN_PREFIX}run": run,
        **job.labels,
    }
    annotations = {f"{OWN_PREFIX}content": content, f"{OWN_PREFIX}version": __version__, **job.annotations}
    template = pod_template(run, labels, annotations, config_text, job)
    return {
        "apiVersion": API_VERSION,
        "kind": "PyTorchJob",
        "metadata": {
            "name": run,
            **({"namespace": job.namespace} if job.namespace else {}),
            # Not on the pods: there it would make Kueue queue each pod by itself.
            "labels": {**labels, **({QUEUE_LABEL: job.queue} if job.queue else {})},
            "annotations": annotations,
        },
        "spec": {
            "nprocPerNode": str(max(1, job.gpus_per_node)),
            "runPolicy": _run_policy(job),
            "pytorchReplicaSpecs": _replicas(job, template),
        },
    }


def notes(job: JobArgs) -> list[str]:
    """What a reader of the manifest would not expect."""
    said = []
    if job.ttl:
        said.append("job.ttl removes the object of a succeeded job only: the operator never removes a failed one")
    if job.nodes > 1:
        said.append(f"{job.nodes} pods mount the claim {job.volume}: on several nodes it must be ReadWriteMany")
    unread = ["job.max_restarts", "job.start_timeout", *(["job.deadline"] if job.deadline else [])]
    said.append(f"{_listed(unread)} have no effect yet: the launcher of this version does not read them")
    return said


def _listed(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _run_policy(job: JobArgs) -> Manifest:
    """No backoffLimit and no activeDeadlineSeconds: with ExitCode the operator obeys neither.

    job.max_restarts and job.deadline go to the launcher, as variables that it does not act on yet (see notes).
    """
    policy: Manifest = {"cleanPodPolicy": "Running", "suspend": False}
    if job.ttl:
        policy["ttlSecondsAfterFinished"] = parse_duration(job.ttl)
    return policy


def _replicas(job: JobArgs, template: Manifest) -> Manifest:
    """Every pod has the same template: who is the master, the operator says by the environment."""
    replicas: Manifest = {"Master": {"replicas": 1, "restartPolicy": "ExitCode", "template": template}}
    if job.nodes > 1:
        replicas["Worker"] = {"replicas": job.nodes - 1, "restartPolicy": "ExitCode", "template": template}
    return replicas
