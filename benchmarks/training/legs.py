"""One program training one thing: what is timed, what it is called, and what it needs."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

ROW = 4096
WARM = 24
"""Steps of a leg before those that are timed: Unsloth compiles for longer than 8."""
OSLO = "oslo"
ATTENTION = {"": "sdpa", "sdpa": "sdpa", "flex": "flex_attention"}
FLASH = {"flash-attn-4": "flash_attention_4", "flash-attn": "flash_attention_2"}
"""A package -> the attention that it has, the newest first."""
PACKAGES = {OSLO: [], "trl": ["trl"], "trl+liger": ["trl", "liger_kernel"], "unsloth": ["unsloth"]}


@dataclass(frozen=True, kw_only=True)
class Leg:
    """program: with its attention after a slash. row: tokens of one packed row. recompute: off, on, or auto (as there
    is memory for: oslo only). room_gib: as much of the GPU's memory is free for it (oslo only); None: all. length:
    tokens of every document; None: log-normal. target_share: of a document's tokens, its last ones. full: every weight
    is trained. within: one evaluation and one checkpoint within the timed steps. start: ends after its first step,
    which is all that is timed. compiled: by `torch_compile`. eight_bit: AdamW keeps its moments in 8 bits (oslo only).
    """

    program: str
    shape: str
    rows: int
    recompute: str = "off"
    room_gib: float | None = None
    row: int = ROW
    length: int | None = None
    target_share: float = 1.0
    full: bool = False
    within: bool = False
    start: bool = False
    compiled: bool = False
    eight_bit: bool = False

    @property
    def peer(self) -> str:
        return self.program.partition("/")[0]

    @property
    def attention(self) -> str:
        """As transformers names it."""
        name = self.program.partition("/")[2]
        return _flash() or FLASH["flash-attn"] if name == "flash" else ATTENTION[name]

    @property
    def name(self) -> str:
        """Unlike that of any other leg: results are kept by it."""
        extras = {
            f"{self.room_gib} GiB free": self.room_gib,
            f"documents of {self.length}": self.length,
            f"{self.target_share:.0%} targets": self.target_share < 1,
            "full": self.full,
            "torch_compile": self.compiled,
            "8-bit AdamW": self.eight_bit,
            "evaluation and checkpoint": self.within,
            "start": self.start,
        }
        words = [self.program, self.shape, f"{self.rows}x{self.row}", f"recompute {self.recompute}"]
        return ", ".join([*words, *(word for word, on in extras.items() if on)])

    @property
    def kind(self) -> str:
        """What its gradient is compared under: legs of one kind compute it by the same code."""
        how = f"{self.program}{' torch_compile' if self.compiled else ''}"
        room = f", {self.room_gib} GiB free" if self.room_gib else ""
        long = ", long documents" if self.length and self.program == OSLO else ""
        return f"{how}, {self.group}, recompute {self.recompute}{room}{long}"

    @property
    def group(self) -> str:
        """Legs of one group have the same reference gradient."""
        return f"{self.shape}, {'full' if self.full else 'LoRA'}"

    def steps(self, timed: int) -> int:
        """Of the whole run, when `timed` are to be timed."""
        return 2 if self.start else WARM + timed

    def middle(self, timed: int) -> int:
        """The step after which it evaluates and saves, once: twice as many are more than it has."""
        return WARM + max(1, timed // 2)


def lacking(leg: Leg) -> str | None:
    """A package that the leg needs and that is not installed."""
    if missing := next((package for package in PACKAGES[leg.peer] if not _is_installed(package)), None):
        return missing
    return " or ".join(FLASH) if leg.program.endswith("/flash") and not _flash() else None


def _flash() -> str | None:
    return next((attention for package, attention in FLASH.items() if _is_installed(package)), None)


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
