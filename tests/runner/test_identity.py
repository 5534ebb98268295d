from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opensloth.run_config import RunConfig, check
from runner.config_file import Target, load_file, name_from_stem
from runner.identity import content_hash, latest_of_content, name_of, next_fresh, run_id
from runner.rendering import cluster_content


def config(path: str = "/data/train.jsonl", model: dict[str, Any] | None = None, **training: Any) -> RunConfig:
    values = {
        "name": "a",
        "opensloth": {"fast_model_args": {"model_name": "m", **(model or {})}},
        "dataset": {"path": path},
        "training": training,
    }
    checked, problems = check(values)
    assert checked is not None, problems
    return checked


def test_the_same_data_elsewhere_is_the_same_content() -> None:
    here, there = config("/here/a.jsonl"), config("/there/b.jsonl")
    assert content_hash(here, {"/here/a.jsonl": "1" * 64}) == content_hash(there, {"/there/b.jsonl": "1" * 64})
    assert content_hash(here, {"/here/a.jsonl": "1" * 64}) != content_hash(here, {"/here/a.jsonl": "2" * 64})


def test_on_a_cluster_a_model_folder_is_its_bytes(sft: Path, tmp_path: Path) -> None:
    def content(name: str, weights: str) -> str:
        model = tmp_path / name
        model.mkdir()
        (model / "model.safetensors").write_text(weights)
        sets = [f"opensloth.fast_model_args.model_name={model}", "job={image: i, volume: v}"]
        return cluster_content(load_file(sft, sets, None, Target(Path("/shared"), Path("/shared/inputs"))))

    first = content("model", "1")
    assert first == content("moved", "1")
    assert first != content("edited", "2")


def test_a_path_on_the_volume_is_itself() -> None:
    here = config(model={"model_name": "/shared/models/a"})
    assert content_hash(here, {"/shared/models/a": "1" * 64}) != content_hash(here, {})
    assert content_hash(here, {}) != content_hash(config(model={"model_name": "/shared/models/b"}), {})


def test_what_is_written_out_is_the_same_content_as_the_default() -> None:
    assert content_hash(config(), {}) == content_hash(config(seed=42), {})
    assert content_hash(config(), {}) != content_hash(config(seed=43), {})


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("model", {"load_in_4bit": True}),
        ("model", {"load_in_8bit": False}),
        ("training", {"optim": "adamw_8bit"}),
        ("training", {"eval_strategy": "no"}),
    ],
)
def test_a_written_value_that_would_give_way_as_the_default_is_other_content(
    section: str, values: dict[str, Any]
) -> None:
    plain = config()
    written = config(**values) if section == "training" else config(model=values)
    ignored: dict[str, Any] = {"exclude": {"explicit"}}
    assert plain.model_dump(**ignored) == written.model_dump(**ignored)
    assert content_hash(plain, {}) != content_hash(written, {})


def test_the_job_section_is_content_on_a_cluster() -> None:
    assert content_hash(config(), {}, {"image": "a"}) != content_hash(config(), {}, {"image": "b"})


def test_a_moved_cache_is_the_same_content(sft: Path) -> None:
    def content(cache: str) -> str:
        sets = [f"opensloth.data_cache_path={cache}"]
        return content_hash(load_file(sft, sets, None, Target(Path("/r"))).run, {})

    assert content("one") == content("two")


def test_numbers_of_fresh_runs() -> None:
    base = run_id("a", "0123456789abcdef")
    assert base == "a-01234567"
    existing = ["a-01234567", "a-01234567-3", "a-01234567-2", "a-89abcdef-9", "b-01234567-7"]
    assert latest_of_content(base, existing) == "a-01234567-3"
    assert next_fresh(base, existing) == "a-01234567-4"
    assert latest_of_content(base, []) is None
    assert next_fresh(base, []) == base


@pytest.mark.parametrize(
    ("run", "name"),
    [("a-01234567", "a"), ("a-b-01234567-12", "a-b"), ("a-12345678-01234567", "a-12345678"), ("odd", "odd")],
)
def test_names(run: str, name: str) -> None:
    assert name_of(run) == name


@pytest.mark.parametrize(
    ("stem", "name"),
    [("sft", "sft"), ("My_Run v2", "my-run-v2"), ("7b", "run-7b"), ("---", "run"), ("x" * 60, "x" * 40), ("é", "run")],
)
def test_name_from_stem(stem: str, name: str) -> None:
    assert name_from_stem(stem) == name
