"""Faults of one machine, caused for real: what becomes of the run (docs/faults.md). About 5 min."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import tiny
import torch
from launched import MakePods, Run, with_faults
from measured import at_most
from memory_limit import limited_to
from volumes import small_volume

from opensloth.checkpoint import MANIFEST, OPTIMIZER, fault_in
from opensloth.pod_log import parse_line

pytestmark = [pytest.mark.slow, pytest.mark.enable_socket, pytest.mark.timeout(300)]
STEPS = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, model: Path) -> dict[str, torch.Tensor]:
    """The weights of a run that nothing happens to."""
    whole = Run(tmp_path_factory.mktemp("whole"), model, max_steps=STEPS)
    assert whole.finish() == 0, whole.said()
    return whole.weights()


def check_same(run: Run, expected: dict[str, torch.Tensor]) -> None:
    worst = max(float((tensor - expected[name]).norm()) for name, tensor in run.weights().items())
    at_most("weights after a fault and a resume differ from the uninterrupted run's by", worst, 0)


def checkpoints(run: Run) -> list[str]:
    return sorted(path.name for path in (run.folder / "checkpoints").iterdir())


def resumed(run: Run) -> list[int]:
    return [event["step"] for event in run.events() if event["event"] == "resumed"]


# --- processes ----------------------------------------------------------------------------------------


def test_all_ranks_killed_at_once(tmp_path: Path, model: Path) -> None:
    run = Run(tmp_path, model, devices=2)
    run.start()
    run.until_step(7)
    for rank in run.ranks():
        os.kill(rank, signal.SIGKILL)
    assert run.wait() == 143
    ended = run.attempt("ended.json")
    assert ended["cause"] == "killed"
    assert "was killed (SIGKILL)" in ended["message"]
    assert run.finish() == 0, run.said()
    assert resumed(run)[0] >= 5


def test_one_rank_terminated_and_the_other_killed(tmp_path: Path, model: Path) -> None:
    """The request is what the attempt ended for; the checkpoint before stands."""
    run = Run(tmp_path, model, devices=2)
    run.start()
    run.until_step(7)
    ranks = run.ranks()
    os.kill(ranks[0], signal.SIGKILL)
    os.kill(ranks[1], signal.SIGTERM)
    assert run.wait() == 143
    assert run.attempt("ended.json")["cause"] in ("killed", "terminated")
    assert fault_in(run.folder / "checkpoints" / "step-00000005") is None
    assert run.ranks() == []


def test_the_launcher_is_killed_and_the_run_goes_on(
    tmp_path: Path, model: Path, expected: dict[str, torch.Tensor]
) -> None:
    run = Run(tmp_path, model, max_steps=STEPS)
    run.start()
    run.until_step(7)
    assert run.process is not None
    run.process.kill()
    run.process.wait()
    assert run.finish() == 0, run.said()
    assert resumed(run)[0] >= 5
    check_same(run, expected)


# --- checkpoints --------------------------------------------------------------------------------------


def test_a_checkpoint_of_45_seconds_survives_a_termination(
    tmp_path: Path, model: Path, expected: dict[str, torch.Tensor]
) -> None:
    run = Run(tmp_path, model, max_steps=STEPS, save_steps=1000)
    run.env = with_faults(save_seconds=45)
    run.start()
    run.until_step(3)
    assert run.process is not None
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 143, run.said()
    step = int(run.attempt("ended.json")["message"].split()[3])
    assert checkpoints(run) == [f"step-{step:08d}"]
    assert next(event for event in run.events() if event["event"] == "checkpoint")["seconds"] > 45
    run.env = {}
    assert run.finish() == 0, run.said()
    assert resumed(run) == [step]
    check_same(run, expected)


def test_a_checkpoint_that_outlasts_the_grace_period_does_not_count(tmp_path: Path, model: Path) -> None:
    run = Run(tmp_path, model, max_steps=STEPS, save_steps=1000)
    run.env = with_faults(save_seconds=30) | {"OSLO_GRACE_SECONDS": "3"}
    run.start()
    run.until_step(3)
    assert run.process is not None
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 143, run.said()
    assert "the ranks had to be killed, the last checkpoint stands" in run.attempt("ended.json")["message"]
    assert all(name.startswith(".") for name in checkpoints(run))
    assert run.ranks() == []
    run.env = {}
    assert run.finish() == 0, run.said()
    assert resumed(run) == []
    assert checkpoints(run) == []


def test_damaged_checkpoints_are_passed_over_and_the_log_says_so(
    tmp_path: Path, model: Path, expected: dict[str, torch.Tensor]
) -> None:
    run = Run(tmp_path, model, max_steps=STEPS, save_steps=2, save_total_limit=None)
    run.start()
    run.until_step(9)
    assert run.process is not None
    run.process.kill()
    run.process.wait()
    run.until_true(lambda: run.ranks() == [])
    shutil.rmtree(run.folder / "attempts" / "1")  # its ranks have saved once more when they lost their launcher
    good, *damaged = (run.folder / "checkpoints" / name for name in checkpoints(run)[-4:])
    adapter = bytearray((damaged[0] / "adapter_model.safetensors").read_bytes())
    adapter[-1] ^= 1
    (damaged[0] / "adapter_model.safetensors").write_bytes(adapter)
    os.truncate(damaged[1] / OPTIMIZER, (damaged[1] / OPTIMIZER).stat().st_size - 1)
    manifest = (damaged[2] / MANIFEST).read_text()
    (damaged[2] / MANIFEST).write_text(manifest[: len(manifest) // 2])
    assert run.finish() == 0, run.said()
    log = (run.folder / "attempts" / "1" / "rank-0.log").read_text()
    for folder, fault in zip(
        damaged,
        (
            "adapter_model.safetensors does not match its hash",
            f"{OPTIMIZER} is missing or cut short",
            "its manifest is missing, torn or altered",
        ),
        strict=True,
    ):
        assert f"checkpoint {folder.name} is passed over: {fault}" in log
    assert resumed(run) == [int(good.name.split("-")[1])]
    check_same(run, expected)


# --- the volume ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [48 << 10, 0], ids=["too little for a checkpoint", "none at all"])
def test_a_volume_that_is_full_at_a_checkpoint(
    tmp_path: Path, model: Path, room: int, expected: dict[str, torch.Tensor]
) -> None:
    with small_volume(tmp_path / "volume", 16) as volume:
        run = Run(volume, model, max_steps=STEPS)
        run.env = with_faults(steps_per_second=4)
        run.start()
        run.until(lambda events: any(event["event"] == "checkpoint" for event in events))
        with (volume / "ballast").open("wb") as ballast:
            os.posix_fallocate(ballast.fileno(), 0, shutil.disk_usage(volume).free - room)
        assert run.wait() == 2, run.said()
        if room:
            ended = run.attempt("ended.json")
            assert ended["cause"] == "config"
            assert ended["message"] == "no room is left on the volume ([Errno 28] No space left on device)"
            assert "submit again" in ended["hint"]
        assert checkpoints(run) == ["step-00000005"], "the one before stands, and nothing else is left"
        (volume / "ballast").unlink()
        run.env = {}
        assert run.finish() == 0, run.said()
        assert resumed(run) == [5]
        check_same(run, expected)
        second = [event["step"] for event in run.events() if event["event"] == "step" and event["attempt"] == 2]
        assert second == list(range(6, STEPS + 1)), "a torn line swallows none that follows"


# --- memory -------------------------------------------------------------------------------------------


def test_a_container_that_reaches_its_memory_limit_is_named_and_final(pods: MakePods) -> None:
    """The kernel kills for real: the pod's processes are in a memory cgroup that they see as containers do."""
    with limited_to(2 << 30) as wrapper:
        run = pods(nodes=1, env=with_faults(memory={"step": 4}))
        run.wrapper = wrapper
        assert run.finish_all() == [5], run.said()
        ended = run.attempt("ended.json")
        assert ended["cause"] == "out_of_memory"
        assert "rank 0 was killed (SIGKILL): the container reached its memory limit of 2.0 GiB" in ended["message"]
        assert "job.memory" in ended["hint"]


def test_a_rank_that_is_given_no_more_memory_is_named_and_final(tmp_path: Path, model: Path) -> None:
    run = Run(tmp_path, model)
    run.env = with_faults(memory={"step": 4, "limit": True})
    assert run.finish() == 5, run.said()
    ended = run.attempt("ended.json")
    assert ended["cause"] == "out_of_memory"
    assert ended["message"] == "out of memory: host"


# --- the clock ----------------------------------------------------------------------------------------


def test_a_clock_that_jumps_changes_nothing(pods: MakePods, tmp_path: Path) -> None:
    """Forwards by half a day, then backwards by a whole one, under a deadline and a limit to silence of minutes."""
    clock = tmp_path / "clock"
    env = {"OSLO_STALE_SECONDS": "30", "OSLO_DEADLINE_SECONDS": "900", "OSLO_HUNG_SECONDS": "60"}
    run = pods(max_steps=40, env=env | with_faults(clock=str(clock), steps_per_second=4))
    run.start()
    run.until_step(4)
    clock.write_text("43200")
    run.until_step(14)
    clock.write_text("-43200")
    assert run.codes() == [0, 0], run.said()
    steps = [event for event in run.events() if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, 41))
    times = [event["time"] for event in steps]
    assert max(times) - times[0] > 40_000
    assert times[-1] - times[0] < -40_000, "the ranks' clock has jumped both ways"
    assert all(0 <= event["eta"] < 900 for event in steps)
    assert all(event["target_tokens_per_second"] > 0 for event in steps)
    assert 0 < run.attempt("beat.json")["train_seconds"] < 300
    assert run.attempt("ended.json")["cause"] == "succeeded"
    for node in (0, 1):
        lines = [parse_line(text) for text in run.out(node).read_text().splitlines()]
        numbers = [line.number for line in lines if line is not None and line.rank == node]
        assert numbers == list(range(len(numbers)))
