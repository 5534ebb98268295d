"""What becomes of a cache under real faults: flipped bits, full and read-only volumes, many builders at once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_tools import Events, chat, write_jsonl
from volumes import small_volume

from opensloth.data import __main__ as command
from opensloth.data import cache
from opensloth.data.build import build
from opensloth.data.built import BuiltData
from opensloth.errors import DataError
from opensloth.run_config import RunConfig, dump

Build = Callable[..., BuiltData]


def rows(count: int, words: int = 1) -> list[dict[str, Any]]:
    return [{"messages": chat(f"say {i}", f"{i} " * words)} for i in range(count)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "a.jsonl", rows(20))


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def verify(folder: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """What `oslo data verify` says of a cache: the error's message, or "" when all is well."""
    capfd.readouterr()
    command.main(["verify", "--cache", str(folder)])
    last = json.loads(capfd.readouterr().out.splitlines()[-1])
    return last["message"] if last["event"] == "error" else ""


# --- flipped bits ---------------------------------------------------------------------------------


def test_a_flipped_bit_anywhere_in_the_footer_is_noticed(data: Path, built: Build) -> None:
    entry = Path(built(data).path)
    footer = entry / "oslo.json"
    whole = footer.read_bytes()
    for at in range(0, len(whole) - 1, 5):  # the last byte is a line end
        flip(footer, at)
        assert cache.read_entry(entry) is None, f"byte {at}"
        footer.write_bytes(whole)
    assert cache.read_entry(entry) is not None
    flip(footer, len(whole) // 2)
    assert not built(data).reused
    assert cache.damaged_files(entry) == []


@pytest.mark.parametrize("file", ["lengths.npy", "targets.npy", "sources.npy", "data-00000-of-00001.arrow"])
def test_a_file_that_cannot_be_opened_any_more_is_built_again(data: Path, built: Build, file: str) -> None:
    torn = Path(built(data).path) / "train" / file
    whole = torn.read_bytes()
    flip(torn, 4)
    assert not built(data).reused
    assert torn.read_bytes() == whole


def test_verification_finds_a_flipped_bit_in_every_file(
    data: Path, built: Build, capfd: pytest.CaptureFixture[str]
) -> None:
    entry = Path(built(data, eval_fraction=0.3).path)
    assert verify(entry.parent, capfd) == ""
    files = sorted(file for file in entry.rglob("*") if file.is_file())
    assert len(files) == 13
    for file in files:
        whole = file.read_bytes()
        flip(file, len(whole) * 2 // 3)
        assert verify(entry.parent, capfd) == f"{entry}: damaged: {file.relative_to(entry).as_posix()}"
        file.write_bytes(whole)


def test_verification_finds_what_is_cut_short_or_gone(
    data: Path, built: Build, capfd: pytest.CaptureFixture[str]
) -> None:
    entry = Path(built(data).path)
    arrow = entry / "train" / "data-00000-of-00001.arrow"
    arrow.write_bytes(arrow.read_bytes()[:-1])
    assert verify(entry.parent, capfd) == f"{entry}: damaged: train/{arrow.name}"
    (entry / "oslo.json").unlink()
    assert verify(entry.parent, capfd) == f"{entry}: is not a cache entry (no oslo.json)"


# --- volumes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.003, 0.5, 1.01])
def test_a_full_volume_leaves_nothing_half_built(tmp_path: Path, built: Build, share: float) -> None:
    """share: the room that is left, in sizes of the documents' file: none, enough for the lock, half, all of it."""
    path = write_jsonl(tmp_path / "long.jsonl", rows(1000, words=80))
    size = (Path(built(path).path) / "train" / "data-00000-of-00001.arrow").stat().st_size
    with small_volume(tmp_path / "volume", 8) as volume:
        folder = volume / "cache"
        folder.mkdir()
        ballast = volume / "ballast"
        ballast.write_bytes(bytes((8 << 20) - int(share * size)))
        with pytest.raises(DataError, match="No space left on device"):
            built(path, cache=folder)
        assert list(folder.iterdir()) == []
        ballast.unlink()
        result = built(path, cache=folder)
        assert (result.reused, result.documents) == (False, 1000)
        assert [entry.name for entry in folder.iterdir()] == [result.key]
        assert cache.damaged_files(Path(result.path)) == []


def test_a_cache_on_a_volume_that_is_mounted_read_only(tmp_path: Path, data: Path, built: Build) -> None:
    with small_volume(tmp_path / "volume", 8) as volume:
        first = built(data, cache=volume / "cache")
        subprocess.run(["mount", "-o", "remount,ro", str(volume)], check=True)
        assert built(data, cache=volume / "cache").reused
        assert built(cache=first.path).reused
        with pytest.raises(DataError, match="not in this cache, and it cannot be written: Read-only file system"):
            built(data, cache=volume / "cache", train_on="all")


# --- many builders --------------------------------------------------------------------------------

BUILDER = """
import sys
from opensloth.data import __main__, build
from opensloth.tokenizer import load_tokenizer
load_tokenizer(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
sys.exit(__main__.main(["build", "--config", sys.argv[2]]))
"""


@pytest.mark.slow  # a minute: eight processes import the libraries
@pytest.mark.timeout(400)
def test_eight_builders_at_once_build_once(
    tmp_path: Path, make_config: Callable[..., RunConfig], model_folder: Path, events: Events
) -> None:
    config = make_config(write_jsonl(tmp_path / "large.jsonl", rows(20_000)))
    (tmp_path / "c.yaml").write_text(dump(config))
    line = [sys.executable, "-c", BUILDER, str(model_folder), str(tmp_path / "c.yaml")]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    builders = [subprocess.Popen(line, text=True, **pipes) for _ in range(8)]
    for builder in builders:
        assert builder.stdout is not None
        assert builder.stdout.readline() == "ready\n"
    for builder in builders:
        assert builder.stdin is not None
        builder.stdin.write("\n")
        builder.stdin.flush()
    results = []
    for builder in builders:
        output, errors = builder.communicate(timeout=200)
        assert builder.returncode == 0, errors
        results.append(json.loads(output.splitlines()[-1]))
    assert sorted(result["reused"] for result in results) == [False, *[True] * 7]
    assert {(result["path"], result["documents"]) for result in results} == {(results[0]["path"], 20_000)}
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {results[0]["key"]}
    assert cache.damaged_files(Path(results[0]["path"])) == []
    assert build(config, events).reused
