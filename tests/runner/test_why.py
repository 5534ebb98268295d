"""`oslo why`: the first cause as one sentence, what bears witness to it, and a command that comes next."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stand_in import Answer

from opensloth.contract import EXIT_CODE_OF_CAUSE
from runner import why
from runner.attempt_files import read_attempt
from runner.backend import AttemptRecord, Findings, RunStatus, State, Word
from runner.cluster_status import CANCELLED_ANNOTATION, JobFacts, derive
from runner.pod_evidence import by_time, seen

Oslo = Callable[..., Answer]
RUN = "sft-12345678"
HERE, THERE = f"local://{RUN}", f"kubernetes://team/{RUN}"
NOW = 1_800_000_000.0  # 08:00:00 UTC


def status(state: State, handle: str = HERE, **changes: Any) -> RunStatus:
    return RunStatus(RUN, handle, "sft", state, **changes)


# --- one sentence, one next command -------------------------------------------------------------------


def test_whoever_tells_of_a_failure_tells_it_in_the_same_words(oslo: Oslo, sft: Path, root: Path) -> None:
    followed = oslo("submit", sft, "--local", "--follow", steps=2, fail_at={"1": "row 3 has no messages"})
    told = oslo("why", "sft", "-o", "json").json()
    handle = followed.handle
    assert told["sentence"] == f"{handle} failed (data): row 3 has no messages"
    assert told["next"] == f"oslo logs {handle}"
    assert told["evidence"] == [f"its files: {root}/runs/{told['run']}/attempts/1"]
    for answer in (followed, oslo("wait", "sft"), oslo("logs", "-f", "sft"), oslo("status", "sft")):
        *_, sentence, command = answer.err.splitlines()
        assert sentence.removeprefix("error: ") == told["sentence"]
        assert command.strip() == f"{told['next']}   shows the log"
    shown = oslo("why", "sft")
    assert shown.code == 0
    assert shown.out.splitlines()[0] == told["sentence"]
    assert shown.out.splitlines()[-1] == f"next: {told['next']}   shows the log"


@pytest.mark.parametrize(
    ("found", "sentence", "command"),
    [
        (
            status(State.SUCCEEDED, step=58, total_steps=58),
            f"{HERE} has succeeded after 58 steps",
            f"oslo pull {HERE}",
        ),
        (
            status(State.RUNNING, step=3, total_steps=9),
            f"{HERE} is running: step 3 of 9",
            f"oslo logs -f {HERE}",
        ),
        (
            status(State.PREPARING, reason="loading the model"),
            f"{HERE} is preparing: loading the model",
            f"oslo logs -f {HERE}",
        ),
        (
            status(State.CANCELLED, THERE, step=3, total_steps=9),
            f"{THERE} was cancelled at step 3 of 9",
            f"oslo resume {THERE}",
        ),
        (
            status(State.CANCELLED, reason="cancelled after step 3"),
            f"{HERE} was cancelled after step 3",
            f"oslo resume {HERE}",
        ),
        (
            status(State.PENDING, THERE, reason="x-master-0 is starting"),
            f"{THERE} is pending: x-master-0 is starting",
            f"oslo status -w {THERE}",
        ),
        (status(State.FAILED, cause="error"), f"{HERE} failed (error): no reason was given", f"oslo logs {HERE}"),
    ],
)
def test_every_state_has_its_sentence_and_command(found: RunStatus, sentence: str, command: str) -> None:
    told = why.explain(Findings(found))
    assert (told.sentence, told.next) == (sentence, command)
    assert why.text(told, Findings(found)).splitlines()[-1].startswith(f"next: {command}   ")


@pytest.mark.parametrize("cause", sorted(EXIT_CODE_OF_CAUSE))
def test_what_may_pass_is_resumed_and_what_will_come_again_is_looked_at(cause: str) -> None:
    if cause == "succeeded":
        return
    passes = EXIT_CODE_OF_CAUSE[cause] >= 128 or cause in ("budget", "start_timeout")
    command, _ = why.next_command(status(State.FAILED, cause=cause))
    assert command == (f"oslo resume {HERE}" if passes else f"oslo logs {HERE}")


@pytest.mark.parametrize("state", [State.CANCELLED, State.FAILED])
def test_what_has_no_object_any_more_is_not_to_be_resumed(state: State) -> None:
    found = Findings(status(state, THERE, cause="killed", reason="its object was deleted"), deleted=True)
    told = why.explain(found)
    assert told.next == f"oslo logs {THERE}"
    assert "oslo submit FILE goes on" in why.text(told, found)


def test_why_of_a_run_that_goes_on_and_of_one_that_is_not_there(oslo: Oslo, sft: Path) -> None:
    handle = oslo("submit", sft, "--local", steps=1, step_seconds=30).handle
    told = oslo("why", "sft")
    assert told.code == 0
    assert re.match(rf"{handle} is (preparing|running): ", told.out)
    assert oslo("why", "nobody-12345678").code == 102


# --- attempts -----------------------------------------------------------------------------------------


def attempt_folder(root: Path, number: int, files: dict[str, Any] | None = None, **more: Any) -> Path:
    """files, more: name without .json -> what is in it."""
    folder = root / str(number)
    folder.mkdir(parents=True)
    for name, content in {**(files or {}), **more}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_the_first_rank_to_fail_is_told_before_its_victims(tmp_path: Path) -> None:
    victims = {
        f"rank-{rank}.outcome": {"cause": "peer_lost", "message": "another rank went away", "time": 9.0 + rank}
        for rank in (0, 2, 3)
    }
    fault = {"cause": "non_finite", "message": "the loss of step 7 is NaN", "time": 8.0}
    ended = {"cause": "non_finite", "message": "the loss of step 7 is NaN", "time": 20.0, "exit_code": 4}
    outcomes = victims | {"rank-1.outcome": fault}
    attempt = read_attempt(attempt_folder(tmp_path, 1, outcomes, ended=ended, started={"time": 1.0}))
    told = why.explain(
        Findings(status(State.FAILED, cause="non_finite", reason="the loss of step 7 is NaN"), [attempt])
    )
    assert told.evidence == [
        "attempt 1, rank 1: non_finite",
        "attempt 1, ranks 0, 2, 3: peer_lost: another rank went away",
    ]
    assert (attempt.started, attempt.ended, attempt.cause) == (1.0, 20.0, "non_finite")


def test_attempts_that_were_lost_say_what_became_of_them(tmp_path: Path) -> None:
    folders = [
        attempt_folder(tmp_path, 1, started={"time": 1.0, "checkpoint_step": None}, lost={"node": 1}),
        attempt_folder(tmp_path, 2, started={"time": 2.0, "checkpoint_step": 20}, stop={"cause": "terminated"}),
        attempt_folder(
            tmp_path,
            3,
            started={"time": 3.0, "checkpoint_step": 40},
            ended={"cause": "killed", "message": "rank 0 was killed (SIGKILL)", "time": 4.0},
        ),
        attempt_folder(tmp_path, 4, started={"time": 5.0, "checkpoint_step": 60}),
    ]
    running = status(State.RUNNING, step=61, total_steps=99, attempt=4)
    assert why.explain(Findings(running, [read_attempt(folder) for folder in folders])).evidence == [
        "attempt 4 went on from step 60",
        "attempt 3 (from step 40): killed: rank 0 was killed (SIGKILL)",
        "attempt 2 (from step 20): it was asked to stop (terminated), and was killed before it had said how it ended",
        "attempt 1: the pod of node 1 vanished without a word: it was deleted, or its machine was lost",
    ]


STACKS = """rank 1: process 71, step 5
state: T do_signal_stop

Thread 0x00007f01 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 324 in wait

Thread 0x00007f02 (most recent call first):
  File "/site-packages/opensloth/step.py", line 41 in forward
  File "/site-packages/opensloth/train.py", line 9 in main
"""


def test_where_ranks_stood_that_made_no_progress(tmp_path: Path) -> None:
    folder = attempt_folder(tmp_path, 2, ended={"cause": "killed", "message": "no progress for 10m", "time": 4.0})
    (folder / "rank-1.stacks").write_text(STACKS)
    for rank in (0, 2):
        waits = STACKS.replace("state: T do_signal_stop", "state: S x").replace("step.py", "dist.py")
        (folder / f"rank-{rank}.stacks").write_text(waits)
    (folder / "rank-3.stacks").write_text("rank 3: it has not said where it stands\nstate: gone\n\n")
    found = status(State.FAILED, cause="killed", reason="no progress for 10m")
    assert why.explain(Findings(found, [read_attempt(folder)])).evidence == [
        "attempt 2: rank 1 stood at stopped by a signal, step.py:41 in forward",
        "attempt 2: ranks 0, 2 stood at dist.py:41 in forward",
    ]


def test_torn_and_empty_files_are_passed_over(tmp_path: Path) -> None:
    folder = attempt_folder(tmp_path, 1, {"rank-0.outcome": [1]}, started={"time": 1.0})
    (folder / "ended.json").write_text('{"cause": "da')
    (folder / "node-1.json").write_text("")
    assert read_attempt(folder) == AttemptRecord(1, started=1.0)


def test_evidence_is_a_handful_of_short_lines() -> None:
    words = [Word(f"rank {i}", "error", f"mistake {i} " * 90, float(i)) for i in range(40)]
    attempt = AttemptRecord(1, "error", "x", words=words)
    evidence = why.explain(Findings(status(State.FAILED, cause="error", reason="x"), [attempt])).evidence
    assert len(evidence) == 7
    assert max(map(len, evidence)) <= 320
    assert evidence[0].startswith("attempt 1, rank 0: error: mistake 0")


# --- a cluster ----------------------------------------------------------------------------------------


def job(*conditions: str, **meta: Any) -> dict[str, Any]:
    listed = [{"type": kind, "status": "True", "lastTransitionTime": "2027-01-15T08:00:00Z"} for kind in conditions]
    return {
        "metadata": {
            "name": RUN,
            "namespace": "team",
            "uid": "u-job",
            "creationTimestamp": "2027-01-15T07:00:00Z",
            **meta,
        },
        "spec": {"runPolicy": {}, "pytorchReplicaSpecs": {"Master": {"replicas": 1}, "Worker": {"replicas": 1}}},
        "status": {"conditions": listed},
    }


def pod(kind: str, state: dict[str, Any] | None, phase: str = "Running", **changes: Any) -> dict[str, Any]:
    """state: of its container; changes: of status, or `meta`, `node`."""
    labels = {"training.kubeflow.org/replica-type": kind, "training.kubeflow.org/replica-index": "0"}
    labels["training.kubeflow.org/job-name"] = RUN
    meta = {"name": f"{RUN}-{kind}-0", "namespace": "team", "uid": f"u-{kind}", "labels": labels}
    meta |= {"creationTimestamp": "2027-01-15T07:50:00Z"} | changes.pop("meta", {})
    node = changes.pop("node", "node-a")
    limits = {"limits": {"memory": "1Gi"}}
    return {
        "metadata": meta,
        "spec": {"containers": [{"name": "pytorch", "resources": limits}]} | ({"nodeName": node} if node else {}),
        "status": {"phase": phase, "containerStatuses": [{"name": "pytorch", "state": state}] if state else []}
        | changes,
    }


def event(reason: str, message: str, about: str = "u-worker", kind: str = "Pod", count: int = 1) -> dict[str, Any]:
    return {
        "reason": reason,
        "message": message,
        "count": count,
        "lastTimestamp": "2027-01-15T07:59:00Z",
        "involvedObject": {"kind": kind, "uid": about},
    }


def told_of(found: dict[str, Any], *pods: dict[str, Any], events: Any = ()) -> why.Why:
    facts = JobFacts(found, pods, [], by_time(events), NOW)
    return why.explain(Findings(derive(facts), [], seen(facts)))


RUNS: dict[str, Any] = {"running": {}}
MASTER = pod("master", RUNS)
CORDONED = "0/1 nodes are available: 1 node(s) were unschedulable. preemption: 0/1 nodes are available"


def unschedulable(message: str) -> dict[str, Any]:
    condition = {"type": "PodScheduled", "status": "False", "message": message}
    return pod("worker", None, "Pending", node=None, conditions=[condition])


def waiting(reason: str, message: str = "") -> dict[str, Any]:
    return pod("worker", {"waiting": {"reason": reason, "message": message}}, "Pending")


GONE = {"deletionTimestamp": "2027-01-15T07:55:00Z"}


@pytest.mark.parametrize(
    ("worker", "events", "says", "hint"),
    [
        (unschedulable(CORDONED), [], "cannot be scheduled: 0/1 nodes", "kubectl uncordon NODE"),
        (unschedulable("0/1 nodes: 1 Insufficient nvidia.com/gpu."), [], "Insufficient", "job.gpus_per_node"),
        (unschedulable("node(s) had untolerated taint {gpu: only}"), [], "untolerated taint", "job.tolerations"),
        (unschedulable('persistentvolumeclaim "tr" not found'), [], '"tr" not found', "job.volume"),
        (unschedulable("pod has unbound immediate PersistentVolumeClaims"), [], "unbound", "kubectl get pvc"),
        (unschedulable("didn't match Pod's node affinity/selector"), [], "selector", "job.node_selector"),
        (waiting("ImagePullBackOff", 'Back-off pulling "x:1"'), [], "ImagePullBackOff: Back-off", "job.image"),
        (waiting("ErrImageNeverPull"), [], "ErrImageNeverPull", "job.image_pull_policy is Never"),
        (waiting("CreateContainerConfigError", 'secret "hf" not found'), [], 'secret "hf" not found', "job.secrets"),
        (
            waiting("ContainerCreating"),
            [event("FailedMount", 'MountVolume.SetUp failed for volume "extra-0" : secret "keys" not found')],
            'worker-0 cannot mount its volumes: MountVolume.SetUp failed for volume "extra-0" : secret "keys"',
            "job.volumes",
        ),
        (
            pod("worker", RUNS, meta={**GONE, "finalizers": ["example.com/hold"]}),
            [],
            "is stuck: it should have left at 07:55:00 UTC, and is held by its finalizer example.com/hold",
            f'kubectl -n team patch pod {RUN}-worker-0 --type=merge -p \'{{"metadata":{{"finalizers":null}}}}\'',
        ),
        (
            pod("worker", RUNS, meta=GONE),
            [],
            "and node-a does not say that it has ended",
            f"oslo cancel --force {THERE}, then oslo resume {THERE}",
        ),
    ],
)
def test_what_keeps_a_pod_is_said_with_what_to_do(
    worker: dict[str, Any], events: list[dict[str, Any]], says: str, hint: str
) -> None:
    told = told_of(job("Created", "Running"), MASTER, worker, events=events)
    assert told.state is State.PENDING
    assert told.sentence.startswith(f"{THERE} is pending: {RUN}-worker-0")
    assert says in told.sentence
    assert hint in (told.hint or "")
    assert told.evidence
    assert all(RUN in line or "event at" in line for line in told.evidence)


@pytest.mark.parametrize(
    ("message", "hint"),
    [
        (
            "pods is forbidden: exceeded quota: few, requested: pods=1, used: pods=1",
            "quota is used up",
        ),
        ('violates PodSecurity "restricted:latest"', "init container"),
        ('error looking up service account team/x: serviceaccount "x" not found', "job.service_account"),
        ("no PriorityClass with name high was found", "job.priority_class"),
    ],
)
def test_what_the_cluster_refuses_to_create_is_said_with_what_to_do(message: str, hint: str) -> None:
    told = told_of(
        job("Created", "Running"), MASTER, events=[event("FailedCreatePod", message, "u-job", "PyTorchJob", 4)]
    )
    assert told.sentence == f"{THERE} is pending: 1 of 2 pods are there: {message}"
    assert hint in (told.hint or "")
    assert "tries again by itself" in (told.hint or "")


def test_events_about_an_earlier_pod_of_the_same_name_are_left_out() -> None:
    old = event("FailedScheduling", "0/1 nodes are available", about="an earlier one")
    new = event("BackOff", "Back-off pulling image", count=7)
    told = told_of(job("Created"), MASTER, waiting("ImagePullBackOff", "x"), events=[old, new, new])
    assert [line for line in told.evidence if line.startswith("event")] == [
        "event at 07:59:00 UTC (7 times): BackOff: Back-off pulling image"
    ]


EXITED = event("ExitedWithCode", "Pod: team.x exited with code 137", "u-job", "PyTorchJob", 13)


def test_a_pod_that_is_gone_is_told_of_by_its_exit_code_while_the_run_goes_on() -> None:
    old = event("ExitedWithCode", "Pod: team.x exited with code 2", "an earlier one", "PyTorchJob")
    told = told_of(job("Created", "Restarting"), MASTER, pod("worker", RUNS), events=[old, EXITED])
    assert told.evidence == ["event at 07:59:00 UTC: ExitedWithCode: Pod: team.x exited with code 137"]
    assert told_of(job("Created", "Succeeded"), pod("master", None, "Succeeded"), events=[EXITED]).evidence == []


def test_a_container_out_of_memory_is_named_with_its_limit() -> None:
    ended = {"terminated": {"exitCode": 137, "reason": "OOMKilled", "finishedAt": "2027-01-15T07:58:00Z"}}
    told = told_of(job("Created", "Failed"), pod("master", ended, "Failed"))
    assert told.cause == "out_of_memory"
    assert "needed more memory than its limit" in told.sentence
    assert "job.memory" in (told.hint or "")
    assert told.evidence == [
        f"{RUN}-master-0: Failed on node-a; container ended with 137 (OOMKilled) at 07:58:00 UTC; memory limit 1Gi"
    ]


@pytest.mark.parametrize(("phase", "stuck"), [("Failed", True), ("Running", False)])
def test_a_pod_that_only_its_finalizer_holds_is_stuck_sooner(phase: str, stuck: bool) -> None:
    leaving = {"deletionTimestamp": "2027-01-15T07:59:45Z", "finalizers": ["example.com/hold"]}
    told = told_of(job("Created", "Running"), MASTER, pod("worker", RUNS, phase, meta=leaving))
    assert ("is stuck" in told.sentence) == stuck
    assert ("is leaving" in told.sentence) != stuck


def test_an_evicted_pod_says_so() -> None:
    evicted = pod("master", None, "Failed", reason="Evicted", message="The node was low on resource: memory.")
    told = told_of(job("Created", "Failed"), evicted)
    assert told.sentence.endswith(f"{RUN}-master-0: Evicted: The node was low on resource: memory.")
    assert told.next == f"oslo resume {THERE}"


def test_a_stuck_pod_of_a_cancelled_run_is_told_with_its_finalizer() -> None:
    found = job("Created", "Suspended", annotations={CANCELLED_ANNOTATION: "{}"})
    found["spec"]["runPolicy"]["suspend"] = True
    told = told_of(found, pod("worker", RUNS, meta={**GONE, "finalizers": ["example.com/hold"]}))
    assert told.state is State.RUNNING
    assert "is held by its finalizer" in told.sentence
    assert "patch pod" in (told.hint or "")


def test_a_run_that_trains_needs_no_evidence() -> None:
    past = [event("BackOff", "x", "an earlier one"), event("FailedScheduling", "it has been scheduled since")]
    told = told_of(job("Created", "Running"), MASTER, pod("worker", RUNS), events=past)
    assert told.evidence == []


def test_a_job_that_no_operator_takes_up() -> None:
    told = told_of(job())
    assert "training operator has not taken it up" in told.sentence
    assert "kubectl -n kubeflow get deployment training-operator" in (told.hint or "")
