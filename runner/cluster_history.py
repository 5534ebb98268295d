"""What deleted runs have left on the volume, read through a helper pod.

In the pod `oslo` itself reads the run's folder, as it does on the machine of a local run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Final

from opensloth import contract, run_config
from opensloth.contract import Cause
from opensloth.run_config import RunConfig
from runner import output, transfer
from runner.backend import (
    LOCAL_SCHEME,
    AttemptRecord,
    Findings,
    LogLine,
    LogQuery,
    Outcome,
    RunStatus,
    State,
    Submission,
    Waiting,
    Word,
    no_result,
)
from runner.channel import LostError
from runner.cluster_status import handle_of, template_of
from runner.errors import BusyError, ClusterError, NotFoundError, UsageError
from runner.helper import Helper
from runner.identity import name_of
from runner.kube.api import JOBS, Cluster
from runner.pod import pod_template
from runner.spec import OWN_PREFIX, SHARED_MOUNT, check_job

_RUNS: Final = f"{SHARED_MOUNT}/{contract.RUNS_DIR}"
_SILENCE_SECONDS: Final = 120.0
"""A command may look through the folder of a long run before it says something."""
_NO_IMAGE: Final = "write job: {image: ..., volume: ...} into ~/.config/oslo/defaults.yaml (or $OSLO_DEFAULTS)"


class ClusterHistory:
    """Runs of one namespace's volume (see backend.Backend); all are over. A context: its pod ends with it."""

    def __init__(self, cluster: Cluster, helper: Helper) -> None:
        self._cluster, self._helper = cluster, helper

    @classmethod
    def of(cls, cluster: Cluster, defaults: Mapping[str, Any], say: Callable[[str], None]) -> ClusterHistory:
        """defaults: the `job` section of the defaults file, for the image and the claim."""
        return cls(cluster, Helper(cluster, _pod_spec(cluster, defaults), say))

    def __enter__(self) -> ClusterHistory:
        self._helper.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self._helper.__exit__(*details)

    @property
    def poll_seconds(self) -> float:
        return 2.0

    @property
    def keeps_files(self) -> bool:
        return True

    def handle(self, run: str) -> str:
        return handle_of(self._cluster.namespace, run)

    def runs(self) -> list[str]:
        said = self._ask(["python", "-m", "opensloth.volume", "runs"])
        with _of_this_version(said):
            found: list[str] = json.loads(said)["runs"]
        return found

    def named(self, wanted: str) -> str | None:
        """The latest of a name is the one whose folder was made last."""
        runs = self.runs()  # in the order of their making
        if wanted in runs:
            return wanted
        return next((run for run in reversed(runs) if name_of(run) == wanted), None)

    def get(self, run: str) -> RunStatus:
        said = self._ask(["oslo", "status", LOCAL_SCHEME + run, "-o", "json"])
        known = {field.name for field in fields(RunStatus)}
        with _of_this_version(said):
            status = RunStatus(**{key: value for key, value in json.loads(said).items() if key in known})
            status = replace(status, handle=self.handle(run), state=State(status.state))
        if status.state.is_over and status.cause != Cause.TERMINATED:
            return status
        # Its pods were asked to leave, or left without a word, and then nobody wanted it any more.
        reason = f"its object was deleted during attempt {status.attempt}"
        return replace(status, state=State.CANCELLED, cause=Cause.CANCELLED, reason=reason, hint=None, eta=None)

    def findings(self, run: str) -> Findings:
        return Findings(self.get(run), self.attempts(run), deleted=True)

    def attempts(self, run: str) -> list[AttemptRecord]:
        """The latest, the oldest first."""
        said = self._ask(["oslo", "why", LOCAL_SCHEME + run, "-o", "json"])
        with _of_this_version(said):
            return [_record(attempt) for attempt in json.loads(said)["attempts"]]

    def config(self, run: str) -> RunConfig:
        return run_config.load(self._ask(["cat", f"{_RUNS}/{run}/{contract.CONFIG_FILE}"]))

    def list_runs(self) -> list[RunStatus]:
        return [self.get(run) for run in self.runs()]

    def logs(self, run: str, query: LogQuery) -> Iterator[LogLine]:
        command = ["oslo", "logs", LOCAL_SCHEME + run, "-o", "json", *_flags(query)]
        for line in self._ask(command).splitlines():
            with _of_this_version(line):
                said = json.loads(line)
                found = LogLine(said["rank"], said["text"], said["event"])
            yield found

    def follow(self, run: str, query: LogQuery) -> Iterator[LogLine | Waiting]:
        """All there is: nothing more comes."""
        return self.logs(run, query)

    def pull(self, run: str, destination: Path) -> list[Path]:
        status = self.get(run)
        if status.state is not State.SUCCEEDED:
            raise no_result(status)
        return self.fetch(run, destination)

    def fetch(self, run: str, destination: Path) -> list[Path]:
        """`pull` of a run that is known to have succeeded."""
        return transfer.pull(
            self._helper, f"{contract.RUNS_DIR}/{run}/{contract.FINAL_DIR}", destination, output.event_sayer()
        )

    def delete(self, run: str, *, files: bool) -> None:
        if files:
            self._ask(["python", "-m", "opensloth.volume", "remove", f"{contract.RUNS_DIR}/{run}"])

    def submit(self, run: str, submission: Submission) -> Outcome:
        raise self._is_past(run)

    def cancel(self, run: str, *, force: bool) -> None:
        raise self._is_past(run)

    def resume(self, run: str) -> None:
        raise self._is_past(run)

    def _is_past(self, run: str) -> BusyError:
        return BusyError(f"the object of {self.handle(run)} was deleted", "oslo submit FILE goes on from its files")

    def _ask(self, command: list[str]) -> str:
        """What a command in the pod prints. Raises NotFoundError with its exit code, else ClusterError."""
        parts = []
        with closing(self._helper.open(command)) as channel:
            while part := channel.receive(_SILENCE_SECONDS):
                parts.append(part)
            if part is None:
                what = f"`{' '.join(command)}` in {self._helper.name}"
                raise LostError(f"{what} has said nothing for {_SILENCE_SECONDS:.0f} s", "does the volume answer?")
        code = channel.exit_code
        if code == NotFoundError.exit_code:
            raise NotFoundError(channel.stderr.strip().removeprefix("error: "))
        if code:
            raise ClusterError(
                f"`{' '.join(command)}` in {self._helper.name} ended with {code}: {channel.stderr.strip()}"
            )
        return b"".join(parts).decode(errors="replace")


def _record(said: dict[str, Any]) -> AttemptRecord:
    known = {field.name for field in fields(AttemptRecord)}
    return AttemptRecord(
        **{key: value for key, value in said.items() if key in known}
        | {"words": [Word(word["who"], word["cause"], word["message"], word["time"]) for word in said["words"]]}
    )


@contextmanager
def _of_this_version(said: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"the helper pod says what this version does not expect: {said[:200]!r}"
        raise ClusterError(message, "job.image must be one of this version (docker/train.Dockerfile)") from error


def _flags(query: LogQuery) -> list[str]:
    flags = []
    for name in ("attempt", "rank", "tail"):
        value = getattr(query, name)
        flags += [f"--{name}", str(value)] if value is not None else []
    flags += ["--since", f"{max(1, round(time.time() - query.since))}s"] if query.since is not None else []
    return flags + (["--grep", query.grep.pattern] if query.grep is not None else [])


def _pod_spec(cluster: Cluster, defaults: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of training pods: those of the namespace's latest job, else as the defaults file would have them."""
    job, _ = check_job(dict(defaults))
    if job is not None and job.image and job.volume:
        spec: Mapping[str, Any] = pod_template("none", {}, {}, "", job)["spec"]
        return spec
    jobs = cluster.find(JOBS, f"{OWN_PREFIX}run")
    if not jobs:
        raise UsageError("nothing says which claim and image to read the volume with", _NO_IMAGE)
    latest = max(jobs, key=lambda found: str(found["metadata"]["creationTimestamp"]))
    spec = template_of(latest)["spec"]
    return spec
