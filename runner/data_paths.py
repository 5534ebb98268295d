"""Which of a config's paths are files of this machine: found, made absolute, named as the target sees them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from opensloth.errors import Problem
from opensloth.fingerprint import source_sha256
from opensloth.opensloth_config import DatasetArgs, OpenSlothConfig
from opensloth.run_config import RunConfig
from opensloth.source_names import VOLUME_PREFIX, is_hub_name
from runner import yaml12


@dataclass(frozen=True)
class Roots:
    """Folders as the training side sees them.

    root: relative output and `pvc:` paths are below it; cache: relative data_cache_path is below it.
    inputs: where local data is copied for it; None: it reads local data in place.
    """

    root: Path
    cache: Path
    inputs: Path | None


def problems(values: Mapping[str, Any], folder: Path, is_cluster: bool) -> list[Problem]:
    """Paths of this machine that are not there or not what they should be, paths of a volume in a local run."""
    found = [*_problems_of_sources(values, folder, is_cluster), *_problems_of_templates(values, folder)]
    if is_cluster:
        why = "is a folder of this machine, which pods do not see"
        hint = "copy it to the volume and give its path below /shared"
        models = ((path, text) for path, text in _model_folders(values) if _local(text, folder).is_dir())
        return found + [Problem(path, f"{text} {why}", hint) for path, text in models]
    return [*found, *_problems_of_folders(values, folder)]


def _problems_of_sources(values: Mapping[str, Any], folder: Path, is_cluster: bool) -> Iterator[Problem]:
    for path, text in _sources(values):
        if text.startswith(VOLUME_PREFIX):
            if not is_cluster:
                why = "is on a cluster's volume, which a local run cannot read"
                yield Problem(path, f"{text} {why}", "give a file of this machine")
        elif not is_hub_name(text, folder) and not _local(text, folder).exists():
            where = _local(text, folder)
            yield Problem(path, f"no such file or folder: {where}", nearest_name(where))


def _problems_of_templates(values: Mapping[str, Any], folder: Path) -> Iterator[Problem]:
    for path, text in _templates(values):
        where = _local(text, folder)
        if not where.is_file():
            yield Problem(path, f"no such file: {where}", nearest_name(where))
        elif (fault := _fault_of_template(where)) is not None:
            yield Problem(path, f"{where}: {fault}")


def _problems_of_folders(values: Mapping[str, Any], folder: Path) -> Iterator[Problem]:
    for path, text, marker, what in _folders_to_go_on_from(values):
        where = _local(text, folder)
        if not where.is_dir():
            yield Problem(path, f"no such folder: {where}", nearest_name(where))
        elif not (where / marker).is_file():
            yield Problem(path, f"{where} is no {what}: it holds no {marker}")


def _fault_of_template(path: Path) -> str | None:
    try:
        _template(path)
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def _template(path: Path) -> str:
    """Raises ValueError when it is not UTF-8."""
    return yaml12.decode(path.read_bytes())


def nearest_name(path: Path) -> str:
    """A hint with the most similar name beside `path`, "" when there is none."""
    parent = path.parent
    if not parent.is_dir():
        return f"there is no folder {parent}"
    near = difflib.get_close_matches(path.name, [entry.name for entry in parent.iterdir()], n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else ""


def resolve(config: RunConfig, folder: Path, roots: Roots) -> tuple[RunConfig, dict[str, Path]]:
    """Make every path absolute as the target sees it, and put templates from files in as text.

    folder: of the config file.
    Returns the config and {path in the config: local file or folder}.
    """
    sources: dict[str, Path] = {}

    def source(text: str) -> str:
        if text.startswith(VOLUME_PREFIX):
            return str(PurePosixPath(roots.root) / text.removeprefix(VOLUME_PREFIX).lstrip("/"))
        if is_hub_name(text, folder):
            return text
        local = _local(text, folder).resolve()
        seen = local if roots.inputs is None else roots.inputs / source_sha256(local) / local.name
        sources[str(seen)] = local
        return str(seen)

    def dataset(one: DatasetArgs) -> DatasetArgs:
        changed: dict[str, Any] = {"path": source(one.path)}
        if one.eval_path is not None:
            changed["eval_path"] = source(one.eval_path)
        if one.chat_template is not None and one.chat_template.endswith(".jinja"):
            changed["chat_template"] = _template(_local(one.chat_template, folder))
        return one.model_copy(update=changed)

    training = config.training
    if training.output_dir is not None:
        base = folder.resolve() if roots.inputs is None else roots.root
        training = training.model_copy(update={"output_dir": str(base / Path(training.output_dir).expanduser())})
    if isinstance(training.resume_from_checkpoint, str) and roots.inputs is None:
        checkpoint = str(_local(training.resume_from_checkpoint, folder).resolve())
        training = training.model_copy(update={"resume_from_checkpoint": checkpoint})
    resolved = config.model_copy(
        update={
            "opensloth": _resolve_opensloth(config.opensloth, folder, roots),
            "dataset": None if config.dataset is None else [dataset(one) for one in config.dataset],
            "training": training,
        }
    )
    return resolved, sources


def _resolve_opensloth(opensloth: OpenSlothConfig, folder: Path, roots: Roots) -> OpenSlothConfig:
    changed: dict[str, Any] = {"data_cache_path": str(roots.cache / Path(opensloth.data_cache_path).expanduser())}
    if roots.inputs is None:
        # A model beside the file; a hub name stays as it is. An adapter is a folder.
        model = opensloth.fast_model_args
        if _local(model.model_name, folder).is_dir():
            name = str(_local(model.model_name, folder).resolve())
            changed["fast_model_args"] = model.model_copy(update={"model_name": name})
        if opensloth.pretrained_lora is not None:
            changed["pretrained_lora"] = str(_local(opensloth.pretrained_lora, folder).resolve())
    return opensloth.model_copy(update=changed)


def _local(text: str, folder: Path) -> Path:
    return folder / Path(text).expanduser()


def _sources(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(dotted path, text) of every data source in the values of a file, whatever else is wrong with them."""
    for prefix, dataset in _datasets(values):
        for key in ("path", "eval_path"):
            if isinstance(dataset.get(key), str) and dataset[key]:
                yield f"{prefix}.{key}", dataset[key]


def _templates(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for prefix, dataset in _datasets(values):
        template = dataset.get("chat_template")
        if isinstance(template, str) and template.endswith(".jinja"):
            yield f"{prefix}.chat_template", template


def _model_folders(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    opensloth = values.get("opensloth")
    if not isinstance(opensloth, dict):
        return
    model = opensloth.get("fast_model_args")
    name = model.get("model_name") if isinstance(model, dict) else None
    for path, text in (("fast_model_args.model_name", name), ("pretrained_lora", opensloth.get("pretrained_lora"))):
        if isinstance(text, str) and text:
            yield f"opensloth.{path}", text


def _folders_to_go_on_from(values: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """(dotted path, text, a file that is in such a folder, what the folder is)."""
    for section, key, marker, what in (
        ("opensloth", "pretrained_lora", "adapter_config.json", "adapter"),
        ("training", "resume_from_checkpoint", "manifest.json", "checkpoint"),
    ):
        given = values.get(section)
        text = given.get(key) if isinstance(given, dict) else None
        if isinstance(text, str):
            yield f"{section}.{key}", text, marker, what


def _datasets(values: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    dataset = values.get("dataset")
    if isinstance(dataset, dict):
        yield "dataset", dataset
    elif isinstance(dataset, list):
        yield from ((f"dataset[{i}]", item) for i, item in enumerate(dataset) if isinstance(item, dict))
