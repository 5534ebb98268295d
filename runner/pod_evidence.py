"""What pods and events bear witness to, as sentences for `oslo why`. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from runner.cluster_status import JobFacts, is_over, is_true
from runner.pod_facts import Manifest, clock, container_status

_EVENTS: Final = 3
"""So many events are told of, the latest first."""
_EXITED: Final = "ExitedWithCode"
_JOB_EVENTS: Final = (_EXITED, "FailedCreatePod")
"""Of the job's own events those that tell something; _EXITED of pods that are gone, which leave no other trace."""


def seen(facts: JobFacts) -> list[str]:
    """Pods that are not simply there and run, then events; nothing of a run that has succeeded."""
    if is_true(facts.job, "Succeeded"):
        return []
    pods = [line for pod in facts.pods if (line := _pod(pod))]
    return [*pods, *_events(facts)]


def _pod(pod: Manifest) -> str | None:
    parts = [*_deletion(pod), *_end(pod)]
    if not parts and pod.get("status", {}).get("phase") == "Running":
        return None
    status = pod.get("status", {})
    node = pod.get("spec", {}).get("nodeName")
    where = f"{status.get('phase', 'Unknown')} on {node}" if node else f"{status.get('phase', 'Unknown')}, on no node"
    since = f" since {clock(pod['metadata']['creationTimestamp'])}" if not parts and not node else ""
    return f"{pod['metadata']['name']}: " + "; ".join([where + since, *parts])


def _deletion(pod: Manifest) -> Iterator[str]:
    meta = pod["metadata"]
    if meta.get("deletionTimestamp"):
        yield f"being deleted, to be gone by {clock(meta['deletionTimestamp'])}"
    if meta.get("deletionTimestamp") and meta.get("finalizers"):
        yield f"finalizers: {', '.join(meta['finalizers'])}"


def _end(pod: Manifest) -> Iterator[str]:
    status, own = container_status(pod), pod.get("status", {})
    if own.get("reason"):  # Evicted, NodeLost
        yield f"{own['reason']}: {own.get('message', '')}".rstrip(": ")
    ended = status["state"].get("terminated") if status else None
    if ended is None or ended["exitCode"] == 0:
        return
    yield f"container ended with {ended['exitCode']} ({ended.get('reason', 'Error')}) at {clock(ended['finishedAt'])}"
    limit = pod["spec"]["containers"][0].get("resources", {}).get("limits", {}).get("memory") if "spec" in pod else None
    if limit and ended.get("reason") == "OOMKilled":
        yield f"memory limit {limit}"


def _events(facts: JobFacts) -> Iterator[str]:
    """Of the job, and of its pods that do not simply run; the same words once."""
    uids = {about["metadata"].get("uid") for about in (facts.job, *filter(_pod, facts.pods))}
    told = [event for event in facts.incidents if _tells(facts.job, event, uids)]
    found: dict[tuple[str, str], Manifest] = {}
    for event in reversed(told):
        found.setdefault((str(event.get("reason")), _words(event)), event)
    for (reason, words), event in list(found.items())[:_EVENTS]:
        count = event.get("count") or event.get("series", {}).get("count") or 1
        times = f" ({count} times)" if count > 1 and reason != _EXITED else ""  # it says so at every look
        yield f"event at {clock(event_time(event))}{times}: {reason}: {words}"


def _tells(job: Manifest, event: Manifest, uids: set[Any]) -> bool:
    about, reason = event.get("involvedObject", {}), event.get("reason")
    if about.get("uid") not in uids:
        return False  # of an earlier object of that name
    return about.get("kind") == "Pod" or (reason in _JOB_EVENTS and not (reason == _EXITED and is_over(job)))


def _words(event: Manifest) -> str:
    return " ".join(str(event.get("message", "")).split())


def event_time(event: Manifest) -> str:
    """RFC 3339, which sorts as text; "" when it has none."""
    return str(event.get("lastTimestamp") or event.get("eventTime") or "")


def by_time(events: Sequence[Manifest]) -> list[Manifest]:
    """The oldest first."""
    return sorted(events, key=event_time)
