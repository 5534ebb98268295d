"""What a cluster says of a run -> RunStatus, as the API server, the operator 1.9.4 and the kubelet word it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from opensloth.pod_log import PodLine
from runner.backend import State
from runner.cluster_status import CANCELLED_ANNOTATION, JobFacts, derive, remember

RUN = "sft-12345678"
NOW = 1_800_000_000.0


def job(*conditions: str, suspend: bool = False, workers: int = 1, **meta: Any) -> dict[str, Any]:
    """conditions: `Running`, or `Running=False`."""
    listed = []
    for text in conditions:
        kind, _, status = text.partition("=")
        listed.append({"type": kind, "status": status or "True", "lastTransitionTime": "2027-01-15T08:00:00Z"})
    replicas = {"Master": {"replicas": 1}, **({"Worker": {"replicas": workers}} if workers else {})}
    labels = {"opensloth/name": "sft"}
    return {
        "metadata": {"name": RUN, "namespace": "team", "labels": labels, "creationTimestamp": "2027-01-15T07:00:00Z"}
        | meta,
        "spec": {"runPolicy": {"suspend": suspend}, "pytorchReplicaSpecs": replicas},
        "status": {"conditions": listed},
    }


def pod(node: int, state: dict[str, Any] | None, phase: str = "Running", **status: Any) -> dict[str, Any]:
    """state: of its container; None: there is none yet."""
    kind, index = ("master", 0) if node == 0 else ("worker", node - 1)
    labels = {"training.kubeflow.org/replica-type": kind, "training.kubeflow.org/replica-index": str(index)}
    containers = [{"name": "pytorch", "state": state}] if state else []
    return {
        "metadata": {"name": f"{RUN}-{kind}-{index}", "uid": f"u{node}", "labels": labels},
        "status": {"phase": phase, "containerStatuses": containers, **status},
    }


RUNS: dict[str, Any] = {"running": {}}


def ended(code: int, message: str = "", reason: str = "Error", at: str = "2027-01-15T07:30:00Z") -> dict[str, Any]:
    return {"terminated": {"exitCode": code, "message": message, "reason": reason, "finishedAt": at}}


def events(*records: dict[str, Any]) -> list[PodLine]:
    return [PodLine(2, 0, i, f"oslo.event {json.dumps(record)}") for i, record in enumerate(records)]


STEP = {"event": "step", "step": 7, "total_steps": 20, "loss": 1.5, "eta": 12.0}


def status_of(
    found: dict[str, Any], *pods: dict[str, Any], lines: list[PodLine] | None = None, incidents: Any = ()
) -> Any:
    return derive(JobFacts(found, pods, lines or [], incidents, NOW))


def test_a_run_that_trains() -> None:
    status = status_of(job("Created", "Running"), pod(0, RUNS), pod(1, RUNS), lines=events(STEP))
    assert (status.state, status.step, status.total_steps, status.loss) == (State.RUNNING, 7, 20, 1.5)
    assert (status.handle, status.name, status.attempt) == (f"kubernetes://team/{RUN}", "sft", 2)
    assert (status.folder, status.final, status.reason) == (f"/shared/runs/{RUN}", None, None)


def test_a_run_that_prepares_its_data_says_how_far_it_is() -> None:
    lines = events({"event": "phase", "phase": "data"}, {"event": "progress", "phase": "encode", "done": 5, "total": 9})
    status = status_of(job("Created", "Running"), pod(0, RUNS), pod(1, RUNS), lines=lines)
    assert (status.state, status.reason) == (State.PREPARING, "preparing the dataset: encode 5 of 9")


def test_the_operator_that_does_not_run() -> None:
    assert status_of(job()).reason == "the training operator has not taken it up yet"


def test_pods_that_cannot_be_created_say_why() -> None:
    refused = {"reason": "FailedCreatePod", "message": "Error creating: pods is forbidden: exceeded\n quota"}
    status = status_of(job("Created", "Running"), pod(0, RUNS), incidents=[refused])
    assert status.state is State.PENDING
    assert status.reason == "1 of 2 pods are there: Error creating: pods is forbidden: exceeded quota"


UNSCHEDULABLE = {"type": "PodScheduled", "status": "False", "message": "0/1 nodes: 1 Insufficient nvidia.com/gpu."}


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (
            pod(1, None, "Pending", conditions=[UNSCHEDULABLE]),
            "worker-0 cannot be scheduled: 0/1 nodes: 1 Insufficient",
        ),
        (
            pod(1, {"waiting": {"reason": "ImagePullBackOff", "message": 'Back-off pulling "x:1"'}}, "Pending"),
            'worker-0: ImagePullBackOff: Back-off pulling "x:1"',
        ),
        (
            pod(1, {"waiting": {"reason": "PodInitializing"}}, "Pending", initContainerStatuses=[{"state": RUNS}]),
            "worker-0 waits for the master",
        ),
        (pod(1, {"waiting": {"reason": "ContainerCreating"}}, "Pending"), "worker-0 is starting"),
    ],
)
def test_what_a_pod_waits_for(second: dict[str, Any], reason: str) -> None:
    status = status_of(job("Created", "Running"), pod(0, RUNS), second)
    assert status.state is State.PENDING
    assert reason in status.reason


def test_a_pod_with_something_wrong_is_named_before_one_that_just_starts() -> None:
    starting = pod(0, {"waiting": {"reason": "ContainerCreating"}}, "Pending")
    wrong = pod(1, None, "Pending", conditions=[UNSCHEDULABLE])
    assert "worker-0 cannot be scheduled" in status_of(job("Created"), starting, wrong).reason


@pytest.mark.parametrize(
    ("end", "says"), [("2027-01-15T07:59:50Z", "is leaving"), ("2027-01-15T07:00:00Z", "is stuck")]
)
def test_a_pod_that_is_being_deleted(end: str, says: str) -> None:
    leaving = pod(1, RUNS)
    leaving["metadata"]["deletionTimestamp"] = end
    assert says in status_of(job("Created", "Restarting"), pod(0, RUNS), leaving).reason


def test_a_run_that_succeeded() -> None:
    done = pod(0, ended(0, reason="Completed"), "Succeeded")
    status = status_of(job("Created", "Running=False", "Succeeded"), done, lines=events(STEP))
    assert (status.state, status.cause, status.exit_code) == (State.SUCCEEDED, "succeeded", 0)
    assert (status.final, status.eta) == (f"/shared/runs/{RUN}/final", None)
    assert status.ended - status.started == 3600


def test_the_first_cause_counts_and_not_its_victims() -> None:
    victim = pod(0, ended(143, "peer_lost: another rank went away", at="2027-01-15T07:29:00Z"), "Failed")
    fault = pod(1, ended(3, "data: row 7 has no answer\nset dataset.bad_rows: skip"), "Failed")
    status = status_of(job("Created", "Failed"), victim, fault)
    assert (status.state, status.cause, status.exit_code) == (State.FAILED, "data", 3)
    assert (status.reason, status.hint) == ("row 7 has no answer", "set dataset.bad_rows: skip")


@pytest.mark.parametrize(
    ("state", "cause", "reason"),
    [
        (ended(137, reason="OOMKilled"), "out_of_memory", "needed more memory than its limit"),
        (ended(1, "Traceback\nModuleNotFoundError: x"), "error", "ended with exit code 1: ModuleNotFoundError: x"),
        (ended(2), "config", "ended with exit code 2"),
        (ended(126), "error", "ended with exit code 126"),
        (ended(137), "killed", "ended with exit code 137"),
        (ended(143), "killed", "ended with exit code 143"),
    ],
)
def test_a_pod_that_ended_without_the_launchers_word(state: dict[str, Any], cause: str, reason: str) -> None:
    status = status_of(job("Created", "Failed", workers=0), pod(0, state, "Failed"))
    assert (status.state, status.cause) == (State.FAILED, cause)
    assert reason in status.reason


def test_an_evicted_pod() -> None:
    evicted = pod(0, None, "Failed", reason="Evicted", message="The node was low on memory.")
    status = status_of(job("Created", "Failed", workers=0), evicted)
    assert (status.cause, status.reason) == ("killed", f"{RUN}-master-0: Evicted: The node was low on memory.")


def test_a_failed_job_without_pods_quotes_the_operator() -> None:
    found = job("Created", "Failed", workers=0)
    found["status"]["conditions"][-1]["message"] = "PyTorchJob is failed because 1 Master replica(s) failed."
    assert "1 Master replica(s) failed" in status_of(found).reason


def test_cancelling_is_not_over_before_the_pods_have_left() -> None:
    cancelled = {"annotations": {CANCELLED_ANNOTATION: "true"}}
    found = job("Created", "Suspended", suspend=True, **cancelled)
    assert status_of(found, pod(0, RUNS)).state is State.RUNNING
    status = status_of(found)
    assert (status.state, status.cause) == (State.CANCELLED, "cancelled")


def test_a_pod_that_is_stuck_keeps_a_run_from_being_cancelled_and_is_named() -> None:
    found = job("Created", "Suspended", suspend=True, annotations={CANCELLED_ANNOTATION: "{}"})
    stuck = pod(1, RUNS)
    stuck["metadata"]["deletionTimestamp"] = "2027-01-15T07:00:00Z"
    assert "worker-0 is stuck" in status_of(found, stuck).reason


def test_a_queue_suspends_too() -> None:
    found = job("Created", "Suspended", suspend=True)
    assert "is suspended" in status_of(found).reason
    found["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "gpus"
    status = status_of(found)
    assert (status.state, status.reason) == (State.PENDING, "waits in the queue gpus")


LACKS = "couldn't assign flavors to pod set master: insufficient unused quota for cpu in flavor gpu, 1 more needed"
OUT = "The workload is deactivated"


@pytest.mark.parametrize(
    ("conditions", "active", "reason"),
    [
        ([], True, "waits in the queue gpus"),
        ([("QuotaReserved", "False", "Pending", LACKS)], True, f"waits in the queue gpus: {LACKS}"),
        (
            [("QuotaReserved", "False", "Pending", LACKS), ("Evicted", "True", "Preempted", "Preempted to ...")],
            True,
            f"was evicted (Preempted) and waits in the queue gpus: {LACKS}",
        ),
        (
            [("QuotaReserved", "False", "Pending", LACKS), ("Evicted", "True", "Deactivated", OUT)],
            True,  # again
            f"waits in the queue gpus: {LACKS}",
        ),
        (
            [("QuotaReserved", "False", "Pending", OUT), ("Evicted", "True", "Deactivated", OUT)],
            False,
            f"was taken out of the queue gpus, which `oslo resume` undoes: {OUT}",
        ),
        (
            [
                ("QuotaReserved", "True", "QuotaReserved", ""),
                ("Finished", "True", "FailedToStart", "conflict for key=x"),
            ],
            True,
            "will not be started by Kueue; `oslo cancel` and submit it again: conflict for key=x",
        ),
    ],
)
def test_why_it_waits_in_its_queue(conditions: list[tuple[str, ...]], active: bool, reason: str) -> None:
    """As Kueue 0.17 words its conditions."""
    listed = [dict(zip(("type", "status", "reason", "message"), one, strict=True)) for one in conditions]
    workload = {"spec": {"active": active}, "status": {"conditions": listed}}
    found = job("Created", "Suspended", suspend=True)
    found["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "gpus"
    status = derive(JobFacts(found, [], [], [], NOW, workload))
    assert (status.state, status.reason) == (State.PENDING, reason)


def test_a_resumed_job_is_not_taken_for_a_suspended_one() -> None:
    """The operator moves the condition that changed last to the end: Suspended=False."""
    status = status_of(job("Created", "Running", "Suspended=False"), pod(0, RUNS), pod(1, RUNS), lines=events(STEP))
    assert status.state is State.RUNNING


def test_a_job_that_is_being_deleted() -> None:
    status = status_of(job("Created", "Running", deletionTimestamp="2027-01-15T08:00:00Z"), pod(0, RUNS))
    assert (status.state, status.reason) == (State.CANCELLED, "its object is being deleted")


def test_a_cancelled_run_is_shown_as_far_as_it_was() -> None:
    """Its pods are gone, and their logs with them."""
    running = status_of(job("Created", "Running"), pod(0, RUNS), pod(1, RUNS), lines=events(STEP))
    found = job("Created", "Suspended", suspend=True, annotations={CANCELLED_ANNOTATION: remember(running)})
    status = status_of(found)
    assert (status.state, status.step, status.total_steps, status.loss) == (State.CANCELLED, 7, 20, 1.5)
    assert (status.attempt, status.eta) == (2, None)
