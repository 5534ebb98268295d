"""What a cluster says of a run -> RunStatus. Pure.

Conditions of a PyTorchJob are read by status, not by order: after a resume the last one is Suspended=False.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from opensloth import contract
from opensloth.contract import EXIT_CODE_OF_CAUSE, Cause
from opensloth.pod_log import PodLine, parse_end
from runner.backend import CLUSTER_SCHEME, RunStatus, State
from runner.event_log import Event, event_of
from runner.pod_facts import Manifest, Wait, container_status, seconds, wait_of
from runner.pytorchjob import QUEUE_LABEL
from runner.spec import OWN_PREFIX, SHARED_MOUNT
from runner.status import has_trained, progress, reason_to_wait

CANCELLED_ANNOTATION: Final = f"{OWN_PREFIX}cancelled"
"""On a job that `oslo cancel` has suspended (a queue suspends jobs as well): how far it was, as JSON."""
_REMEMBERED: Final = ("step", "total_steps", "epoch", "loss", "eval_loss", "attempt")
_CANCELLING: Final = Wait("is being cancelled: the ranks save a checkpoint and leave", trouble=False)
_NO_OPERATOR: Final = "does it run? `kubectl -n kubeflow get deployment training-operator`"
_NOT_CREATED: Final = (
    ("exceeded quota", "the namespace's quota is used up: `oslo list` says by which runs. "),
    ("violates PodSecurity", 'the operator\'s init container must pass it too: k8s/README.md, "Why `operator`". '),
    ("error looking up service account", "make the account, or name another in job.service_account. "),
    ("no PriorityClass", "job.priority_class names none of the cluster's. "),
)
"""What the API server says -> what to do."""
_AGAIN: Final = "The operator tries again by itself, less and less often"


@dataclass(frozen=True)
class JobFacts:
    """What was read of one job.

    pods: its own, by name. lines: the last of the master's log. incidents: events about the job, and about its pods
    if they were asked for, oldest first. now: seconds since the epoch. workload: Kueue's, of a job that waits in its
    queue.
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
    state, waits = _state(facts, events)
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
        reason=ending.get("message") or (waits.text if waits else None),
        hint=ending.get("hint") or (waits.hint if waits else None) or None,
        exit_code=ending.get("exit_code"),
        started=seconds(meta.get("creationTimestamp")),
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


def creation_hint(failure: str) -> str:
    """What to do about one of creation_failures."""
    return next((hint for said, hint in _NOT_CREATED if said in failure), "") + _AGAIN


def creation_failures(incidents: Sequence[Manifest]) -> list[str]:
    """Why pods could not be created, each reason once."""
    said = [str(event.get("message", "")) for event in incidents if event.get("reason") == "FailedCreatePod"]
    return list(dict.fromkeys(" ".join(text.split()) for text in said))


# --- the state --------------------------------------------------------------------------------------


def _state(facts: JobFacts, events: Sequence[Event]) -> tuple[State, Wait | None]:
    """The state, and while the run is not over what it waits for or does."""
    job = facts.job
    if job["metadata"].get("deletionTimestamp"):
        return State.CANCELLED, Wait("its object is being deleted")
    if is_true(job, "Failed"):
        return State.FAILED, None
    if is_true(job, "Succeeded"):
        return State.SUCCEEDED, None
    if is_suspended(job):
        return _suspended(facts)
    waits = _waits(facts)
    if waits:
        return State.PENDING, waits[0]
    state = State.RUNNING if has_trained(events) else State.PREPARING
    doing = reason_to_wait(state, events)
    return state, Wait(doing) if doing else None


def _suspended(facts: JobFacts) -> tuple[State, Wait | None]:
    if is_cancelled(facts.job):
        if facts.pods:
            stuck = [wait for wait in _pod_waits(facts) if wait.trouble]
            return State.RUNNING, next(iter(stuck), _CANCELLING)
        return State.CANCELLED, None
    queue = facts.job["metadata"].get("labels", {}).get(QUEUE_LABEL)
    return State.PENDING, Wait(_queueing(queue, facts.workload) if queue else "is suspended (spec.runPolicy.suspend)")


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


def _waits(facts: JobFacts) -> list[Wait]:
    """What the run waits for; what is wrong first."""
    waits, wanted = _pod_waits(facts), wanted_pods(facts.job)
    if len(facts.pods) < wanted:
        why, failures = f"{len(facts.pods)} of {wanted} pods are there", creation_failures(facts.incidents)
        if failures:
            waits.append(Wait(f"{why}: {failures[-1]}", creation_hint(failures[-1])))
        elif not _conditions(facts.job):
            waits.append(Wait("the training operator has not taken it up yet", _NO_OPERATOR, trouble=False))
        else:
            waits.append(Wait(f"{why}: the training operator makes the others", trouble=False))
    return sorted(waits, key=lambda wait: not wait.trouble)


def _pod_waits(facts: JobFacts) -> list[Wait]:
    waits = (wait_of(pod, facts.now, facts.incidents) for pod in facts.pods)
    return [wait for wait in waits if wait]


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
    name, status = pod["metadata"]["name"], container_status(pod)
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


def _conditions(job: Manifest) -> list[Manifest]:
    return job.get("status", {}).get("conditions") or []


def _condition_time(job: Manifest, kind: str) -> float | None:
    found = next((c for c in _conditions(job) if c["type"] == kind and c["status"] == "True"), None)
    return seconds(found.get("lastTransitionTime")) if found else None
