"""A job in Kueue's queue: Kueue suspends and starts it, by the Workload that it keeps for the job."""

from __future__ import annotations

from copy import deepcopy
from functools import lru_cache
from typing import Any, Final

from runner.kube.api import Cluster, Resource
from runner.pod_facts import Manifest
from runner.pytorchjob import QUEUE_LABEL

GROUP: Final = "kueue.x-k8s.io"
_JOB_UID_LABEL: Final = f"{GROUP}/job-uid"
_WRITTEN: Final = {
    "metadata": ("labels", "annotations"),
    "spec": ("nodeSelector", "tolerations", "schedulingGates"),
}
"""Into a pod's template, by the part that has the key."""
_OWN: Final = ("workload", "workload-slice-name", "podset", "local-queue-name", "cluster-queue-name")
_MARKS: Final = frozenset(f"{GROUP}/{name}" for name in _OWN)


def is_queued(job: Manifest) -> bool:
    """Whether it asks for a queue."""
    return QUEUE_LABEL in job["metadata"].get("labels", {})


def workload_of(cluster: Cluster, job: Manifest) -> Manifest | None:
    """None: Kueue is not installed, has its PyTorchJob integration off, or has not taken up the job yet."""
    workloads = _workloads(cluster)
    found = cluster.find(workloads, f"{_JOB_UID_LABEL}={job['metadata']['uid']}") if workloads else []
    return found[0] if found else None


def set_active(cluster: Cluster, workload: Manifest, *, active: bool) -> None:
    """Take the job out of the queue, which ends its pods with their grace period, or put it in again."""
    workloads = _workloads(cluster)
    assert workloads is not None
    cluster.patch(workloads, workload["metadata"]["name"], {"spec": {"active": active}})


def as_before(job: Manifest, workload: Manifest | None) -> dict[str, Any]:
    """The job without what Kueue writes into the pods' templates when it starts it; its Workload has them as they were.

    Kueue does not start a job with the marks of another, and reads the nodes of a flavor as the job's own wish.
    """
    cleaned = deepcopy(dict(job))
    before = {one["name"]: one["template"] for one in (workload or {}).get("spec", {}).get("podSets", [])}
    for kind, replica in cleaned["spec"]["pytorchReplicaSpecs"].items():
        template, original = replica["template"], before.get(kind.lower())
        for part, keys in _WRITTEN.items():
            found = template.setdefault(part, {})
            for key in keys:
                if original is not None and key in original.get(part, {}):
                    found[key] = original[part][key]
                elif original is not None:
                    found.pop(key, None)
                elif part == "metadata" and key in found:
                    found[key] = {name: text for name, text in found[key].items() if name not in _MARKS}
    return cleaned


@lru_cache(maxsize=1)
def _workloads(cluster: Cluster) -> Resource | None:
    """None: the cluster does not know Kueue."""
    version = cluster.preferred_version(GROUP)
    return Resource(version, "workloads") if version else None
