"""A config file, `--set`s and the defaults file -> one checked RunConfig and JobArgs.

All problems come at once, each with the file and line, or the `--set`, that it stems from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensloth.arithmetic import batch_shape
from opensloth.contract import INPUTS_DIR
from opensloth.errors import ConfigError, Problem
from opensloth.run_config import RunConfig, check, shown
from runner import data_paths, overrides, yaml12
from runner.errors import InvalidFileError
from runner.grace import derive_grace
from runner.spec import CACHE_MOUNT, SHARED_MOUNT, JobArgs, check_job, needs_of_a_cluster


@dataclass(frozen=True)
class Target:
    """Where a config is going to run.

    root: the root folder as the training side sees it.
    inputs: `<root>/inputs` of a cluster, where local data files are copied; None: this machine reads them in place.
    """

    root: Path
    inputs: Path | None = None

    @classmethod
    def of_cluster(cls) -> Target:
        root = Path(SHARED_MOUNT)
        return cls(root, root / INPUTS_DIR)

    @property
    def is_cluster(self) -> bool:
        return self.inputs is not None


@dataclass(frozen=True)
class LoadedFile:
    """A file that has no problems.

    run: every path absolute; job: the `job` section over the defaults file.
    origins: dotted path of each value that somebody wrote -> `sft.yaml:3`, `--set ...` or `defaults.yaml:2`; of one
        that follows from others -> `derived: ...`.
    sources: path as resolved in `run` -> the local file or folder that is meant.
    """

    path: Path
    run: RunConfig
    job: JobArgs
    origins: Mapping[str, str]
    sources: Mapping[str, Path]

    def world(self, target: Target) -> int:
        """Processes that will train."""
        return self.job.world if target.is_cluster else len(self.run.opensloth.devices)

    def invalid(self, error: ConfigError) -> InvalidFileError:
        """What only the prepared data, or another target, could tell of the file: the same error with its lines."""
        where = {"": self.path.name, **self.origins}
        return InvalidFileError(self.path.name, [_located(problem, where) for problem in error.problems])


def load_file(path: Path, sets: Sequence[str], defaults: Path | None, target: Target) -> LoadedFile:
    """Read, merge, check and resolve.

    sets: the arguments of `--set`; defaults: the defaults file, None when there is none.
    Raises InvalidFileError with every problem.
    """
    merged = _Merged(path)
    merged.read(path)
    merged.override(sets)
    if defaults is not None:
        merged.fill_job(defaults)
    if merged.unreadable:
        raise InvalidFileError(path.name, merged.located())
    values = {"name": name_from_stem(path.stem), **merged.values}
    job_values = values.pop("job", None)
    job, job_problems = check_job({} if job_values is None else job_values)
    run, run_problems = check(values)
    merged.problems += [*run_problems, *job_problems]
    if target.is_cluster and job is not None:
        merged.problems += needs_of_a_cluster(job)
    merged.problems += data_paths.problems(values, path.parent, target.is_cluster)
    if run is not None and job is not None:
        run = _for_target(run, job, target)
        merged.problems += _shape_problems(run, job.world if target.is_cluster else len(run.opensloth.devices))
    if merged.problems or run is None or job is None:
        raise InvalidFileError(path.name, merged.located())
    cache_root = Path(CACHE_MOUNT) if target.is_cluster and job.cache else target.root
    run, sources = data_paths.resolve(run, path.parent, data_paths.Roots(target.root, cache_root, target.inputs))
    origins = merged.origins()
    if job.grace_period is None:
        grace = derive_grace(run)
        job = job.model_copy(update={"grace_period": f"{grace.seconds}s"})
        origins["job.grace_period"] = grace.why
    return LoadedFile(path, run, job, origins, sources)


def name_from_stem(stem: str) -> str:
    """A file's stem as a run's name: lower-case letters, digits and '-', at most 40 characters."""
    name = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")
    if not name[:1].isalpha():
        name = f"run-{name}"
    return name[:40].strip("-")


class _Merged:
    """The values of several sources, and where each came from."""

    def __init__(self, path: Path) -> None:
        self.values: dict[str, Any] = {}
        self.problems: list[Problem] = []
        self.unreadable = False
        self._file = path.name
        self._where: dict[str, str] = {"": path.name}
        self._lines: dict[str, int] = {}

    def read(self, path: Path) -> None:
        document = self._document(path)
        if self.unreadable:
            return
        self.values = document.values
        self._note(path, document.lines)

    def override(self, sets: Sequence[str]) -> None:
        for argument in sets:
            parsed = overrides.parse_override(argument)
            problem = parsed if isinstance(parsed, Problem) else overrides.apply(self.values, parsed)
            if problem:
                self.problems.append(problem)
            elif isinstance(parsed, overrides.Override):
                self._forget(parsed.path)
                self._where[parsed.path] = parsed.where

    def fill_job(self, path: Path) -> None:
        """Fill what `job` leaves open; mappings are filled key by key."""
        before = self.unreadable
        document = self._document(path)
        if self.unreadable:
            self.unreadable = before or bool(self.problems)
            return
        for key in document.values:
            if key != "job":
                where = f"{path.name}:{document.lines[key]}"
                self.problems.append(Problem(key, "a defaults file fills `job` only", "leave it out", where))
        given = document.values.get("job")
        ours = self.values.get("job")
        if not isinstance(given, dict):
            if given is not None:
                where = f"{path.name}:{document.lines['job']}"
                self.problems.append(Problem("job", f"expected a mapping of keys, got {shown(given)}", "", where))
            return
        if ours is None:
            ours = self.values["job"] = {}
        if isinstance(ours, dict):
            taken = _fill(ours, given, "job")
            self._where |= {p: f"{path.name}:{n}" for p, n in document.lines.items() if _below(p, taken)}

    def located(self) -> list[Problem]:
        """The problems with their `where`, by line; what is not of the file's lines comes last."""
        found = {(p.path, p.message): _located(p, self._where) for p in self.problems}
        return sorted(found.values(), key=lambda problem: self._line(problem.where))

    def origins(self) -> dict[str, str]:
        return {path: where for path, where in self._where.items() if path}

    def _document(self, path: Path) -> yaml12.Document:
        document = _read(path)
        self.problems += [Problem(p.path, p.message, p.hint, f"{path.name}:{line}") for line, p in document.problems]
        if not isinstance(document.values, dict):
            self.unreadable = True
            if not document.problems:
                self.problems.append(_not_a_mapping(document.values, path))
        return document

    def _note(self, path: Path, lines: Mapping[str, int]) -> None:
        self._where |= {p: f"{path.name}:{line}" for p, line in lines.items() if p}

    def _forget(self, path: str) -> None:
        self._where = {p: w for p, w in self._where.items() if not _below(p, {path})}

    def _line(self, where: str) -> tuple[int, int]:
        file, _, line = where.rpartition(":")
        if file == self._file and line.isdigit():
            return (0, int(line))
        return (0, 0) if where == self._file else (1, 0)


def _read(path: Path) -> yaml12.Document:
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        hint = data_paths.nearest_name(path)
        raise InvalidFileError(path.name, [Problem("", f"cannot be read: {reason}", hint, str(path))]) from error
    try:
        return yaml12.parse(yaml12.decode(data))
    except ValueError as error:
        raise InvalidFileError(path.name, [Problem("", str(error), "", str(path))]) from error


def _not_a_mapping(values: object, path: Path) -> Problem:
    hint = "the smallest file: opensloth: {fast_model_args: {model_name: ...}} and dataset: {path: train.jsonl}"
    if values is None:
        return Problem("", "the file is empty", hint, path.name)
    return Problem("", f"expected a mapping of sections, got {shown(values)}", hint, f"{path.name}:1")


def _fill(ours: dict[str, Any], given: Mapping[str, Any], prefix: str) -> set[str]:
    """Copy what `ours` lacks; return the paths that were copied."""
    copied = set()
    for key, value in given.items():
        path = f"{prefix}.{key}"
        if key not in ours:
            ours[key] = value
            copied.add(path)
        elif isinstance(ours[key], dict) and isinstance(value, dict):
            copied |= _fill(ours[key], value, path)
    return copied


def _located(problem: Problem, where: Mapping[str, str]) -> Problem:
    """`problem` with the place of its key, or of the nearest section around it.

    where: of each dotted path that somebody wrote; "" is the whole file.
    """
    if problem.where:
        return problem
    path = problem.path
    if path == "opensloth.training_type" and path not in where:
        path = "training_type"  # the file's own key, copied into the section
    at = path
    while at and at not in where:
        at = at[: max(at.rfind("."), at.rfind("["), 0)]
    return Problem(path, problem.message, problem.hint, where[at])


def _below(path: str, roots: set[str]) -> bool:
    """Whether `path` is one of `roots` or inside one."""
    return any(path == root or path.startswith((f"{root}.", f"{root}[")) for root in roots)


def _for_target(run: RunConfig, job: JobArgs, target: Target) -> RunConfig:
    """On a cluster a pod's processes are its GPUs; `opensloth.devices` is for local runs."""
    if not target.is_cluster:
        return run
    devices = list(range(job.processes_per_node))
    return run.model_copy(update={"opensloth": run.opensloth.model_copy(update={"devices": devices})})


def _shape_problems(run: RunConfig, world: int) -> list[Problem]:
    try:
        batch_shape(run.training, world)
    except ConfigError as error:
        return list(error.problems)
    return []
