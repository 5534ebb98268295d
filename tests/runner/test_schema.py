"""`oslo schema` accepts what `oslo validate` accepts, and knows every key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from config_cases import GOOD_CASES, Case
from json_schema import problems

from opensloth.opensloth_config import TrainingArguments
from opensloth.training_keys import FIXED
from runner import starter, yaml12
from runner.schema import file_schema
from runner.spec import JobArgs

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path for path in ROOT.glob("examples/**/*.yaml"))


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return file_schema()


@pytest.mark.parametrize("case", GOOD_CASES, ids=lambda case: case.title)
def test_good_files_fit(case: Case, schema: dict[str, Any]) -> None:
    assert problems(yaml12.parse(case.text).values, schema, schema) == []


def test_the_starter_fits(schema: dict[str, Any]) -> None:
    assert problems(yaml12.parse(starter.STARTER).values, schema, schema) == []


def test_the_examples_fit(schema: dict[str, Any]) -> None:
    for path in EXAMPLES:
        assert problems(yaml12.parse(path.read_text()).values, schema, schema) == [], path


@pytest.mark.parametrize(
    "text",
    [
        "dataset: {path: x}",
        "opensloth: {fast_model_args: {}}",
        "opensloth: {fast_model_args: {model_name: m, max_len: 3}}",
        "opensloth: {fast_model_args: {model_name: m}}\ntraining: {seed: x}",
        "opensloth: {fast_model_args: {model_name: m}}\ntraining: {fp16: true}",
        "opensloth: {fast_model_args: {model_name: m}}\nname: Bad_Name",
        "opensloth: {fast_model_args: {model_name: m}}\njob: {nodes: 0}",
        "opensloth: {fast_model_args: {model_name: m}}\njob: {volumes: [{hostPath: /x}]}",
    ],
)
def test_bad_files_do_not_fit(text: str, schema: dict[str, Any]) -> None:
    assert problems(yaml12.parse(text).values, schema, schema) != []


def test_every_key_is_there_with_the_docstring_of_its_field(schema: dict[str, Any]) -> None:
    training = schema["$defs"]["TrainingArguments"]["properties"]
    assert set(training) == {*TrainingArguments.model_fields, *FIXED}
    job = schema["$defs"]["JobArgs"]["properties"]
    assert set(job) == set(JobArgs.model_fields)
    assert job["shm"]["description"].startswith("Size of /dev/shm, a part of `memory`.")
    assert training["global_batch_size"]["description"].startswith("Rows in a step over all processes")
    assert schema["$defs"]["OpenSlothConfig"]["properties"]["data_cache_path"]["default"] == "cache"
