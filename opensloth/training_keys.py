"""What becomes of each key of transformers' TrainingArguments that oslo has no field for.

Every key is either a field of `opensloth_config.TrainingArguments` (honoured), fixed (accepted with the one
value that oslo uses anyway) or refused with its reason. A test goes over all of transformers' fields.
"""

from __future__ import annotations

from typing import Any, Final

FIXED: Final[dict[str, tuple[Any, str]]] = {
    "average_tokens_across_devices": (
        True,
        "the loss is always divided by the target tokens of the whole step",
    ),
    "logging_nan_inf_filter": (False, "a loss that is not finite stops the run; it is never hidden"),
    "logging_strategy": ("steps", "use logging_steps"),
    "logging_first_step": (True, "the first step is always logged"),
    "log_on_each_node": (True, "every rank keeps its own log"),
    "disable_tqdm": (True, "progress is shown by events"),
    "use_cache": (False, "a key-value cache in training would let packed documents see each other"),
    "fp16": (False, "float16 needs loss scaling; use bf16, or float32 where there is no bf16"),
    "fp16_full_eval": (False, "evaluation computes as training does"),
    "bf16_full_eval": (False, "evaluation computes as training does"),
    "label_smoothing_factor": (0.0, "the loss is plain cross-entropy"),
    "group_by_length": (False, "packing already fills the rows"),
    "prediction_loss_only": (True, "evaluation computes the loss only"),
    "eval_delay": (0, "evaluation begins with eval_strategy's first interval"),
    "remove_unused_columns": (True, "preparation keeps only the columns it needs"),
    "save_on_each_node": (False, "checkpoints are on the shared root"),
    "push_to_hub": (False, "upload the final folder yourself: `hf upload NAME <run>/final`"),
    "hub_always_push": (False, "oslo does not upload"),
    "ignore_data_skip": (False, "resume goes on at the very row"),
    "restore_callback_states_from_checkpoint": (False, "reporters keep no state"),
    "dataloader_num_workers": (0, "rows are memory-mapped; there is nothing for workers to do"),
    "dataloader_persistent_workers": (False, "there are no workers"),
    "dataloader_pin_memory": (True, "batches are pinned where the device is CUDA"),
    "dataloader_in_order": (True, "the order of rows is fixed"),
    "full_determinism": (False, "CPU runs are bit-identical as they are"),
    "auto_find_batch_size": (False, "set per_device_train_batch_size"),
    "torch_compile": (False, "opensloth.engine decides what is compiled"),
    "use_liger_kernel": (False, "opensloth.engine decides which kernels run"),
    "skip_memory_metrics": (True, "memory is in every event"),
    "include_num_input_tokens_seen": ("no", "tokens are in every event"),
    "eval_do_concat_batches": (True, "evaluation computes the loss only"),
    "eval_use_gather_object": (False, "evaluation computes the loss only"),
    "batch_eval_metrics": (False, "evaluation computes the loss only"),
    "load_best_model_at_end": (
        False,
        "the final weights are the last step's; keep more checkpoints to choose among",
    ),
    "do_predict": (False, "oslo trains and evaluates"),
    "enable_jit_checkpoint": (False, "every run checkpoints when it is asked to stop"),
    "ddp_find_unused_parameters": (False, "gradients are reduced in one flat buffer"),
}
"""name: (the value that oslo uses, why there is no other)."""

OPTIMIZERS: Final = (
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "ademamix",
    "ademamix_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "lion_8bit",
    "lion_32bit",
    "paged_lion_8bit",
    "paged_lion_32bit",
    "adafactor",
    "adagrad",
    "rmsprop",
    "sgd",
)
"""transformers' optimizers less those that need a loop of their own (schedule-free, GaLore, LOMO and their like)."""

SCHEDULERS: Final = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "warmup_stable_decay",
)
"""transformers' schedules less those that follow a metric."""

_LAUNCHER = "processes and devices come from opensloth.devices or job"
_SHARDING = "sharding is not there yet; use LoRA, 4-bit or a smaller model"
_DDP = "gradients are reduced in one flat buffer, not by DDP"
_HUB = "oslo does not upload; use `hf upload NAME <run>/final`"
_METRICS = "evaluation computes the loss only"
_ENGINE = "opensloth.engine decides what is compiled and which kernels run"
_TRACKIO = "reporters are tensorboard, wandb and mlflow"

REFUSED: Final[dict[str, str]] = {
    "optim_target_modules": "layer-wise optimizers such as GaLore are not supported",
    "gradient_checkpointing": "use opensloth.fast_model_args.use_gradient_checkpointing",
    "gradient_checkpointing_kwargs": "recomputation is always non-reentrant",
    "torch_compile_backend": _ENGINE,
    "torch_compile_mode": _ENGINE,
    "liger_kernel_config": _ENGINE,
    "neftune_noise_alpha": "noise on embeddings is not supported",
    "torch_empty_cache_steps": "memory is flat over the run",
    "log_level": "use opensloth.log_level",
    "log_level_replica": "use opensloth.log_level",
    "project": _TRACKIO,
    "trackio_space_id": _TRACKIO,
    "trackio_bucket_id": _TRACKIO,
    "trackio_static_space_id": _TRACKIO,
    "eval_accumulation_steps": _METRICS,
    "include_for_metrics": _METRICS,
    "metric_for_best_model": _METRICS,
    "greater_is_better": _METRICS,
    "hub_token": _HUB,
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_revision": _HUB,
    "accelerator_config": "oslo has its own loop",
    "parallelism_config": _SHARDING,
    "dataloader_prefetch_factor": "rows are memory-mapped; there are no workers",
    "dataloader_multiprocessing_context": "rows are memory-mapped; there are no workers",
    "label_names": "targets are the column labels",
    "length_column_name": "lengths are kept in the prepared dataset",
    "ddp_bucket_cap_mb": _DDP,
    "ddp_broadcast_buffers": _DDP,
    "ddp_static_graph": _DDP,
    "ddp_backend": "gloo on the CPU, NCCL on CUDA",
    "fsdp": _SHARDING,
    "fsdp_config": _SHARDING,
    "deepspeed": _SHARDING,
    "debug": "use opensloth.log_level: debug",
    "do_train": "oslo trains; to see the plan only, use `oslo validate`",
    "do_eval": "use eval_strategy",
    "local_rank": _LAUNCHER,
    "warmup_ratio": "use warmup_steps with a number below 1",
    "logging_dir": "TensorBoard's files are in the run folder",
    "evaluation_strategy": "its name is eval_strategy",
    "no_cuda": "its name is use_cpu",
    "overwrite_output_dir": "a run never overwrites another; `oslo submit --fresh` starts anew",
}
"""name: what to use instead, or why it cannot be."""


_OWN_OPTIMIZERS: Final = {"adamw_torch", "adamw_torch_fused", "adafactor", "adagrad", "rmsprop", "sgd"}
"""torch's and transformers'; all others of OPTIMIZERS are bitsandbytes', also ademamix and lion_32bit."""
PLAIN_OPTIMIZER = "adamw_torch"
"""What takes the place of a default that cannot be had."""


_MOMENT_BYTES: Final = {
    "adamw_torch": 12, "adamw_torch_fused": 8, "adamw_8bit": 2, "adamw_bnb_8bit": 2, "ademamix": 12, "ademamix_8bit": 3,
    "lion_8bit": 1, "lion_32bit": 4, "adagrad": 8, "rmsprop": 8,
}  # fmt: skip


def moment_bytes(optimizer: str) -> int:
    """Of GPU memory for each trained weight, with what a step makes of all of them at once (torch's own, unless fused:
    a root).

    Adafactor and SGD keep next to nothing; paged ones make room by themselves.
    """
    return _MOMENT_BYTES.get(optimizer, 0)


def needs_bitsandbytes(optimizer: str) -> bool:
    """On CUDA, by transformers' name of it."""
    return optimizer not in _OWN_OPTIMIZERS


def refusal_of_transformers_key(key: str, value: object) -> str | None:
    """Say why `key` cannot be `value`.

    Returns the reason; "" when the value is the one that oslo uses anyway; None when transformers has no
    such key, so that the caller reports it as unknown.
    """
    if key in FIXED:
        fixed, why = FIXED[key]
        same = value == fixed and isinstance(value, bool) == isinstance(fixed, bool)
        return "" if same else f"only {_yaml(fixed)} is possible: {why}"
    if key in REFUSED:
        return f"not supported: {REFUSED[key]}"
    return None


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
