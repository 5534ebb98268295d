"""The config classes: what a user writes in Python, and what each section of the YAML file is checked against.

A key of the YAML is the name of a field here. Unknown keys are refused, types are strict ("3" is not 3), and
contradictions inside one class raise at once. Pure: nothing here looks at the machine.
"""

from __future__ import annotations

import difflib
import json
import warnings
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from opensloth.training_keys import OPTIMIZERS, SCHEDULERS, refusal_of_transformers_key

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

ReportTo = Literal["tensorboard", "wandb", "mlflow", "none"]
Interval = Literal["no", "steps", "epoch"]


class Section(BaseModel):
    """A section of the config: no unknown keys, strict types, assignment checked like construction."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid",
        strict=True,
        validate_assignment=True,
        protected_namespaces=(),
        hide_input_in_errors=True,
    )

    def wrote(self, field: str) -> bool:
        """Whether the user gave `field`, rather than its default."""
        return field in self.model_fields_set


class FastModelArgs(Section):
    """The base model and how it is loaded."""

    model_name: str = Field(min_length=1)
    """A Hugging Face name, or a folder that transformers can load."""
    revision: str | None = None
    """Branch, tag or commit of a hub model. None: its main branch."""
    max_seq_length: int = Field(4096, ge=8)
    """Tokens in a packed row, and the longest document that is kept."""
    load_in_4bit: bool = True
    """NF4 weights (QLoRA). Needs CUDA; as a default it gives way to full precision where there is none."""
    load_in_8bit: bool = False
    """LLM.int8 weights. Needs CUDA."""
    full_finetuning: bool = False
    """Train every weight instead of an adapter."""
    use_gradient_checkpointing: Literal["unsloth", "auto"] | bool = "unsloth"
    """Recompute activations in the backward pass. "unsloth": and keep the rest in host memory, on CUDA.
    "auto", and "unsloth" as a default: on CUDA, as much as memory asks for."""
    fast_inference: Literal[False] = False
    """Belongs to generation during training, which SFT does not do: only false is accepted."""
    max_lora_rank: int | None = Field(None, ge=1)
    """Upper bound for `lora_args.r`. None: no bound."""
    gpu_memory_utilization: float = Field(0.7, gt=0, le=1)
    """Belongs to `fast_inference`: only its default is accepted."""

    @field_validator("gpu_memory_utilization")
    @classmethod
    def _only_for_inference(cls, share: float) -> float:
        if share != cls.model_fields["gpu_memory_utilization"].default:
            raise ValueError("belongs to fast_inference, which SFT does not do: leave it out")
        return share

    @model_validator(mode="after")
    def _one_way_to_load(self) -> FastModelArgs:
        quantised = [name for name in ("load_in_4bit", "load_in_8bit") if getattr(self, name) and self.wrote(name)]
        if len(quantised) == 2:
            raise ValueError("load_in_4bit and load_in_8bit exclude each other: keep one")
        if self.full_finetuning and quantised:
            raise ValueError(
                f"full_finetuning trains every weight, which {quantised[0]} makes impossible: drop one of the two"
            )
        if (self.full_finetuning or self.load_in_8bit) and not self.wrote("load_in_4bit"):
            # Not an assignment: that would mark the field as written by the user.
            self.__dict__["load_in_4bit"] = False
        return self


class LoraArgs(Section):
    """The adapter. The `finetune_*` switches choose among `target_modules`, as Unsloth's do."""

    finetune_vision_layers: Literal[False] = False
    """Vision towers are not trained: only false is accepted."""
    finetune_language_layers: Literal[True] = True
    finetune_attention_modules: bool = True
    """False: leave q, k, v and o projections alone."""
    finetune_mlp_modules: bool = True
    """False: leave gate, up and down projections alone."""
    r: int = Field(8, ge=1)
    """Rank."""
    lora_alpha: int = Field(16, ge=1)
    """The adapter's output is scaled by lora_alpha / r (by lora_alpha / sqrt(r) with use_rslora)."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    bias: Literal["none", "all", "lora_only"] = "none"
    random_state: int = 3407
    """Seed of the adapter's initial weights."""
    target_modules: list[str] = Field(default_factory=lambda: list(LORA_TARGETS), min_length=1)
    use_rslora: bool = False

    @model_validator(mode="after")
    def _something_to_train(self) -> LoraArgs:
        if not self.selected_modules():
            raise ValueError(
                "finetune_attention_modules and finetune_mlp_modules leave no target_modules: switch one on"
            )
        return self

    def selected_modules(self) -> list[str]:
        """`target_modules` less those that the `finetune_*` switches leave out."""
        left_out: set[str] = set()
        if not self.finetune_attention_modules:
            left_out |= {"q_proj", "k_proj", "v_proj", "o_proj"}
        if not self.finetune_mlp_modules:
            left_out |= {"gate_proj", "up_proj", "down_proj"}
        return [name for name in self.target_modules if name not in left_out]


class OpenSlothConfig(Section):
    """Data cache, devices, model, adapter."""

    data_cache_path: str = Field(min_length=1)
    """Where prepared datasets are kept; without a `dataset` section, the prepared dataset itself.
    Relative: in a YAML file under the root folder, in Python under the working directory."""
    devices: list[int] = Field(default_factory=lambda: [0], min_length=1)
    """One process for each; on CUDA the device numbers. A cluster uses job.gpus_per_node."""
    fast_model_args: FastModelArgs
    lora_args: LoraArgs | None = None
    """None: the defaults of LoraArgs, unless pretrained_lora or full_finetuning says otherwise."""
    pretrained_lora: str | None = None
    """An adapter folder to go on from."""
    sequence_packing: bool = True
    """Fill rows of max_seq_length tokens with whole documents that cannot see each other."""
    log_level: Literal["info", "debug"] = "info"
    filter_overlength_samples: bool = True
    """For a dataset that is trained as it is: drop rows over max_seq_length (false: refuse them)."""
    training_type: Literal["sft", "dpo", "kto", "orpo"] = "sft"
    engine: Literal["auto", "fused", "torch", "unsloth"] = "auto"
    """Which implementation runs the steps; auto: fused where it computes the same, else torch."""

    @field_validator("devices")
    @classmethod
    def _distinct(cls, devices: list[int]) -> list[int]:
        if len(set(devices)) != len(devices) or min(devices) < 0:
            raise ValueError(f"device numbers are 0 or above and distinct; got {devices}")
        return devices

    @field_validator("training_type")
    @classmethod
    def _only_sft_so_far(cls, training_type: str) -> str:
        if training_type != "sft":
            raise ValueError(f"'{training_type}' is not there yet; this version trains 'sft' only")
        return training_type

    @field_validator("engine")
    @classmethod
    def _no_unsloth_so_far(cls, engine: str) -> str:
        if engine == "unsloth":
            raise ValueError("'unsloth' is not there yet; use 'auto', 'fused' or 'torch'")
        return engine

    @model_validator(mode="after")
    def _one_adapter(self) -> OpenSlothConfig:
        full = self.fast_model_args.full_finetuning
        if full and (self.lora_args or self.pretrained_lora):
            raise ValueError(
                "full_finetuning trains no adapter: drop lora_args and pretrained_lora, or full_finetuning"
            )
        if self.lora_args and self.pretrained_lora:
            warnings.warn("pretrained_lora brings its own shape: lora_args is ignored", stacklevel=2)
            self.__dict__["lora_args"] = None
        elif not (self.lora_args or self.pretrained_lora or full):
            self.__dict__["lora_args"] = LoraArgs()
        bound = self.fast_model_args.max_lora_rank
        if bound and self.lora_args and self.lora_args.r > bound:
            raise ValueError(f"lora_args.r is {self.lora_args.r}, over fast_model_args.max_lora_rank {bound}")
        return self


class TrainingArguments(Section):
    """How to train. Names and meanings are transformers'; defaults are oslo's.

    A key of transformers' class that is not a field here is refused with its reason
    (`opensloth.training_keys`), never ignored.
    """

    output_dir: str | None = "saves/loras/"
    """In Python: the folder of the run. In a YAML file (default there: null): receives a copy of the result."""
    per_device_train_batch_size: int = Field(2, ge=1)
    """Rows in a micro-batch of one process; with packing each row holds up to max_seq_length tokens."""
    gradient_accumulation_steps: int = Field(4, ge=1)
    """Micro-batches of one process in a step."""
    global_batch_size: int | None = Field(None, ge=1)
    """Rows in a step over all processes; derives gradient_accumulation_steps."""
    learning_rate: float = Field(2e-4, gt=0, allow_inf_nan=False)
    num_train_epochs: float = Field(3, gt=0, allow_inf_nan=False)
    max_steps: int = Field(-1, ge=-1)
    """Optimizer steps; above 0 it overrides num_train_epochs."""
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: dict[str, Any] | None = None
    warmup_steps: float = Field(10, ge=0, allow_inf_nan=False)
    """Steps of warm-up; below 1 a fraction of all steps."""
    optim: str = "adamw_8bit"
    """transformers' names. The 8-bit and paged ones need CUDA and bitsandbytes."""
    optim_args: str | None = None
    weight_decay: float = Field(0.01, ge=0, allow_inf_nan=False)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0, allow_inf_nan=False)
    max_grad_norm: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Clip the norm of the whole gradient; 0: no clipping."""
    bf16: bool | None = None
    """Compute in bfloat16 (adapters and master weights stay float32). None: on CUDA devices that have it."""
    tf32: bool | None = None
    """TF32 matrix products on CUDA. None: torch's default."""
    use_cpu: bool = False
    """Train on the CPU even where there is CUDA."""
    logging_steps: int = Field(1, ge=1)
    """Steps between two lines of the log, which then hold the mean since the last."""
    report_to: ReportTo | list[ReportTo] = "tensorboard"
    run_name: str | None = None
    """The run's name for the reporters. None: the run's own."""
    eval_strategy: Interval = "no"
    """When the evaluation split is scored. Left out while there is such a split: "epoch"."""
    eval_steps: int | None = Field(None, ge=1)
    """Steps between evaluations with eval_strategy "steps". None: logging_steps."""
    eval_on_start: bool = False
    per_device_eval_batch_size: int | None = Field(None, ge=1)
    """None: per_device_train_batch_size."""
    save_strategy: Interval = "steps"
    save_steps: int | None = Field(None, ge=1)
    """Steps between checkpoints. None: a tenth of the run, at most 500."""
    save_total_limit: int | None = Field(2, ge=1)
    """Checkpoints that are kept. None: all."""
    save_only_model: bool = False
    """Checkpoints without optimizer and random state: smaller, and nothing can be resumed from them."""
    resume_from_checkpoint: str | bool | None = None
    """A checkpoint folder; true: the newest of this run. None: the newest when a run is taken up again."""
    seed: int = Field(42, ge=0)
    data_seed: int | None = Field(None, ge=0)
    """Seed of the row order. None: seed."""
    train_sampling_strategy: Literal["random", "sequential"] = "random"
    dataloader_drop_last: bool = False
    """Leave out the last, short step of an epoch."""
    dataset_num_proc: int | None = Field(None, ge=1)
    """Threads that tokenise. None: all cores."""
    ddp_timeout: int = Field(1800, ge=1)
    """Seconds that a collective may take."""

    @model_validator(mode="before")
    @classmethod
    def _transformers_keys(cls, values: Any) -> Any:
        """Take transformers keys whose only possible value oslo uses anyway; refuse the others by name."""
        if not isinstance(values, dict):
            return values
        kept, refused = {}, []
        for key, value in values.items():
            reason = None if key in cls.model_fields else refusal_of_transformers_key(key, value)
            if reason:
                refused.append(f"{key}: {reason}")
            elif reason is None:
                kept[key] = value
        if refused:
            raise ValueError("; ".join(refused))
        return kept

    @field_validator("optim", "lr_scheduler_type")
    @classmethod
    def _known(cls, name: str, info: ValidationInfo) -> str:
        known = OPTIMIZERS if info.field_name == "optim" else SCHEDULERS
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(
                f"{name!r} is not one of {', '.join(known)}" + (f"; did you mean {near[0]}?" if near else "")
            )
        return name

    @field_validator("lr_scheduler_kwargs")
    @classmethod
    def _finite(cls, kwargs: dict[str, Any] | None) -> dict[str, Any] | None:
        try:
            json.dumps(kwargs, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError("expected finite numbers") from None
        return kwargs

    @field_validator("max_steps", "warmup_steps")
    @classmethod
    def _whole_steps(cls, steps: float, info: ValidationInfo) -> float:
        if info.field_name == "max_steps" and steps == 0:
            raise ValueError("0 steps train nothing: give a number above 0, or -1 for whole epochs")
        if steps > 1 and steps != int(steps):
            raise ValueError(f"expected whole steps, or a fraction below 1 of all steps, got {steps}")
        return steps

    @model_validator(mode="after")
    def _agree(self) -> TrainingArguments:
        if self.save_only_model and self.resume_from_checkpoint:
            raise ValueError("save_only_model writes checkpoints that cannot be resumed: drop resume_from_checkpoint")
        if self.eval_steps is not None and self.eval_strategy != "steps":
            raise ValueError('eval_steps needs eval_strategy "steps"')
        if self.save_steps is not None and self.save_strategy != "steps":
            raise ValueError('save_steps needs save_strategy "steps"')
        return self

    def reporters(self) -> list[str]:
        """`report_to` as a list, without "none"."""
        names = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        return [name for name in names if name != "none"]

    def to_dict(self) -> dict[str, Any]:
        """All fields, plain values."""
        return self.model_dump(mode="json")


class DatasetArgs(Section):
    """One source of training rows."""

    path: str = Field(min_length=1)
    """A local file or folder (relative to the YAML file), `pvc:PATH` on the volume, or a hub name."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset, or of a folder that has splits."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    format: Literal[
        "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "input_output", "text", "tokenized"
    ] = "auto"
    """The shape of a row. auto: told from the columns of the first rows, and printed."""
    columns: dict[str, str] = Field(default_factory=dict)
    """The format's column: your column, as in {prompt: question, completion: answer}."""
    chat_template: str | None = None
    """`chatml`, a .jinja file, or a template's text. None: the tokenizer's own."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens are targets: what assistants said, only the last of that, or everything."""
    overlength: Literal["drop", "truncate", "error"] = "drop"
    """What happens to documents over max_seq_length."""
    bad_rows: Literal["error", "skip"] = "error"
    """What happens to rows that cannot be read; skipped ones are counted and shown."""
    num_samples: int = Field(-1, ge=-1)
    """Take the first so many rows; -1: all."""
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """How often this dataset's documents are seen in an epoch: 2 twice, 0.5 every second one."""
    eval_path: str | None = None
    """A source of the same format that is only evaluated."""
    eval_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of the rows that is evaluated instead of trained, chosen by content."""

    @model_validator(mode="after")
    def _one_evaluation_source(self) -> DatasetArgs:
        if self.eval_path and self.eval_fraction:
            raise ValueError("eval_path and eval_fraction exclude each other: keep one")
        if self.num_samples == 0:
            raise ValueError("num_samples is 0: give a number above 0, or -1 for all rows")
        return self
