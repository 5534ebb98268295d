"""`--set a.b=c`: changes a value of the config before it is checked. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from opensloth.errors import Problem
from runner.secret_values import looks_secret
from runner.yaml12 import parse

_STEP: Final = re.compile(r"\.?([^.\[\]=]+)|\[(\d+)\]")

_MAY_HOLD_SECRETS: Final = (("job", "env"), ("job", "secrets"))


@dataclass(frozen=True)
class Override:
    """One `--set`: path `dataset[1].path`, steps ("dataset", 1, "path"), value as YAML has it."""

    path: str
    steps: tuple[str | int, ...]
    value: Any

    @property
    def where(self) -> str:
        """How messages name it; what may hold a secret is left out."""
        nested = isinstance(self.value, dict | list)
        if nested or self.steps[:2] in _MAY_HOLD_SECRETS or looks_secret(str(self.steps[-1]), self.value):
            return f"--set {self.path}"
        return f"--set {self.path}={_shown(self.value)}"


def parse_override(argument: str) -> Override | Problem:
    """Read `dataset[1].path=x`; the value is read as YAML. Returns the problem when it cannot be read."""
    path, equals, text = argument.partition("=")
    path = path.strip()
    steps = _steps(path)
    if not equals or not steps:
        where = f"--set {path}"
        return Problem("", "expected KEY=VALUE, as in training.learning_rate=1e-4 or dataset[1].path=x", "", where)
    document = parse(text)
    if document.problems:
        found = document.problems[0][1]
        return Problem(path, found.message, found.hint, f"--set {path}")
    return Override(path, steps, document.values)


def apply(values: dict[str, Any], override: Override) -> Problem | None:
    """Put the override's value into `values` in place; sections that are not there are made."""
    at: Any = values
    walked = ""
    for step, following in zip(override.steps, (*override.steps[1:], None), strict=True):
        problem = _cannot_enter(at, step, walked, override)
        if problem:
            return problem
        if following is None:
            at[step] = override.value
            return None
        if isinstance(step, str) and at.get(step) is None:
            at[step] = {}
        walked += f"[{step}]" if isinstance(step, int) else f".{step}" if walked else step
        at = at[step]
    return None


def _cannot_enter(at: Any, step: str | int, walked: str, override: Override) -> Problem | None:
    if isinstance(step, int):
        if not isinstance(at, list):
            return Problem(override.path, f"{walked} is not a list: leave out [{step}]", "", override.where)
        if step >= len(at):
            last = f"the last is [{len(at) - 1}]" if at else "it is empty"
            return Problem(override.path, f"{walked} has no item [{step}]: {last}", "", override.where)
    elif isinstance(at, list):
        return Problem(
            override.path, f"{walked} is a list: say which item, as in {walked}[0].{step}", "", override.where
        )
    elif not isinstance(at, dict):
        return Problem(override.path, f"{walked} is not a mapping, so it has no key {step}", "", override.where)
    return None


def _steps(path: str) -> tuple[str | int, ...]:
    steps: list[str | int] = []
    position = 0
    while position < len(path):
        match = _STEP.match(path, position)
        if match is None or (position == 0 and path[0] in ".["):
            return ()
        steps.append(int(match[2]) if match[2] is not None else match[1])
        position = match.end()
    return tuple(steps)


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
