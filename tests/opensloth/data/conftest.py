from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_tools import Events, make_tokenizer
from transformers import PreTrainedTokenizerFast

from opensloth.data.build import build
from opensloth.data.built import BuiltData
from opensloth.run_config import RunConfig, check


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer that has the ChatML template; no weights."""
    folder = tmp_path_factory.mktemp("model")
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer without a template."""
    folder = tmp_path_factory.mktemp("base")
    make_tokenizer(None).save_pretrained(folder)
    return folder


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def make_config(tmp_path: Path, model_folder: Path) -> Callable[..., RunConfig]:
    """Config of one dataset (keyword arguments are DatasetArgs), or of `datasets`."""

    def make(
        path: Path | str | None = None,
        *,
        model: Path | str | None = None,
        max_seq_length: int = 512,
        cache: Path | str | None = None,
        datasets: list[dict[str, Any]] | None = None,
        packing: bool = True,
        **args: Any,
    ) -> RunConfig:
        values: dict[str, Any] = {
            "name": "test",
            "opensloth": {
                "data_cache_path": str(cache or tmp_path / "cache"),
                "fast_model_args": {"model_name": str(model or model_folder), "max_seq_length": max_seq_length},
                "sequence_packing": packing,
            },
        }
        if path is not None:
            values["dataset"] = {"path": str(path), **args}
        if datasets is not None:
            values["dataset"] = datasets
        config, problems = check(values)
        assert config is not None, problems
        return config

    return make


@pytest.fixture
def built(make_config: Callable[..., RunConfig], events: Events) -> Callable[..., BuiltData]:
    def run(*args: Any, **kwargs: Any) -> BuiltData:
        return build(make_config(*args, **kwargs), events)

    return run
