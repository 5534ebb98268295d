"""Which of a config's paths are files of this machine: found, made absolute, named as the target sees them."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from opensloth.errors import Problem
from opensloth.fingerprint import source_sha256
from opensloth.opensloth_config import DatasetArgs, OpenSlothConfig, TrainingArguments
from opensloth.run_config import RunConfig
from opensloth.source_names import VOLUME_PREFIX, VOLUME_ROOT, expanded, is_hub_name
from runner import yaml12

# os.path asks instead of pathlib: what cannot be a path (a name too long, NUL) is not there, and raises nothing.


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
    return [
        *_problems_of_sources(values, folder, is_cluster),
        *_problems_of_templates(values, folder),
        *_problems_of_folders(values, folder, is_cluster),
    ]


def _problems_of_sources(values: Mapping[str, Any], folder: Path, is_cluster: bool) -> Iterator[Problem]:
    for path, text in _sources(values):
        if text.startswith(VOLUME_PREFIX):
            if not is_cluster:
                yield _problem_of_volume(path, text, "file")
        elif not is_hub_name(text, folder) and not os.path.exists(_local(text, folder)):
            where = _local(text, folder)
            yield Problem(path, f"no such file or folder: {where}", nearest_name(where))


def _problems_of_templates(values: Mapping[str, Any], folder: Path) -> Iterator[Problem]:
    for path, text in _templates(values):
        where = _local(text, folder)
        if not os.path.isfile(where):
            yield Problem(path, f"no such file: {where}", nearest_name(where))
        elif (fault := _fault_of_template(where)) is not None:
            yield Problem(path, f"{where}: {fault}")


def _problems_of_folders(values: Mapping[str, Any], folder: Path, is_cluster: bool) -> Iterator[Problem]:
    for path, text, marker, what in _folders(values):
        where = _local(text, folder)
        if text.startswith(VOLUME_PREFIX):
            if not is_cluster:
                yield _problem_of_volume(path, text, "folder")
        elif is_cluster and (_is_of_volume(text) or (text.startswith("/") and not os.path.exists(where))):
            continue  # in the pods: on the volume, in another one, or in the image
        elif not os.path.isdir(where):
            if marker or (is_cluster and text.startswith((".", "~"))):  # a model may be the hub's
                yield Problem(path, f"no such folder: {where}", nearest_name(where))
        elif marker and not os.path.isfile(where / marker):
            yield Problem(path, f"{where} is no {what}: it holds no {marker}")


def _problem_of_volume(path: str, text: str, kind: str) -> Problem:
    why = "is on a cluster's volume, which a local run cannot read"
    return Problem(path, f"{text} {why}", f"give a {kind} of this machine")


def _is_of_volume(text: str) -> bool:
    return text.startswith(f"{VOLUME_ROOT}/")


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
    if not os.path.isdir(parent):
        return f"there is no folder {parent}"
    near = difflib.get_close_matches(path.name, [entry.name for entry in parent.iterdir()], n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else ""


def resolve(config: RunConfig, folder: Path, roots: Roots) -> tuple[RunConfig, dict[str, Path]]:
    """Make every path absolute as the target sees it, and put templates from files in as text.

    folder: of the config file.
    Returns the config and {path in the config: local file or folder}: the data, and on a cluster the folders of
    models, adapters and checkpoints too.
    """
    resolver = _Resolver(folder, roots)
    resolved = config.model_copy(
        update={
            "opensloth": resolver.opensloth(config.opensloth),
            "dataset": None if config.dataset is None else [resolver.dataset(one) for one in config.dataset],
            "training": resolver.training(config.training),
        }
    )
    return resolved, resolver.sources


def hash_in(seen: str) -> str:
    """SHA-256 of what came from the submitting machine: of a path `<inputs>/<sha256>/<name>`."""
    return PurePosixPath(seen).parent.name


class _Resolver:
    """Resolves the sections of one config, and notes what of this machine they name."""

    def __init__(self, folder: Path, roots: Roots) -> None:
        self.sources: dict[str, Path] = {}
        self._folder, self._roots = folder, roots

    def dataset(self, one: DatasetArgs) -> DatasetArgs:
        changed: dict[str, Any] = {"path": self._source(one.path)}
        if one.eval_path is not None:
            changed["eval_path"] = self._source(one.eval_path)
        if one.chat_template is not None and one.chat_template.endswith(".jinja"):
            changed["chat_template"] = _template(_local(one.chat_template, self._folder))
        return one.model_copy(update=changed)

    def training(self, training: TrainingArguments) -> TrainingArguments:
        changed: dict[str, Any] = {}
        if training.output_dir is not None:
            base = self._folder.resolve() if self._roots.inputs is None else self._roots.root
            changed["output_dir"] = str(base / expanded(training.output_dir))
        if isinstance(training.resume_from_checkpoint, str):
            changed["resume_from_checkpoint"] = self._of_folder(training.resume_from_checkpoint)
        return training.model_copy(update=changed)

    def opensloth(self, opensloth: OpenSlothConfig) -> OpenSlothConfig:
        cache = self._roots.cache / expanded(opensloth.data_cache_path)
        model = opensloth.fast_model_args
        changed: dict[str, Any] = {
            "data_cache_path": str(cache),
            "fast_model_args": model.model_copy(update={"model_name": self._model(model.model_name)}),
        }
        if opensloth.pretrained_lora is not None:
            changed["pretrained_lora"] = self._of_folder(opensloth.pretrained_lora)
        return opensloth.model_copy(update=changed)

    def _source(self, text: str) -> str:
        if text.startswith(VOLUME_PREFIX):
            return self._on_volume(text)
        if is_hub_name(text, self._folder):
            return text
        return self._here(text)

    def _model(self, name: str) -> str:
        """A model beside the file, or a place on the volume; a hub name stays as it is."""
        if name.startswith(VOLUME_PREFIX) or os.path.isdir(_local(name, self._folder)):
            return self._of_folder(name)
        return name

    def _of_folder(self, text: str) -> str:
        """A folder that `problems` has found to be here, or that only pods see."""
        local = _local(text, self._folder)
        if self._roots.inputs is None:
            return str(local.resolve())
        if text.startswith(VOLUME_PREFIX):
            return self._on_volume(text)
        return text if _is_of_volume(text) or not os.path.isdir(local) else self._here(text)

    def _on_volume(self, text: str) -> str:
        return str(PurePosixPath(self._roots.root) / text.removeprefix(VOLUME_PREFIX).lstrip("/"))

    def _here(self, text: str) -> str:
        local = _local(text, self._folder).resolve()
        inputs = self._roots.inputs
        seen = local if inputs is None else inputs / source_sha256(local) / local.name
        self.sources[str(seen)] = local
        return str(seen)


def _local(text: str, folder: Path) -> Path:
    return folder / expanded(text)


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


def _folders(values: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """(dotted path, text, a file that is in such a folder, what the folder is) of models, adapters, checkpoints.

    The file is "" for a model, which may also be a hub name.
    """
    for keys, marker, what in (
        (("opensloth", "fast_model_args", "model_name"), "", "model"),
        (("opensloth", "pretrained_lora"), "adapter_config.json", "adapter"),
        (("training", "resume_from_checkpoint"), "manifest.json", "checkpoint"),
    ):
        found: Any = values
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        if isinstance(found, str) and found:
            yield ".".join(keys), found, marker, what


def _datasets(values: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    dataset = values.get("dataset")
    if isinstance(dataset, dict):
        yield "dataset", dataset
    elif isinstance(dataset, list):
        yield from ((f"dataset[{i}]", item) for i, item in enumerate(dataset) if isinstance(item, dict))
