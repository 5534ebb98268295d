"""Ranks as real processes over gloo: N ranks train as one does, never hang, and stop together. One to two minutes."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from launched import Run, row
from measured import at_most
from rank_scenarios import (
    BAD_STEP,
    CASES,
    DEFAULT_EPSILON,
    ERRONEOUS,
    ERRORS,
    FEW,
    STEPS,
    checkpoint_of,
    ranks,
)
from train_rank import distance, identical, largest_distance, of_ranks

pytestmark = [pytest.mark.slow, pytest.mark.enable_socket, pytest.mark.timeout(600)]
SEVERAL = (2, 4)
AS_ONE = "2 and 4 ranks train as one, five steps of AdamW"
NEAR_EPSILON = 100 * 1e-8


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    return folder, of_ranks(ranks, folder, (1, *SEVERAL), seconds=400)


@pytest.fixture(scope="module")
def trained(everything: tuple[Path, dict[int, list[Any]]]) -> dict[int, list[Any]]:
    return {world: [rank["steps"] for rank in found] for world, found in everything[1].items()}


def logged(found: dict[str, Any], key: str) -> list[float]:
    return [entry[key] for entry in found["history"] if key in entry]


def relative(found: list[float], expected: list[float]) -> float:
    assert len(found) == len(expected) > 0
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("world", SEVERAL)
@pytest.mark.parametrize("case", CASES)
def test_ranks_train_as_one(trained: dict[int, list[Any]], case: str, world: int) -> None:
    alone, ranks = trained[1][0][case], [rank[case] for rank in trained[world]]
    assert len(logged(alone, "loss")) == STEPS
    at_most(f"{AS_ONE}: loss", relative(logged(ranks[0], "loss"), logged(alone, "loss")), 1e-6)
    for step in range(STEPS):
        at_most(f"{AS_ONE}: gradients", largest_distance(ranks[0]["gradients"][step], alone["gradients"][step]), 1e-5)
        for name, change in alone["changes"][step].items():
            far = distance(ranks[0]["changes"][step][name], change)
            if case in DEFAULT_EPSILON:  # the next test holds all but some elements to 1e-5
                at_most(f"{AS_ONE}, epsilon 1e-8: changes", far, 1e-4)
            else:
                at_most(f"{AS_ONE}, epsilon 1e-6: changes", far, 1e-5)
        for what in ("gradients", "changes"):
            assert all(identical(rank[what][step], ranks[0][what][step]) for rank in ranks)


@pytest.mark.parametrize("world", SEVERAL)
@pytest.mark.parametrize("case", DEFAULT_EPSILON)
def test_what_differs_at_the_default_epsilon_are_elements_with_a_gradient_near_it(
    trained: dict[int, list[Any]], case: str, world: int
) -> None:
    alone, found = trained[1][0][case], trained[world][0][case]
    near = near_epsilon(alone["gradients"])
    claim = f"{AS_ONE}, epsilon 1e-8: changes but for elements near it"
    for expected, changes, left_out in zip(alone["changes"], found["changes"], near, strict=True):
        for name, change in expected.items():
            rest = ~left_out[name]
            at_most(claim, distance(changes[name][rest], change[rest]), 1e-5)
    share = sum(int(mask.sum()) for mask in near[-1].values()) / sum(mask.numel() for mask in near[-1].values())
    at_most(f"{AS_ONE}, epsilon 1e-8: share of elements near it", share, 2e-3)


def near_epsilon(gradients: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """Step -> which elements began, until then, with gradients below NEAR_EPSILON that were not all 0."""
    peaks = {name: torch.zeros_like(gradient) for name, gradient in gradients[0].items()}
    near = {name: torch.zeros_like(gradient, dtype=torch.bool) for name, gradient in gradients[0].items()}
    found = []
    for step in gradients:
        peaks = {name: torch.maximum(peak, step[name].abs()) for name, peak in peaks.items()}
        near = {name: mask | (peaks[name] > 0) & (peaks[name] < NEAR_EPSILON) for name, mask in near.items()}
        found.append(near)
    return found


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_of_ranks_is_seen_by_that(everything: tuple[Path, dict[int, list[Any]]], error: str) -> None:
    found, expected = everything[1][2][0]["errors"][error], everything[1][1][0]["steps"][ERRONEOUS]
    last = STEPS - 1
    assert largest_distance(found["changes"][last], expected["changes"][last]) > 1e-3


@pytest.mark.parametrize("world", SEVERAL)
def test_targets_are_as_uneven_as_that_asks_for(trained: dict[int, list[Any]], world: int) -> None:
    """Of the rows in order: in some step one rank has them all."""
    alone = trained[1][0]["full, one document a row"]["targets"]
    of_steps = list(zip(*(rank["full, one document a row"]["targets"] for rank in trained[world]), strict=True))
    assert [sum(targets) for targets in of_steps] == alone
    assert alone[1] == 1
    assert sum(0 in targets for targets in of_steps) >= world // 2
    assert max(map(max, of_steps)) > 20


@pytest.fixture(scope="module")
def few(everything: tuple[Path, dict[int, list[Any]]]) -> dict[int, list[Any]]:
    return {world: [rank["few"] for rank in found] for world, found in everything[1].items()}


@pytest.mark.parametrize("world", SEVERAL)
@pytest.mark.parametrize("case", FEW)
def test_ranks_without_rows_wait_for_nobody(few: dict[int, list[Any]], case: str, world: int) -> None:
    """Training, evaluation and checkpoints with fewer rows than ranks."""
    alone, ranks = few[1][0][case], [rank[case] for rank in few[world]]
    for key in ("loss", "eval_loss"):
        at_most(
            "fewer rows than ranks: loss and evaluation as one rank",
            relative(logged(ranks[0], key), logged(alone, key)),
            1e-6,
        )
    assert logged(ranks[0], "eval_targets") == logged(alone, "eval_targets")
    at_most("fewer rows than ranks: seconds for four steps", max(rank["seconds"] for rank in ranks), 30)


@pytest.fixture(scope="module")
def spoiled(everything: tuple[Path, dict[int, list[Any]]]) -> tuple[Path, list[Any]]:
    return everything[0] / "of-2" / "spoiled", [rank["spoiled"] for rank in everything[1][2]]


@pytest.mark.parametrize(("name", "said"), [("loss", "loss nan"), ("gradient", "gradient norm (inf|nan)")])
def test_what_one_rank_alone_meets_stops_all_with_the_step_before_saved(
    spoiled: tuple[Path, list[Any]], name: str, said: str
) -> None:
    """A token with an infinite embedding, or an infinite gradient under a finite loss; dropout on."""
    folder, ranks = spoiled
    saved = folder / name / "checkpoints" / f"step-{BAD_STEP - 1:08d}"
    message, hint, done = ranks[0][name]
    assert ranks[1][name] == ranks[0][name]
    assert done == BAD_STEP - 1
    assert re.search(rf"^step {BAD_STEP}: .*{said}", message), message
    if name == "gradient":
        assert "loss nan" not in message
    assert "(rows 24, 25, 26, 27, 28, 29, 30, 31 of the plan)" in message
    assert f"the weights after step {BAD_STEP - 1} are saved; last good checkpoint: {saved}; try" in hint
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    undisturbed, found = (checkpoint_of(folder / run, BAD_STEP - 1) for run in ("whole", name))
    assert found.keys() == undisturbed.keys()
    assert {"random-state-0.pt", "random-state-1.pt", "optimizer.pt", "adapter_model.safetensors"} <= found.keys()
    claim = f"a {name} that is not finite on one of two ranks"
    others = [file for file in found if found[file] != undisturbed[file]]
    at_most(f"{claim}: files of the step before that differ from an undisturbed run's", len(others), 0)
    for rank in ranks:
        assert rank[f"{name}, resumed"][1] == rank["whole"][1]
        resumed, whole = rank[f"{name}, resumed"][0], rank["whole"][0]
        at_most(f"{claim}, resumed: weights differ from an undisturbed run's by", largest_distance(resumed, whole), 0)
        assert identical(resumed, whole)


def test_the_launcher_says_it_and_another_attempt_goes_on_from_there(tmp_path: Path) -> None:
    """One document of 120 holds a token with an infinite embedding: one of two ranks meets it, again and again."""
    model, tokenizer = tiny.make_model(), tiny.make_tokenizer()
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("~")] = math.inf
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    run = Run(tmp_path, tmp_path / "model", devices=2, max_steps=60, save_steps=1000)
    lines = [row(i) for i in range(120)]
    run.data.write_text("".join([*lines[:50], lines[50].replace("plus", "~"), *lines[51:]]))
    assert run.finish() == 4
    ended = run.attempt("ended.json")
    step = int(re.match(r"step (\d+): loss nan, ", ended["message"])[1])  # type: ignore[index]
    saved = run.folder / "checkpoints" / f"step-{step - 1:08d}"
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    assert f"last good checkpoint: {saved}; try" in ended["hint"]
    outcomes = [run.attempt(f"rank-{rank}.outcome.json") for rank in (0, 1)]
    assert [(o["cause"], o["message"]) for o in outcomes] == [("non_finite", ended["message"])] * 2
    assert run.finish() == 4
    assert run.attempt("ended.json")["message"] == ended["message"]
    resumed = [event["step"] for event in run.events() if event["event"] == "resumed"]
    assert resumed == [step - 1]
