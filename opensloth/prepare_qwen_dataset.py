"""Prepare a dataset from the command line: the seed's flags in front of `python -m opensloth.data build`.

The prepared dataset at `--output_dir` is what `OpenSlothConfig(data_cache_path=...)` takes when there is no
`dataset` section.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opensloth.contract import EXIT_CODE_OF_CAUSE, ROOT_ENV
from opensloth.data import cache
from opensloth.data.build import build
from opensloth.data.built import BuiltData
from opensloth.data.file_errors import file_errors
from opensloth.data.prepared import FOOTER_FILE
from opensloth.data.preview import as_text, preview
from opensloth.errors import ConfigError, DataError, OpenSlothError
from opensloth.run_config import DEFAULT_DATA_CACHE_PATH, RunConfig, check

OWN_TEMPLATES = ("auto", "qwen-2.5", "qwen2.5", "qwen-3", "qwen3")
"""Names that mean the template which the tokenizer brings along."""
DEBUG_ROWS = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare what the flags say; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        config = config_of(options)
        output = Path(options.output_dir or default_name(options))
        with file_errors(output):
            _check_output(output)
            data = build(config, _report)
            _publish(Path(data.path), output)
        sys.stdout.write(_summary(data, output))
        if options.debug:
            sys.stdout.write(as_text(preview(config, DEBUG_ROWS), color=sys.stdout.isatty()))
    except OpenSlothError as error:
        sys.stderr.write(f"error: {error}\n")
        return int(EXIT_CODE_OF_CAUSE[error.cause])
    return 0


def config_of(options: argparse.Namespace) -> RunConfig:
    """The config that `oslo data build` would be given.

    Raises ConfigError with all problems.
    """
    for flag in ("gpus", "instruction_part", "response_part"):
        if getattr(options, flag) is not None:
            _report("note", level="info", message=f"--{flag} is not needed any more and has no effect")
    dataset: dict[str, Any] = {
        "path": str(Path(options.input_file).absolute()) if options.input_file else options.dataset_name,
        "split": options.split,
        "num_samples": options.num_samples,
        "train_on": "assistant" if options.train_on_target_only else "all",
    }
    if options.chat_template not in OWN_TEMPLATES:
        dataset["chat_template"] = options.chat_template
    root = Path(os.environ.get(ROOT_ENV) or Path.home() / ".oslo")
    model = {"model_name": options.tokenizer_name, "max_seq_length": options.max_seq_length}
    config, problems = check(
        {
            "name": "prepare",
            "opensloth": {"data_cache_path": str(root / DEFAULT_DATA_CACHE_PATH), "fast_model_args": model},
            "dataset": dataset,
            "training": {"dataset_num_proc": options.num_proc},
        }
    )
    if config is None:
        raise ConfigError(problems)
    return config


def default_name(options: argparse.Namespace) -> str:
    """`data/<model>-<dataset>-<split>-<n or all>-l<length>-processed`."""
    model = Path(options.tokenizer_name).name
    dataset = Path(options.input_file).stem if options.input_file else options.dataset_name.rpartition("/")[2]
    count = "all" if options.num_samples < 0 else options.num_samples
    return f"data/{model}-{dataset}-{options.split}-{count}-l{options.max_seq_length}-processed"


def _check_output(output: Path) -> None:
    """Only a prepared dataset is ever replaced."""
    if output.exists() and not (output / FOOTER_FILE).is_file() and (output.is_file() or any(output.iterdir())):
        raise DataError(f"{output}: is there and is not a prepared dataset", "give another --output_dir")


def _publish(entry: Path, output: Path) -> None:
    """Put the cache entry's files at `output`, as hard links where the file system allows it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.building")
    try:
        shutil.copytree(entry, aside, copy_function=_link_or_copy)
        cache.remove_folder(output)
        aside.rename(output)
    except shutil.Error as error:  # lists every file that was not copied; the first says why
        cache.remove_folder(aside)
        raise DataError(f"{output}: {error.args[0][0][2]}") from error
    except BaseException:
        cache.remove_folder(aside)
        raise


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def _summary(data: BuiltData, output: Path) -> str:
    share = data.target_tokens / data.tokens
    return (
        f"{output}: {data.documents} documents, {data.tokens} tokens, {share:.0%} of them targets\n"
        f"train on it: OpenSlothConfig(data_cache_path={str(output)!r}, ...)\n"
    )


def _report(event: str, /, **fields: Any) -> None:
    if event == "note":
        sys.stderr.write(f"{fields['level']}: {fields['message']}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m opensloth.prepare_qwen_dataset", description=__doc__)
    add = parser.add_argument
    add("--tokenizer_name", default="unsloth/Qwen2.5-0.5B-Instruct", help="model folder or hub name")
    add("--chat_template", default="qwen-2.5", help="qwen-2.5: the tokenizer's own; chatml, a .jinja file or a text")
    add("--dataset_name", default="mlabonne/FineTome-100k", help="hub name")
    add("-i", "--input_file", help="a local file or folder instead of a hub name")
    add("--split", default="train")
    add("-n", "--num_samples", type=int, default=-1, help="the first so many rows; -1: all")
    add("-wk", "--num_proc", type=int, default=8, help="threads that tokenise")
    add("-o", "--output_dir", help="where the prepared dataset goes; default: a name of model, data and length")
    add("--max_seq_length", type=int, default=4096)
    add(
        "--train_on_target_only",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="learn what assistants said; --no-train_on_target_only: everything",
    )
    add("--debug", action="store_true", help="show rows with their targets marked")
    add("--gpus", help="no effect: data no longer depends on the number of GPUs")
    add("--instruction_part", help="no effect: masks come from the template, not from markers")
    add("--response_part", help="no effect: masks come from the template, not from markers")
    return parser


if __name__ == "__main__":
    sys.exit(main())
