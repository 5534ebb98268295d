"""Loading tokenizers, and the built-in template."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_tools import chat, make_tokenizer

from opensloth.errors import DataError
from opensloth.tokenizer import load_tokenizer, own_template, tokenizer_sha256, vocabulary_size


def test_the_template_given_replaces_the_tokenizers_own_and_is_saved(base_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(base_folder), chat_template="chatml")
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert own_template(again) == own_template(tokenizer)
    text = again.apply_chat_template(chat("hi", "hello"), tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
    assert again.apply_chat_template(chat("hi"), tokenize=False, add_generation_prompt=True).endswith("assistant\n")


def test_chatml_stops_with_a_token_that_the_model_knows(tmp_path: Path) -> None:
    made = make_tokenizer(None)
    made.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace("<|im_end|>", "<|other|>"))
    tokenizer = load_tokenizer(str(tmp_path), chat_template="chatml")
    assert tokenizer.apply_chat_template(chat("hi"), tokenize=False) == "<|im_start|>user\nhi</s>\n"


def test_of_several_templates_the_default_is_taken() -> None:
    made = make_tokenizer(None)
    made.chat_template = {"default": "a", "tool_use": "b"}
    assert own_template(made) == "a"
    made.chat_template = {"tool_use": "b"}
    assert own_template(made) is None


def test_the_vocabulary_is_the_models(tmp_path: Path) -> None:
    made = make_tokenizer()
    assert vocabulary_size(made, str(tmp_path)) == len(made)
    (tmp_path / "config.json").write_text('{"vocab_size": 512}')
    assert vocabulary_size(made, str(tmp_path)) == 512
    (tmp_path / "config.json").write_text('{"text_config": {"vocab_size": 513}}')
    assert vocabulary_size(made, str(tmp_path)) == 513


def test_a_folder_with_a_broken_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"the tokenizer of '.*' cannot be loaded: .*\n  is the folder complete"):
        load_tokenizer(str(tmp_path))


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"the tokenizer of 'nobody/nothing' cannot be loaded: .*\n  check the name"):
        load_tokenizer("nobody/nothing")


def test_the_hash_of_a_folder_is_that_of_its_files(model_folder: Path, base_folder: Path) -> None:
    assert tokenizer_sha256(str(model_folder)) == tokenizer_sha256(str(model_folder))
    assert tokenizer_sha256(str(model_folder)) != tokenizer_sha256(str(base_folder))
