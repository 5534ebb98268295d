"""Process 1 of a run on each node: one attempt from its start to a classified exit code.

`python -m opensloth.launch RUN_DIR` makes the next attempt's folder (or, on a node above 0, joins it), builds the
dataset, runs the ranks under torchrun, and says in ended.json what happened: torchrun itself answers 1 for
everything. docs/launcher.md has the files and the rules.

A request to stop is a file, stop.json. SIGTERM and SIGINT write it; they are not passed on, because torchrun
kills its ranks 30 s after it gets one, while a checkpoint may take longer. The ranks see the file, agree on a
step, save and leave; who has not left when the grace period ends is killed.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import signal
import time
import uuid
from pathlib import Path
from typing import Any

from opensloth import contract, run_config
from opensloth.contract import Cause
from opensloth.errors import ConfigError
from opensloth.events import Events
from opensloth.files import write_atomically, write_json
from opensloth.launch import budget, history, meeting, settings
from opensloth.launch.attempt import Attempt, attempt_numbers
from opensloth.launch.dataset import prepare_dataset
from opensloth.launch.ending import Ending, first_cause
from opensloth.launch.part import Part, quiet_events
from opensloth.launch.ranks import kill_strays, missing_devices, ranks_of_node, run_ranks
from opensloth.launch.settings import Settings
from opensloth.launch.stacks import hung_ending
from opensloth.launch.volume import fault
from opensloth.pod_log import format_end

RECORDS_SECONDS = 10.0
"""How long node 0 waits for the other nodes' records after its ranks have failed."""
RECORDS_WHEN_TERMINATED_SECONDS = 3.0
"""The same in a pod that is about to be killed: ended.json must be written by then, or the stop counts as a loss."""
DONE_SECONDS = 120.0
"""How long it waits after success: node 0's exit ends the job, and the pods that are not done yet."""
VERDICT_SECONDS = 60.0
"""How long another node waits for ended.json: longer than node 0 waits for its ranks and for the records."""
VERDICT_WHEN_TERMINATED_SECONDS = 5.0
"""The same in a pod that is about to be killed."""
_MESSAGE_BYTES = 4000
"""The kubelet keeps 4096 bytes of a termination message."""


class Launcher:
    def __init__(self, chosen: Settings) -> None:
        self._settings = chosen
        self._token = uuid.uuid4().hex
        self._part: Part | None = None
        self._terminated = False
        self._quiet: Events | None = None
        self._ranks = 0
        """Ranks of this node, once they have been started."""
        self._earlier_seconds = 0.0
        """Training time of earlier attempts."""

    def run(self) -> int:
        """Serve one attempt; returns the exit code (contract.ExitCode)."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._heed)
        try:
            ending = self._serve()
        except Exception as error:  # the boundary: an attempt without an end would look killed
            ending = self._failure(error)
        try:
            ending = self._agree(ending)
        except OSError as error:
            ending = self._failure(error)
        self._say_last(ending)
        return ending.exit_code

    def _heed(self, *_: object) -> None:
        self._terminated = True
        if self._part is not None:
            with contextlib.suppress(OSError):  # the folder was deleted, or its volume is gone
                self._part.attempt.ask_to_stop(Cause.TERMINATED)

    def _failure(self, error: Exception) -> Ending:
        of_volume = fault(error, self._settings.run) if isinstance(error, OSError) else None
        return of_volume or Ending(Cause.ERROR, f"the launcher failed: {type(error).__name__}: {error}")

    # --- the attempt ----------------------------------------------------------------------------------

    def _serve(self) -> Ending:
        """From the start to how it ended on this node."""
        if self._settings.in_pod:
            self._bring_config()
            report = history.report(self._settings.run)
            if report is not None:
                return self._already_succeeded(report)
        return self._lead() if self._settings.is_main else self._take_part()

    def _bring_config(self) -> None:
        """Copy the config to the run folder, so that the folder alone tells what was run."""
        run, text = self._settings.run, self._settings.config.read_bytes()
        if not run.parent.parent.exists():  # do not make the root where a volume should be
            raise FileNotFoundError(errno.ENOENT, "no volume", str(run.parent.parent))
        (run / contract.ATTEMPTS_DIR).mkdir(parents=True, exist_ok=True)
        there = run / contract.CONFIG_FILE
        if self._settings.is_main and not (there.is_file() and there.read_bytes() == text):
            write_atomically(there, text)

    def _already_succeeded(self, report: dict[str, Any]) -> Ending:
        events = quiet_events(self._settings, max(attempt_numbers(self._settings.run), default=0))
        events.note("this run has already succeeded: nothing is left to do")
        events.emit("result", **{key: value for key, value in report.items() if key != "versions"})
        return Ending(Cause.SUCCEEDED, "")

    def _lead(self) -> Ending:
        attempt = Attempt.allocate(self._settings.run, self._settings.nodes)
        part = self._enter(attempt)
        past = history.past_attempts(self._settings.run, attempt.number)
        self._earlier_seconds = sum(earlier.train_seconds for earlier in past)
        refusal = budget.refusal(
            past,
            (attempt.read(contract.STARTED_FILE) or {}).get("checkpoint_step"),
            max_restarts=self._settings.max_restarts,
            deadline_seconds=self._settings.deadline_seconds,
            last_step=lambda number: history.last_step(self._settings.run, number),
        )
        return refusal or self._work(part)

    def _take_part(self) -> Ending:
        """On a node above 0: in the newest attempt, and in a newer one if that comes before the ranks have begun."""
        entrance = meeting.Entrance(self._settings, self._token, self._before_any_attempt())
        while True:
            attempt = entrance.join(self._reason_not_to_wait)
            if isinstance(attempt, Ending):
                return attempt
            part = self._enter(attempt)
            ending = self._work(part)
            silent = part.master_is_silent()
            if self._ranks or not (silent or ending.cause == Cause.SUPERSEDED):
                return ending
            if silent:
                entrance.avoid(attempt, part.master_beat())
            self._part = None
            part.close()

    def _reason_not_to_wait(self) -> Ending | None:
        if self._terminated:
            return Ending(Cause.TERMINATED, "terminated before there was an attempt to take part in")
        report = history.report(self._settings.run)
        return self._already_succeeded(report) if report is not None else None

    def _before_any_attempt(self) -> Events:
        """The same ones each time: a reader drops lines whose numbers it has seen."""
        self._quiet = self._quiet or quiet_events(self._settings, 0)
        return self._quiet

    def _enter(self, attempt: Attempt) -> Part:
        self._part = Part(self._settings, attempt)
        if self._terminated:  # it came before there was anybody to tell
            attempt.ask_to_stop(Cause.TERMINATED)
        return self._part

    def _work(self, part: Part) -> Ending:
        """Dataset, meeting, ranks."""
        try:
            config = run_config.load(self._settings.config.read_text())
        except ConfigError as error:
            return Ending(error.cause, error.message)
        except OSError as error:
            return Ending(Cause.CONFIG, f"{self._settings.config} cannot be read: {error.strerror}")
        kill_strays(self._settings)  # ranks that outlived an earlier launcher
        missing = missing_devices(self._settings, config)
        if missing:
            return missing
        part.events.emit("phase", phase="data")
        data = prepare_dataset(part)
        if isinstance(data, Ending):
            return data
        master = self._meet(part, data)
        if isinstance(master, Ending):
            return master
        self._ranks = ranks_of_node(self._settings, config)
        return run_ranks(part, config, master, self._check_deadline)

    def _meet(self, part: Part, data: dict[str, Any]) -> str | Ending:
        """When all nodes are ready: the address that the ranks meet at, "" where there is one node only."""
        if not self._settings.is_main:
            return meeting.wait_for_go(part, data)
        write_json(part.attempt.folder / contract.DATA_FILE, data)
        if not self._settings.torchrun_from_environment:
            return ""
        return meeting.wait_for_all(part) or meeting.say_go(part)

    def _deadline_passed(self) -> Ending | None:
        if self._part is None or not self._settings.is_main:
            return None
        seconds = self._earlier_seconds + self._part.trained()
        return budget.deadline_passed(seconds, self._settings.deadline_seconds)

    def _check_deadline(self) -> None:
        if self._part is not None and self._deadline_passed():
            self._part.attempt.ask_to_stop(Cause.DEADLINE)

    # --- the end --------------------------------------------------------------------------------------

    def _agree(self, ending: Ending) -> Ending:
        """One end for all nodes: node 0 finds the first cause, the others take it from ended.json."""
        part = self._part
        if part is None:
            return ending
        if not self._settings.is_main:
            part.attempt.write_node(self._settings.node, ending)
            return self._verdict(part, ending)
        ending = self._first_cause(part, ending)
        part.write_last_beat()
        part.events.emit("phase", phase="done")
        part.attempt.end(ending)
        return ending

    def _first_cause(self, part: Part, own: Ending) -> Ending:
        """Over all ranks and nodes; a fault that came before the ranks is this node's own."""
        if not self._ranks or own.cause == Cause.SUPERSEDED:
            return own
        if self._settings.nodes > 1:
            own = self._first_over_nodes(part, own)
        passed = self._deadline_passed() if own.cause == Cause.DEADLINE else None
        if passed:
            return Ending(Cause.DEADLINE, f"{own.message}: {passed.message}", passed.hint)
        return own

    def _first_over_nodes(self, part: Part, own: Ending) -> Ending:
        missing = self._wait_for_records(part, own)
        if own.cause == Cause.SUCCEEDED:
            if missing:
                part.events.warn(f"{len(missing)} of {self._settings.nodes} nodes did not say that they are done")
            return own
        nodes = part.attempt.node_endings(self._settings.nodes)
        ranks = part.attempt.outcomes(range(self._ranks * self._settings.nodes))
        found = first_cause([own, *nodes.values(), *ranks]) or own
        if found.cause == Cause.HUNG:  # by now the stacks of the other nodes' ranks are there too
            found = hung_ending(part.attempt, missing)
        if found.cause == Cause.PEER_LOST and missing:
            gone = ", ".join(map(str, missing))
            return Ending(Cause.PEER_LOST, f"node {gone} vanished without a word", "its pod or its machine was lost")
        return found

    def _wait_for_records(self, part: Part, own: Ending) -> list[int]:
        """The nodes that have not said in time how it ended there."""
        begin, patience = time.monotonic(), DONE_SECONDS if own.cause == Cause.SUCCEEDED else RECORDS_SECONDS
        while missing := part.attempt.missing(contract.NODE_FILE, self._settings.nodes):
            limit = RECORDS_WHEN_TERMINATED_SECONDS if self._terminated else patience
            if time.monotonic() - begin > limit or part.interruption():
                break
            time.sleep(self._settings.poll_seconds)
        return missing

    def _verdict(self, part: Part, own: Ending) -> Ending:
        """What node 0 has found; this node's own end when it does not say so in time."""
        begin = time.monotonic()
        while (ended := part.attempt.ended()) is None:
            limit = VERDICT_WHEN_TERMINATED_SECONDS if self._terminated else VERDICT_SECONDS
            if time.monotonic() - begin > limit or part.interruption():
                return part.attempt.ended() or own
            time.sleep(self._settings.poll_seconds)
        return ended

    def _say_last(self, ending: Ending) -> None:
        """The end as an event, the last line of the log, and as the pod's termination message."""
        part = self._part
        with contextlib.suppress(OSError):  # the volume is full, or gone: the kubelet still hears of it
            if part is not None:
                part.close(lambda: part.events.emit("end", **ending.record()))
            else:
                self._before_any_attempt().emit("end", **ending.record())
        if self._settings.termination_log is not None:
            message = format_end(ending.cause, ending.message, ending.hint).encode()[:_MESSAGE_BYTES]
            with contextlib.suppress(OSError):  # not in a pod after all
                self._settings.termination_log.write_bytes(message)


def launch(run: Path) -> int:
    """Run one attempt of the run in folder `run`; returns the exit code (contract.ExitCode)."""
    return Launcher(settings.read(run)).run()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m opensloth.launch", description="Run one attempt of a run.")
    parser.add_argument("run_dir", type=Path, help="the run folder, with its config.yaml")
    return launch(parser.parse_args().run_dir.resolve())
