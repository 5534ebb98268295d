"""The config classes: the documented example, defaults, and the contradictions that they refuse."""

from __future__ import annotations

import pytest

from opensloth.opensloth_config import DatasetArgs, FastModelArgs, LoraArgs, OpenSlothConfig, TrainingArguments

MODEL = FastModelArgs(model_name="m")


def test_the_documented_example() -> None:
    config = OpenSlothConfig(
        data_cache_path="data/dataset_cache",
        devices=[0],
        fast_model_args=FastModelArgs(
            model_name="unsloth/Qwen2.5-0.5B-Instruct", max_seq_length=4096, load_in_4bit=True
        ),
        lora_args=LoraArgs(
            r=8,
            lora_alpha=16,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            lora_dropout=0.0,
        ),
        sequence_packing=True,
    )
    training = TrainingArguments(
        output_dir="outputs/sft_training",
        per_device_train_batch_size=2,
        learning_rate=2e-4,
        num_train_epochs=3,
        optim="adamw_8bit",
    )
    assert config.lora_args == LoraArgs()
    assert config.training_type == "sft"
    assert training.to_dict()["num_train_epochs"] == 3


def test_without_an_adapter_the_default_one_is_taken() -> None:
    assert OpenSlothConfig(data_cache_path="c", fast_model_args=MODEL).lora_args == LoraArgs()


def test_full_finetuning_takes_no_adapter_and_gives_up_the_4_bit_default() -> None:
    config = OpenSlothConfig(data_cache_path="c", fast_model_args=FastModelArgs(model_name="m", full_finetuning=True))
    assert config.lora_args is None
    assert config.fast_model_args.load_in_4bit is False
    assert not config.fast_model_args.wrote("load_in_4bit")


def test_a_pretrained_adapter_brings_its_own_shape() -> None:
    with pytest.warns(UserWarning, match="lora_args is ignored"):
        config = OpenSlothConfig(
            data_cache_path="c", fast_model_args=MODEL, lora_args=LoraArgs(), pretrained_lora="adapter"
        )
    assert config.lora_args is None


def test_switches_choose_among_the_target_modules() -> None:
    assert LoraArgs(finetune_mlp_modules=False).selected_modules() == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert LoraArgs(finetune_attention_modules=False).selected_modules() == ["gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: FastModelArgs(model_name="m", load_in_4bit=True, load_in_8bit=True), "exclude each other"),
        (lambda: FastModelArgs(model_name="m", load_in_4bit=True, full_finetuning=True), "drop one of the two"),
        (lambda: FastModelArgs(model_name=""), "at least 1 character"),
        (lambda: FastModelArgs(model_name="m", max_seq_len=3), "max_seq_len"),
        (lambda: FastModelArgs(model_name="m", max_seq_length="4096"), "valid integer"),
        (
            lambda: LoraArgs(finetune_attention_modules=False, finetune_mlp_modules=False),
            "leave no target_modules",
        ),
        (lambda: OpenSlothConfig(data_cache_path="c", fast_model_args=MODEL, devices=[0, 0]), "distinct"),
        (lambda: OpenSlothConfig(data_cache_path="c", fast_model_args=MODEL, devices=[-1]), "0 or above"),
        (lambda: OpenSlothConfig(data_cache_path="c", fast_model_args=MODEL, training_type="dpo"), "not there yet"),
        (lambda: OpenSlothConfig(data_cache_path="c", fast_model_args=MODEL, engine="unsloth"), "not there yet"),
        (
            lambda: OpenSlothConfig(
                data_cache_path="c",
                fast_model_args=FastModelArgs(model_name="m", full_finetuning=True),
                lora_args=LoraArgs(),
            ),
            "trains no adapter",
        ),
        (
            lambda: OpenSlothConfig(
                data_cache_path="c",
                fast_model_args=FastModelArgs(model_name="m", max_lora_rank=4),
                lora_args=LoraArgs(r=8),
            ),
            "over fast_model_args.max_lora_rank 4",
        ),
        (lambda: TrainingArguments(eval_steps=5), "eval_strategy"),
        (lambda: TrainingArguments(save_steps=5, save_strategy="epoch"), "save_strategy"),
        (lambda: TrainingArguments(save_only_model=True, resume_from_checkpoint=True), "cannot be resumed"),
        (lambda: TrainingArguments(learning_rate=float("nan")), "finite number"),
        (lambda: TrainingArguments(max_steps=0), "train nothing"),
        (lambda: TrainingArguments(warmup_steps=2.5), "whole steps"),
        (lambda: FastModelArgs(model_name="m", gpu_memory_utilization=0.5), "leave it out"),
        (lambda: DatasetArgs(path="d", eval_path="e", eval_fraction=0.1), "keep one"),
        (lambda: DatasetArgs(path="d", num_samples=0), "-1 for all rows"),
    ],
)
def test_refused(build: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build()  # type: ignore[operator]
