"""The arithmetic of time, against docs/performance.md: an H100."""

from __future__ import annotations

import pytest

from opensloth.memory_estimate import Batch, Keep, Method
from opensloth.model_shape import ModelShape
from opensloth.opensloth_config import LORA_TARGETS
from opensloth.speed_estimate import SPREAD, Card, Step, tokens_per_second

H100 = Card(989e12, 3350e9)
BARE = 134_000 / 142_500
"""A run through the launcher, of the steps alone: the one that was measured both ways."""
MEAN = 480
"""Tokens of a document there."""
ONE = 16_384 / 2 / SPREAD
"""A row that is one document: a token sees half of it."""
SHAPES = {
    "0.5b": ModelShape.from_config(
        dict(
            model_type="qwen2", hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
            num_key_value_heads=2, vocab_size=151_936, tie_word_embeddings=True,
        )
    ),
    "7b": ModelShape.from_config(
        dict(
            model_type="qwen2", hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28,
            num_attention_heads=28, num_key_value_heads=4, vocab_size=152_064, tie_word_embeddings=False,
        )
    ),
}  # fmt: skip
LORA = Method(8, LORA_TARGETS, 16, 8, fused=True)
FULL = Method(0, (), 16, 8, fused=True)


@pytest.mark.parametrize(
    ("size", "method", "tokens", "targets", "keep", "document", "steps_alone"),
    [
        ("0.5b", LORA, 8192, 1.0, Keep.ALL, MEAN, 142_500),
        ("0.5b", LORA, 8192, 0.4, Keep.ALL, MEAN, 151_900),
        ("0.5b", LORA, 8192, 1.0, Keep.ATTENTION, MEAN, 119_000),
        ("0.5b", LORA, 8192, 1.0, Keep.INPUTS, MEAN, 115_100),
        ("0.5b", LORA, 8192, 1.0, Keep.HOST, MEAN, 111_100),
        ("0.5b", LORA, 32_768, 1.0, Keep.ALL, MEAN, 158_600),
        ("0.5b", LORA, 16_384, 1.0, Keep.ALL, MEAN, 151_700),
        ("0.5b", LORA, 16_384, 1.0, Keep.ALL, ONE, 65_100),
        ("0.5b", FULL, 8192, 1.0, Keep.INPUTS, MEAN, 89_500),
        ("0.5b", FULL, 8192, 1.0, Keep.ALL, MEAN, 108_100),
        ("7b", LORA, 8192, 1.0, Keep.ALL, MEAN, 18_060),
        ("7b", LORA, 8192, 1.0, Keep.INPUTS, MEAN, 13_170),
        ("7b", LORA, 8192, 1.0, Keep.HOST, MEAN, 13_060),
    ],
)
def test_within_ten_percent_of_what_was_measured(
    size: str, method: Method, tokens: int, targets: float, keep: Keep, document: float, steps_alone: float
) -> None:
    step = Step(Batch(tokens, round(tokens * targets)), 1, document)
    found = tokens_per_second(SHAPES[size], method, step, keep, H100)
    assert found == pytest.approx(steps_alone * BARE, rel=0.1)


def test_a_lesser_card_is_slower_by_what_it_lacks() -> None:
    step = Step(Batch(8192, 8192), 1, MEAN)
    whole, half = (
        tokens_per_second(SHAPES["7b"], LORA, step, Keep.ALL, Card(share * H100.operations, share * H100.bandwidth))
        for share in (1.0, 0.5)
    )
    assert half == pytest.approx(whole / 2, rel=0.05)


def test_accumulation_pays_for_the_optimizer_once() -> None:
    batch = Batch(8192, 8192)
    one, many = (
        tokens_per_second(SHAPES["0.5b"], FULL, Step(batch, accumulation, MEAN), Keep.ALL, H100)
        for accumulation in (1, 16)
    )
    assert many > 1.05 * one
