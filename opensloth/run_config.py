"""The resolved config of one run: checked from a plain mapping, written to and read from a run folder.

`check` is the one place where a mapping becomes config objects; it reports every problem at once, each with
its dotted path, and knows nothing of files: whoever read the mapping adds line numbers.
"""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from opensloth.errors import ConfigError, Problem
from opensloth.opensloth_config import DatasetArgs, OpenSlothConfig, Section, TrainingArguments
from opensloth.training_keys import refusal_of_transformers_key

DEFAULT_DATA_CACHE_PATH = "cache"
SectionT = TypeVar("SectionT", bound=Section)
NAME_PATTERN = r"^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$"
"""DNS-1035, at most 40 characters: a run's name becomes a Kubernetes object's."""


class RunConfig(Section):
    """Everything that training needs to know, without the `job` section."""

    name: str = Field(pattern=NAME_PATTERN)
    training_type: Literal["sft", "dpo", "kto", "orpo"] = "sft"
    opensloth: OpenSlothConfig
    dataset: list[DatasetArgs] | None = None
    """None: `opensloth.data_cache_path` is a prepared dataset."""
    training: TrainingArguments
    explicit: list[str] = Field(default_factory=list)
    """Dotted paths of the keys that a person wrote; the other values are defaults, which may give way."""


def check(values: Mapping[str, Any]) -> tuple[RunConfig | None, list[Problem]]:
    """Turn the mapping of a YAML file, less its `job` section, into a RunConfig.

    values: keys name, training_type, opensloth, dataset, training; `name` must be there.
    Returns the config and no problems, or None and all problems (Problem.where is "").
    """
    written = explicit_paths(values)
    values = _with_file_defaults(values)
    problems: list[Problem] = []
    for key in values:
        if key not in RunConfig.model_fields or key == "explicit":
            known = [name for name in RunConfig.model_fields if name != "explicit"]
            problems.append(unknown_key("", key, [*known, "job"]))
    sections: dict[str, Any] = {
        "opensloth": check_section(OpenSlothConfig, values.get("opensloth"), "opensloth", problems),
        "training": check_section(TrainingArguments, values.get("training"), "training", problems),
        "dataset": _check_datasets(values.get("dataset"), problems),
    }
    problems += _contradictions(values, sections)
    head: dict[str, Any] = {key: values[key] for key in ("name", "training_type") if key in values}
    if problems:
        problems += _problems_of_head(head)
        return None, problems
    try:
        return RunConfig(**head, **sections, explicit=written), []
    except ValidationError as error:
        return None, problems_from(error, "", RunConfig)


def check_section(section: type[SectionT], values: object, path: str, problems: list[Problem]) -> SectionT | None:
    """Build `section` from `values`; append what is wrong to `problems` and return None."""
    if values is None:
        values = {}
    if not isinstance(values, dict):
        problems.append(Problem(path, f"expected a mapping of keys, got {shown(values)}"))
        return None
    found = list(_unknown_keys(section, values, path))
    try:
        known = _without(values, {problem.path for problem in found}, path)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            built = section(**known)
    except ValidationError as error:
        problems += found + problems_from(error, path, section)
        return None
    except UserWarning as warning:  # in a file, a key that would be ignored is a mistake
        problems += [*found, Problem(path, str(warning))]
        return None
    problems += found
    return None if found else built


def problems_from(error: ValidationError, path: str, section: type[BaseModel]) -> list[Problem]:
    """Say in our words what pydantic found; paths are dotted and start with `path`."""
    found: dict[str, str] = {}
    for detail in error.errors(include_url=False, include_context=True):
        at, sentence = _join(path, *_keys(detail["loc"])), _sentence(dict(detail))
        found[at] = (
            f"{_expectation(found[at])} or {_expectation(sentence, 'expected ')}{_got(sentence)}"
            if at in found
            else sentence
        )
    # Of a value that fits no member of a union, the problem of its item tells more than that of the whole.
    inner = tuple(found)
    return [Problem(at, sentence) for at, sentence in found.items() if not any(p.startswith(f"{at}[") for p in inner)]


def _keys(loc: tuple[int | str, ...]) -> list[int | str]:
    """pydantic's location less the parts that name a member of a union: `literal[...]`, `list[...]`, `bool`."""
    return [part for part in loc if isinstance(part, int) or not ("[" in part or part in _UNION_MEMBERS)]


def _expectation(sentence: str, less: str = "") -> str:
    return sentence.partition(", got ")[0].removeprefix(less)


def _got(sentence: str) -> str:
    _, comma, value = sentence.partition(", got ")
    return comma + value


def unknown_key(path: str, key: object, known: list[str]) -> Problem:
    """The problem of a key that no class has, with the nearest one that it has."""
    near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(sorted(known))}"
    return Problem(_join(path, str(key)), "unknown key", hint)


def explicit_paths(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted paths of all leaves of `values`; a list is a leaf, except the list of datasets."""
    paths: list[str] = []
    for key, value in values.items():
        path = _join(prefix, key)
        if isinstance(value, Mapping) and value:
            paths += explicit_paths(value, path)
        else:
            paths.append(path)
    return sorted(paths)


def from_python(opensloth_config: OpenSlothConfig, training_config: TrainingArguments, name: str) -> RunConfig:
    """The RunConfig of the two objects of the Python interface; what the caller gave counts as written."""
    written = {
        "opensloth": opensloth_config.model_dump(exclude_unset=True),
        "training": training_config.model_dump(exclude_unset=True),
    }
    return RunConfig(name=name, opensloth=opensloth_config, training=training_config, explicit=explicit_paths(written))


def dump(config: RunConfig) -> str:
    """Text of config.yaml: JSON, which is YAML 1.2 too and reads back to the same numbers."""
    return json.dumps(config.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"


def load(text: str) -> RunConfig:
    """Read what `dump` wrote.

    Raises ConfigError when the text is not a resolved config of this version.
    """
    try:
        config = RunConfig.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(problems_from(error, "", RunConfig)) from error
    for path, section in _sections(config):
        section.__pydantic_fields_set__ = {
            field
            for field in type(section).model_fields
            if any(p == _join(path, field) or p.startswith(_join(path, field) + ".") for p in config.explicit)
        }
    return config


def shown(value: object) -> str:
    """A value as a message shows it: short, as YAML spells it."""
    if value is None:
        return "nothing (null)"
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _sections(config: RunConfig) -> list[tuple[str, Section]]:
    """The nested sections with their paths, so that `Section.wrote` is right after a round trip."""
    model = config.opensloth
    found: list[tuple[str, Section | None]] = [
        ("opensloth", model),
        ("opensloth.fast_model_args", model.fast_model_args),
        ("opensloth.lora_args", model.lora_args),
        ("training", config.training),
    ]
    return [(path, section) for path, section in found if section is not None]


def _with_file_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in what differs between a file and Python: the cache's place, no copy of the result."""
    filled = dict(values)
    opensloth = filled.get("opensloth")
    if isinstance(opensloth, dict):
        opensloth = {"data_cache_path": DEFAULT_DATA_CACHE_PATH} | opensloth
        if "training_type" in filled and "training_type" not in opensloth:
            opensloth["training_type"] = filled["training_type"]
        filled["opensloth"] = opensloth
    training = filled.get("training")
    if training is None or isinstance(training, dict):
        filled["training"] = {"output_dir": None} | (training or {})
    return filled


def _check_datasets(values: object, problems: list[Problem]) -> list[DatasetArgs] | None:
    if values is None:
        return None
    if isinstance(values, list):
        if not values:
            problems.append(Problem("dataset", "expected at least one dataset, got an empty list"))
        checked = [check_section(DatasetArgs, item, f"dataset[{i}]", problems) for i, item in enumerate(values)]
        return [item for item in checked if item is not None]
    one = check_section(DatasetArgs, values, "dataset", problems)
    return None if one is None else [one]


def _contradictions(values: Mapping[str, Any], sections: Mapping[str, Any]) -> list[Problem]:
    """What no section can see alone."""
    problems = []
    opensloth, training = values.get("opensloth"), values.get("training")
    if opensloth is None:
        hint = "the smallest file: opensloth: {fast_model_args: {model_name: ...}}"
        problems.append(Problem("opensloth", "missing: the model to train is named there", hint))
    if values.get("dataset") is None and isinstance(opensloth, dict):
        cache = sections["opensloth"]
        if cache is not None and cache.data_cache_path == DEFAULT_DATA_CACHE_PATH:
            hint = "add dataset: {path: train.jsonl}, or name a prepared dataset in opensloth.data_cache_path"
            problems.append(Problem("dataset", "missing: there is nothing to train on", hint))
    if (
        isinstance(training, dict)
        and isinstance(opensloth, dict)
        and values.get("training_type", "sft") != opensloth.get("training_type", "sft")
    ):
        problems.append(Problem("training_type", "differs from opensloth.training_type: keep one of the two"))
    trained, datasets = sections["training"], sections["dataset"]
    if trained and datasets and trained.eval_strategy != "no" and not any(_has_evaluation(d) for d in datasets):
        hint = "set dataset.eval_fraction or dataset.eval_path, or drop eval_strategy"
        message = f"is {trained.eval_strategy}, but there is no evaluation split"
        problems.append(Problem("training.eval_strategy", message, hint))
    return problems


def _has_evaluation(dataset: DatasetArgs) -> bool:
    return bool(dataset.eval_path or dataset.eval_fraction)


def _problems_of_head(head: Mapping[str, Any]) -> list[Problem]:
    class Head(Section):
        name: str = Field(pattern=NAME_PATTERN)

    try:
        Head(name=head.get("name"))  # type: ignore[arg-type]
    except ValidationError as error:
        return problems_from(error, "", Head)
    return []


def _unknown_keys(section: type[BaseModel], values: Mapping[str, Any], path: str) -> list[Problem]:
    found = []
    fields = section.model_fields
    for key, value in values.items():
        if key in fields:
            nested = _section_of(fields[key].annotation)
            if nested is not None and isinstance(value, dict):
                found += _unknown_keys(nested, value, _join(path, key))
            continue
        reason = refusal_of_transformers_key(str(key), value) if section is TrainingArguments else None
        if reason:
            found.append(Problem(_join(path, str(key)), reason))
        elif reason is None:
            found.append(unknown_key(path, key, list(fields)))
    return found


def _section_of(annotation: object) -> type[Section] | None:
    """The Section in `Section` or `Section | None`."""
    candidates = getattr(annotation, "__args__", (annotation,))
    return next((a for a in candidates if isinstance(a, type) and issubclass(a, Section)), None)


def _without(values: Mapping[str, Any], paths: set[str], prefix: str) -> dict[str, Any]:
    """`values` less the keys at `paths`, so that one wrong key does not hide what else is wrong."""
    kept: dict[str, Any] = {}
    for key, value in values.items():
        path = _join(prefix, key)
        if path not in paths:
            kept[key] = _without(value, paths, path) if isinstance(value, dict) else value
    return kept


def _join(*parts: object) -> str:
    """Dotted path; a number is an index: dataset[1].path."""
    path = ""
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part != "" and part is not None:
            path += f".{part}" if path else str(part)
    return path


def _sentence(detail: dict[str, Any]) -> str:
    """pydantic's finding as "expected ..., got ..."."""
    kind, context, value = detail["type"], detail.get("ctx", {}), detail.get("input")
    got = f", got {shown(value)}"
    match kind:
        case "missing":
            return "missing: this key must be given"
        case "value_error":
            return str(context["error"])
        case "literal_error":
            return f"expected {context['expected']}{got}"
        case "greater_than_equal":
            return f"expected {context['ge']} or above{got}"
        case "greater_than":
            return f"expected more than {context['gt']}{got}"
        case "less_than":
            return f"expected less than {context['lt']}{got}"
        case "less_than_equal":
            return f"expected {context['le']} or below{got}"
        case "string_pattern_mismatch":
            rule = "lower-case letters, digits and '-', first a letter, at most 40 characters"
            return f"expected {rule}{got}"
        case "string_too_short" | "too_short":
            return f"must not be empty{got}"
        case "finite_number":
            return f"expected a finite number{got}"
    return f"expected {_EXPECTED_TYPES.get(kind, detail['msg'])}{got}"


_UNION_MEMBERS = {"bool", "int", "float", "str"}

_EXPECTED_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
}
