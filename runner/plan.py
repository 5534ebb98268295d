"""What a run will do, said before it starts. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from opensloth.arithmetic import BatchShape, StepPlan, batch_shape, plan_warnings, step_plan
from opensloth.run_config import RunConfig
from runner.prediction import Prediction
from runner.spec import JobArgs


@dataclass(frozen=True)
class BuiltData:
    """The result event of `python -m opensloth.data build`; counts are of one epoch after weights."""

    path: str
    reused: bool
    """Whether it was in the cache already."""
    documents: int
    target_tokens: int
    rows: int
    """Packed rows; documents where packing is off."""
    row_fill: float
    """Share of the rows' tokens that are no padding."""
    eval_documents: int
    sources: list[dict[str, Any]]

    @classmethod
    def from_event(cls, event: Mapping[str, Any]) -> BuiltData:
        return cls(**{name: event[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Plan:
    """A run before it starts.

    steps and data are None where the dataset has not been prepared.
    origins: key -> (value, who gave it) for `job`, and for what `--set` changed.
    prediction: of GPU memory and time; a sentence why there is none; None for a run without a GPU.
    """

    run: str
    model: str
    method: str
    shape: BatchShape
    data: BuiltData | None
    steps: StepPlan | None
    warnings: tuple[str, ...]
    origins: Mapping[str, tuple[Any, str]]
    prediction: Prediction | str | None = None

    @property
    def target_tokens_per_step(self) -> int | None:
        """On average."""
        if self.data is None:
            return None
        return round(self.data.target_tokens / self.data.rows * self.shape.rows_per_step)

    def to_json(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "model": self.model,
            "method": self.method,
            "rows_per_step": self.shape.rows_per_step,
            "batch": asdict(self.shape),
            "data": None if self.data is None else asdict(self.data),
            "target_tokens_per_step": self.target_tokens_per_step,
            "steps": None if self.steps is None else _steps_json(self.steps),
            "prediction": self.prediction.to_json() if isinstance(self.prediction, Prediction) else None,
            "not_predicted": self.prediction if isinstance(self.prediction, str) else None,
            "warnings": list(self.warnings),
            "origins": {key: {"value": value, "from": source} for key, (value, source) in self.origins.items()},
        }


def build_plan(
    run: str, config: RunConfig, job: JobArgs | None, data: BuiltData | None, origins: Mapping[str, str]
) -> Plan:
    """job: None for a local run; data: None when it has not been prepared; origins: see config_file.LoadedFile."""
    world = len(config.opensloth.devices) if job is None else job.world
    steps = None
    if data is not None:
        steps = step_plan(config.training, data.rows, world, has_eval=data.eval_documents > 0)
    return Plan(
        run=run,
        model=config.opensloth.fast_model_args.model_name,
        method=_method(config),
        shape=batch_shape(config.training, world),
        data=data,
        steps=steps,
        warnings=tuple(plan_warnings(steps)) if steps else (),
        origins=_origins(config, job, origins),
    )


def plan_text(plan: Plan) -> str:
    """The plan as `KEY  value` lines."""
    rows = [("run", plan.run), ("model", f"{plan.model}, {plan.method}")]
    if plan.data is not None:
        rows += _data_rows(plan.data)
    rows.append(("batch", str(plan.shape)))
    if plan.steps is not None and plan.target_tokens_per_step is not None:
        rows.append(("step", f"about {plan.target_tokens_per_step:,} target tokens"))
        rows.append(("steps", _steps_text(plan.steps)))
    if isinstance(plan.prediction, Prediction):
        rows += plan.prediction.rows()
    elif plan.prediction is not None:
        rows.append(("memory", f"not predicted: {plan.prediction}"))
    rows += [(key, f"{plain(value)}  ({source})") for key, (value, source) in plan.origins.items()]
    width = max(len(key) for key, _ in rows)
    return "\n".join(f"{key:<{width}}  {value}" for key, value in rows)


def plain(value: Any) -> str:
    """A value as the file would have it."""
    return value if isinstance(value, str) else json.dumps(value)


def _method(config: RunConfig) -> str:
    model = config.opensloth.fast_model_args
    if model.full_finetuning:
        return "full fine-tuning"
    bits = " over 4-bit weights" if model.load_in_4bit else " over 8-bit weights" if model.load_in_8bit else ""
    if model.load_in_4bit and "opensloth.fast_model_args.load_in_4bit" not in config.explicit:
        bits += " (where there is CUDA)"  # as a default it gives way
    adapter = config.opensloth.lora_args
    return f"LoRA r={adapter.r}{bits}" if adapter else f"LoRA from {config.opensloth.pretrained_lora}{bits}"


def _data_rows(data: BuiltData) -> list[tuple[str, str]]:
    rows = [
        ("data", f"{'cached' if data.reused else 'built now'}: {data.path}"),
        ("documents", f"{data.documents:,} with {data.target_tokens:,} target tokens"),
        ("rows", f"{data.rows:,} an epoch, {data.row_fill:.1%} filled"),
    ]
    if data.eval_documents:
        rows.append(("evaluation", f"{data.eval_documents:,} documents"))
    for source in data.sources:
        counts = ", ".join(
            f"{count:,} {name.replace('_', ' ')}"
            for name, count in source.items()
            if type(count) is int and (count or name in ("read", "kept"))
        )
        rows.append(("source", f"{source['path']} ({source['format']}): {counts}"))
    return rows


def _steps_text(steps: StepPlan) -> str:
    parts = [f"{steps.total_steps:,} ({steps.steps_per_epoch:,} an epoch)"]
    if steps.warmup_steps:
        parts.append(f"{steps.warmup_steps:,} of warm-up")
    if steps.checkpoint_interval:
        parts.append(f"a checkpoint every {steps.checkpoint_interval:,}")
    if steps.eval_interval:
        parts.append(f"evaluation every {steps.eval_interval:,}")
    return ", ".join(parts)


def _steps_json(steps: StepPlan) -> dict[str, Any]:
    return {key: value for key, value in asdict(steps).items() if key != "shape"}


def _origins(config: RunConfig, job: JobArgs | None, origins: Mapping[str, str]) -> dict[str, tuple[Any, str]]:
    """Every value of `job` with where it comes from, and of the other sections what `--set` changed."""
    found: dict[str, tuple[Any, str]] = {}
    values = config.model_dump(mode="json")
    for path, source in origins.items():
        if source.startswith("--set") and not path.startswith("job"):
            found[path] = (_at(values, path), source.partition("=")[0])
    if job is None:
        return found
    for key, value in job.model_dump(mode="json").items():
        path = f"job.{key}"
        sources = [source for at, source in origins.items() if at == path or at.startswith((f"{path}.", f"{path}["))]
        if sources:
            found[path] = (value, ", ".join(dict.fromkeys(sources)))
        elif value not in (None, [], {}):
            found[path] = (value, "default")
    return found


def _at(values: Any, path: str) -> Any:
    """The value at a dotted path of the file; a single dataset stands in a list once it is resolved."""
    for step in path.replace("[", ".").replace("]", "").split("."):
        if isinstance(values, list) and not step.isdigit():
            values = values[0]
        values = values[int(step)] if isinstance(values, list) else (values or {}).get(step)
    return values
