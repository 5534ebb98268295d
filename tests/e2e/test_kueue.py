"""A job in a queue, with a real Kueue: skipped where the cluster has none that looks after this namespace."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from kubectl import HAS_CLUSTER, REPOSITORY, kubectl
from stage import NAMESPACE, OnCluster, write_job

pytestmark = pytest.mark.e2e
QUEUED: Final = ("--set", "job.queue=training", "--set", "job.cpu=100m")
ROOM: Final = "300m"
"""For one job of two pods."""
LONG: Final = {"max_steps": 20_000, "save_steps": 1000}
OVERLAY: Final = REPOSITORY / "k8s" / "overlays" / "kueue"


def queue_objects() -> list[dict[str, Any]]:
    """The overlay's, with room for one job, and named after this namespace where they are the whole cluster's."""
    found = [one for name in ("queues", "access") for one in yaml.safe_load_all((OVERLAY / f"{name}.yaml").read_text())]
    text = json.dumps([one for one in found if one["kind"] not in ("ResourceFlavor", "ClusterQueue")])
    flavor, queue = (next(one for one in found if one["kind"] == kind) for kind in ("ResourceFlavor", "ClusterQueue"))
    group = queue["spec"]["resourceGroups"][0]
    flavor["metadata"]["name"] = queue["metadata"]["name"] = group["flavors"][0]["name"] = NAMESPACE
    next(one for one in group["flavors"][0]["resources"] if one["name"] == "cpu")["nominalQuota"] = ROOM
    queue["spec"]["namespaceSelector"]["matchLabels"] = {"kubernetes.io/metadata.name": NAMESPACE}
    ours = json.loads(text)
    for one in ours:
        one["metadata"]["namespace"] = NAMESPACE
        if one["kind"] == "LocalQueue":
            one["spec"]["clusterQueue"] = NAMESPACE
        for subject in one.get("subjects", []):
            subject |= {"namespace": NAMESPACE} if subject["kind"] == "ServiceAccount" else {}
    return [flavor, queue, *ours]


@pytest.fixture(scope="module")
def queue(cluster: OnCluster) -> Iterator[OnCluster]:
    """The cluster, with a queue `training`."""
    assert HAS_CLUSTER
    if "kueue.x-k8s.io/" not in kubectl("api-versions"):
        pytest.skip("the cluster has no Kueue")
    objects = {"apiVersion": "v1", "kind": "List", "items": queue_objects()}
    kubectl("apply", "-f", "-", given=objects)
    yield cluster
    cluster.clear()
    kubectl("delete", "--ignore-not-found", "-f", "-", given=objects)


@pytest.fixture(autouse=True)
def _tidy(queue: OnCluster) -> Iterator[None]:
    yield
    queue.clear()


def has_trained(status: dict[str, Any]) -> bool:
    return (status["step"] or 0) > 0


def test_one_that_finds_no_room_says_so_and_runs_once_there_is(queue: OnCluster, model: Path, tmp_path: Path) -> None:
    first = queue.submit(write_job(tmp_path, model, **LONG), *QUEUED).handle
    queue.until(first, has_trained)
    second = queue.submit(write_job(tmp_path, model), *QUEUED).handle
    waiting = queue.until(second, lambda status: "insufficient" in (status["reason"] or ""))
    assert waiting["state"] == "pending"
    assert waiting["reason"].startswith("waits in the queue training: ")
    assert "cpu" in waiting["reason"]

    assert queue.oslo("cancel", first).code == 0
    assert not queue.pods(first.rpartition("/")[2])
    assert queue.oslo("wait", second).code == 0
    left = queue.status(first)  # there is room again
    assert left["state"] == "cancelled"
    assert has_trained(left)

    assert queue.oslo("resume", first).code == 0
    queue.until(first, lambda status: (status["step"] or 0) > left["step"])


def test_one_that_waits_can_be_cancelled_and_put_back(queue: OnCluster, model: Path, tmp_path: Path) -> None:
    job = queue.submit(write_job(tmp_path, model), *QUEUED, "--set", "job.cpu=1").handle
    queue.until(job, lambda status: "insufficient" in (status["reason"] or ""))
    assert queue.oslo("cancel", job).code == 0
    assert queue.status(job)["state"] == "cancelled"
    assert queue.oslo("resume", job).code == 0
    queue.until(job, lambda status: "insufficient" in (status["reason"] or ""))


def test_one_that_an_admin_takes_out_of_the_queue_can_be_put_back(
    queue: OnCluster, model: Path, tmp_path: Path
) -> None:
    job = queue.submit(write_job(tmp_path, model, **LONG), *QUEUED).handle
    before = queue.until(job, has_trained)["step"]
    uid = json.loads(queue.kubectl("get", "pytorchjob", job.rpartition("/")[2], "-o", "json"))["metadata"]["uid"]
    workload = queue.kubectl("get", "workloads.kueue.x-k8s.io", "-l", f"kueue.x-k8s.io/job-uid={uid}", "-o", "name")
    queue.kubectl("patch", workload.strip(), "--type=merge", "-p", '{"spec": {"active": false}}')
    queue.until(job, lambda status: "was taken out of the queue training" in (status["reason"] or ""))
    run = job.rpartition("/")[2]
    queue.kubectl("wait", "--for=delete", "pod", "-l", f"training.kubeflow.org/job-name={run}", "--timeout=180s")
    assert queue.oslo("resume", job).code == 0
    queue.until(job, lambda status: (status["step"] or 0) > before)


def test_one_that_has_failed_can_be_resumed(queue: OnCluster, model: Path, tmp_path: Path) -> None:
    """The object that takes its place must not have the marks of its first start: Kueue would never start it."""
    job = queue.submit(write_job(tmp_path, model, bad_row=True), *QUEUED).handle
    assert queue.oslo("wait", job).code == 100
    assert queue.oslo("resume", job).code == 0
    assert queue.oslo("wait", job).code == 100
    assert queue.status(job)["cause"] == "data"
