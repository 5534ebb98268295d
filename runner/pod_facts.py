"""What a pod's object says: which node of the run it is, whether it has started, what it waits for. Pure."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from runner.backend import CLUSTER_SCHEME
from runner.pod import CONTAINER

JOB_NAME_LABEL: Final = "training.kubeflow.org/job-name"
INDEX_LABEL: Final = "training.kubeflow.org/replica-index"
TYPE_LABEL: Final = "training.kubeflow.org/replica-type"
STUCK_SECONDS: Final = 60
"""A pod that is still there so long after its grace period will not leave by itself."""
HELD_SECONDS: Final = 10
"""The same where its container has ended and only finalizers are left."""
MOUNT_FAILURES: Final = ("FailedMount", "FailedAttachVolume")
"""Events of a pod that starts and cannot: its object does not say so."""
_ORDINARY: Final = ("ContainerCreating", "PodInitializing")
_UNSCHEDULABLE: Final = (
    (
        "were unschedulable",
        "a node is cordoned, `kubectl get nodes` says which: after `kubectl uncordon NODE` the pod starts by itself",
    ),
    ("unbound immediate PersistentVolumeClaim", "`kubectl get pvc` says which claim is not Bound; see job.volume"),
    (re.compile(r'persistentvolumeclaim "[^"]*" not found'), "make the claim, or name another in job.volume"),
    ("untolerated taint", "job.tolerations, or another node: `kubectl describe nodes` shows the taints"),
    ("didn't match Pod's node affinity/selector", "job.node_selector names labels that no free node has"),
    (
        "Insufficient",
        "it starts by itself once there is room; what it asks for is job.gpus_per_node, job.cpu and job.memory",
    ),
)
"""What the scheduler says, the most telling first -> what to do."""
_WAITING: Final = {
    "ErrImagePull": "is job.image there, and may the namespace pull it (job.image_pull_secrets)?",
    "ImagePullBackOff": "is job.image there, and may the namespace pull it (job.image_pull_secrets)?",
    "ErrImageNeverPull": "job.image is not on the node, and job.image_pull_policy is Never",
    "InvalidImageName": "job.image is no name of an image",
    "CreateContainerConfigError": "make what is missing (job.secrets, job.volumes): the pod then starts by itself",
}
"""Why the kubelet does not start a container -> what to do."""
Manifest = Mapping[str, Any]


@dataclass(frozen=True)
class Wait:
    """What a pod waits for. trouble: whether something is wrong. hint: what to do about it."""

    text: str
    hint: str = ""
    trouble: bool = True


def node_of(pod: Manifest) -> int:
    """0: the master; worker i is node i + 1."""
    labels = pod["metadata"]["labels"]
    return 0 if labels[TYPE_LABEL] == "master" else int(labels[INDEX_LABEL]) + 1


def container_status(pod: Manifest) -> Manifest | None:
    """Of the container that trains; None while there is none."""
    statuses = pod.get("status", {}).get("containerStatuses", [])
    return next((status for status in statuses if status["name"] == CONTAINER), None)


def has_started(pod: Manifest) -> bool:
    """Whether the container runs or has run, so that there is a log."""
    status = container_status(pod)
    return status is not None and ("running" in status["state"] or "terminated" in status["state"])


def seconds(timestamp: str | None) -> float | None:
    """RFC 3339 -> seconds since the epoch."""
    return dt.datetime.fromisoformat(timestamp).timestamp() if timestamp else None


def clock(timestamp: str | float) -> str:
    """RFC 3339, or seconds since the epoch -> `19:05:12 UTC`."""
    at = seconds(timestamp) if isinstance(timestamp, str) else timestamp
    return dt.datetime.fromtimestamp(at or 0.0, dt.UTC).strftime("%H:%M:%S UTC")


def wait_of(pod: Manifest, now: float, incidents: Sequence[Manifest] = ()) -> Wait | None:
    """What a pod waits for; None when it runs. incidents: events, oldest first."""
    if pod["metadata"].get("deletionTimestamp"):
        return _leaving(pod, now)
    name, status = pod["metadata"]["name"], pod.get("status", {})
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            says = condition.get("message", condition.get("reason"))
            return Wait(f"{name} cannot be scheduled: {says}", _scheduling_hint(says))
    for container in (*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])):
        waiting = container["state"].get("waiting")
        if waiting and waiting.get("reason") not in _ORDINARY:
            text = f"{name}: {waiting.get('reason')}: {waiting.get('message', '')}".rstrip(": ")
            return Wait(text, _WAITING.get(waiting.get("reason"), ""))
    if status.get("phase") == "Pending" or not has_started(pod):
        return _starting(pod, incidents)
    return None


def _leaving(pod: Manifest, now: float) -> Wait:
    meta = pod["metadata"]
    name, end = meta["name"], seconds(meta["deletionTimestamp"]) or now  # the end of its grace period
    held_by = meta.get("finalizers")
    has_ended = pod.get("status", {}).get("phase") in ("Failed", "Succeeded")
    if now - end <= (HELD_SECONDS if held_by and has_ended else STUCK_SECONDS):
        return Wait(f"{name} is leaving", trouble=False)
    text = f"{name} is stuck: it should have left at {clock(end)}"
    if held_by:
        free = f"kubectl -n {meta.get('namespace', 'default')} patch pod {name} --type=merge"
        return Wait(
            f"{text}, and is held by its finalizer {', '.join(held_by)}",
            "whoever set the finalizer must let go of it; by force, as an admin: "
            f'{free} -p \'{{"metadata":{{"finalizers":null}}}}\'. The run then goes on by itself',
        )
    node = pod.get("spec", {}).get("nodeName", "its node")
    job = f"{CLUSTER_SCHEME}{meta.get('namespace', 'default')}/{meta['labels'].get(JOB_NAME_LABEL)}"
    return Wait(
        f"{text}, and {node} does not say that it has ended",
        f"if {node} is lost, by force: oslo cancel --force {job}, then oslo resume {job}: once the run has begun "
        "again, a pod that still runs writes nothing more",
    )


def _starting(pod: Manifest, incidents: Sequence[Manifest]) -> Wait:
    name, status = pod["metadata"]["name"], pod.get("status", {})
    for event in reversed(incidents):
        if event.get("reason") in MOUNT_FAILURES and event["involvedObject"].get("uid") == pod["metadata"]["uid"]:
            says = " ".join(str(event.get("message", "")).split())
            return Wait(f"{name} cannot mount its volumes: {says}", _WAITING["CreateContainerConfigError"])
    initialising = any("running" in c["state"] for c in status.get("initContainerStatuses", []))
    return Wait(f"{name} {'waits for the master' if initialising else 'is starting'}", trouble=False)


def _scheduling_hint(says: str) -> str:
    for pattern, hint in _UNSCHEDULABLE:
        if pattern in says if isinstance(pattern, str) else pattern.search(says):
            return hint
    return ""
