"""A job in Kueue's queue: Kueue suspends and starts it, by the Workload that it keeps for the job."""

from __future__ import annotations

from runner.cluster_status import Manifest
from runner.errors import ClusterError
from runner.kube.api import Cluster, Resource

GROUP = "kueue.x-k8s.io"
_JOB_UID_LABEL = f"{GROUP}/job-uid"


def set_active(cluster: Cluster, job: Manifest, *, active: bool) -> None:
    """Take the job out of the queue, which ends its pods with their grace period, or put it in again.

    Raises ClusterError when Kueue is not installed, or has no Workload for the job.
    """
    workloads = Resource(cluster.preferred_version(GROUP), "workloads")
    found = cluster.find(workloads, f"{_JOB_UID_LABEL}={job['metadata']['uid']}")
    if not found:
        name = job["metadata"]["name"]
        raise ClusterError(
            f"Kueue has no Workload for {name} in {cluster.where}", "is its PyTorchJob integration on? k8s/README.md"
        )
    for workload in found:
        cluster.patch(workloads, workload["metadata"]["name"], {"spec": {"active": active}})
