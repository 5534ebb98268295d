"""The arithmetic of time, against docs/performance.md: an H100 and an H200."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from qwen_shapes import QWEN

from opensloth.memory_estimate import Batch, Keep, Keeping, Method
from opensloth.model_shape import ModelShape
from opensloth.opensloth_config import LORA_TARGETS
from opensloth.speed_estimate import Card, Step, tokens_per_second

DOC = Path(__file__).parents[2] / "docs" / "memory.md"
H100, H200 = Card(989e12, 3350e9, 64e9, hopper=True), Card(989e12, 4800e9, 64e9, hopper=True)
MEAN, ONE = 480, 16_384
"""Tokens of a document there: drawn, and a row's."""
SHAPES = {size: ModelShape.from_config(config) for size, config in QWEN.items()}
LORA = Method(8, LORA_TARGETS, 16, 8, fused=True)
FULL = Method(0, (), 16, 8, fused=True)
FULL_8_BIT = Method(0, (), 16, 2, fused=True)
FOUR_BITS = dataclasses.replace(LORA, bits=4)

MEASURED = [
    ("0.5B, 2 rows", "H100", "0.5b", LORA, 8192, 1.0, Keeping(Keep.ALL), MEAN, 143_100),
    ("0.5B, 2 rows", "H200", "0.5b", LORA, 8192, 1.0, Keeping(Keep.ALL), MEAN, 154_400),
    ("0.5B, 2 rows, steps alone", "H100", "0.5b", LORA, 8192, 1.0, Keeping(Keep.INPUTS), MEAN, 121_500),
    ("0.5B, 8 rows", "H100", "0.5b", LORA, 32_768, 1.0, Keeping(Keep.ALL), MEAN, 160_200),
    ("0.5B, 8 rows", "H200", "0.5b", LORA, 32_768, 1.0, Keeping(Keep.ALL), MEAN, 173_600),
    ("0.5B, 8 rows, 40 % targets", "H100", "0.5b", LORA, 32_768, 0.4, Keeping(Keep.ALL), MEAN, 180_700),
    ("0.5B, 8 rows, 40 % targets", "H200", "0.5b", LORA, 32_768, 0.4, Keeping(Keep.ALL), MEAN, 198_200),
    ("0.5B, 1 row of 16,384", "H200", "0.5b", LORA, 16_384, 1.0, Keeping(Keep.ALL), MEAN, 168_600),
    ("the same, steps alone", "H100", "0.5b", LORA, 16_384, 1.0, Keeping(Keep.ALL), MEAN, 155_900),
    ("the same, one document of 16,384", "H200", "0.5b", LORA, 16_384, 1.0, Keeping(Keep.ALL), ONE, 89_900),
    ("0.5B, every weight, steps alone", "H100", "0.5b", FULL, 8192, 1.0, Keeping(Keep.INPUTS), MEAN, 93_000),
    ("0.5B, every weight", "H100", "0.5b", FULL, 8192, 1.0, Keeping(Keep.ALL), MEAN, 113_500),
    ("0.5B, every weight", "H200", "0.5b", FULL, 8192, 1.0, Keeping(Keep.ALL), MEAN, 119_400),
    ("the same, AdamW in 8 bits", "H200", "0.5b", FULL_8_BIT, 8192, 1.0, Keeping(Keep.ALL), MEAN, 115_900),
    ("the same, steps alone", "H100", "0.5b", FULL_8_BIT, 8192, 1.0, Keeping(Keep.ALL), MEAN, 106_400),
    ("1.5B, 2 rows, steps alone", "H100", "1.5b", LORA, 8192, 1.0, Keeping(Keep.ALL), MEAN, 62_900),
    ("1.5B, 2 rows, steps alone", "H100", "1.5b", LORA, 8192, 1.0, Keeping(Keep.INPUTS), MEAN, 50_100),
    ("1.5B, 4 bits, steps alone", "H100", "1.5b", FOUR_BITS, 8192, 1.0, Keeping(Keep.ALL), MEAN, 59_800),
    ("1.5B, every weight, steps alone", "H100", "1.5b", FULL, 8192, 1.0, Keeping(Keep.ALL), MEAN, 43_100),
    ("the same, AdamW in 8 bits", "H100", "1.5b", FULL_8_BIT, 8192, 1.0, Keeping(Keep.ALL), MEAN, 43_500),
    ("7B, 2 rows", "H100", "7b", LORA, 8192, 1.0, Keeping(Keep.ALL), MEAN, 17_980),
    ("7B, 2 rows", "H200", "7b", LORA, 8192, 1.0, Keeping(Keep.ALL), MEAN, 18_490),
    ("7B, 2 rows, steps alone", "H100", "7b", LORA, 8192, 1.0, Keeping(Keep.INPUTS), MEAN, 13_820),
    ("7B, 2 rows", "H100", "7b", LORA, 8192, 1.0, Keeping(Keep.HOST, 6), MEAN, 15_530),
    ("7B, 2 rows", "H200", "7b", LORA, 8192, 1.0, Keeping(Keep.HOST, 6), MEAN, 15_810),
    ("7B, 2 rows", "H100", "7b", LORA, 8192, 1.0, Keeping(Keep.HOST, 2), MEAN, 14_850),
    ("7B, 2 rows", "H200", "7b", LORA, 8192, 1.0, Keeping(Keep.HOST, 2), MEAN, 15_420),
    ("7B, 2 rows, steps alone", "H100", "7b", LORA, 8192, 1.0, Keeping(Keep.HOST), MEAN, 14_510),
    ("7B, 2 rows, steps alone", "H100", "7b", LORA, 8192, 1.0, Keeping(Keep.HOST_INPUTS), MEAN, 13_330),
    ("7B, every weight, steps alone", "H200", "7b", FULL, 8192, 1.0, Keeping(Keep.INPUTS), MEAN, 9_970),
    ("the same, AdamW in 8 bits", "H200", "7b", FULL_8_BIT, 8192, 1.0, Keeping(Keep.INPUTS), MEAN, 9_880),
    ("the same, AdamW in 8 bits", "H200", "7b", FULL_8_BIT, 8192, 1.0, Keeping(Keep.ALL), MEAN, 11_720),
]
"""Tokens a second (docs/performance.md)."""


@pytest.mark.parametrize(
    ("title", "card", "size", "method", "tokens", "targets", "keeping", "document", "measured"), MEASURED
)
def test_within_ten_percent_of_what_was_measured(
    title: str,
    card: str,
    size: str,
    method: Method,
    tokens: int,
    targets: float,
    keeping: Keeping,
    document: float,
    measured: int,
) -> None:
    step = Step(Batch(tokens, round(tokens * targets)), 1, document, min(tokens, 16_384))
    found = tokens_per_second(SHAPES[size], method, step, keeping, {"H100": H100, "H200": H200}[card])
    assert found == pytest.approx(measured, rel=0.1)
    row = f"| {title} | {card} | {keeping} | {measured:,} | {round(found, -2):,.0f} |"
    assert row in DOC.read_text(), f"docs/memory.md lacks\n{row}"


def test_a_lesser_card_is_slower_by_what_it_lacks() -> None:
    step = Step(Batch(8192, 8192), 1, MEAN, 4096)
    whole, half = (
        tokens_per_second(
            SHAPES["7b"],
            LORA,
            step,
            Keeping(Keep.ALL),
            Card(share * H100.operations, share * H100.bandwidth, H100.link),
        )
        for share in (1.0, 0.5)
    )
    assert half == pytest.approx(whole / 2, rel=0.05)


def test_long_documents_are_faster_where_cudnn_attends() -> None:
    def rate(document: int, card: Card) -> float:
        step = Step(Batch(16_384, 16_384), 1, document, 16_384)
        return tokens_per_second(SHAPES["0.5b"], LORA, step, Keeping(Keep.ALL), card)

    other = dataclasses.replace(H100, hopper=False)
    assert rate(8191, H100) == rate(8191, other)
    assert rate(8192, H100) > 1.2 * rate(8192, other)


def test_a_token_sees_half_a_row_at_most() -> None:
    def rate(document: int, row: int) -> float:
        step = Step(Batch(4096, 4096), 1, document, row)
        return tokens_per_second(SHAPES["0.5b"], LORA, step, Keeping(Keep.ALL), H100)

    assert rate(4096, 4096) == rate(4000, 4096) < rate(2000, 4096)


def test_accumulation_pays_for_the_optimizer_once() -> None:
    batch = Batch(8192, 8192)
    one, many = (
        tokens_per_second(SHAPES["0.5b"], FULL, Step(batch, accumulation, MEAN, 4096), Keeping(Keep.ALL), H100)
        for accumulation in (1, 16)
    )
    assert many > 1.05 * one


def test_the_more_layers_keep_all_the_faster() -> None:
    step = Step(Batch(8192, 8192), 1, MEAN, 4096)
    rates = [tokens_per_second(SHAPES["7b"], LORA, step, Keeping(Keep.INPUTS, whole), H100) for whole in range(29)]
    assert rates == sorted(set(rates))
    assert rates[-1] == tokens_per_second(SHAPES["7b"], LORA, step, Keeping(Keep.ALL), H100)
