"""Weights in 4 bits on several ranks, as real processes over gloo; and the state of an optimizer of 8 bits, kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from measured import at_most
from train_rank import history, identical, largest_distance, make, of_ranks, weights

from opensloth.checkpoint import OPTIMIZER
from opensloth.hardware import Hardware

pytest.importorskip("bitsandbytes")
quantised_scenarios = pytest.importorskip("quantised_scenarios")


@pytest.mark.slow
@pytest.mark.enable_socket
@pytest.mark.timeout(300)
def test_two_ranks_train_weights_in_four_bits_as_one(tmp_path: Path) -> None:
    found = of_ranks(quantised_scenarios.trained, tmp_path, (1, 2), seconds=200)
    for way in quantised_scenarios.WAYS:
        alone, ranks = found[1][0][way], [rank[way] for rank in found[2]]
        assert len([entry for entry in alone["history"] if "loss" in entry]) == quantised_scenarios.STEPS
        first, last = alone["adapter"]
        assert largest_distance(last, first) > 0.01
        far = largest_distance(ranks[0]["adapter"][1], last)
        at_most("2 ranks train an adapter on weights in 4 bits as one: weights", far, 1e-5)
        assert identical(ranks[1]["adapter"][1], ranks[0]["adapter"][1])
        for before, after in (run["frozen"] for run in (alone, *ranks)):
            assert [stored.dtype for stored in before.values()] == [torch.uint8] * 14, "seven of each layer"
            assert identical(before, alone["frozen"][0])
            assert identical(after, before)


def test_moments_in_8_bits_come_back_from_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes keeps those of the two larger matrices in 8 bits; a run goes on from them to the same bits."""
    # Its optimizer computes on a CPU as well, where the product has no use for it.
    monkeypatch.setattr(Hardware, "quantises", True)
    options: dict[str, Any] = {"full": True, "optim": "adamw_8bit", "max_steps": 6, "save_steps": 3}
    whole, resumed = (
        make(tmp_path / name, tiny.random_rows(60), save_strategy="steps", save_total_limit=2, **options)
        for name in ("whole", "resumed")
    )
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-00000003"
    saved = torch.load(checkpoint / OPTIMIZER, weights_only=True)["optimizer"]["state"]
    assert [kinds(state) for state in saved.values()].count(EIGHT_BITS) == 2
    resumed.train(resume_from_checkpoint=checkpoint)
    assert history(resumed)[-3:] == history(whole)[-3:]
    assert identical(weights(resumed), weights(whole))
    found, expected = moments(resumed), moments(whole)
    assert {name: tensor.dtype for name, tensor in found.items()} == {n: t.dtype for n, t in expected.items()}
    assert identical(found, expected)


EIGHT_BITS = {
    "state1": torch.uint8, "state2": torch.uint8, "qmap1": torch.float32, "qmap2": torch.float32,
    "absmax1": torch.float32, "absmax2": torch.float32, "step": torch.int64,
}  # fmt: skip


def kinds(state: dict[str, Any]) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in flat(state).items()}


def moments(trainer: Any) -> dict[str, torch.Tensor]:
    """Of every weight, by its number."""
    return flat(trainer._optimizer.state_dict()["state"])


def flat(state: dict[Any, Any]) -> dict[str, torch.Tensor]:
    """The package puts its quantised tensors one level deeper than others."""
    found: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if not isinstance(value, dict):
            found[str(name)] = torch.as_tensor(value)
        elif isinstance(name, int):
            found |= {f"{name}.{key}": tensor for key, tensor in flat(value).items()}
        else:
            found |= flat(value)
    return found
