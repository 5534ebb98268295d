"""A model's config.json: from its folder, from the hub's cache here, or from the hub in one short request."""

from __future__ import annotations

import http.client
import json
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

_NAME: Final = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
_SECONDS: Final = 3.0
_MOST_BYTES: Final = 1 << 20
_YES: Final = {"1", "ON", "YES", "TRUE"}
_OFFLINE: Final = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


class NoModelConfigError(Exception):
    """Why there is none, as a clause."""


def read_model_config(
    model: str, revision: str | None, sources: Mapping[str, Path], environ: Mapping[str, str] = os.environ
) -> dict[str, Any]:
    """model: a hub name, or an absolute path as the config has it. sources: see config_file.LoadedFile.

    Raises NoModelConfigError.
    """
    folder = sources.get(model, Path(model))
    if folder.is_absolute():
        return _parsed(_read(folder / "config.json"), str(folder))
    if not _NAME.fullmatch(model):
        raise NoModelConfigError(f"{model!r} is neither a folder nor a name on the hub")
    cached = _cached(model, revision or "main", environ)
    if cached is not None:
        return _parsed(_read(cached), model)
    return _parsed(_asked(model, revision or "main", environ), model)


def is_asked_of_hub(
    model: str, revision: str | None, sources: Mapping[str, Path], environ: Mapping[str, str] = os.environ
) -> bool:
    """Whether what belongs to the model has to come over the network. Arguments: as of read_model_config."""
    folder = sources.get(model, Path(model))
    return not folder.is_absolute() and not _is_offline(environ) and _cached(model, revision or "main", environ) is None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise NoModelConfigError(f"{path} cannot be read here: {error.strerror}") from error


def _parsed(text: bytes, whose: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise NoModelConfigError(f"the config.json of {whose} is not a JSON object")
    return config


def _home(environ: Mapping[str, str]) -> Path:
    usual = Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(environ.get("HF_HOME") or usual).expanduser()


def _cached(model: str, revision: str, environ: Mapping[str, str]) -> Path | None:
    """revision: a branch or tag, or a commit."""
    hub = Path(environ.get("HF_HUB_CACHE") or _home(environ) / "hub").expanduser()
    folder = hub / f"models--{model.replace('/', '--')}"
    try:
        commit = (folder / "refs" / revision).read_text().strip()
    except OSError:
        commit = revision
    path = folder / "snapshots" / commit / "config.json"
    return path if path.is_file() else None


def _asked(model: str, revision: str, environ: Mapping[str, str]) -> bytes:
    if name := _is_offline(environ):
        raise NoModelConfigError(f"{model} is not in the hub's cache on this machine, and {name} is set")
    endpoint = (environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    if not endpoint.startswith(("https://", "http://")):
        raise NoModelConfigError(f"HF_ENDPOINT is no address: {endpoint!r}")
    request = urllib.request.Request(f"{endpoint}/{model}/resolve/{urllib.parse.quote(revision, safe='')}/config.json")
    token = _token(environ)
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.build_opener(_SameHostRedirect).open(request, timeout=_SECONDS) as answer:
            text: bytes = answer.read(_MOST_BYTES)
            return text
    except urllib.error.HTTPError as error:
        raise NoModelConfigError(f"{endpoint} has no config.json of {model} for us: HTTP {error.code}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise NoModelConfigError(f"{endpoint} does not answer: {getattr(error, 'reason', error)}") from error


class _SameHostRedirect(urllib.request.HTTPRedirectHandler):
    """The token goes along where the hub sends us on to a model's new name, and to no other host."""

    def redirect_request(self, req: urllib.request.Request, *args: Any) -> urllib.request.Request | None:
        new = super().redirect_request(req, *args)
        token = req.get_header("Authorization")
        if new is not None and token and (new.type, new.host) == (req.type, req.host):
            new.add_unredirected_header("Authorization", token)
        return new


def _is_offline(environ: Mapping[str, str]) -> str | None:
    """The variable that says so."""
    return next((name for name in _OFFLINE if environ.get(name, "").upper() in _YES), None)


def _token(environ: Mapping[str, str]) -> str | None:
    if environ.get("HF_TOKEN"):
        return environ["HF_TOKEN"].strip()
    path = Path(environ.get("HF_TOKEN_PATH") or _home(environ) / "token").expanduser()
    try:
        return path.read_text().strip() or None
    except (OSError, ValueError):
        return None
