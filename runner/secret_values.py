"""Tells values that should not stand in a file, so that they are refused and never shown. Pure."""

from __future__ import annotations

import re
from typing import Final

_NAMES: Final = re.compile(
    r"(?:^|[_.])(?:TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|API_?KEY|ACCESS_KEY|PRIVATE_KEY)(?:$|_(?:ID|KEY))",
    re.IGNORECASE,
)
_VALUES: Final = re.compile(
    r"hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20}"
    r"|AKIA[0-9A-Z]{16}|xox[abprs]-[\w-]{10,}|-----BEGIN [A-Z ]*PRIVATE KEY|(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])"
)


def looks_secret(name: str, value: object) -> bool:
    """Whether an environment variable is one that gives access to something."""
    return bool(_NAMES.search(name)) or (isinstance(value, str) and bool(_VALUES.search(value)))
