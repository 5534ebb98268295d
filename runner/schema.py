"""JSON schema of the whole config file, generated from the classes that check it."""

from __future__ import annotations

import ast
import inspect
from types import ModuleType
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from opensloth import opensloth_config
from opensloth.opensloth_config import DatasetArgs, OpenSlothConfig, Section, TrainingArguments
from opensloth.run_config import DEFAULT_DATA_CACHE_PATH, NAME_PATTERN
from opensloth.training_keys import FIXED
from runner import spec
from runner.spec import JobArgs

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


class _File(Section):
    """The config file of oslo: one fine-tuning run."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="oslo")

    name: str = Field("the file's stem", pattern=NAME_PATTERN)
    training_type: Literal["sft", "dpo", "kto", "orpo"] = "sft"
    opensloth: OpenSlothConfig
    dataset: DatasetArgs | list[DatasetArgs] | None = None
    training: TrainingArguments | None = None
    job: JobArgs | None = None


def file_schema() -> dict[str, Any]:
    """The schema; descriptions are the docstrings of the fields."""
    schema = {"$schema": _DIALECT, **_File.model_json_schema()}
    definitions = schema["$defs"]
    for module in (opensloth_config, spec):
        for (owner, field), text in field_docstrings(module).items():
            if owner in definitions and field in definitions[owner]["properties"]:
                definitions[owner]["properties"][field]["description"] = text
    _as_in_a_file(definitions)
    return schema


def _as_in_a_file(definitions: dict[str, Any]) -> None:
    """What a file may leave out or may say, and Python's classes see otherwise."""
    config = definitions["OpenSlothConfig"]
    config["required"].remove("data_cache_path")
    config["properties"]["data_cache_path"]["default"] = DEFAULT_DATA_CACHE_PATH
    training = definitions["TrainingArguments"]["properties"]
    training["output_dir"]["default"] = None
    for key, (value, why) in FIXED.items():
        training[key] = {"const": value, "description": f"Only this value: {why}."}


def field_docstrings(module: ModuleType) -> dict[tuple[str, str], str]:
    """(class, field) -> the string that stands below the field."""
    found = {}
    for statement in ast.parse(inspect.getsource(module)).body:
        if isinstance(statement, ast.ClassDef):
            for field, below in zip(statement.body, statement.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and _is_text(below):
                    assert isinstance(below, ast.Expr)
                    assert isinstance(below.value, ast.Constant)
                    found[statement.name, field.target.id] = inspect.cleandoc(str(below.value.value))
    return found


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
