"""A resumed run is the uninterrupted one, at 1, 2 and 4 ranks and at another number of them. About two minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from measured import at_least, at_most
from rank_scenarios import (
    REDUCTIONS,
    RESUMED,
    TOTAL,
    finish,
    reduced_by_each,
    resumed,
    stop_after,
    taken_over,
    together,
    uninterrupted,
)
from train_rank import identical, largest_distance, of_ranks

from opensloth import checkpoint, optimizer, trainer
from opensloth.data.order import RowOrder

pytestmark = [pytest.mark.slow, pytest.mark.enable_socket, pytest.mark.timeout(600)]
WORLDS = (1, 2, 4)
INTERRUPTIONS = [*(f"stopped after {step}" for step in range(1, TOTAL)), "stopped after each", "killed in step 6"]


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[Any]]]:
    folder = tmp_path_factory.mktemp("resumed")
    return folder, of_ranks(resumed, folder, WORLDS, seconds=500)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", RESUMED)
@pytest.mark.parametrize("interruption", INTERRUPTIONS)
def test_an_interrupted_run_ends_as_an_uninterrupted_one_bit_for_bit(
    everything: tuple[Path, dict[int, list[Any]]], interruption: str, case: str, world: int
) -> None:
    """Dropout on; a schedule with warm-up; evaluations and checkpoints in between; SIGTERM to one rank only.

    Losses, rates, gradient norms and evaluations of every step, weights, and AdamW's moments.
    """
    for rank in everything[1][world]:
        whole, found = (rank["interrupted"][case][part] for part in ("whole", interruption))
        assert found["history"] == whole["history"]
        for what in ("weights", "moments"):
            claim = f"resumed at the same number of ranks, {world}: {what} differ from the uninterrupted run's by"
            at_most(claim, largest_distance(found[what], whole[what]), 0)
            assert identical(found[what], whole[what])


def test_those_runs_cross_epochs_and_are_evaluated(everything: tuple[Path, dict[int, list[Any]]]) -> None:
    whole = everything[1][1][0]["interrupted"]["adapter"]["whole"]["history"]
    steps = [entry for entry in whole if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, TOTAL + 1))
    assert [entry["step"] for entry in whole if "eval_loss" in entry] == [2, 4, 6, 7]
    assert steps[2]["epoch"] == 1
    assert steps[-1]["epoch"] > 2
    assert len({entry["learning_rate"] for entry in steps}) > 4


def test_dropout_is_on_and_each_rank_has_its_own(everything: tuple[Path, dict[int, list[Any]]]) -> None:
    """Else nothing above would tell whether random states are restored."""
    found = everything[1]
    runs = {world: found[world][0]["interrupted"]["full"]["whole"]["history"] for world in WORLDS}
    losses = {world: [entry["loss"] for entry in run if "loss" in entry] for world, run in runs.items()}
    still = [entry["loss"] for entry in found[1][0]["taken over"]["full"]["whole"]["history"] if "loss" in entry]
    assert len({*(each[0] for each in losses.values()), still[0]}) == len(WORLDS) + 1


@pytest.fixture(scope="module")
def changes_of_ranks(everything: tuple[Path, dict[int, list[Any]]]) -> dict[str, list[Any]]:
    """From -> to, the ranks that went on."""
    folder, found = everything
    back = of_ranks(taken_over, folder, (1,), seconds=60)[1]
    return {
        "1 -> 2": [rank["taken over"] for rank in found[2]],
        "2 -> 4": [rank["taken over"] for rank in found[4]],
        "4 -> 1": back,
    }


@pytest.mark.parametrize("case", ["adapter", "full"])
@pytest.mark.parametrize("change", ["1 -> 2", "2 -> 4", "4 -> 1"])
def test_another_number_of_ranks_goes_on_with_the_same_rows(
    everything: tuple[Path, dict[int, list[Any]]], changes_of_ranks: dict[str, list[Any]], change: str, case: str
) -> None:
    ranks = [rank[case] for rank in changes_of_ranks[change]]
    alone = everything[1][1][0]["taken over"][case]
    assert together([rank["whole rows"] for rank in ranks]) == alone["whole rows"]
    rest = {step: rows for step, rows in alone["whole rows"].items() if step > 3}
    assert together([rank["resumed rows"] for rank in ranks]) == rest
    assert len(rest) == TOTAL - 3
    found, whole = ranks[0]["resumed"]["history"], alone["whole"]["history"]
    assert [entry["step"] for entry in found] == [entry["step"] for entry in whole]
    for key in ("loss", "eval_loss"):
        pairs = [(a[key], b[key]) for a, b in zip(found, whole, strict=True) if key in b]
        off = max(abs(a - b) / b for a, b in pairs)
        at_most("resumed at another number of ranks: losses as uninterrupted, dropout off", off, 1e-6)


@pytest.fixture(scope="module")
def reduced(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return of_ranks(reduced_by_each, tmp_path_factory.mktemp("reduced"), (4,), seconds=100)[4]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_why_gradients_are_not_summed_by_ddp(reduced: list[Any], reduction: str) -> None:
    """Four ranks. DDP orders its buckets anew after the first step of a process, and so adds in another order.

    That this is all: it is bit-identical again when the uninterrupted run makes its DDP anew where the other resumed.
    """
    runs = [rank[reduction] for rank in reduced]
    assert all(identical(run["resumed"], runs[0]["resumed"]) for run in runs), "ranks agree"
    assert identical(runs[0]["resumed"], runs[0]["whole"]) == (reduction != "DDP")
    if reduction == "DDP":
        claim, ours = "gradients averaged by DDP, 4 ranks: weights", reduced[0][REDUCTIONS[0]]["whole"]
        at_least(f"{claim} after resuming differ by", largest_distance(runs[0]["resumed"], runs[0]["whole"]), 1e-9)
        at_most(f"{claim} of the uninterrupted run as ours", largest_distance(runs[0]["whole"], ours), 1e-6)


def _forgetting(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Make resuming forget one thing."""
    restore, rows = optimizer.restore, RowOrder.micro_batches

    def forgetful(optimizer: Any, scheduler: Any, saved: dict[str, Any]) -> None:
        kept = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        restore(optimizer, scheduler, saved | ({what: kept[what]} if what in kept else {}))

    monkeypatch.setattr(trainer, "restore", forgetful)
    if what == "random states":
        monkeypatch.setattr(checkpoint, "set_random_state", lambda *_: None)
    if what == "the epoch":
        monkeypatch.setattr(RowOrder, "micro_batches", lambda self, step, rank: rows(self, step % 3, rank))
    if what == "the place in the epoch":
        monkeypatch.setattr(RowOrder, "micro_batches", lambda self, step, rank: rows(self, step - 4, rank))


@pytest.mark.parametrize(
    "what",
    ["nothing", "optimizer", "scheduler", "random states", "the epoch", "the place in the epoch"],
)
def test_what_resuming_forgets_is_seen_by_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    whole = uninterrupted(tmp_path / "whole", "adapter")
    stop_after(tmp_path / "parts", "adapter", 4)
    _forgetting(monkeypatch, what)
    found = finish(tmp_path / "parts", "adapter", 4)
    same = found["history"] == whole["history"], identical(found["weights"], whole["weights"])
    assert same == ((True, True) if what == "nothing" else (False, False))
