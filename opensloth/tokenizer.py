"""The tokenizer of a model, with the chat template that training uses. The one place that loads it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensloth.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHATML = "chatml"
"""Name of the built-in template."""

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""Files of a model folder that decide how text becomes ids. config.json: the kind, and the vocabulary's size."""

_CHATML_TEXT = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') + %STOP% + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CHATML_STOP = "<|im_end|>"


def load_tokenizer(
    model_name: str, *, revision: str | None = None, chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub name.

    chat_template: `chatml`, a .jinja file, or a template's text; it replaces the tokenizer's own and is saved
    with it. None: the tokenizer's own, if it has one.
    Raises DataError when there is no such model or it has no tokenizer with a fast implementation.
    """
    from transformers import AutoTokenizer

    _check_local(model_name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DataError(f"the tokenizer of '{model_name}' cannot be loaded: {reason}", _hint(model_name)) from error
    if not tokenizer.is_fast:
        raise DataError(
            f"'{model_name}' has only a slow tokenizer, which cannot say where in the text a token came from",
            "convert it: save a tokenizer.json beside the model",
        )
    if chat_template is not None:
        tokenizer.chat_template = resolve_chat_template(chat_template, tokenizer)
    return tokenizer


def resolve_chat_template(option: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a `chat_template` option.

    Raises DataError when a .jinja file cannot be read.
    """
    if option == CHATML:
        # A model that does not know <|im_end|> as one token stops at its own end-of-sequence token instead.
        stop_id = tokenizer.convert_tokens_to_ids(_CHATML_STOP)
        known = stop_id not in (None, tokenizer.unk_token_id) or tokenizer.eos_token is None
        return _CHATML_TEXT.replace("%STOP%", f"'{_CHATML_STOP}'" if known else "eos_token")
    if option.endswith(".jinja"):
        return read_template(Path(option))
    if "{" not in option:
        raise DataError(
            f"chat_template '{option}' is not known", f"give '{CHATML}', a .jinja file, or the text of a template"
        )
    return option


def read_template(path: Path) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"chat_template: {path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"chat_template: {path}: cannot be read ({error})") from error


def own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The text of the tokenizer's chat template; of several, the default one."""
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template or None


def vocabulary_size(tokenizer: PreTrainedTokenizerBase, model_name: str) -> int:
    """How many ids the model has rows for: its config's figure where there is a folder, else the tokenizer's."""
    try:
        config = json.loads((Path(model_name) / "config.json").read_text(encoding="utf-8"))
        size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    except (OSError, ValueError):
        size = None
    return int(size) if size else len(tokenizer)


def tokenizer_sha256(model_name: str, revision: str | None = None) -> str:
    """Hex hash of everything that decides how text becomes ids.

    Of a model folder, the bytes of its tokenizer files, without importing transformers; of a hub name, the
    tokenizer that it loads as.
    """
    folder = Path(model_name)
    digest = hashlib.sha256()
    if folder.is_dir():
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                digest.update(f"{name}\0{hashlib.sha256((folder / name).read_bytes()).hexdigest()}\n".encode())
        return digest.hexdigest()
    tokenizer: Any = load_tokenizer(model_name, revision=revision)
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(json.dumps([tokenizer.special_tokens_map, tokenizer.chat_template], sort_keys=True).encode())
    return digest.hexdigest()


def _check_local(model_name: str) -> None:
    """Say it plainly when a path does not lead to a model, before transformers takes it for a hub name."""
    folder = Path(model_name)
    if folder.is_dir():
        if not any((folder / name).is_file() for name in TOKENIZER_FILES if name != "config.json"):
            raise DataError(f"{model_name}: this folder has no tokenizer", "expected a tokenizer.json in it")
        return
    if model_name.startswith(("/", "./", "../", "~")) or model_name.count("/") > 1:
        raise DataError(f"{model_name}: no such model folder", "check opensloth.fast_model_args.model_name")


def _hint(model_name: str) -> str:
    if Path(model_name).is_dir():
        return "is the folder complete? it needs tokenizer.json and tokenizer_config.json"
    return "check the name and the network; without a network, give the path of a model folder"
