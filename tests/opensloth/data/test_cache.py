"""The cache: what changes the key, who builds, what a killed builder leaves, what may be removed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_tools import Events, chat, make_tokenizer, write_jsonl

from opensloth.data import cache
from opensloth.data.build import build
from opensloth.data.built import BuiltData
from opensloth.data.lock import BuildLock, LockObserver, beat_path
from opensloth.data.prepared import PreparedDataset
from opensloth.errors import DataError
from opensloth.files import write_json
from opensloth.run_config import RunConfig, dump

Build = Callable[..., BuiltData]


def rows(count: int) -> list[dict[str, Any]]:
    return [{"messages": chat(f"say {i}", f"{i}")} for i in range(count)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "a.jsonl", rows(20))


def test_the_second_build_reuses_the_first(data: Path, built: Build, events: Events) -> None:
    first, second = built(data), built(data)
    assert (first.reused, second.reused) == (False, True)
    assert first.path == second.path
    assert (first.rows, first.sources) == (second.rows, second.sources)
    assert f"dataset found in the cache: {first.path}" in events.notes()


@pytest.mark.parametrize(
    "options",
    [
        {"train_on": "all"}, {"overlength": "truncate"}, {"bad_rows": "skip"}, {"num_samples": 19}, {"weight": 2.0},
        {"eval_fraction": 0.1}, {"chat_template": "chatml"}, {"max_seq_length": 511},
        {"columns": {"messages": "messages"}},
    ],
)  # fmt: skip
def test_every_option_that_matters_has_a_key_of_its_own(data: Path, built: Build, options: dict[str, Any]) -> None:
    assert built(data).key != built(data, **options).key


def test_one_byte_of_data_template_or_tokenizer_makes_another_key(tmp_path: Path, data: Path, built: Build) -> None:
    model, template = tmp_path / "model", tmp_path / "t.jinja"
    made = make_tokenizer()
    made.save_pretrained(model)
    template.write_text(str(made.chat_template))
    keys = [built(data, model=model, chat_template=str(template)).key]
    data.write_text(data.read_text().replace("say 3", "say 4"))
    keys.append(built(data, model=model, chat_template=str(template)).key)
    template.write_text(template.read_text() + " ")
    keys.append(built(data, model=model, chat_template=str(template)).key)
    (model / "tokenizer_config.json").write_text((model / "tokenizer_config.json").read_text() + "\n")
    keys.append(built(data, model=model, chat_template=str(template)).key)
    assert len(set(keys)) == 4


def test_names_and_places_do_not_matter(tmp_path: Path, data: Path, built: Build, model_folder: Path) -> None:
    first = built(data)
    shutil.copytree(model_folder, tmp_path / "elsewhere")
    again = built(data.rename(tmp_path / "b.jsonl"), model=tmp_path / "elsewhere")
    assert (again.key, again.reused) == (first.key, True)


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated", "missing", "no footer", "torn footer", "foreign"])
def test_a_torn_entry_is_built_again(data: Path, built: Build, damage: str) -> None:
    first = built(data)
    entry = Path(first.path)
    arrow = entry / "train" / "data-00000-of-00001.arrow"
    whole = arrow.read_bytes()
    if damage == "truncated":
        arrow.write_bytes(whole[:-1])
    elif damage == "missing":
        (entry / "train" / "lengths.npy").unlink()
    elif damage == "no footer":
        (entry / "oslo.json").unlink()
    elif damage == "torn footer":
        (entry / "oslo.json").write_text('{"format": 1, "fi')
    else:
        shutil.rmtree(entry)
        entry.mkdir()
        (entry / "something").write_text("else")
    again = built(data)
    assert (again.key, again.reused) == (first.key, False)
    assert arrow.read_bytes() == whole
    assert not (entry / "something").exists()


def test_verification_reads_every_byte(data: Path, built: Build) -> None:
    entry = Path(built(data).path)
    assert cache.damaged_files(entry) == []
    arrow = entry / "train" / "data-00000-of-00001.arrow"
    content = bytearray(arrow.read_bytes())
    content[len(content) // 2] ^= 1
    arrow.write_bytes(content)
    assert cache.read_entry(entry) is not None  # the cheap check sees sizes only
    assert cache.damaged_files(entry) == ["train/data-00000-of-00001.arrow"]


def test_opening_a_damaged_entry_says_so(data: Path, built: Build) -> None:
    entry = Path(built(data).path)
    (entry / "train" / "lengths.npy").unlink()
    with pytest.raises(DataError, match=r"is damaged .*\n  prepare it again: oslo data build"):
        PreparedDataset.open(entry)


def test_a_read_only_cache(data: Path, built: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    first = built(data)
    folder = Path(first.path).parent
    monkeypatch.setenv("OSLO_RUN_DIR", str(folder))

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    # Rights do not stop root, who may run these tests; so the file system's answer is given in its place.
    monkeypatch.setattr("opensloth.beat.write_json", refuse)
    monkeypatch.setattr("opensloth.data.cache.os.access", lambda *_: False)
    assert built(data).reused
    with pytest.raises(
        DataError, match=r"not in this cache, and it cannot be written: Read-only file system\n  .*build"
    ):
        built(data, train_on="all")


# --- the lock -------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def foreign_lock(path: Path, *, beat: int = 0) -> None:
    """The lock of a builder on another machine."""
    write_json(path, {"token": "theirs", "pid": 1, "pid_started": "5", "machine": "other boot ns"})
    write_json(beat_path(path, "theirs"), {"beat": beat, "done": 7, "total": 9})


def test_only_one_holds_the_lock(tmp_path: Path) -> None:
    one, other = BuildLock(tmp_path / "k.lock"), BuildLock(tmp_path / "k.lock")
    assert one.try_acquire()
    assert not other.try_acquire()
    one.release()
    assert other.try_acquire()
    other.release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_whose_beat_stands_still_is_broken(tmp_path: Path) -> None:
    path, clock = tmp_path / "k.lock", Clock()
    foreign_lock(path)
    observer = LockObserver(path, stale_seconds=60, clock=clock)
    progress = observer.look()
    assert progress is not None
    assert (progress.done, progress.total) == (7, 9)
    clock.now = 59
    assert observer.look() is not None
    foreign_lock(path, beat=1)  # it lives
    clock.now = 100
    assert observer.look() is not None
    clock.now = 159
    assert observer.look() is not None
    clock.now = 160
    assert observer.look() is None
    assert list(tmp_path.iterdir()) == []


def test_a_successors_lock_is_not_broken(tmp_path: Path) -> None:
    path, clock = tmp_path / "k.lock", Clock()
    foreign_lock(path)
    observer = LockObserver(path, stale_seconds=60, clock=clock)
    assert observer.look() is not None
    path.unlink()
    successor = BuildLock(path)
    assert successor.try_acquire()
    clock.now = 61
    assert observer.look() is not None  # another token: seen for the first time
    successor.release()


def test_a_torn_lock_is_broken_when_it_stays(tmp_path: Path) -> None:
    path, clock = tmp_path / "k.lock", Clock()
    path.write_text("{")
    observer = LockObserver(path, stale_seconds=60, clock=clock)
    assert observer.look() is not None
    clock.now = 60
    assert observer.look() is None
    assert not path.exists()


# --- processes ------------------------------------------------------------------------------------


def start(config: RunConfig, file: Path) -> subprocess.Popen[str]:
    file.write_text(dump(config))
    command = [sys.executable, "-m", "opensloth.data", "build", "--config", str(file)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def events_of(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, output + errors
    return [json.loads(line) for line in output.splitlines()]


def test_two_processes_make_one_build(tmp_path: Path, data: Path, make_config: Callable[..., RunConfig]) -> None:
    config = make_config(data)
    processes = [start(config, tmp_path / f"{i}.yaml") for i in range(2)]
    results = [events_of(process)[-1] for process in processes]
    assert sorted(result["reused"] for result in results) == [False, True]
    assert results[0]["path"] == results[1]["path"]
    left = {path.name for path in (tmp_path / "cache").iterdir()}
    assert left == {results[0]["key"]}


HOLDER = """
import sys, time
from pathlib import Path
from opensloth.data.lock import BuildLock
entry = Path(sys.argv[1])
lock = BuildLock(entry.with_name(entry.name + ".lock"))
assert lock.try_acquire()
(entry.with_name(f".{entry.name}.{lock.token}.building") / "train").mkdir(parents=True)
entry.with_name(f"..{entry.name}.{lock.token}.beat.0123abcd.tmp").touch()  # half a beat
print("held", flush=True)
time.sleep(60)
"""


def test_the_lock_of_a_killed_process_is_broken_at_once(data: Path, built: Build) -> None:
    entry = Path(built(data).path)
    shutil.rmtree(entry)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(entry)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    observer = LockObserver(entry.with_name(f"{entry.name}.lock"))
    assert observer.look() is not None
    holder.kill()
    holder.communicate()
    assert not built(data).reused
    assert [path.name for path in entry.parent.iterdir()] == [entry.name]


@pytest.mark.slow
def test_a_killed_builder_is_followed_by_the_next(
    tmp_path: Path, make_config: Callable[..., RunConfig], events: Events
) -> None:
    config = make_config(write_jsonl(tmp_path / "large.jsonl", rows(40_000)))
    process = start(config, tmp_path / "c.yaml")
    folder = tmp_path / "cache"
    deadline = time.monotonic() + 40
    while not list(folder.glob(".*.building/train/*.arrow")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert list(folder.glob("*.lock"))
    assert not [entry for entry in folder.iterdir() if (entry / "oslo.json").exists()]
    result = build(config, events)  # at once: the dead process is seen to be dead
    assert (result.reused, result.documents) == (False, 40_000)
    assert {path.name for path in folder.iterdir()} == {result.key}
    assert cache.damaged_files(Path(result.path)) == []


# --- ls and prune ---------------------------------------------------------------------------------


def test_what_is_used_and_what_can_go(
    tmp_path: Path, data: Path, built: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "r-1"
    run.mkdir(parents=True)
    unused = built(data)
    monkeypatch.setenv("OSLO_RUN_DIR", str(run))
    used = built(data, train_on="all")
    folder = tmp_path / "cache"
    found = {entry.key: entry for entry in cache.entries(folder)}
    assert found[used.key].used_by == (str(run),)
    assert found[unused.key].used_by == ()
    assert found[used.key].documents == 20
    assert found[used.key].tokens == used.tokens
    assert found[used.key].size == sum(
        file.stat().st_size for file in Path(used.path).rglob("*") if file.is_file() and file.name != "oslo.json"
    )
    listed = cache.entries(folder)
    assert cache.select_for_pruning(listed, older_than_days=None, unused=False) == []
    assert cache.select_for_pruning(listed, older_than_days=None, unused=True) == [found[unused.key]]
    assert cache.select_for_pruning(listed, older_than_days=1, unused=False) == []
    later = time.time() + 2 * 86400
    assert len(cache.select_for_pruning(listed, older_than_days=1, unused=False, now=later)) == 2
    assert cache.select_for_pruning(listed, older_than_days=1, unused=True, now=later) == [found[unused.key]]
    run.rmdir()
    assert cache.entries(folder)[0].used_by == ()
    cache.remove_entry(found[used.key])
    assert [entry.key for entry in cache.entries(folder)] == [unused.key]


def test_training_on_an_entry_or_on_a_copy_of_it(
    tmp_path: Path, data: Path, built: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = Path(built(data).path)
    copy = shutil.copytree(entry, tmp_path / "copies" / "mine")
    monkeypatch.setenv("OSLO_RUN_DIR", str(tmp_path))
    built(cache=copy)
    assert [path.name for path in copy.parent.iterdir()] == ["mine"]  # nothing is noted: no cache
    built(cache=entry)
    listed = cache.entries(tmp_path / "cache")
    assert [found.used_by for found in listed] == [(str(tmp_path),)]
    assert cache.select_for_pruning(listed, older_than_days=None, unused=True) == []


def test_an_empty_cache_has_no_entries(tmp_path: Path) -> None:
    assert cache.entries(tmp_path / "nothing") == []
