"""GPU memory and time of a run, from its file and its model's config.json. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from opensloth.arithmetic import BatchShape
from opensloth.errors import Problem
from opensloth.human import human_duration
from opensloth.memory_estimate import (
    CONTEXT_BYTES,
    GIB,
    IN_HOST,
    Batch,
    Estimate,
    Keep,
    Keeping,
    Method,
    estimate,
    order,
    roomiest,
)
from opensloth.model_shape import ModelShape
from opensloth.opensloth_config import LORA_TARGETS, LoraArgs
from opensloth.run_config import RunConfig
from opensloth.speed_estimate import Step, copies_keep_up, tokens_per_second
from opensloth.training_keys import PLAIN_OPTIMIZER, moment_bytes, needs_bitsandbytes
from runner.gpu import THIS_MACHINE, Gpu

if TYPE_CHECKING:
    from runner.plan import Plan

ROUGH: Final = 1.25
"""An estimate that is only about right must be over a card's memory by this before it is believed."""
_DOCUMENT: Final = 500
"""Tokens of a document where nobody has counted them; only attention depends on it."""
_RECOMPUTE: Final = "opensloth.fast_model_args.use_gradient_checkpointing"
_BY_PLAIN_TORCH: Final = (Keep.INPUTS,)
"""Unless it is told not to."""
_ACCUMULATION: Final = "training.gradient_accumulation_steps"


@dataclass(frozen=True)
class Prediction:
    """expected: what the run will keep for the backward pass, and what that takes. smallest: the least it can do with.

    why_not_fused: None on the fast path. is_rough: an estimate of plain torch, or of an adapter that is not known.
    is_counted: whether the targets are. may_refuse: whether it is good enough to turn a run down.
    tokens_per_second: of one GPU. seconds: of all steps. changes: what would make it fit, where it does not.
    """

    gpu: Gpu
    why_not_fused: str | None
    is_rough: bool
    is_counted: bool
    may_refuse: bool
    expected: tuple[Keeping, Estimate]
    smallest: tuple[Keeping, Estimate]
    tokens_per_second: float | None
    seconds: float | None
    changes: tuple[str, ...]

    @property
    def fits(self) -> bool | None:
        """None: there is nothing to compare it with, or it is not good enough to say no."""
        if self.gpu.memory is None:
            return None
        if _fits(self.smallest[1], self.gpu.memory, self.is_rough):
            return True
        return False if self.may_refuse else None

    @property
    def problem(self) -> Problem | None:
        if self.fits is not False:
            return None
        keeping, least = self.smallest
        about = "about " if self.is_rough else ""
        name = self.gpu.name or "a GPU"
        message = (
            f"does not fit: training takes {about}{_gib(least.of_card)} of GPU memory at least, and {name} has "
            f"{_gib(self.gpu.memory or 0)} ({self.gpu.source}); {_parts(least)}, keeping {keeping}"
        )
        ways = "; or ".join([*self.changes, f"a GPU with {_gib(least.of_card)}"])
        hint = f"what makes it fit: {ways}. `submit --force` tries it all the same"
        if self.gpu.source == THIS_MACHINE:
            hint += "; `validate --cluster` looks at the cluster's GPUs"
        return Problem("opensloth.fast_model_args.model_name", message, hint)

    def rows(self) -> list[tuple[str, str]]:
        """As lines of the plan."""
        keeping, expected = self.expected
        about = "about " if self.is_rough else ""
        line = f"{about}{_gib(expected.of_card)}"
        if self.gpu.memory is not None:
            line += f" of the {_gib(self.gpu.memory)} of {self.gpu.name or 'a GPU'} ({self.gpu.source})"
        line += f", keeping {keeping} for the backward pass"
        found = [("memory", line), ("", _parts(expected))]
        least, smallest = self.smallest
        if _gib(smallest.of_card) != _gib(expected.of_card):
            found.append(("", f"at least {_gib(smallest.of_card)}, keeping {least}"))
        if not self.is_counted and expected.loss > expected.layer:
            found.append(("", "as if every token were a target, and at the least none: nobody has counted them yet"))
        if self.gpu.memory is None:
            found.append(("", "compared with no GPU: job.gpu_memory says what one has, as in 80Gi"))
        if self.why_not_fused:
            found.append(("", f"a rough estimate: plain torch trains this ({self.why_not_fused})"))
        elif self.is_rough:
            found.append(("", "a rough estimate: the rank of pretrained_lora was not looked up"))
        if self.tokens_per_second:
            total = f", {human_duration(self.seconds)} for all steps" if self.seconds else ""
            found.append(("speed", f"about {_rounded(self.tokens_per_second):,} tokens/s on each GPU{total}"))
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "gpu": {
                "name": self.gpu.name or None,
                "memory": self.gpu.memory,
                "from": None if self.gpu.memory is None else self.gpu.source,
            },
            "fits": self.fits,
            "rough": self.is_rough,
            "why_not_fused": self.why_not_fused,
            "context": CONTEXT_BYTES,
            "expected": _choice_json(self.expected),
            "smallest": _choice_json(self.smallest),
            "tokens_per_second": self.tokens_per_second and round(self.tokens_per_second),
            "seconds": self.seconds and round(self.seconds),
        }


def predict(config: RunConfig, model_config: Mapping[str, Any], gpu: Gpu, plan: Plan, *, quantises: bool) -> Prediction:
    """model_config: what config.json holds. quantises: whether 4-bit and 8-bit defaults will be honoured.

    Raises ValueError with the reason where the model's sizes cannot be told.
    """
    shape = ModelShape.from_config(model_config)
    case = _Case.of(config, shape, gpu, plan, quantises=quantises)
    expected, least = case.choose(gpu.memory), case.least
    rough = not case.method.fused or config.opensloth.pretrained_lora is not None
    rate = case.rate(gpu, plan)
    changes: tuple[str, ...] = ()
    if gpu.memory is not None and not _fits(least, gpu.memory, rough):
        changes = case.changes(gpu.memory, rough, _Settings(config, plan.shape, quantises))
    return Prediction(
        gpu=gpu,
        why_not_fused=case.why_not_fused,
        is_rough=rough,
        is_counted=plan.data is not None,
        may_refuse=config.opensloth.sequence_packing and not _may_be_windowed(config, shape),
        expected=(expected, case.keeping(expected)),
        smallest=(Keeping(case.keeps[-1]), least),
        tokens_per_second=rate,
        seconds=None if rate is None else _seconds(config, plan, rate),
        changes=changes,
    )


@dataclass(frozen=True)
class _Settings:
    """How a change is said, so that the file with it is accepted and trains with the same batch."""

    config: RunConfig
    batch: BatchShape
    quantises: bool

    def allows(self, rows: int) -> bool:
        size = self.config.training.global_batch_size
        return size is None or size % (rows * self.batch.world) == 0

    def with_rows(self, rows: int) -> str:
        said = f"--set training.per_device_train_batch_size={rows}"
        accumulation, rest = divmod(self.batch.per_device * self.batch.accumulation, rows)
        derived = self.config.training.global_batch_size and _ACCUMULATION not in self.config.explicit
        return said if rest or derived else f"{said} --set {_ACCUMULATION}={accumulation}"

    def with_4_bits(self) -> str:
        said = "--set opensloth.fast_model_args.load_in_4bit=true"
        if self.config.opensloth.fast_model_args.load_in_8bit:
            said += " --set opensloth.fast_model_args.load_in_8bit=false"
        return said if self.quantises else f"{said} (after `pip install 'opensloth[gpu]'`)"


@dataclass(frozen=True)
class _Case:
    """One way to train.

    keeps: that the file allows, in the order in which the engine tries them. rows, row_tokens: of a batch. targets:
    their share of the tokens, None where nobody has counted them.
    """

    shape: ModelShape
    method: Method
    why_not_fused: str | None
    keeps: tuple[Keep, ...]
    rows: int
    row_tokens: int
    targets: float | None

    @classmethod
    def of(cls, config: RunConfig, shape: ModelShape, gpu: Gpu, plan: Plan, *, quantises: bool) -> _Case:
        data, row = plan.data, config.opensloth.fast_model_args.max_seq_length
        why = _why_not_fused(config, shape, gpu)
        method = _method(config, shape, gpu, fused=why is None, quantises=quantises)
        rows = plan.shape.per_device
        if data is not None:
            rows = min(rows, data.rows)
        return cls(
            shape=shape,
            method=method,
            why_not_fused=why,
            keeps=_keeps(config, shape, method, gpu),
            rows=rows,
            row_tokens=row,
            targets=None if data is None else min(1.0, data.target_tokens / (data.rows * row)),
        )

    @property
    def batch(self) -> Batch:
        """With as many targets as there may be."""
        tokens = self.rows * self.row_tokens
        return Batch(tokens, tokens if self.targets is None else round(tokens * self.targets))

    @property
    def least(self) -> Estimate:
        """What the run cannot do without."""
        batch = self.batch if self.targets is not None else Batch(self.batch.tokens, 0)
        return estimate(self.shape, self.method, batch, Keeping(self.keeps[-1]))

    def keeping(self, keeping: Keeping) -> Estimate:
        return estimate(self.shape, self.method, self.batch, keeping)

    def choose(self, memory: int | None) -> Keeping:
        """What the engine will keep on a GPU of this memory."""
        if memory is None:
            return Keeping(self.keeps[0])
        fixed = self.keeping(Keeping(Keep.ALL))
        free = memory - CONTEXT_BYTES - fixed.weights - fixed.trained
        return roomiest(self.shape, self.method, self.batch, free, self.keeps) or Keeping(self.keeps[-1])

    def rate(self, gpu: Gpu, plan: Plan) -> float | None:
        """Tokens a second on the fast path, padding not counted; None for a GPU that is not known."""
        if not self.method.fused or gpu.product is None or gpu.product.card is None:
            return None
        batch, document = self.batch, float(min(_DOCUMENT, self.row_tokens))
        if plan.data is not None:
            of_row = plan.data.row_fill * self.row_tokens
            batch = Batch(max(1, round(self.rows * of_row)), batch.targets)
            document = plan.data.rows * of_row / plan.data.documents
        step = Step(batch, plan.shape.accumulation, document, self.row_tokens)
        return tokens_per_second(self.shape, self.method, step, self.choose(gpu.memory), gpu.product.card)

    def changes(self, memory: int, rough: bool, settings: _Settings) -> tuple[str, ...]:
        """What would make it fit: each way alone, else all of them together."""
        ways = self._ways(memory, rough, settings)
        alone = [said for said, case in ways if _fits(case.least, memory, rough)]
        if alone or len(ways) < 2:
            return tuple(alone)
        together = self
        for _, case in ways:
            together = together._with_change(case, self)
        said = " ".join(said for said, _ in ways)
        return (f"together {said}",) if _fits(together.least, memory, rough) else ()

    def _ways(self, memory: int, rough: bool, settings: _Settings) -> list[tuple[str, _Case]]:
        ways = []
        least = IN_HOST if self.method.fused else _BY_PLAIN_TORCH
        if self.keeps[-1] is not least[-1]:
            ways.append((f"--set {_RECOMPUTE}=unsloth", replace(self, keeps=least)))
        fewer = [replace(self, rows=rows) for rows in range(self.rows - 1, 0, -1) if settings.allows(rows)]
        if fewer:
            case = next((case for case in fewer if _fits(case.least, memory, rough)), fewer[-1])
            ways.append((settings.with_rows(case.rows), case))
        if not self.method.is_full and self.method.bits > 4:
            four = replace(self, method=replace(self.method, bits=4))
            # without 8 bits the fast path may train it, whose estimate is exact
            if not settings.config.opensloth.fast_model_args.load_in_8bit or _fits(four.least, memory, rough=False):
                ways.append((settings.with_4_bits(), four))
        if self.method.is_full:
            adapter = replace(self.method, rank=LoraArgs().r, targets=LORA_TARGETS)
            ways.append(("--set opensloth.fast_model_args.full_finetuning=false", replace(self, method=adapter)))
        return ways

    def _with_change(self, changed: _Case, before: _Case) -> _Case:
        """Also what `changed` has otherwise than `before`."""
        new = {name: value for name, value in vars(changed).items() if value != getattr(before, name)}
        return replace(self, **new)


def _every_keep(shape: ModelShape, method: Method, gpu: Gpu) -> tuple[Keep, ...]:
    if not method.fused:
        return _BY_PLAIN_TORCH
    card = gpu.product.card if gpu.product else None
    return order(copies_keep_up=card is not None and copies_keep_up(shape, method, *card.reached))


def _keeps(config: RunConfig, shape: ModelShape, method: Method, gpu: Gpu) -> tuple[Keep, ...]:
    asked = config.opensloth.fast_model_args.use_gradient_checkpointing
    if asked is False:
        return (Keep.ALL,)
    if asked is True:
        return (Keep.INPUTS,)
    if method.fused and asked == "unsloth" and _RECOMPUTE in config.explicit:
        return IN_HOST
    return _every_keep(shape, method, gpu)


def _method(config: RunConfig, shape: ModelShape, gpu: Gpu, *, fused: bool, quantises: bool) -> Method:
    args, adapter = config.opensloth.fast_model_args, config.opensloth.lora_args or LoraArgs()
    bits = 16 if _computes_in_bfloat16(config, gpu) else 32
    if not args.full_finetuning:
        asked = 4 if args.load_in_4bit and quantises else 8 if args.load_in_8bit and quantises else bits
        bits = min(asked, shape.bits if shape.bits < 16 else bits)
    optimizer = config.training.optim
    if not quantises and needs_bitsandbytes(optimizer):
        optimizer = PLAIN_OPTIMIZER
    return Method(
        rank=0 if args.full_finetuning else adapter.r,
        targets=() if args.full_finetuning else tuple(adapter.selected_modules()),
        bits=bits,
        moments=moment_bytes(optimizer),
        fused=fused,
    )


def _computes_in_bfloat16(config: RunConfig, gpu: Gpu) -> bool:
    if config.training.bf16 is None:
        return gpu.computes_in_bfloat16
    return config.training.bf16


def _why_not_fused(config: RunConfig, shape: ModelShape, gpu: Gpu) -> str | None:
    """What can be told before the model is loaded of what `opensloth.engine` will say."""
    opensloth, adapter = config.opensloth, config.opensloth.lora_args
    if opensloth.engine == "torch":
        return "asked for"
    if not _computes_in_bfloat16(config, gpu):
        return "the fast path computes in bfloat16 only"
    if not opensloth.sequence_packing:
        return "the rows are not packed"
    if opensloth.fast_model_args.load_in_8bit or shape.bits == 8:
        return "its linear layers are in 8 bits"
    if shape.reason_against_fused:
        return f"the fast path cannot: {shape.reason_against_fused}"
    if _may_be_windowed(config, shape):
        return f"documents may be longer than the attention window of {shape.window}"
    if adapter is None:
        return None
    if adapter.lora_dropout:
        return "the fast path has no adapter dropout"
    if adapter.bias != "none" or not set(adapter.selected_modules()) <= set(LORA_TARGETS):
        return "the adapter trains more than the fast path knows"
    return None


def _may_be_windowed(config: RunConfig, shape: ModelShape) -> bool:
    """Whether a document as long as a row would be longer than the attention's window: the engine goes by documents."""
    return shape.window is not None and shape.window < config.opensloth.fast_model_args.max_seq_length


def _fits(least: Estimate, memory: int, rough: bool) -> bool:
    return least.of_card <= memory * (ROUGH if rough else 1)


def _seconds(config: RunConfig, plan: Plan, rate: float) -> float | None:
    """Of all steps; None where their number is not known."""
    row = config.opensloth.fast_model_args.max_seq_length
    if plan.data is not None and plan.steps is not None:
        of_epoch = plan.data.rows * plan.data.row_fill * row / plan.shape.world
        return plan.steps.total_steps / plan.steps.steps_per_epoch * of_epoch / rate
    if config.training.max_steps > 0:
        return config.training.max_steps * plan.shape.per_device * plan.shape.accumulation * row / rate
    return None


def _gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB"


def _parts(found: Estimate) -> str:
    """Where the memory goes."""
    parts = {
        "weights": found.weights,
        "trained weights and moments": found.trained,
        "kept": found.kept,
        "a layer at work" if found.layer > found.loss else "the loss at work": max(found.layer, found.loss),
        "CUDA and the rest": found.other + CONTEXT_BYTES,
    }
    return ", ".join(f"{name}: {size / GIB:.1f}" for name, size in parts.items()) + " GiB"


def _rounded(rate: float) -> int:
    """Three digits: it is no better than that, and two would put up to 5 % on top."""
    digits = max(0, len(str(int(rate))) - 3)
    return int(round(rate, -digits))


def _choice_json(choice: tuple[Keeping, Estimate]) -> dict[str, Any]:
    keeping, found = choice
    return {"keeps": str(keeping), "peak": found.peak, **asdict(found)}
