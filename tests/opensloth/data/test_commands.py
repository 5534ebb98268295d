"""`python -m opensloth.data` and `python -m opensloth.prepare_qwen_dataset`, as a program or a person meets them."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_tools import chat, make_tokenizer, write_jsonl

from opensloth import prepare_qwen_dataset
from opensloth.contract import ExitCode
from opensloth.data.__main__ import main
from opensloth.data.documents import IGNORE
from opensloth.data.prepared import PreparedDataset
from opensloth.run_config import RunConfig, dump
from opensloth.tokenizer import load_tokenizer

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "a.jsonl", [{"messages": chat(f"say {i}", f"{i}")} for i in range(9)])


@pytest.fixture
def call(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Run a command with a config on stdin; returns its exit code and stdout."""

    def run(*arguments: str, **config: Any) -> tuple[int, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(dump(make_config(**config))))
        code = main(list(arguments))
        return code, capfd.readouterr().out

    return run


def last(output: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def test_build_ends_with_its_result(call: Any, data: Path) -> None:
    code, output = call("build", "--config", "-", path=data)
    assert code == ExitCode.SUCCEEDED
    kinds = [json.loads(line)["event"] for line in output.splitlines()]
    assert set(kinds) == {"note", "progress", "result"}
    result = last(output)
    assert set(result) == {
        "event", "path", "key", "reused", "documents", "tokens", "target_tokens", "rows", "row_fill",
        "eval_documents", "eval_target_tokens", "sources",
    }  # fmt: skip
    assert result["documents"] == 9


def test_an_error_has_its_cause_and_exit_code(call: Any, tmp_path: Path) -> None:
    code, output = call("build", "--config", "-", path=tmp_path / "nothing.jsonl")
    assert code == ExitCode.DATA
    error = last(output)
    assert (error["event"], error["cause"]) == ("error", "data")
    assert "nothing.jsonl: no such file" in error["message"]
    assert error["hint"]


def test_a_config_that_is_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--config", str(tmp_path / "nothing.yaml")]) == ExitCode.CONFIG
    assert last(capfd.readouterr().out)["message"] == f"{tmp_path}/nothing.yaml: No such file or directory"
    (tmp_path / "c.yaml").write_text("{}")
    assert main(["build", "--config", str(tmp_path / "c.yaml")]) == ExitCode.CONFIG
    assert last(capfd.readouterr().out)["cause"] == "config"


def test_what_libraries_print_is_not_among_the_events(
    make_config: MakeConfig, data: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def noisy(*args: Any, **options: Any) -> Any:
        sys.stdout.write("from Python\n")
        os.write(1, b"from C\n")
        subprocess.run(["echo", "from a child"], check=True)
        return load_tokenizer(*args, **options)

    monkeypatch.setattr("opensloth.data.build.load_tokenizer", noisy)
    monkeypatch.setattr("sys.stdin", io.StringIO(dump(make_config(data))))
    assert main(["build", "--config", "-"]) == ExitCode.SUCCEEDED
    output, errors = capfd.readouterr()
    assert {json.loads(line)["event"] for line in output.splitlines()} == {"note", "progress", "result"}
    assert {"from Python", "from C", "from a child"} <= set(errors.splitlines())
    os.write(1, b"afterwards\n")
    assert capfd.readouterr().out == "afterwards\n"


def test_a_name_that_is_not_utf8_is_still_an_event(call: Any, tmp_path: Path) -> None:
    code, output = call("ls", "--cache", os.fsdecode(b"/no/\xff"))
    assert (code, last(output)["entries"]) == (0, [])
    code, output = call("verify", "--cache", os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    assert (code, last(output)["verified"]) == (0, [])


def test_a_file_that_cannot_be_read(call: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to("/proc/self/mem")  # a regular file whose first page nobody may read
    for command in ("build", "preview"):
        output = ["-o", "json"] if command == "preview" else []
        code, said = call(command, "--config", "-", *output, path=tmp_path / "a.jsonl")
        assert code == ExitCode.INFRASTRUCTURE  # EIO is the storage's fault: in pods it is tried again
        assert last(said)["message"] == f"{tmp_path}/a.jsonl: Input/output error"


def run_with(limits: str, config: str, stdout: Any = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    """`build` in a shell that was given `limits` before."""
    command = f'{limits}; exec "{sys.executable}" -m opensloth.data build --config -'
    return subprocess.run(
        ["bash", "-c", command], input=config, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60
    )


def test_a_disk_that_takes_no_more(make_config: MakeConfig, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat(f"say {i}", f"{i}")} for i in range(999)])
    done = run_with("ulimit -f 16", dump(make_config(path)))
    assert done.returncode == ExitCode.DATA
    message = last(done.stdout)["message"]
    assert str(tmp_path / "cache") in message
    assert "File too large" in message
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_output_that_takes_no_more(make_config: MakeConfig, data: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = run_with("true", dump(make_config(data)), stdout=full)
    assert done.returncode == ExitCode.ERROR
    assert done.stderr == "error: standard output: No space left on device\n"


def test_ls_prune_and_verify(call: Any, data: Path, tmp_path: Path) -> None:
    built = last(call("build", "--config", "-", path=data)[1])
    cache = str(tmp_path / "cache")
    assert [entry["key"] for entry in last(call("ls", "--config", "-", path=data)[1])["entries"]] == [built["key"]]
    entries = last(call("ls", "--cache", cache)[1])["entries"]
    assert entries[0]["name"] == "test"
    assert entries[0]["documents"] == 9
    assert last(call("verify", "--cache", cache)[1])["verified"] == [built["path"]]
    assert last(call("verify", "--cache", built["path"])[1])["verified"] == [built["path"]]
    listed = last(call("prune", "--cache", cache, "--unused")[1])
    assert (listed["removed"], len(listed["entries"])) == (False, 1)
    assert Path(built["path"]).exists()
    arrow = Path(built["path"]) / "train" / "data-00000-of-00001.arrow"
    arrow.write_bytes(arrow.read_bytes()[:-8] + b"12345678")
    code, output = call("verify", "--cache", cache)
    assert code == ExitCode.DATA
    assert last(output)["message"].endswith("damaged: train/data-00000-of-00001.arrow")
    assert last(call("prune", "--cache", cache, "--unused", "--yes")[1])["removed"]
    assert not Path(built["path"]).exists()


# --- preview --------------------------------------------------------------------------------------

ROWS = [
    {"messages": chat("hi", "hello")},
    {"messages": chat("a", "b", "c", "d")},
    {"messages": chat("x " * 400, "too long")},
    {"messages": chat("nobody answers")},
]


def test_preview_shows_targets_counts_and_audit(call: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    code, output = call("preview", "--config", "-", "--rows", "1", "--no-color", path=path)
    assert code == 0
    assert output == (
        f"{path}: format messages (detected from the columns)\n"
        f"\n--- {path}:1: 17 tokens, 5 targets\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦hello<|im_end|>⟧\n"
        f"\n\n--- {path}:2: 28 tokens, 4 targets\n"
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n⟦d<|im_end|>⟧\n"
        "\n\nof the first 4 rows: 2 kept, 0 unreadable, 1 dropped for length, 0 truncated, 1 without targets, "
        "0 of one token\n"
        "45 tokens, 9 targets (20%)\n"
        "pass stop token: 2 of 2 documents end their last target with <|im_end|>\n"
        "pass one BOS at most: 0 of 2 documents begin with two <s>\n"
        "info BOS: 0 of 2 documents begin with <s>\n"
        "pass padding: padding is the same token as EOS, which stays a target\n"
    )
    assert not (tmp_path / "cache").exists()


def test_preview_in_colour(call: Any, data: Path) -> None:
    output = call("preview", "--config", "-", "--rows", "1", "--color", path=data)[1]
    assert "\x1b[32m0<|im_end|>\x1b[0m" in output
    assert "\x1b[32mpass\x1b[0m stop token" in output
    assert "⟦" not in output


def test_preview_as_json(call: Any, data: Path) -> None:
    code, output = call("preview", "--config", "-", "--rows", "2", "-o", "json", path=data)
    source = last(output)["sources"][0]
    assert (code, source["format"], source["counts"]["kept"]) == (0, "messages", 9)
    assert [sample["where"].rpartition(":")[2] for sample in source["samples"]] == ["1", "2", "3", "6"]
    assert [piece["text"] for piece in source["samples"][0]["pieces"] if piece["target"]] == ["0<|im_end|>"]
    assert {check["name"]: check["ok"] for check in source["audit"]} == {
        "stop token": True, "one BOS at most": True, "BOS": None, "padding": True,
    }  # fmt: skip


def test_preview_finds_what_is_wrong(call: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"input_ids": [0, 0, 40], "labels": [-100, 0, 40]}])
    audit = last(call("preview", "--config", "-", "-o", "json", path=path)[1])["sources"][0]["audit"]
    assert {check["name"]: check["ok"] for check in audit} == {
        "stop token": False, "one BOS at most": False, "BOS": None, "padding": True,
    }  # fmt: skip


def test_preview_with_nothing_kept_or_no_dataset(call: Any, tmp_path: Path, capfd: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS[2:])
    output = call("preview", "--config", "-", path=path)[1]
    assert "FAIL targets: no document is left of these rows" in output
    assert call("preview", "--config", "-", cache=tmp_path)[0] == ExitCode.DATA
    assert call("preview", "--config", "-", path=tmp_path / "nothing.jsonl") == (ExitCode.DATA, "")


# --- the seed's command ---------------------------------------------------------------------------


def prepare(capfd: Any, *arguments: Any) -> tuple[int, str, str]:
    code = prepare_qwen_dataset.main([str(argument) for argument in arguments])
    captured = capfd.readouterr()
    return code, captured.out, captured.err


def test_the_seeds_flags(capfd: Any, data: Path, tmp_path: Path, model_folder: Path) -> None:
    output = tmp_path / "prepared"
    flags = ["--tokenizer_name", model_folder, "-i", data, "-o", output, "-n", 5, "-wk", 2, "--max_seq_length", 64]
    code, out, err = prepare(capfd, *flags, "--gpus", 4, "--instruction_part", "<|im_start|>user\n", "--debug")
    assert code == 0
    assert f"{output}: 5 documents" in out
    assert "⟦0<|im_end|>⟧" in out
    assert "--gpus is not needed any more" in err
    ids, labels = PreparedDataset.open(output).row(0)
    assert make_tokenizer().decode(ids[labels != IGNORE]) == "0<|im_end|>"
    code, out, _ = prepare(capfd, *flags, "--no-train_on_target_only")
    assert code == 0
    ids, labels = PreparedDataset.open(output).row(0)
    assert (ids == labels).all()


def test_what_the_seeds_command_prepared_is_trained_as_it_is(
    call: Any, capfd: Any, data: Path, tmp_path: Path, model_folder: Path
) -> None:
    prepare(capfd, "--tokenizer_name", model_folder, "-i", data, "-o", tmp_path / "prepared")
    result = last(call("build", "--config", "-", cache=tmp_path / "prepared")[1])
    assert (result["path"], result["documents"]) == (str(tmp_path / "prepared"), 9)


def test_the_seeds_command_overwrites_no_other_folder(
    capfd: Any, data: Path, tmp_path: Path, model_folder: Path
) -> None:
    code, _, err = prepare(capfd, "--tokenizer_name", model_folder, "-i", data, "-o", tmp_path)
    assert code == ExitCode.DATA
    assert "is there and is not a prepared dataset\n  give another --output_dir" in err
    assert data.exists()


def test_the_seeds_command_where_nothing_can_be_written(capfd: Any, data: Path, model_folder: Path) -> None:
    code, _, err = prepare(capfd, "--tokenizer_name", model_folder, "-i", data, "-o", "/proc/prepared/here")
    assert code == ExitCode.DATA
    assert err.splitlines()[-1] == "error: /proc/prepared: No such file or directory"
    code, _, err = prepare(capfd, "--tokenizer_name", model_folder, "-i", data, "-o", data / "here")
    assert code == ExitCode.DATA
    assert err.splitlines()[-1].startswith(f"error: {data}")


def test_the_seeds_command_with_wrong_values(capfd: Any, data: Path, model_folder: Path) -> None:
    code, _, err = prepare(capfd, "--tokenizer_name", model_folder, "-i", data, "-n", 0, "--max_seq_length", 1)
    assert code == ExitCode.CONFIG
    assert "opensloth.fast_model_args.max_seq_length" in err
    assert "num_samples is 0" in err


def test_the_default_name_is_the_seeds() -> None:
    options = prepare_qwen_dataset._parser().parse_args([])
    name = prepare_qwen_dataset.default_name(options)
    assert name == "data/Qwen2.5-0.5B-Instruct-FineTome-100k-train-all-l4096-processed"
    config = prepare_qwen_dataset.config_of(options)
    assert config.dataset is not None
    assert (config.dataset[0].path, config.dataset[0].train_on) == ("mlabonne/FineTome-100k", "assistant")
