"""The launcher's small parts: settings, cgroups, the pod's log, who may join, the beat."""

from __future__ import annotations

import errno
import io
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opensloth import beat
from opensloth.contract import Cause
from opensloth.errors import StopRequested
from opensloth.launch import machine, settings
from opensloth.launch.attempt import Attempt, newest_checkpoint_step
from opensloth.launch.ending import Ending
from opensloth.launch.launcher import Launcher
from opensloth.launch.meeting import Entrance
from opensloth.launch.part import Part, Teller
from opensloth.launch.relay import PodLog, Relay
from opensloth.orders import Orders
from opensloth.pod_log import parse_line


class Notes:
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.said.append(message)


def chosen(run: Path, **values: Any) -> settings.Settings:
    return settings.Settings(run=run, config=run / "config.yaml", nodes=2, **values)


# --- the environment and the machine ------------------------------------------------------------------


def test_without_the_operators_variables_there_is_one_launcher(tmp_path: Path) -> None:
    found = settings.read(tmp_path, {"RANK": "3", "WORLD_SIZE": "4"})
    assert (found.node, found.nodes, found.ranks_per_node, found.in_pod) == (0, 1, None, False)
    assert (found.max_restarts, found.deadline_seconds, found.termination_log) == (None, None, None)


def test_with_them_it_is_one_of_several(tmp_path: Path) -> None:
    env = {"OSLO_CONFIG": "/etc/oslo/config.yaml", "PET_NNODES": "3", "PET_NODE_RANK": "2", "PET_NPROC_PER_NODE": "8"}
    found = settings.read(tmp_path, env | {"OSLO_MAX_RESTARTS": "0", "OSLO_DEADLINE_SECONDS": "60"})
    assert (found.node, found.nodes, found.ranks_per_node, found.in_pod) == (2, 3, 8, True)
    assert (found.max_restarts, found.deadline_seconds) == (0, 60.0)
    assert found.termination_log == Path("/dev/termination-log")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, 1),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, 64),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
        ({}, 64),
    ],
)
def test_cores_are_what_the_container_may_use(
    tmp_path: Path, files: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert machine.cores(tmp_path) == expected


def test_usable_memory_is_what_is_left_within_the_limit(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    assert machine.usable_memory(tmp_path, meminfo) is None
    meminfo.write_text("MemTotal:  8388608 kB\nMemFree:  1 kB\nMemAvailable:  4194304 kB\n")
    assert machine.usable_memory(tmp_path, meminfo) == 4 << 30
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.usable_memory(tmp_path, meminfo) == 4 << 30
    (tmp_path / "memory.max").write_text(f"{1 << 30}\n")
    assert machine.usable_memory(tmp_path, meminfo) == 1 << 30
    (tmp_path / "memory.current").write_text(f"{700 << 20}\n")
    (tmp_path / "memory.stat").write_text(f"anon {500 << 20}\nfile {200 << 20}\n")
    assert machine.usable_memory(tmp_path, meminfo) == 524 << 20, "what was read from files does not count"
    (tmp_path / "memory.current").write_text(f"{2 << 30}\n")
    assert machine.usable_memory(tmp_path, meminfo) == 0


def test_memory_kills_are_counted_in_both_kinds_of_cgroup(tmp_path: Path) -> None:
    assert (machine.oom_kills(tmp_path), machine.memory_limit(tmp_path)) == (0, "unknown size")
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("2147483648\n")
    assert (machine.oom_kills(tmp_path), machine.memory_limit(tmp_path)) == (2, "2.0 GiB")
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert machine.memory_limit(tmp_path) == "unknown size", "so says a group without a limit"
    (tmp_path / "memory.events").write_text("low 0\nhigh 0\nmax 9\noom 3\noom_kill 3\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert (machine.oom_kills(tmp_path), machine.memory_limit(tmp_path)) == (3, "unknown size")


# --- the pod's log ------------------------------------------------------------------------------------


def test_every_line_is_relayed_whole_with_its_number(tmp_path: Path) -> None:
    attempt, out = Attempt(tmp_path, 2), io.StringIO()
    attempt.folder.mkdir(parents=True)
    log = PodLog(2, 1, out)
    relay = Relay(log, attempt, attempt.folder / "own.log")
    relay.follow([(3, attempt.folder / "rank-3.log")])
    log.say("hello\nthere")
    with (attempt.folder / "rank-3.log").open("wb") as rank:
        rank.write(b"one\r\ntw")
        rank.flush()
        rank.write("o \u00e9\nnever finished".encode())
    relay.close()
    lines = [parse_line(text) for text in out.getvalue().split("\n")]
    assert [(line.attempt, line.rank, line.number, line.text) for line in lines if line] == [
        (2, -2, 0, "hello"),
        (2, -2, 1, "there"),
        (2, 3, 0, "one"),
        (2, 3, 1, "two \u00e9"),
        (2, 3, 2, "never finished"),
    ]


def test_what_is_waited_for_is_said_at_once_and_every_half_minute() -> None:
    notes, now = Notes(), [0.0]
    teller = Teller(notes, lambda: now[0])  # type: ignore[arg-type]
    for at, what in ((0, "a"), (1, "a"), (29, "a"), (31, "a"), (32, "b"), (40, "b")):
        now[0] = at
        teller.say(what)
    assert notes.said == ["a", "a", "b"]


# --- attempts -----------------------------------------------------------------------------------------


def entrance(run: Path, token: str, node: int = 1) -> Entrance:
    return Entrance(chosen(run, node=node), token, Notes())  # type: ignore[arg-type]


def test_who_may_join(tmp_path: Path) -> None:
    attempt = Attempt.allocate(tmp_path, 3)
    assert attempt.number == 1
    mine, other, successor = entrance(tmp_path, "a"), entrance(tmp_path, "b", node=2), entrance(tmp_path, "c")
    assert mine._obstacle(attempt) is None
    assert mine._obstacle(attempt) is None, "the place is its own already"
    assert other._obstacle(attempt) is None
    mine.avoid(attempt, None)
    assert "not heard of" in str(mine._obstacle(attempt))
    (attempt.folder / "beat.json").write_text('{"beat": 1}')
    assert mine._obstacle(attempt) is None, "node 0 is heard of again"
    assert attempt.missing("joined-{node}.json", 4) == [3]
    assert not (attempt.folder / "lost.json").exists()
    assert "has lost the pod" in str(successor._obstacle(attempt))
    assert json.loads((attempt.folder / "lost.json").read_text())["node"] == 1
    assert "has lost a node" in str(other._obstacle(attempt))


def test_a_predecessor_that_said_how_it_ended_is_not_lost(tmp_path: Path) -> None:
    attempt = Attempt.allocate(tmp_path, 2)
    assert attempt.take_place(1, "a")
    attempt.write_node(1, Ending(Cause.TERMINATED, ""))
    assert "has ended on this node" in str(entrance(tmp_path, "b")._obstacle(attempt))
    assert not (attempt.folder / "lost.json").exists()
    attempt.end(Ending(Cause.TERMINATED, ""))
    assert "attempt 1 has ended" in str(entrance(tmp_path, "b")._obstacle(attempt))


def test_what_makes_a_launcher_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = Attempt.allocate(tmp_path, 2)
    worker = Part(chosen(tmp_path, node=1, stale_seconds=60), attempt)
    main = Part(chosen(tmp_path), attempt)
    assert worker.reason_to_leave("x") is None
    attempt.write_node(1, Ending(Cause.DATA, "bad row"))
    left = main.reason_to_leave("x")
    assert left is not None
    assert (left.cause, left.message) == (Cause.DATA, "node 1: bad row")
    assert worker.reason_to_leave("x") is None, "its own record is no other's"
    attempt.declare_lost(1)
    assert main.interruption() == Ending(Cause.PEER_LOST, "the pod of node 1 vanished without a word and was replaced")
    attempt.end(Ending(Cause.DATA, "bad row"))
    assert worker.interruption() == Ending(Cause.DATA, "bad row")
    Attempt.allocate(tmp_path, 2)
    assert worker.interruption() == main.interruption() == Ending(Cause.SUPERSEDED, "attempt 2 has started")
    for part in (worker, main):
        part.close()


def test_a_master_is_silent_when_its_beat_does_not_change(tmp_path: Path) -> None:
    attempt, now = Attempt.allocate(tmp_path, 2), [0.0]
    part = Part(chosen(tmp_path, node=1, stale_seconds=60), attempt)
    part._master_watch = beat.Watch(lambda: now[0])
    for at, number, silent in ((0, 1, False), (59, 1, False), (60, 1, True), (61, 2, False), (120, 2, False)):
        now[0] = at
        (attempt.folder / "beat.json").write_text(json.dumps({"beat": number}))
        assert part.master_is_silent() is silent, at
    part.close()


def test_a_newer_attempt_fences_the_older(tmp_path: Path) -> None:
    attempt = Attempt.allocate(tmp_path, 1)
    orders = Orders(attempt.folder)
    orders.fence()
    newer = Attempt.allocate(tmp_path, 1)
    with pytest.raises(StopRequested) as stopped:
        orders.fence()
    assert stopped.value.cause == Cause.SUPERSEDED
    Orders(newer.folder).fence()


def test_in_a_pod_the_volume_is_asked_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look lists folders several times, and all nodes wait at once."""
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    attempt = Attempt.allocate(tmp_path, 2)
    for in_pod in (False, True):
        part = Part(chosen(tmp_path, node=1, in_pod=in_pod), attempt)
        looks = iter([None, "found"])
        assert part.wait_for(lambda looks=looks: next(looks), lambda: "waiting", "waiting") == "found"  # type: ignore[misc]
        part.close()
        reasons = iter([None, Ending(Cause.TERMINATED, "")])
        Entrance(chosen(tmp_path / "none", node=1, in_pod=in_pod), "a", Notes()).join(lambda it=reasons: next(it))  # type: ignore[arg-type,misc]
    assert slept == [0.1, 0.1, 0.5, 0.5]


def test_the_newest_checkpoint_is_found_by_name(tmp_path: Path) -> None:
    assert newest_checkpoint_step(tmp_path) is None
    for name in ("step-00000020", "step-00000100", ".step-00000200.tmp", "step-x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_checkpoint_step(tmp_path) == 100


@pytest.mark.parametrize(("terminated", "longest"), [(True, 4), (False, 11)])
def test_a_pod_that_is_about_to_be_killed_does_not_wait_long_for_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminated: bool, longest: float
) -> None:
    """It would be killed before ended.json, and a clean stop would count as a loss."""
    now = [0.0]
    monkeypatch.setattr("time.sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    launcher = Launcher(chosen(tmp_path))
    launcher._terminated = terminated
    part = Part(chosen(tmp_path), Attempt.allocate(tmp_path, 2))
    assert launcher._wait_for_records(part, Ending(Cause.TERMINATED, "")) == [1]
    assert longest - 1 <= now[0] <= longest
    part.close()


# --- the last word ------------------------------------------------------------------------------------


def test_a_launcher_that_never_joined_says_its_end_under_a_number_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who follows the log drops what it has seen by number."""
    launcher = Launcher(chosen(tmp_path / "runs" / "x", in_pod=True, node=1))
    timer = threading.Timer(0.3, lambda: setattr(launcher, "_terminated", True))
    timer.start()
    launcher._say_last(launcher._take_part())
    timer.join()
    lines = [parse_line(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.number for line in lines if line] == list(range(len(lines)))
    assert len(lines) == 2
    assert '"event": "end"' in lines[-1].text


def test_a_full_volume_does_not_swallow_the_last_word(tmp_path: Path) -> None:
    class Full:
        def close(self, last_event: Callable[[], None]) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    word = tmp_path / "termination-log"
    launcher = Launcher(chosen(tmp_path / "runs" / "x", in_pod=True, termination_log=word))
    launcher._part = Full()  # type: ignore[assignment]
    launcher._say_last(Ending(Cause.PEER_LOST, "node 1 vanished without a word"))
    assert word.read_text() == "peer_lost: node 1 vanished without a word"
