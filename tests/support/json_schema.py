"""Checks a value against a JSON schema, for the keywords that pydantic writes; any other keyword fails the test."""

from __future__ import annotations

import re
from typing import Any

_SILENT = {"title", "description", "default", "$schema", "$defs"}
_TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "integer": int,
    "number": (int, float),
}


def problems(value: Any, schema: dict[str, Any], root: dict[str, Any], path: str = "") -> list[str]:
    """Where `value` does not fit `schema`; `$ref`s point into `root`."""
    found = _check("type", schema["type"], value, schema, root, path) if "type" in schema else []
    if found:  # the other keywords are about values of that type
        return found
    for keyword, rule in schema.items():
        if keyword not in _SILENT:
            found += _check(keyword, rule, value, schema, root, path)
    return found


def _check(keyword: str, rule: Any, value: Any, schema: dict[str, Any], root: dict[str, Any], path: str) -> list[str]:  # noqa: C901
    wrong = [f"{path or 'file'}: {value!r} against {keyword} {rule!r}"]
    match keyword:
        case "$ref":
            return problems(value, root["$defs"][rule.removeprefix("#/$defs/")], root, path)
        case "anyOf":
            return [] if any(not problems(value, one, root, path) for one in rule) else wrong
        case "type":
            is_bool = isinstance(value, bool) and rule in ("integer", "number")
            return [] if isinstance(value, _TYPES[rule]) and not is_bool else wrong
        case "enum":
            return [] if value in rule else wrong
        case "const":
            return [] if value == rule and type(value) is type(rule) else wrong
        case "required":
            return [] if set(rule) <= set(value) else wrong
        case "properties":
            known = {key: inner for key, inner in rule.items() if key in value}
            return [p for key, inner in known.items() for p in problems(value[key], inner, root, f"{path}.{key}")]
        case "additionalProperties":
            others = {key: inner for key, inner in value.items() if key not in schema.get("properties", {})}
            if rule is False:
                return wrong if others else []
            return (
                [] if rule is True else [p for k, v in others.items() for p in problems(v, rule, root, f"{path}.{k}")]
            )
        case "items":
            return [p for i, item in enumerate(value) for p in problems(item, rule, root, f"{path}[{i}]")]
        case "pattern":
            return [] if not isinstance(value, str) or re.search(rule, value) else wrong
        case "minLength" | "minItems":
            return [] if len(value) >= rule else wrong
        case "minimum":
            return [] if value >= rule else wrong
        case "exclusiveMinimum":
            return [] if value > rule else wrong
        case "maximum":
            return [] if value <= rule else wrong
        case "exclusiveMaximum":
            return [] if value < rule else wrong
    raise AssertionError(f"the checker does not know the keyword {keyword}")
