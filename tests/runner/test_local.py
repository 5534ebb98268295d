"""The local backend with real processes: start, attach, stop, kill, resume, delete."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stand_in import launcher_command

from opensloth import contract
from opensloth.events import Events
from opensloth.files import read_json, write_json
from opensloth.process import identify_self
from opensloth.run_config import check, dump
from runner.backend import LogLine, LogQuery, Outcome, RunStatus, State, Submission
from runner.errors import BusyError, LaunchError, NotFoundError, RunnerError
from runner.local import LocalBackend
from runner.process import descendants, is_alive
from runner.run_folder import RunFolder

RUN = "sft-12345678"


def submission() -> Submission:
    values = {"name": "sft", "opensloth": {"fast_model_args": {"model_name": "m"}}, "dataset": {"path": "x/y"}}
    config, _ = check(values)
    assert config is not None
    return Submission(dump(config))


def backend(root: Path, **options: Any) -> LocalBackend:
    return LocalBackend(root, launcher_command(**options))


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def over(local: LocalBackend, run: str = RUN) -> RunStatus:
    """Wait until the run is over and its launcher, which still has a word to say then, has left."""
    until(lambda: local.get(run).state.is_over)
    status = local.get(run)
    started = read_json(Path(str(status.folder)) / "attempts" / str(status.attempt) / "started.json")
    until(lambda: started is None or not is_alive(started))
    return status


def test_a_run_from_start_to_end(root: Path) -> None:
    local = backend(root, steps=3)
    assert local.submit(RUN, submission()) is Outcome.STARTED
    status = over(local)
    assert (status.state, status.step, status.total_steps, status.exit_code) == (State.SUCCEEDED, 3, 3, 0)
    assert status.final == str(root / "runs" / RUN / "final")
    assert (root / "runs" / RUN / "config.yaml").read_text() == submission().config_text
    assert not (root / "runs" / RUN / "submit.lock").exists()


def test_submit_returns_when_the_attempt_has_started(root: Path) -> None:
    local = backend(root, start_seconds=0.3, prepare_seconds=30)
    local.submit(RUN, submission())
    assert local.get(RUN).state is State.PREPARING


def test_a_launcher_that_ends_before_it_started_is_quoted(root: Path) -> None:
    local = backend(root, refuse=True)
    with pytest.raises(LaunchError, match="exit code 1 before it had started:\nno room on the device"):
        local.submit(RUN, submission())
    status = local.get(RUN)
    assert (status.state, status.attempt) == (State.FAILED, 0)
    assert "no room on the device" in str(status.reason)
    assert [line.text for line in local.logs(RUN, LogQuery())] == ["no room on the device"]
    assert backend(root, steps=1).submit(RUN, submission()) is Outcome.STARTED
    assert over(local).state is State.SUCCEEDED


def test_submitting_again(root: Path) -> None:
    slow = backend(root, steps=1, step_seconds=30)
    assert slow.submit(RUN, submission()) is Outcome.STARTED
    assert slow.submit(RUN, submission()) is Outcome.ATTACHED
    slow.cancel(RUN, force=False)
    assert over(slow).state is State.CANCELLED
    assert backend(root, steps=1).submit(RUN, submission()) is Outcome.RESUMED
    assert over(slow).state is State.SUCCEEDED
    assert slow.submit(RUN, submission()) is Outcome.ALREADY_SUCCEEDED
    assert slow.get(RUN).attempt == 2


def test_a_failed_run_goes_on_where_it_failed(root: Path) -> None:
    local = backend(root, steps=4, fail_at={"2": "row 3 has no messages"})
    local.submit(RUN, submission())
    status = over(local)
    assert (status.state, status.cause, status.reason) == (State.FAILED, "data", "row 3 has no messages")
    assert local.submit(RUN, submission()) is Outcome.RESUMED
    until(lambda: local.get(RUN).attempt == 2)
    assert over(local).state is State.SUCCEEDED
    steps = [line.event["step"] for line in local.logs(RUN, LogQuery(rank=0)) if line.event and "step" in line.event]
    assert steps == [3, 4]


def test_kill_9_is_reported_as_such(root: Path) -> None:
    local = backend(root, steps=1, step_seconds=30)
    local.submit(RUN, submission())
    pid = read_json(root / "runs" / RUN / "attempts" / "1" / "started.json")["pid"]
    os.kill(pid, signal.SIGKILL)
    status = over(local)
    assert (status.state, status.cause) == (State.FAILED, "killed")
    assert status.reason == f"the launcher (process {pid}) was killed: it is gone and left no word"
    assert local.submit(RUN, submission()) is Outcome.RESUMED


def test_a_launcher_that_breaks_off_is_quoted(root: Path) -> None:
    local = backend(root, steps=3, crash_at=2)
    local.submit(RUN, submission())
    status = over(local)
    assert (status.state, status.cause) == (State.FAILED, "error")
    assert status.reason == "the launcher broke off: ZeroDivisionError: division by zero"


@pytest.mark.parametrize("change", [{"pid_started": 1}, {"boot_id": "another boot"}])
def test_a_process_with_the_same_number_is_not_mistaken_for_the_launcher(root: Path, change: dict[str, Any]) -> None:
    attempt = root / "runs" / RUN / "attempts" / "1"
    attempt.mkdir(parents=True)
    (root / "runs" / RUN / "config.yaml").write_text(submission().config_text)
    write_json(attempt / "started.json", identify_self())
    assert LocalBackend(root).get(RUN).state is State.PREPARING
    write_json(attempt / "started.json", identify_self() | change)
    assert LocalBackend(root).get(RUN).cause == "killed"


def test_a_launcher_on_another_host_cannot_be_asked_and_counts_as_alive(root: Path) -> None:
    attempt = root / "runs" / RUN / "attempts" / "1"
    attempt.mkdir(parents=True)
    (root / "runs" / RUN / "config.yaml").write_text(submission().config_text)
    write_json(attempt / "started.json", identify_self() | {"host": "elsewhere", "pid": 2**22 + 1, "boot_id": "b"})
    assert LocalBackend(root).get(RUN).state is State.PREPARING
    write_json(attempt / "ended.json", {"cause": "succeeded", "exit_code": 0, "time": 1.0})


def test_a_closed_terminal_does_not_end_a_job(root: Path) -> None:
    """A session leader with a terminal of its own submits; then the terminal hangs up and the leader is killed."""
    script = (
        "import sys; from pathlib import Path\n"
        "from runner.backend import Submission; from runner.local import LocalBackend\n"
        f"LocalBackend(Path({str(root)!r}), {tuple(launcher_command(steps=1, step_seconds=1))!r})"
        f".submit({RUN!r}, Submission({submission().config_text!r}))\n"
        "print('submitted', flush=True); sys.stdin.read()"
    )
    leader, follower = os.openpty()
    shell = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n" + script],
        stdin=follower,
        stdout=subprocess.PIPE,
        stderr=follower,
        start_new_session=True,
    )
    os.close(follower)
    assert shell.stdout is not None
    with shell, shell.stdout:
        assert shell.stdout.readline() == b"submitted\n"
        os.close(leader)  # the kernel sends SIGHUP to the session
        shell.wait(10)
    assert shell.returncode in (-signal.SIGHUP, 1)  # 1: its read of the terminal failed a moment before
    assert over(LocalBackend(root)).state is State.SUCCEEDED


def test_several_runs_side_by_side(root: Path) -> None:
    local = backend(root, steps=2, step_seconds=0.5)
    runs = [f"sft-0000000{n}" for n in range(4)]
    for run in runs:
        local.submit(run, submission())
    assert {status.state for status in local.list_runs()} <= {State.PREPARING, State.RUNNING}
    assert [status.run for status in local.list_runs()] == runs[::-1]
    assert {over(local, run).state for run in runs} == {State.SUCCEEDED}


def test_two_submits_at_once_start_one_launcher(root: Path) -> None:
    local = backend(root, start_seconds=0.1, steps=1, step_seconds=30)
    outcomes: list[Outcome] = []
    threads = [threading.Thread(target=lambda: outcomes.append(local.submit(RUN, submission()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [Outcome.ATTACHED] * 3 + [Outcome.STARTED]
    assert [path.name for path in (root / "runs" / RUN / "attempts").iterdir()] == ["1"]


def test_a_lock_of_a_dead_submitter_is_taken_over(root: Path) -> None:
    local = backend(root, steps=1)
    folder = root / "runs" / RUN
    folder.mkdir(parents=True)
    write_json(folder / "submit.lock", identify_self() | {"pid_started": 1, "token": "t"})
    assert local.submit(RUN, submission()) is Outcome.STARTED
    assert over(local).state is State.SUCCEEDED


def test_a_lock_of_a_living_submitter_is_waited_for(root: Path) -> None:
    local = backend(root, steps=1)
    folder = root / "runs" / RUN
    folder.mkdir(parents=True)
    write_json(folder / "submit.lock", identify_self() | {"token": "t"})
    (folder / "config.yaml").write_text(submission().config_text)
    assert local.get(RUN).state is State.PENDING
    thread = threading.Thread(target=local.submit, args=(RUN, submission()))
    thread.start()
    time.sleep(0.3)
    assert local.get(RUN).attempt == 0
    (folder / "submit.lock").unlink()
    thread.join()
    assert over(local).state is State.SUCCEEDED


def test_cancel_asks_and_keeps_the_record(root: Path) -> None:
    local = backend(root, steps=3, step_seconds=0.2)
    local.submit(RUN, submission())
    until(lambda: (local.get(RUN).step or 0) >= 1)
    local.cancel(RUN, force=False)
    status = over(local)
    assert (status.state, status.cause) == (State.CANCELLED, "cancelled")
    assert str(status.reason).startswith("cancelled at step")
    with pytest.raises(BusyError, match="has been cancelled: there is nothing to cancel"):
        local.cancel(RUN, force=False)
    local.resume(RUN)
    assert over(local).state is State.SUCCEEDED
    with pytest.raises(BusyError, match="has succeeded: there is nothing to resume"):
        local.resume(RUN)


def test_force_kills_who_does_not_listen(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.local._KILL_AFTER_SECONDS", 0.2)
    local = backend(root, steps=1, step_seconds=30, ignore_stop=True, child=True)
    local.submit(RUN, submission())
    until(lambda: (root / "runs" / RUN / "child.pid").exists())
    child = int((root / "runs" / RUN / "child.pid").read_text())
    local.cancel(RUN, force=False)
    time.sleep(0.3)
    assert not local.get(RUN).state.is_over
    local.cancel(RUN, force=True)
    status = over(local)
    assert (status.state, status.reason) == (State.CANCELLED, "cancelled; the launcher was killed")
    until(lambda: not Path(f"/proc/{child}").exists() or " Z " in Path(f"/proc/{child}/stat").read_text())


def test_delete_refuses_while_it_runs(root: Path) -> None:
    local = backend(root, steps=1, step_seconds=30)
    local.submit(RUN, submission())
    with pytest.raises(BusyError, match=r"is (preparing|running)"):
        local.delete(RUN, files=True)
    with pytest.raises(BusyError, match=r"is (preparing|running)"):
        local.resume(RUN)
    local.cancel(RUN, force=True)
    over(local)
    local.delete(RUN, files=True)
    assert local.runs() == []
    assert list((root / "runs").iterdir()) == []
    with pytest.raises(NotFoundError):
        local.get(RUN)


def test_delete_waits_for_who_is_submitting(root: Path) -> None:
    """Deleting between a submit's look at the status and its start would take the folder from under the launcher."""
    local = backend(root, steps=1)
    local.submit(RUN, submission())
    over(local)
    folder = root / "runs" / RUN
    write_json(folder / "submit.lock", identify_self() | {"token": "t"})
    thread = threading.Thread(target=local.delete, args=(RUN,))
    thread.start()
    time.sleep(0.3)
    assert folder.exists()
    (folder / "submit.lock").unlink()
    thread.join()
    assert not folder.exists()


def test_submits_and_deletes_at_once(root: Path) -> None:
    """Each submit finds a whole run or makes a new one; each delete finds one, none, or one that runs."""
    local = backend(root, steps=0)
    local.submit(RUN, submission())
    failures: list[BaseException] = []

    def repeat(action: Callable[[], object]) -> None:
        for _ in range(8):
            try:
                action()
            except (BusyError, NotFoundError):
                time.sleep(0.02)
            except BaseException as error:
                failures.append(error)

    actions = [lambda: local.submit(RUN, submission()), lambda: local.delete(RUN, files=True)]
    threads = [threading.Thread(target=repeat, args=(action,)) for action in actions * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert not (root / "runs" / RUN / "submit.lock").exists()
    assert [path.name for path in (root / "runs").iterdir() if path.name.startswith(".")] == []


def test_a_lock_is_released_by_its_owner_only(root: Path) -> None:
    folder = RunFolder(root / "runs" / RUN, f"local://{RUN}")
    with folder.submitting(make=True):
        (folder.path / "submit.lock").unlink()
        write_json(folder.path / "submit.lock", identify_self() | {"token": "another's"})
    assert read_json(folder.path / "submit.lock")["token"] == "another's"


def test_a_run_that_is_being_deleted_is_not_listed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = backend(root, steps=1)
    local.submit(RUN, submission())
    over(local)
    assert [status.run for status in local.list_runs()] == [RUN]
    monkeypatch.setattr(local, "runs", lambda: [RUN, "sft-00000000"])  # the second was deleted after the look
    assert [status.run for status in local.list_runs()] == [RUN]
    monkeypatch.undo()
    (root / "runs" / RUN).rename(root / "runs" / f".{RUN}.01234567.deleted")
    assert local.runs() == []


def test_processes_below_this_one_without_ps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, start_new_session=True)
    try:
        until(lambda: len(descendants(child.pid)) == 1)
        assert child.pid in descendants(os.getpid())
    finally:
        child.communicate(b"\n")


def test_processes_where_there_is_no_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.process.PROC", tmp_path)
    monkeypatch.setattr("opensloth.process.PROC", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunnerError, match="there is no /proc and no `ps`"):
        descendants(os.getpid())
    ps = tmp_path / "ps"
    ps.write_text("#!/bin/sh\necho '  10     1'; echo '  11    10'; echo '  12    11'\n")
    ps.chmod(0o755)
    assert descendants(10) == [11, 12]


def test_the_launcher_does_not_run_in_the_users_folder(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "opensloth").mkdir()
    (tmp_path / "opensloth" / "__init__.py").write_text("raise SystemExit('the wrong opensloth')")
    monkeypatch.chdir(tmp_path)
    local = LocalBackend(root, (sys.executable, "-c", "import opensloth, sys; sys.exit(7)"))
    with pytest.raises(LaunchError, match="exit code 7"):
        local.submit(RUN, submission())


def test_logs_of_all_ranks(root: Path) -> None:
    local = backend(root, steps=2, ranks=2)
    local.submit(RUN, submission())
    over(local)
    lines = [(line.rank, line.text) for line in local.logs(RUN, LogQuery())]
    assert lines == [
        (-1, "-- preparing the dataset"),
        (0, "-- training"),
        (0, "step 1/2  loss 4  1,234 target tok/s  3.0 MiB  ETA 0s"),
        (0, "a raw line of step 1"),
        (0, "step 2/2  loss 2  1,234 target tok/s  3.0 MiB  ETA 0s"),
        (0, "a raw line of step 2"),
        (-1, "ended: succeeded"),
        (1, "rank 1 at step 1"),
        (1, "rank 1 at step 2"),
    ]
    assert [line.text for line in local.logs(RUN, LogQuery(rank=1, tail=1))] == ["rank 1 at step 2"]
    assert list(local.logs(RUN, LogQuery(since=time.time() + 60))) == []
    assert len(list(local.logs(RUN, LogQuery(since=time.time() - 60)))) == len(lines)
    with pytest.raises(NotFoundError, match="has no attempt 2"):
        list(local.logs(RUN, LogQuery(attempt=2)))


def test_a_torn_event_in_a_log_is_left_out_and_a_torn_line_is_shown(root: Path) -> None:
    local = backend(root, steps=1)
    local.submit(RUN, submission())
    over(local)
    log = root / "runs" / RUN / "attempts" / "1" / "rank-0.log"
    whole = log.read_bytes()
    log.write_bytes(whole + contract.EVENT_PREFIX.encode() + b'{"event": "st')
    texts = [line.text for line in local.logs(RUN, LogQuery(rank=0))]
    assert texts[-1] == "a raw line of step 1"
    log.write_bytes(whole + b"Traceback (most rec")
    assert [line.text for line in local.logs(RUN, LogQuery(rank=0))][-1] == "Traceback (most rec"


def test_a_log_shows_the_same_progress_once(root: Path) -> None:
    local = backend(root, steps=1)
    local.submit(RUN, submission())
    over(local)
    events = Events(root / "runs" / RUN / contract.EVENTS_FILE, rank=-1, attempt=1)
    for done in (1, 2, 2):
        events.emit("progress", phase="tokenise", done=done, total=2, unit="rows")
    texts = [line.text for line in local.logs(RUN, LogQuery())]
    assert [text for text in texts if text.startswith("tokenise")] == ["tokenise 1/2 rows", "tokenise 2/2 rows"]


def test_follow_to_the_end_shows_each_line_once(root: Path) -> None:
    local = backend(root, steps=5, step_seconds=0.05, ranks=2)
    local.submit(RUN, submission())
    followed = [line for line in local.follow(RUN, LogQuery()) if isinstance(line, LogLine)]
    at_rest = list(local.logs(RUN, LogQuery()))
    assert sorted((line.rank, line.text) for line in followed) == sorted((line.rank, line.text) for line in at_rest)
    assert [line.text for line in followed if line.rank == 0] == [line.text for line in at_rest if line.rank == 0]


def test_follow_goes_on_in_a_new_attempt(root: Path) -> None:
    local = backend(root, steps=4, step_seconds=0.2)
    local.submit(RUN, submission())
    seen: list[str] = []
    resumed = False
    for line in local.follow(RUN, LogQuery()):
        if isinstance(line, LogLine):
            seen.append(line.text)
        if not resumed and any(text.startswith("step 1") for text in seen):
            local.cancel(RUN, force=False)
            over(local)
            local.resume(RUN)
            resumed = True
    steps = [text.split("  ")[0] for text in seen if text.startswith("step ")]
    assert steps == ["step 1/4", "step 2/4", "step 3/4", "step 4/4"]
    assert seen.count("ended: succeeded") == 1


def test_follow_ends_when_the_launcher_is_killed(root: Path) -> None:
    local = backend(root, steps=1, step_seconds=30)
    local.submit(RUN, submission())
    pid = read_json(root / "runs" / RUN / "attempts" / "1" / "started.json")["pid"]
    for line in local.follow(RUN, LogQuery()):
        if isinstance(line, LogLine):
            os.kill(pid, signal.SIGKILL)
    assert local.get(RUN).cause == "killed"
