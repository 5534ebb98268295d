"""What Kueue writes into a job when it starts it, and how it goes away again."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from runner.kueue import as_before

LABELS = {"opensloth/run": "sft-1", "kueue.x-k8s.io/priority-class": "urgent"}
ANNOTATIONS = {"opensloth/config": "{}", "kueue.x-k8s.io/podset-preferred-topology": "rack"}


def submitted() -> dict[str, Any]:
    def template() -> dict[str, Any]:
        meta = {"labels": dict(LABELS), "annotations": dict(ANNOTATIONS)}
        return {"metadata": meta, "spec": {"containers": [], "tolerations": [{"key": "mine"}]}}

    replicas = {kind: {"replicas": 1, "template": template()} for kind in ("Master", "Worker")}
    return {"metadata": {"name": "sft-1"}, "spec": {"pytorchReplicaSpecs": replicas}}


def started(job: dict[str, Any], *, flavor: bool) -> dict[str, Any]:
    """As Kueue 0.17 changes it; flavor: one with node labels and tolerations."""
    job = deepcopy(job)
    for kind, replica in job["spec"]["pytorchReplicaSpecs"].items():
        meta, spec = replica["template"]["metadata"], replica["template"]["spec"]
        meta["annotations"]["kueue.x-k8s.io/workload"] = "pytorchjob-sft-1-abcde"
        for name, text in (("podset", kind.lower()), ("local-queue-name", "q"), ("cluster-queue-name", "cq")):
            meta["labels"][f"kueue.x-k8s.io/{name}"] = text
        if flavor:
            spec["nodeSelector"] = {"gpu": "h100"}
            spec["tolerations"].append({"key": "pool"})
    return job


def workload(job: dict[str, Any]) -> dict[str, Any]:
    replicas = job["spec"]["pytorchReplicaSpecs"]
    return {
        "spec": {"podSets": [{"name": k.lower(), "template": deepcopy(r["template"])} for k, r in replicas.items()]}
    }


def test_its_workload_has_it_as_it_was() -> None:
    job = submitted()
    assert as_before(started(job, flavor=True), workload(job)) == job


def test_without_a_workload_the_marks_go_and_what_the_user_wrote_stays() -> None:
    job = submitted()
    assert as_before(started(job, flavor=False), None) == job


def test_the_job_itself_is_left_alone() -> None:
    job = started(submitted(), flavor=True)
    before = deepcopy(job)
    as_before(job, workload(submitted()))
    assert job == before
