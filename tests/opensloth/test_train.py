"""`opensloth.train.train` with the two config objects of the documentation, on a machine without CUDA."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import transformers

from opensloth.errors import ConfigError, DataError
from opensloth.hardware import Hardware, bring_in_line
from opensloth.opensloth_config import FastModelArgs, LoraArgs, OpenSlothConfig, TrainingArguments
from opensloth.run_config import from_python
from opensloth.train import _publish, train
from opensloth.trainer import Place, TrainResult

CPU = Hardware(cuda=0, bf16=False, bitsandbytes=False)
GPU = Hardware(cuda=1, bf16=True, bitsandbytes=True)


def documented(folder: Path, **model: Any) -> OpenSlothConfig:
    """The documented example, with a small local model and a prepared dataset in `folder`."""
    return OpenSlothConfig(
        data_cache_path=str(folder / "data" / "dataset_cache"),
        devices=[0],
        fast_model_args=FastModelArgs(model_name=str(folder / "model"), max_seq_length=4096, **model),
        lora_args=LoraArgs(
            r=8,
            lora_alpha=16,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            lora_dropout=0.0,
        ),
        sequence_packing=True,
    )


def documented_training(folder: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder / "outputs" / "sft_training"),
        per_device_train_batch_size=2,
        learning_rate=2e-4,
        num_train_epochs=3,
        **changes,
    )


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A model and a prepared dataset, as `datasets` saves one."""
    from datasets import Dataset

    tiny.save(tmp_path / "model")
    Dataset.from_list(tiny.random_rows(40)).save_to_disk(str(tmp_path / "data" / "dataset_cache"))
    return tmp_path


def test_written_values_that_this_machine_cannot_honour_are_refused_together(prepared: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        train(documented(prepared, load_in_4bit=True), documented_training(prepared, optim="adamw_8bit"))
    said = {problem.path: problem for problem in caught.value.problems}
    assert said["opensloth.fast_model_args.load_in_4bit"].message == (
        "4-bit loading needs CUDA, and this machine has none"
    )
    assert said["opensloth.fast_model_args.load_in_4bit"].hint == ("--set opensloth.fast_model_args.load_in_4bit=false")
    assert said["training.optim"].hint == "--set training.optim=adamw_torch"


def test_the_documented_example_trains(prepared: Path) -> None:
    """As defaults, the 4-bit and 8-bit values give way, with a line each in the run's events."""
    from peft import AutoPeftModelForCausalLM

    result = train(documented(prepared), documented_training(prepared))
    out = prepared / "outputs" / "sft_training"
    assert result.steps == 3
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    warnings = [event["message"] for event in events if event.get("level") == "warning"]
    assert warnings[0].startswith("opensloth.fast_model_args.load_in_4bit: the default 4-bit loading needs CUDA")
    assert warnings[1] == (
        "training.optim: the default adamw_8bit needs CUDA, and this machine has none; using adamw_torch"
    )
    AutoPeftModelForCausalLM.from_pretrained(out)
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template == tiny.CHATML


def test_written_values_that_it_can_honour(prepared: Path) -> None:
    train(documented(prepared, load_in_4bit=False), documented_training(prepared, optim="adamw_torch", max_steps=1))


def test_on_a_gpu_nothing_gives_way(tmp_path: Path) -> None:
    config = from_python(
        documented(tmp_path, load_in_4bit=True), documented_training(tmp_path, optim="adamw_8bit"), "sft"
    )
    in_line, warnings = bring_in_line(config, GPU)
    assert warnings == []
    assert in_line.opensloth.fast_model_args.load_in_4bit is True
    assert in_line.training.optim == "adamw_8bit"
    assert in_line.training.bf16 is True
    assert config.training.bf16 is None, "the caller's config is left as it is"


def test_without_its_package_quantisation_names_the_package(tmp_path: Path) -> None:
    config = from_python(documented(tmp_path, load_in_4bit=True), documented_training(tmp_path), "sft")
    with pytest.raises(ConfigError, match=r"needs the package bitsandbytes .*pip install 'opensloth\[gpu\]'"):
        bring_in_line(config, Hardware(cuda=1, bf16=True, bitsandbytes=False))


@pytest.mark.parametrize(
    ("devices", "said"),
    [([3], r"asks for \[3\]; this machine has 0"), ([0, 1], "takes a process each, and this is one process")],
)
def test_devices_that_are_not_there(tmp_path: Path, devices: list[int], said: str) -> None:
    config = from_python(
        documented(tmp_path).model_copy(update={"devices": devices}), documented_training(tmp_path), "sft"
    )
    with pytest.raises(ConfigError, match=said):
        bring_in_line(config, GPU)


def test_a_model_that_is_not_there(prepared: Path) -> None:
    config = documented(prepared).model_copy(update={"fast_model_args": FastModelArgs(model_name="./nowhere")})
    with pytest.raises((ConfigError, DataError), match="nowhere"):
        train(config, documented_training(prepared))


def test_a_dataset_that_is_not_there(tmp_path: Path) -> None:
    tiny.save(tmp_path / "model")
    with pytest.raises(DataError, match="dataset_cache"):
        train(documented(tmp_path), documented_training(tmp_path))


def test_a_target_module_that_the_model_does_not_have(prepared: Path) -> None:
    config = documented(prepared)
    config = config.model_copy(update={"lora_args": LoraArgs(target_modules=["q_proj", "query"])})
    with pytest.raises(ConfigError, match=r"no module named query .*its linear layers are down_proj, gate_proj"):
        train(config, documented_training(prepared))


def test_a_result_that_somebody_still_reads_is_replaced_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS keeps the files of a folder that is read under other names in it: it cannot be removed."""

    class Trainer:
        def save_model(self, folder: Path, _: object) -> None:
            folder.mkdir()
            (folder / "adapter").write_text("new")

    place = Place(tmp_path / "checkpoints", tmp_path / "final", tmp_path)
    place.final.mkdir()
    (place.final / "adapter").write_text("old")
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    config = from_python(documented(tmp_path), documented_training(tmp_path), "x")
    result = TrainResult(1, 0.5, None, 7, 1.0)
    _publish(Trainer(), config, place, tmp_path, result, None)  # type: ignore[arg-type]
    assert (place.final / "adapter").read_text() == "new"
