"""The model: loaded, given an adapter, and saved so that plain transformers and peft load it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    modeling_utils,
)
from transformers.pytorch_utils import Conv1D

from opensloth.errors import ConfigError, DataError, Problem
from opensloth.files import write_json
from opensloth.opensloth_config import FastModelArgs, LoraArgs, OpenSlothConfig


def load_model(config: OpenSlothConfig, device: torch.device, *, bf16: bool) -> nn.Module:
    """The base model on `device`, with its adapter unless every weight is trained.

    bf16: with an adapter the frozen weights are kept in bfloat16; adapters and fully trained weights are float32.
    Raises ConfigError when the model cannot be found or loaded.
    """
    args = config.fast_model_args
    dtype = torch.bfloat16 if bf16 and not args.full_finetuning else torch.float32
    with _explained(args), _weights_apart():
        base = AutoModelForCausalLM.from_pretrained(
            args.model_name,
            revision=args.revision or "main",
            dtype=dtype,
            attn_implementation=_plain_attention(args),
            quantization_config=_quantisation(args, dtype),
            device_map={"": device},
            trust_remote_code=False,
        )
    base.config.use_cache = False
    model = attach_adapter(base, config)
    recompute_activations(model, wanted=bool(args.use_gradient_checkpointing))
    return model


@contextlib.contextmanager
def _weights_apart() -> Iterator[None]:
    """While models are loaded: every large weight gets GPU memory of its own, and can give it back alone.

    transformers asks for one block as large as the model first, which saves some hundred calls of the driver. But of
    such a block nothing can be given back while one weight is left in it, and the fast path moves nearly all of them:
    at 7B it kept 2.5 GiB that nobody could use.
    """
    warm_up = modeling_utils.caching_allocator_warmup
    modeling_utils.caching_allocator_warmup = lambda *_, **__: None
    try:
        yield
    finally:
        modeling_utils.caching_allocator_warmup = warm_up


def recompute_activations(model: nn.Module, *, wanted: bool) -> None:
    """Trade time for memory in the backward pass."""
    if wanted:
        base_of(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def attach_adapter(base: PreTrainedModel, config: OpenSlothConfig) -> nn.Module:
    """Wrap `base` in the adapter that the config asks for; without one, `base` itself, all of it trainable."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if config.pretrained_lora:
        try:
            return PeftModel.from_pretrained(base, config.pretrained_lora, is_trainable=True)
        except (OSError, ValueError, RuntimeError) as error:
            reason = f"{config.pretrained_lora!r} is no adapter of this model: {str(error).splitlines()[0]}"
            raise ConfigError([Problem("opensloth.pretrained_lora", reason)]) from error
    if config.lora_args is None:
        return base.requires_grad_(True)
    lora = config.lora_args
    _check_targets(base, lora)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(lora.random_state)
        return get_peft_model(
            base,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=lora.r,
                lora_alpha=lora.lora_alpha,
                lora_dropout=lora.lora_dropout,
                bias=lora.bias,
                target_modules=lora.selected_modules(),
                use_rslora=lora.use_rslora,
                fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.modules()),
            ),
        )


def base_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[return-value,operator]


def plain_attention(config: PretrainedConfig) -> str:
    """transformers' attention for rows of one document. SDPA drops soft-capped scores in silence; eager does not."""
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else "sdpa"


def vocabulary_of(model: nn.Module) -> int:
    """How many ids the model has an embedding for."""
    embeddings: Any = base_of(model).get_input_embeddings()
    return int(embeddings.weight.shape[0])


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def save_model(model: nn.Module, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write the adapter, or the whole model, into `folder` as peft and transformers read it.

    dtype: what fully trained weights are rounded to; None: as they are. Adapters are never rounded.
    """
    base = base_of(model)
    if base is not model:
        model.save_pretrained(str(folder), save_embedding_layers=False)  # type: ignore[operator]
        return
    # What is not rounded is to be loaded again: named as the parameters are, for `load_weights`.
    base.save_pretrained(folder, state_dict=_on_cpu(base, dtype), save_original_format=dtype is not None)
    if dtype is None:
        return
    config_file = folder / "config.json"  # transformers writes the dtype in which the weights were trained
    write_json(config_file, json.loads(config_file.read_text()) | {"dtype": str(dtype).removeprefix("torch.")})


def _on_cpu(base: PreTrainedModel, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """The weights, each in memory of its own; those that are tied stay one.

    transformers would copy what lies in one piece of memory with others, all of it at a time, on the GPU.
    """
    made: dict[tuple[int, torch.Size], torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    for name, tensor in base.state_dict().items():
        place = tensor.data_ptr(), tensor.shape
        if place not in made:
            alone = tensor.untyped_storage().nbytes() == tensor.nbytes
            made[place] = tensor.to("cpu", dtype or tensor.dtype, copy=not alone)
        state[name] = made[place]
    return state


def load_weights(model: nn.Module, folder: Path) -> None:
    """Put back the weights that `save_model` wrote without rounding.

    Raises DataError when the folder lacks a weight, or has one that the model does not know.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    base = base_of(model)
    state: dict[str, torch.Tensor] = {}
    if base is not model:
        found = set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
        missing = [name for name in found.missing_keys if "lora_" in name]
    else:
        for file in sorted(folder.glob("*.safetensors")):
            state |= load_file(file)
        found = base.load_state_dict(state, strict=False)
        base.tie_weights()
        own = base.state_dict()
        restored = {own[name].data_ptr() for name in state if name in own}
        missing = [name for name in found.missing_keys if own[name].data_ptr() not in restored]  # tied: stored once
    if missing or found.unexpected_keys:
        names = ", ".join([*missing, *found.unexpected_keys][:3])
        raise DataError(f"{folder}: its weights are not this model's ({names})", "start anew, or use its own model")


def published_dtype(args: FastModelArgs) -> torch.dtype | None:
    """The dtype that the base model was published in; None when its config does not say."""
    with _explained(args):
        config = AutoConfig.from_pretrained(args.model_name, revision=args.revision or "main")
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else None


def check_fits(model: nn.Module, tokenizer: Any) -> None:
    """Raise DataError when the tokenizer makes ids that the model has no embedding for."""
    embeddings = vocabulary_of(model)
    if len(tokenizer) > embeddings:
        raise DataError(
            f"the tokenizer has {len(tokenizer)} ids, the model embeddings for {embeddings}",
            "use the tokenizer that belongs to the model",
        )


def _plain_attention(args: FastModelArgs) -> str:
    return plain_attention(AutoConfig.from_pretrained(args.model_name, revision=args.revision or "main"))


def _quantisation(args: FastModelArgs, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if args.load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if args.load_in_8bit else None


def _check_targets(base: nn.Module, lora: LoraArgs) -> None:
    present = {name.rpartition(".")[2] for name, _ in base.named_modules()}
    missing = [name for name in lora.selected_modules() if name not in present]
    if missing:
        linear = {n.rpartition(".")[2] for n, m in base.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
        raise ConfigError(
            [
                Problem(
                    "opensloth.lora_args.target_modules",
                    f"the model has no module named {', '.join(missing)}",
                    f"its linear layers are {', '.join(sorted(linear))}",
                )
            ]
        )


@contextlib.contextmanager
def _explained(args: FastModelArgs) -> Iterator[None]:
    """Turn transformers' errors about a model that cannot be had into a ConfigError."""
    try:
        yield
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            [
                Problem(
                    "opensloth.fast_model_args.model_name",
                    f"{args.model_name!r} cannot be loaded: {first_line}",
                    "give a folder that holds config.json and the weights, or a name on the hub",
                )
            ]
        ) from error
