"""The Kubernetes backend: a run is one PyTorchJob, and the object is all that a submit leaves on the cluster."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from opensloth.pod_log import PodLine
from opensloth.run_config import RunConfig, load
from runner import cluster_logs, cluster_status, kueue
from runner.backend import (
    AttemptRecord,
    Findings,
    LogLine,
    LogQuery,
    Outcome,
    RunStatus,
    State,
    Submission,
    Waiting,
    no_result,
)
from runner.cluster_history import ClusterHistory
from runner.cluster_status import (
    CANCELLED_ANNOTATION,
    JobFacts,
    is_cancelled,
    is_over,
    template_of,
)
from runner.errors import BusyError, ClusterError, Interrupted, NotFoundError, UnreachableError
from runner.helper import START_SECONDS, Helper
from runner.identity import name_of
from runner.kube.api import EVENTS, JOBS, PODS, Cluster
from runner.kube.errors import ConflictError, ForbiddenError, MissingError, RefusedError, UnavailableError
from runner.patience import OUTAGE_SECONDS, patiently
from runner.pod import CONFIG_ANNOTATION
from runner.pod_evidence import by_time, seen
from runner.pod_facts import JOB_NAME_LABEL, Manifest, has_started, node_of
from runner.spec import OWN_PREFIX

MANAGED: Final = "app.kubernetes.io/managed-by=oslo"
_TAIL_LINES: Final = 400
"""Of the master's log: enough to hold its last step and evaluation."""
_POLL_SECONDS: Final = 2.0
_GONE_SECONDS: Final = 600.0
"""How long a deleted job may take: the grace period of its pods, and more."""
_NAME: Final = re.compile("[a-zA-Z0-9]([-a-zA-Z0-9]*[a-zA-Z0-9])?")
_SERVER_FIELDS: Final = ("uid", "resourceVersion", "creationTimestamp", "generation", "managedFields", "selfLink")
_PARALLEL_LOGS: Final = 8
_WHY_SECONDS: Final = 45.0
"""How long `why` waits for a helper pod: what it tells without the volume is worth more than a long wait."""


class KubernetesBackend:
    """Runs of one namespace (see backend.Backend)."""

    def __init__(self, cluster: Cluster, say: Callable[[str], None]) -> None:
        """say: hears what a command waits for."""
        self.cluster = cluster
        self._say = say
        self._warned: set[str] = set()

    @property
    def poll_seconds(self) -> float:
        return _POLL_SECONDS

    def handle(self, run: str) -> str:
        return cluster_status.handle_of(self.cluster.namespace, run)

    def runs(self) -> list[str]:
        return [job["metadata"]["name"] for job in self.cluster.find(JOBS, MANAGED)]

    def named(self, wanted: str) -> str | None:
        if name_of(wanted) != wanted and self.find(wanted) is not None:
            return wanted
        jobs = self.cluster.find(JOBS, f"{MANAGED},{OWN_PREFIX}name={wanted}") if _is_name(wanted) else []
        latest = max(
            jobs, key=lambda job: (job["metadata"]["creationTimestamp"], job["metadata"]["name"]), default=None
        )
        return None if latest is None else str(latest["metadata"]["name"])

    def submit(self, run: str, submission: Submission) -> Outcome:
        manifest = submission.manifest
        assert manifest is not None
        job = self.find(run)
        outcome = _standing(job)
        if outcome is Outcome.STARTED:
            self._until_gone(run, job)
            return self._create(run, manifest)
        if outcome is Outcome.RESUMED and job is not None:
            return self._replace(job, manifest)
        return outcome

    def standing(self, run: str) -> Outcome:
        """What a submit would come to."""
        return _standing(self.find(run))

    def get(self, run: str) -> RunStatus:
        job = self._job(run)
        return self._status(job, self._pods_of(run))

    def findings(self, run: str) -> Findings:
        job, pods = self._job(run), self._pods_of(run)
        incidents = by_time([*self._incidents(run), *self._pod_warnings(pods)])
        facts = self._facts(job, pods, self._last_lines(pods), incidents)
        status = cluster_status.derive(facts)
        return Findings(status, self._attempts(job, status), seen(facts))

    def _attempts(self, job: Manifest, status: RunStatus) -> list[AttemptRecord]:
        """From the volume, where they tell something: of a run that has failed, or that has been restarted."""
        restarted = status.attempt > 1 and status.state in (State.PREPARING, State.RUNNING)
        if status.state is not State.FAILED and not restarted:
            return []
        try:
            with self._history(job, _WHY_SECONDS) as history:
                return history.attempts(status.run)
        except NotFoundError:  # it has left no files
            return []
        except ClusterError as error:
            self._warn(f"the run's folder on the volume was not read: {error}")
            return []

    def config(self, run: str) -> RunConfig:
        return load(template_of(self._job(run))["metadata"]["annotations"][CONFIG_ANNOTATION])

    def list_runs(self) -> list[RunStatus]:
        jobs, pods = self.cluster.find(JOBS, MANAGED), self.cluster.find(PODS, MANAGED)
        by_job: dict[str, list[Manifest]] = {job["metadata"]["name"]: [] for job in jobs}
        for pod in pods:
            by_job.get(pod["metadata"]["labels"].get(JOB_NAME_LABEL), []).append(pod)
        with ThreadPoolExecutor(_PARALLEL_LOGS) as pool:
            statuses = list(pool.map(lambda job: self._status(job, by_job[job["metadata"]["name"]]), jobs))
        return sorted(statuses, key=lambda status: (status.started or float("inf"), status.run), reverse=True)

    def logs(self, run: str, query: LogQuery) -> Iterator[LogLine]:
        """Of the pods; what they no longer have (an earlier attempt, a pod that is gone) is on the volume."""
        job, pods = self._job(run), self._pods_of(run)
        lacks_pods = len(pods) < cluster_status.wanted_pods(job) and (is_over(job) or is_cancelled(job))
        if query.attempt is None and not lacks_pods:
            return cluster_logs.read(self.cluster, pods, query)
        return self._logs_from_volume(job, pods, query)

    def _logs_from_volume(self, job: Manifest, pods: Sequence[Manifest], query: LogQuery) -> Iterator[LogLine]:
        try:
            with self._history(job) as history:
                yield from history.logs(job["metadata"]["name"], query)
        except ClusterError as error:
            if not pods:
                raise
            self._warn(f"only the logs of pods that are left: {error}")
            yield from cluster_logs.read(self.cluster, pods, query)

    def follow(self, run: str, query: LogQuery) -> Iterator[LogLine | Waiting]:
        self._job(run)
        return cluster_logs.follow(self.cluster, lambda: self._look(run), query)

    def cancel(self, run: str, *, force: bool) -> None:
        job = self._job(run)
        status = self._status(job, self._pods_of(run))
        if is_cancelled(job) and not status.state.is_over and not force:
            return  # somebody has asked before: it is waited for
        if status.state.is_over:
            raise BusyError(f"{status.handle} is {status.state}: there is nothing to cancel")
        self._suspend(job, cluster_status.remember(status))
        if force:
            for pod in self._pods_of(run):
                self.cluster.delete(PODS, pod["metadata"]["name"], grace_seconds=0)

    def resume(self, run: str) -> None:
        job = self._job(run)
        handle = self.handle(run)
        if cluster_status.is_true(job, "Succeeded"):
            raise BusyError(f"{handle} has succeeded: there is nothing to resume", f"oslo pull {handle}")
        if is_over(job):
            self._replace(job, _as_submitted(kueue.as_before(job, self._workload(job))))
        elif is_cancelled(job) or cluster_status.is_held_back(self._workload(job)):
            if self._pods_of(run):
                raise BusyError(f"{handle} is still being cancelled", f"oslo wait {handle}, then resume it")
            self._suspend(job, None)
        else:
            raise BusyError(f"{handle} is {self.get(run).state}", f"oslo logs -f {handle}")

    @property
    def keeps_files(self) -> bool:
        return True

    def delete(self, run: str, *, files: bool) -> None:
        job = self._job(run)
        status = self._status(job, self._pods_of(run))
        if not status.state.is_over:
            raise BusyError(f"{status.handle} is {status.state}", f"oslo cancel {status.handle}")
        self.cluster.delete(JOBS, run, uid=job["metadata"]["uid"])
        self._until_gone(run, job)
        if files:
            with suppress(NotFoundError), self._history(job) as history:
                history.delete(run, files=True)  # there are none of a run that never began

    def pull(self, run: str, destination: Path) -> list[Path]:
        job = self._job(run)
        status = self._status(job, self._pods_of(run))
        if status.state is not State.SUCCEEDED:
            raise no_result(status)
        with self._history(job) as history:
            return history.fetch(run, destination)

    # --- for those who submit -----------------------------------------------------------------------

    def find(self, run: str) -> Manifest | None:
        try:
            return self.cluster.get(JOBS, run)
        except MissingError:
            return None

    def has_other_settings(self, run: str, manifest: Manifest) -> bool:
        """Whether the run's object differs from `manifest` in what is not its content: a deadline, say."""
        job = self.find(run)
        if job is None:
            return False
        ours, theirs = manifest["spec"], kueue.as_before(job, self._workload(job))["spec"]
        return any(ours[key] != theirs.get(key) for key in ("nprocPerNode", "pytorchReplicaSpecs"))

    def missing_pods(self, run: str) -> tuple[int, list[str]]:
        """(how many pods are not there yet, why they could not be created)."""
        job = self._job(run)
        if cluster_status.is_suspended(job) or is_over(job):
            return 0, []
        missing = cluster_status.wanted_pods(job) - len(self._pods_of(run))
        return max(0, missing), cluster_status.creation_failures(self._incidents(run)) if missing > 0 else []

    def _warn(self, text: str) -> None:
        """Once: whoever follows a run looks every second."""
        if text not in self._warned:
            self._warned.add(text)
            self._say(f"warning: {text}")

    # --- requests -----------------------------------------------------------------------------------

    def _job(self, run: str) -> Manifest:
        """Raises NotFoundError."""
        job = self.find(run)
        if job is None:
            raise NotFoundError(f"{self.handle(run)} is not there (any more)", "oslo list shows what is")
        return job

    def _history(self, job: Manifest, start_seconds: float = START_SECONDS) -> ClusterHistory:
        """The volume's side of a run, through a helper pod like the run's own.

        start_seconds: how long that may take to start.
        """
        return ClusterHistory(self.cluster, Helper(self.cluster, template_of(job)["spec"], self._say, start_seconds))

    def _pods_of(self, run: str) -> list[Manifest]:
        pods = self.cluster.find(PODS, f"{JOB_NAME_LABEL}={run}")
        return sorted(pods, key=node_of)

    def _incidents(self, run: str) -> list[Manifest]:
        """Events about the job, oldest first; none without the right to see them."""
        try:
            events = self.cluster.find(EVENTS, fields=f"involvedObject.kind=PyTorchJob,involvedObject.name={run}")
        except (ForbiddenError, UnreachableError) as error:
            self._warn(f"why pods are missing is not known: {error}")
            return []
        return by_time(events)

    def _pod_warnings(self, pods: Sequence[Manifest]) -> list[dict[str, Any]]:
        """Events about the pods that are there, which say what their objects do not."""
        names = {pod["metadata"]["name"] for pod in pods}
        try:
            events = self.cluster.find(EVENTS, fields="involvedObject.kind=Pod,type=Warning") if names else []
        except (ForbiddenError, UnreachableError) as error:
            self._warn(f"what happened to the pods is not known: {error}")
            return []
        return [event for event in events if event["involvedObject"].get("name") in names]

    def _workload(self, job: Manifest) -> Manifest | None:
        """What Kueue keeps for a job that asks for a queue; None without the right to see it."""
        if not kueue.is_queued(job):
            return None
        try:
            return kueue.workload_of(self.cluster, job)
        except (ForbiddenError, UnreachableError) as error:
            self._warn(f"what Kueue says of it is not known: {error}")
            return None

    def _facts(
        self, job: Manifest, pods: Sequence[Manifest], lines: Sequence[PodLine], incidents: Sequence[Manifest]
    ) -> JobFacts:
        waits = cluster_status.is_suspended(job) and not is_over(job) and not is_cancelled(job)
        workload = self._workload(job) if waits else None
        return JobFacts(job, pods, lines, incidents, time.time(), workload)

    def _derive(self, job: Manifest, pods: Sequence[Manifest], lines: Sequence[PodLine]) -> RunStatus:
        incidents = self._incidents(job["metadata"]["name"]) if _lacks_pods(job, pods) else []
        return cluster_status.derive(self._facts(job, pods, lines, incidents))

    def _status(self, job: Manifest, pods: Sequence[Manifest]) -> RunStatus:
        pods = sorted(pods, key=node_of)
        return self._derive(job, pods, self._last_lines(pods))

    def _last_lines(self, pods: Sequence[Manifest]) -> list[PodLine]:
        """Of the master, unless only a worker is left."""
        told = next(filter(has_started, pods), None)
        return self._tail(told["metadata"]["name"]) if told else []

    def _tail(self, pod: str) -> list[Any]:
        try:
            raw = self.cluster.log(pod, tail=_TAIL_LINES)
        except (ForbiddenError, UnavailableError) as error:
            self._warn(f"no step and no loss are known: {error}")
            return []
        except (MissingError, RefusedError):  # it was deleted, or restarts, this very moment
            return []
        return [timed.line for timed in map(cluster_logs.parse, raw) if timed.line]

    def _look(self, run: str) -> cluster_logs.Standing:
        job = patiently(lambda: self.find(run), OUTAGE_SECONDS, self._say)
        if job is None:
            return cluster_logs.Standing([], True, None)
        pods = patiently(lambda: self._pods_of(run), OUTAGE_SECONDS, self._say)
        status = self._derive(job, pods, [])
        cancelling = is_cancelled(job) and pods
        waits = status.reason if status.state is State.PENDING or cancelling else None
        return cluster_logs.Standing(pods, status.state.is_over, waits)

    def _create(self, run: str, manifest: dict[str, Any]) -> Outcome:
        try:
            self.cluster.create(JOBS, manifest)
        except ConflictError:
            if self.find(run) is None:
                raise
            return Outcome.ATTACHED  # somebody submitted the same content in between
        except UnavailableError:
            raise
        except UnreachableError as error:
            message = f"{error.message}: {self.handle(run)} may have been submitted all the same"
            raise UnreachableError(message, "submit again: if it is there, that attaches to it") from error
        except KeyboardInterrupt as error:
            there = self.find(run) is not None
            what = "was submitted and goes on" if there else "was not submitted"
            raise Interrupted(f"interrupted: {self.handle(run)} {what}", f"oslo cancel {run}" * there, 130) from error
        return Outcome.STARTED

    def _replace(self, job: Manifest, manifest: dict[str, Any]) -> Outcome:
        """A finished object cannot start again: a new one takes its place, and the launcher goes on from the files."""
        run, stays = job["metadata"]["name"], "its files stay on the volume: submit again to go on from them"
        try:
            self.cluster.delete(JOBS, run, uid=job["metadata"]["uid"])
            self._until_gone(run, job)
        except ConflictError:
            return Outcome.ATTACHED  # somebody else has put another in its place in between
        except KeyboardInterrupt as error:
            message = (
                f"interrupted: the finished object of {self.handle(run)} was deleted, and none was made in its place"
            )
            raise Interrupted(message, stays, 130) from error
        try:
            outcome = self._create(run, manifest)
        except ClusterError as error:
            if isinstance(error, UnreachableError) and not isinstance(error, UnavailableError):
                raise  # it is not known
            message = f"the finished object of {self.handle(run)} was deleted, and none was made in its place: {error}"
            raise ClusterError(message, stays) from error
        return Outcome.RESUMED if outcome is Outcome.STARTED else outcome

    def _until_gone(self, run: str, job: Manifest | None) -> None:
        """Until `job` and its pods are gone, or somebody has made another object of that name.

        Pods are found by name and label, not by their owner.
        """
        end, said = time.monotonic() + _GONE_SECONDS, False
        while True:
            there = patiently(lambda: self.find(run), OUTAGE_SECONDS, self._say)
            if there is not None and (job is None or there["metadata"]["uid"] != job["metadata"]["uid"]):
                return
            if there is None and not patiently(lambda: self._pods_of(run), OUTAGE_SECONDS, self._say):
                return
            if not said:
                self._say(f"{self.handle(run)} is being deleted: waiting until it is gone")
                said = True
            if time.monotonic() > end:
                raise ClusterError(f"{self.handle(run)} was deleted, but has not gone after {_GONE_SECONDS:.0f} s")
            time.sleep(0.5)

    def _suspend(self, job: Manifest, progress: str | None) -> None:
        """Take the run's pods away, each with its grace period, and note how far it was; None: give them back.

        Kueue would undo what anybody else sets in `suspend`. The note is true only once the job is out of its queue.
        """
        run, note = job["metadata"]["name"], {"metadata": {"annotations": {CANCELLED_ANNOTATION: progress}}}
        ends, queued = progress is not None, kueue.is_queued(job)
        workload = kueue.workload_of(self.cluster, job) if queued else None
        if workload is None:
            if queued and ends and cluster_status.is_suspended(job):
                raise ClusterError(f"Kueue has not taken up {self.handle(run)} yet", "try again; does its manager run?")
            self.cluster.patch(JOBS, run, note | {"spec": {"runPolicy": {"suspend": ends}}})
        elif ends:
            kueue.set_active(self.cluster, workload, active=False)
            self.cluster.patch(JOBS, run, note)
        else:
            self.cluster.patch(JOBS, run, note)
            kueue.set_active(self.cluster, workload, active=True)


def _standing(job: Manifest | None) -> Outcome:
    if job is None or job["metadata"].get("deletionTimestamp"):
        return Outcome.STARTED
    if cluster_status.is_true(job, "Succeeded"):
        return Outcome.ALREADY_SUCCEEDED
    return Outcome.RESUMED if is_over(job) or is_cancelled(job) else Outcome.ATTACHED


def _lacks_pods(job: Manifest, pods: Sequence[Manifest]) -> bool:
    """Whether there should be more by now."""
    waits = not is_over(job) and not cluster_status.is_suspended(job)
    return waits and len(pods) < cluster_status.wanted_pods(job)


def _as_submitted(job: Manifest) -> dict[str, Any]:
    """The object less what the server has added to it."""
    meta = {key: value for key, value in job["metadata"].items() if key not in _SERVER_FIELDS}
    meta["annotations"] = {k: v for k, v in meta.get("annotations", {}).items() if k != CANCELLED_ANNOTATION}
    spec = {**job["spec"], "runPolicy": {**job["spec"]["runPolicy"], "suspend": False}}
    return {"apiVersion": job["apiVersion"], "kind": job["kind"], "metadata": meta, "spec": spec}


def _is_name(text: str) -> bool:
    return len(text) <= 63 and _NAME.fullmatch(text) is not None
