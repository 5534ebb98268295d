"""JobArgs and a resolved config -> one PyTorchJob, complete: every default of the operator is written out. Pure.

Read with the training operator 1.9: the container must be called `pytorch`, the master has exactly one replica,
nprocPerNode is a whole number as text (with `auto` WORLD_SIZE is wrong), keys and policies are not checked by
the API server, and labels of the job are not copied to its pods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from opensloth import __version__
from runner.errors import UsageError
from runner.pod import pod_template
from runner.quantities import parse_duration
from runner.spec import OWN_PREFIX, JobArgs

API_VERSION: Final = "kubeflow.org/v1"
CONFIG_LIMIT_BYTES: Final = 200 * 1024
"""Leaves room for the other annotations."""
ANNOTATIONS_LIMIT_BYTES: Final = 256 * 1024
"""Kubernetes' own, for all annotations of an object together."""
INPUTS_ANNOTATION: Final = f"{OWN_PREFIX}inputs"
"""Of the job: what it reads of /shared/inputs, separated by commas."""
POD_NAME_LIMIT: Final = 63
"""A pod's name is its host name and its service's name too: a DNS label."""
_OWN_ANNOTATIONS_BYTES: Final = 8 * 1024
QUEUE_LABEL: Final = "kueue.x-k8s.io/queue-name"
Manifest = dict[str, Any]


def render_pytorchjob(
    run: str, name: str, content: str, config_text: str, job: JobArgs, inputs: Sequence[str] = ()
) -> Manifest:
    """The object that a submit creates.

    run: its name; content: hex SHA-256 (identity.content_hash); config_text: run_config.dump with the pods' paths.
    inputs: paths on the volume of what comes from the submitting machine.
    Raises UsageError when a name is too long, or the annotations are too large.
    """
    check_pod_names(run, job.nodes)
    _check_size(config_text, job.annotations)
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
            "annotations": {**annotations, **({INPUTS_ANNOTATION: ",".join(sorted(inputs))} if inputs else {})},
        },
        "spec": {
            "nprocPerNode": str(job.processes_per_node),
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
    return said


def check_pod_names(run: str, nodes: int) -> None:
    """The operator calls pods RUN-master-0 and RUN-worker-INDEX, and does not look at the length.

    Raises UsageError when the longest is no name that Kubernetes takes.
    """
    longest = f"{run}-worker-{nodes - 2}" if nodes > 1 else f"{run}-master-0"
    excess = len(longest) - POD_NAME_LIMIT
    if excess > 0:
        raise UsageError(
            f"the pod {longest} would have a name of {len(longest)} characters; Kubernetes takes {POD_NAME_LIMIT}",
            f"shorten `name` by {excess} character{'s' if excess > 1 else ''}",
        )


def _check_size(config_text: str, annotations: Mapping[str, str]) -> None:
    size = len(config_text.encode())
    if size > CONFIG_LIMIT_BYTES:
        raise UsageError(
            f"the resolved config has {size:,} bytes; an object takes {CONFIG_LIMIT_BYTES:,}",
            "shorten the chat_template or the list of datasets",
        )
    theirs = sum(len(f"{key}{value}".encode()) for key, value in annotations.items())
    room = ANNOTATIONS_LIMIT_BYTES - size - _OWN_ANNOTATIONS_BYTES
    if theirs > room:
        raise UsageError(f"job.annotations have {theirs:,} bytes; beside the config there is room for {room:,}")


def _run_policy(job: JobArgs) -> Manifest:
    """No backoffLimit and no activeDeadlineSeconds: with ExitCode the operator obeys neither.

    job.max_restarts and job.deadline are the launcher's, which gets them as variables.
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
