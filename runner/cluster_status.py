"""What a cluster says of a run -> RunStatus. Pure.

Conditions of a PyTorchJob are read by status, not by order: after a resume the last one is Suspended=False.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from opensloth import contract
from opensloth.contract import EXIT_CODE_OF_CAUSE, Cause
from opensloth.pod_log import PodLine, parse_end
from runner.backend import CLUSTER_SCHEME, RunStatus, State
from runner.event_log import Event, event_of
from runner.pod import CONTAINER
from runner.pytorchjob import QUEUE_LABEL
from runner.spec import OWN_PREFIX, SHARED_MOUNT
from runner.status import has_trained, progress, reason_to_wait

CANCELLED_ANNOTATION: Final = f"{OWN_PREFIX}cancelled"
"""On a job that `oslo cancel` has suspended (a queue suspends jobs as well): how far it was, as JSON."""
_REMEMBERED: Final = ("step", "total_steps", "epoch", "loss", "eval_loss", "attempt")
INDEX_LABEL: Final = "training.kubeflow.org/replica-index"
TYPE_LABEL: Final = "training.kubeflow.org/replica-type"
_STUCK_SECONDS: Final = 60
"""A pod that is still there so long after its grace period will not leave by itself."""
Manifest = Mapping[str, Any]


@dataclass(frozen=True)
class JobFacts:
    """What was read of one job.

    pods: its own, by name. lines: the last of the master's log. incidents: events about the job, oldest first.
    now: seconds since the epoch. workload: Kueue's, of a job that waits in its queue.
    """

    job: Manifest
    pods: Sequence[Manifest]
    lines: Sequence[PodLine]
    incidents: Sequence[Manifest]
    now: float
    workload: Manifest | None = None


def derive(facts: JobFacts) -> RunStatus:
    job = facts.job
    meta, labels = job["metadata"], job["metadata"].get("labels", {})
    events = [event for line in facts.lines if (event := event_of(line.text))]
    state, reason = _state(facts, events)
    ending = _ending(facts, state)
    finished = _condition_time(job, "Succeeded") or _condition_time(job, "Failed")
    folder = f"{SHARED_MOUNT}/{contract.RUNS_DIR}/{meta['name']}"
    return RunStatus(
        run=meta["name"],
        handle=handle_of(meta.get("namespace", "default"), meta["name"]),
        name=labels.get(f"{OWN_PREFIX}name", meta["name"]),
        state=state,
        **_progress(facts, state, events),
        cause=ending.get("cause"),
        reason=ending.get("message") or reason,
        hint=ending.get("hint") or None,
        exit_code=ending.get("exit_code"),
        started=_seconds(meta.get("creationTimestamp")),
        ended=finished if state.is_over else None,
        folder=folder,
        final=f"{folder}/{contract.FINAL_DIR}" if state is State.SUCCEEDED else None,
    )


def _progress(facts: JobFacts, state: State, events: Sequence[Event]) -> dict[str, Any]:
    """From the master's log; of a cancelled run, whose pods are gone, as it was noted then."""
    if state is State.CANCELLED and not facts.lines:
        try:
            noted = json.loads(facts.job["metadata"].get("annotations", {}).get(CANCELLED_ANNOTATION, "{}"))
        except ValueError:
            noted = {}
        return {key: noted[key] for key in _REMEMBERED if key in noted} if isinstance(noted, dict) else {}
    return progress(state, events) | {"attempt": max((line.attempt for line in facts.lines), default=0)}


def remember(status: RunStatus) -> str:
    """What CANCELLED_ANNOTATION holds."""
    return json.dumps({key: getattr(status, key) for key in _REMEMBERED})


def handle_of(namespace: str, run: str) -> str:
    return f"{CLUSTER_SCHEME}{namespace}/{run}"


def is_true(job: Manifest, condition: str) -> bool:
    return any(c["type"] == condition and c["status"] == "True" for c in _conditions(job))


def is_cancelled(job: Manifest) -> bool:
    return is_suspended(job) and CANCELLED_ANNOTATION in job["metadata"].get("annotations", {})


def is_suspended(job: Manifest) -> bool:
    return bool(job["spec"].get("runPolicy", {}).get("suspend"))


def is_held_back(workload: Manifest | None) -> bool:
    """Whether Kueue leaves the job out of its queue."""
    return workload is not None and workload["spec"].get("active") is False


def is_over(job: Manifest) -> bool:
    """Whether it has succeeded or failed for good."""
    return is_true(job, "Succeeded") or is_true(job, "Failed")


def template_of(job: Manifest) -> Manifest:
    """Of its pods; workers have the same."""
    template: Manifest = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]
    return template


def wanted_pods(job: Manifest) -> int:
    return sum(int(replica["replicas"]) for replica in job["spec"]["pytorchReplicaSpecs"].values())


def node_of(pod: Manifest) -> int:
    """0: the master; worker i is node i + 1."""
    labels = pod["metadata"]["labels"]
    return 0 if labels[TYPE_LABEL] == "master" else int(labels[INDEX_LABEL]) + 1


def has_started(pod: Manifest) -> bool:
    """Whether the container runs or has run, so that there is a log."""
    status = _container(pod)
    return status is not None and ("running" in status["state"] or "terminated" in status["state"])


def creation_failures(incidents: Sequence[Manifest]) -> list[str]:
    """Why pods could not be created, each reason once."""
    said = [str(event.get("message", "")) for event in incidents if event.get("reason") == "FailedCreatePod"]
    return list(dict.fromkeys(" ".join(text.split()) for text in said))


def waits_of_pod(pod: Manifest, now: float) -> str | None:
    """What a pod waits for; None when it runs."""
    return next((text for _, text in _pod_waits(pod, now)), None)


# --- the state --------------------------------------------------------------------------------------


def _state(facts: JobFacts, events: Sequence[Event]) -> tuple[State, str | None]:
    """The state, and while the run is not over what it waits for."""
    job = facts.job
    if job["metadata"].get("deletionTimestamp"):
        return State.CANCELLED, "its object is being deleted"
    if is_true(job, "Failed"):
        return State.FAILED, None
    if is_true(job, "Succeeded"):
        return State.SUCCEEDED, None
    if is_suspended(job):
        return _suspended(facts)
    waits = next(_waits(facts), None)
    if waits is not None:
        return State.PENDING, waits
    state = State.RUNNING if has_trained(events) else State.PREPARING
    return state, reason_to_wait(state, events)


def _suspended(facts: JobFacts) -> tuple[State, str | None]:
    if is_cancelled(facts.job):
        if facts.pods:
            stuck = (text for pod in facts.pods for trouble, text in _pod_waits(pod, facts.now) if trouble)
            return State.RUNNING, next(stuck, "is being cancelled: the ranks save a checkpoint and leave")
        return State.CANCELLED, None
    queue = facts.job["metadata"].get("labels", {}).get(QUEUE_LABEL)
    return State.PENDING, _queueing(queue, facts.workload) if queue else "is suspended (spec.runPolicy.suspend)"


def _queueing(queue: str, workload: Manifest | None) -> str:
    """Why Kueue does not let it start, in its own words."""
    conditions = {c["type"]: c for c in (workload or {}).get("status", {}).get("conditions", [])}

    def says(kind: str, status: str) -> str:
        found = conditions.get(kind, {})
        return " ".join(str(found.get("message", "")).split()) if found.get("status") == status else ""

    if given_up := says("Finished", "True"):
        return f"will not be started by Kueue; `oslo cancel` and submit it again: {given_up}"
    evicted = says("Evicted", "True")  # until it starts again
    if is_held_back(workload):
        return f"was taken out of the queue {queue}, which `oslo resume` undoes: {evicted}".rstrip(": ")
    why = conditions["Evicted"]["reason"] if evicted else "Deactivated"
    after = "" if why == "Deactivated" else f"was evicted ({why}) and "
    lacks = says("QuotaReserved", "False") or says("Admitted", "False")
    return f"{after}waits in the queue {queue}: {lacks}".rstrip(": ")


def _waits(facts: JobFacts) -> Iterator[str]:
    """What pods wait for; those with something wrong first."""
    texts = [(trouble, text) for pod in facts.pods for trouble, text in _pod_waits(pod, facts.now)]
    failures = creation_failures(facts.incidents)
    wanted = wanted_pods(facts.job)
    if len(facts.pods) < wanted:
        why = f"{len(facts.pods)} of {wanted} pods are there"
        if failures:
            texts.append((True, f"{why}: {failures[-1]}"))
        elif not _conditions(facts.job):
            texts.append((False, "the training operator has not taken it up yet"))
        else:
            texts.append((False, f"{why}: the training operator makes the others"))
    yield from (text for _, text in sorted(texts, key=lambda pair: not pair[0]))


def _pod_waits(pod: Manifest, now: float) -> Iterator[tuple[bool, str]]:
    """(whether something is wrong, what it waits for)."""
    name, status = pod["metadata"]["name"], pod.get("status", {})
    deleted = _seconds(pod["metadata"].get("deletionTimestamp"))  # the end of its grace period
    if deleted is not None:
        if now - deleted > _STUCK_SECONDS:
            yield True, f"{name} is stuck: it should have left {now - deleted:.0f} s ago"
        else:
            yield False, f"{name} is leaving"
        return
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            yield True, f"{name} cannot be scheduled: {condition.get('message', condition.get('reason'))}"
            return
    for container in (*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])):
        waiting = container["state"].get("waiting")
        if waiting and waiting.get("reason") not in ("ContainerCreating", "PodInitializing"):
            yield True, f"{name}: {waiting.get('reason')}: {waiting.get('message', '')}".rstrip(": ")
            return
    if status.get("phase") == "Pending" or not has_started(pod):
        initialising = any("running" in c["state"] for c in status.get("initContainerStatuses", []))
        yield False, f"{name} {'waits for the master' if initialising else 'is starting'}"


# --- how it ended -----------------------------------------------------------------------------------


def _ending(facts: JobFacts, state: State) -> dict[str, Any]:
    """cause, message, hint and exit_code of a run that is over."""
    if state is State.SUCCEEDED:
        return {"cause": Cause.SUCCEEDED, "exit_code": 0}
    if state is State.CANCELLED:
        return {"cause": Cause.CANCELLED}
    if state is not State.FAILED:
        return {}
    ends = sorted((end for pod in facts.pods if (end := _pod_end(pod))), key=lambda end: str(end["time"]))
    own = [end for end in ends if end["cause"] not in (Cause.PEER_LOST, Cause.SUPERSEDED, Cause.TERMINATED)]
    if ends:
        return (own or ends)[0]
    says = next((c.get("message", "") for c in _conditions(facts.job) if c["type"] == "Failed"), "")
    return {"cause": Cause.ERROR, "message": f"the training operator says: {says}"}


def _pod_end(pod: Manifest) -> dict[str, Any] | None:
    """How a pod's container failed; None when it did not."""
    name, status = pod["metadata"]["name"], _container(pod)
    ended = status["state"].get("terminated") if status else None
    if ended is None or ended["exitCode"] == 0:
        if pod.get("status", {}).get("phase") != "Failed":
            return None
        why = f"{name}: {pod['status'].get('reason', 'failed')}: {pod['status'].get('message', '')}".rstrip(": ")
        return {"cause": Cause.KILLED, "message": why, "time": ""}
    code, time = ended["exitCode"], ended.get("finishedAt", "")
    told = parse_end(ended.get("message", ""))
    if told:
        return {"cause": told[0], "message": told[1], "hint": told[2], "exit_code": code, "time": time}
    if ended.get("reason") == "OOMKilled":
        hint = "raise job.memory, or try a smaller batch or model"
        message = f"{name} was killed: it needed more memory than its limit"
        return {"cause": Cause.OUT_OF_MEMORY, "message": message, "hint": hint, "exit_code": code, "time": time}
    final = (cause for cause, known in EXIT_CODE_OF_CAUSE.items() if known == code)
    cause = Cause.KILLED if code >= 128 else next(final, Cause.ERROR)
    last = (ended.get("message") or "").strip().rpartition("\n")[2]
    message = f"{name} ended with exit code {code}" + (f": {last}" if last else "")
    return {"cause": cause, "message": message, "exit_code": code, "time": time}


def _container(pod: Manifest) -> Manifest | None:
    statuses = pod.get("status", {}).get("containerStatuses", [])
    return next((status for status in statuses if status["name"] == CONTAINER), None)


def _conditions(job: Manifest) -> list[Manifest]:
    return job.get("status", {}).get("conditions") or []


def _condition_time(job: Manifest, kind: str) -> float | None:
    found = next((c for c in _conditions(job) if c["type"] == kind and c["status"] == "True"), None)
    return _seconds(found.get("lastTransitionTime")) if found else None


def _seconds(timestamp: str | None) -> float | None:
    """RFC 3339 -> seconds since the epoch."""
    return dt.datetime.fromisoformat(timestamp).timestamp() if timestamp else None
