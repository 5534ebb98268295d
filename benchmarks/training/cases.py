"""The cases: what is compared with what, and the bars."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from training.legs import OSLO, Leg

BEST = "trl+liger/flex"
"""The fastest peer wherever it compiles, but for FlashAttention's package, 7B, and one document that fills a row."""
LONG = 16_384


@dataclass(frozen=True, kw_only=True)
class Case:
    """own, peers: legs, those worth their time first. also: peers' legs that are known to be behind, once, at the end.

    must, aim: the least ratio of tokens a second, oslo's best leg to the best peer's; with `seconds` the most seconds
    by which oslo's first step may come later. beside: a case whose best leg of oslo's stands in for the peers.
    bound_gib: the most memory that an own leg may take; "peer": that of the best peer.
    """

    title: str
    own: tuple[Leg, ...]
    peers: tuple[Leg, ...] = ()
    also: tuple[Leg, ...] = ()
    must: float | None = None
    aim: float | None = None
    seconds: bool = False
    beside: str | None = None
    bound_gib: float | str | None = None


def _legs(*programs: str, **given: Any) -> tuple[Leg, ...]:
    return tuple(Leg(program=program, **given) for program in programs)


_SMALL: dict[str, Any] = {"shape": "0.5b", "rows": 2}
_BIG: dict[str, Any] = {"shape": "7b", "rows": 2}
_TINY: dict[str, Any] = {"shape": "tiny", "rows": 1, "row": 3072}
"""As long as the gate's documents together."""
_UNSLOTH_7B = _legs("unsloth", **_BIG, recompute="on")

CASES = {
    "0.5b": Case(
        title="0.5B, 2 rows",
        own=_legs(OSLO, **_SMALL),
        peers=_legs(BEST, **_SMALL),
        also=(
            *_legs("trl+liger/flash", "trl/sdpa", "trl+liger/sdpa", "unsloth", **_SMALL),
            *_legs("trl+liger/sdpa", **_SMALL, compiled=True),
            *_legs(BEST, "unsloth", **_SMALL, recompute="on"),
        ),
        must=3,
        aim=4,
    ),
    "7b": Case(
        title="7B, 2 rows",
        own=_legs(OSLO, **_BIG),
        peers=_legs("unsloth", BEST, **_BIG),
        also=_legs("trl+liger/flash", **_BIG),
        must=1.35,
        aim=1.45,
    ),
    "0.5b-batch": Case(
        title="0.5B, best batch",
        own=_legs(OSLO, shape="0.5b", rows=8),
        peers=_legs(BEST, shape="0.5b", rows=8),
        also=_legs("unsloth", shape="0.5b", rows=8),
        must=1.8,
        aim=2.2,
    ),
    "full": Case(
        title="0.5B, every weight, 2 rows, no more memory than the peer",
        own=(
            *_legs(OSLO, **_SMALL, full=True, eight_bit=True),
            *_legs(OSLO, **_SMALL, full=True),
            *_legs(OSLO, **_SMALL, full=True, recompute="on"),  # the peer's optimizer, in less memory than the peer
        ),
        peers=_legs(BEST, **_SMALL, full=True),
        must=1.5,
        aim=2,
        bound_gib="peer",
    ),
    "7b-16gib": Case(
        title="7B, 2 rows, no more memory than Unsloth",
        own=_legs(OSLO, **_BIG, recompute="auto", room_gib=16.2),
        peers=_UNSLOTH_7B,
        must=1.4,
        aim=1.7,
        bound_gib="peer",
    ),
    "7b-19gib": Case(
        title="7B, 2 rows, at most 19 GiB",
        own=_legs(OSLO, **_BIG, recompute="auto", room_gib=19.3),  # a tenth of what the model leaves stays free
        peers=_UNSLOTH_7B,
        also=_legs(BEST, **_BIG, recompute="on"),
        must=1.65,
        aim=1.88,
        bound_gib=19,
    ),
    "start": Case(
        title="0.5B, start to first step",
        own=_legs(OSLO, **_SMALL, start=True),
        peers=_legs("trl/sdpa", **_SMALL, start=True),
        must=10,
        aim=0,
        seconds=True,
    ),
    "16k": Case(
        title="0.5B, one row of 16k",
        own=_legs(OSLO, shape="0.5b", rows=1, row=LONG),
        peers=_legs(BEST, shape="0.5b", rows=1, row=LONG),
        must=2,
        aim=3,
    ),
    "16k-one": Case(
        title="0.5B, one document of 16k",
        own=_legs(OSLO, shape="0.5b", rows=1, row=LONG, length=LONG),
        peers=_legs("unsloth", BEST, shape="0.5b", rows=1, row=LONG, length=LONG),
        also=_legs("trl+liger/flash", "trl+liger/sdpa", shape="0.5b", rows=1, row=LONG, length=LONG),
        must=1.3,
        aim=1.6,
    ),
    "0.5b-targets": Case(
        title="0.5B, 8 rows, 40 % of the tokens are targets, beside 0.5b-batch",
        own=_legs(OSLO, shape="0.5b", rows=8, target_share=0.4),
        aim=1.15,
        beside="0.5b-batch",
    ),
    "0.5b-within": Case(
        title="0.5B, 2 rows, one evaluation and one checkpoint within",
        own=_legs(OSLO, **_SMALL, within=True),
        peers=_legs(BEST, **_SMALL, within=True),
        must=3,
        aim=4,
    ),
    "tiny": Case(
        title="to try the benchmark itself",
        own=_legs(OSLO, **_TINY),
        peers=_legs("trl/sdpa", **_TINY),
        also=_legs(BEST, **_TINY),
        must=1,
        aim=2,
    ),
    "tiny-full": Case(
        title="to try the benchmark itself: every weight, an evaluation and a checkpoint within, one document a row",
        own=_legs(OSLO, **_TINY, length=3072, full=True, within=True),
        peers=_legs("trl/sdpa", **_TINY, length=3072, full=True, within=True),
        bound_gib="peer",
    ),
}
"""By name, the most important first."""
DEFAULT = [name for name in CASES if not name.startswith("tiny")]
