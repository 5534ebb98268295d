"""What `python -m opensloth.prune` frees, and what it must never touch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from opensloth import prune, run_config
from opensloth.data import cache
from opensloth.files import write_json

DAY: Final = 86400.0
NOW: Final = time.time()
KEY_A, KEY_B, KEY_C = "a" * 64, "b" * 64, "c" * 64
Prune = Callable[..., tuple[int, list[str]]]


def age(path: Path, days: float) -> Path:
    """Make all of it that old."""
    for found in (*path.rglob("*"), path):
        os.utime(found, (NOW - days * DAY,) * 2)
    return path


def write(path: Path, size: int = 10) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    return path


def make_run(root: Path, name: str, days: float, *, inputs: str = "", ended: bool = True, **opensloth: str) -> Path:
    run = root / "runs" / name
    for file in ("events.jsonl", "final/adapter.safetensors", "report.json", "attempts/1/rank-0.log"):
        write(run / file)
    write(run / "checkpoints" / "step-1" / "state.pt", 2048)
    write_json(run / "attempts" / "1" / "started.json", {"pid": 1})
    if ended:
        write_json(run / "attempts" / "1" / "ended.json", {"cause": "succeeded"})
    values = {
        "name": "test",
        "opensloth": {"fast_model_args": {"model_name": "m"}, "data_cache_path": str(root / "cache"), **opensloth},
        "dataset": {"path": f"{root}/inputs/{inputs or 'x'}/data.jsonl"},
    }
    config, problems = run_config.check(values)
    assert config is not None, problems
    (run / "config.yaml").write_text(run_config.dump(config))
    return age(run, days)


def make_entry(root: Path, key: str, days: float, used_by: Path | None = None, used_days: float | None = None) -> Path:
    folder = root / "cache" / key
    write(folder / "train" / "data.bin", 512)
    counts = {"documents": 1, "tokens": 1}
    files = {"train/data.bin": {"size": 512}}
    footer = {"name": "d", "counts": counts, "created": NOW - days * DAY, "files": files}
    write_json(folder / cache.FOOTER_FILE, cache.sealed(footer))
    age(folder, days)
    if used_by is not None:
        marker = root / "cache" / cache.USES_DIR / key / used_by.name
        marker.parent.mkdir(parents=True)
        write_json(marker, {"run": str(used_by)})
        age(marker, days if used_days is None else used_days)
    return folder


@pytest.fixture
def pruned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Prune:
    def call(*arguments: str) -> tuple[int, list[str]]:
        code = prune.main(["--root", str(tmp_path), "--older-than", "30", *arguments])
        return code, capsys.readouterr().out.splitlines()

    return call


# --- runs ---------------------------------------------------------------------------------------------


def test_an_old_run_loses_its_checkpoints_and_nothing_else(tmp_path: Path, pruned: Prune) -> None:
    run = make_run(tmp_path, "old-1", 31)
    kept = {path for path in run.rglob("*") if "checkpoints" not in path.parts}
    assert pruned() == (0, ["removed checkpoints runs/old-1/checkpoints: 2.0 KiB", "freed 2.0 KiB"])
    assert set(run.rglob("*")) == kept


def test_a_run_that_died_without_an_end_long_ago_is_over(tmp_path: Path, pruned: Prune) -> None:
    run = make_run(tmp_path, "dead-1", 31, ended=False)
    (run / "report.json").unlink()
    pruned()
    assert not (run / "checkpoints").exists()


@pytest.mark.parametrize("file", ["events.jsonl", "attempts/1/beat-0.json", "attempts/1/rank-0.log"])
@pytest.mark.parametrize("ended", [True, False])
def test_a_run_that_anything_was_written_to_keeps_its_checkpoints(
    tmp_path: Path, pruned: Prune, file: str, ended: bool
) -> None:
    run = make_run(tmp_path, "long-1", 60, ended=ended)
    age(write(run / file), 29)
    assert pruned() == (0, ["freed 0 B"])
    assert (run / "checkpoints" / "step-1" / "state.pt").exists()


def test_what_a_killed_pruning_left_of_checkpoints_goes_too(tmp_path: Path, pruned: Prune) -> None:
    run = make_run(tmp_path, "old-1", 31)
    left = write(run / ".checkpoints.0123abcd.removed" / "state.pt").parent
    age(run, 31)
    pruned()
    assert not left.exists()


# --- inputs and datasets ------------------------------------------------------------------------------


def test_inputs_go_when_no_young_run_reads_them(tmp_path: Path, pruned: Prune) -> None:
    make_run(tmp_path, "old-1", 31, inputs=KEY_A)
    make_run(tmp_path, "old-2", 31, inputs=KEY_B)
    make_run(tmp_path, "young-1", 1, inputs=KEY_B)
    for key, days in ((KEY_A, 31), (KEY_B, 31), (KEY_C, 1)):
        age(write(tmp_path / "inputs" / key / "data.jsonl").parent, days)
    _, lines = pruned()
    assert f"removed input inputs/{KEY_A}: 10 B" in lines
    assert sorted(path.name for path in (tmp_path / "inputs").iterdir()) == [KEY_B, KEY_C]


def test_an_input_that_a_run_begins_to_use_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in (KEY_A, KEY_B):
        age(write(tmp_path / "inputs" / key / "data.jsonl").parent, 31)

    def submit(line: str) -> None:
        if not line.startswith("freed"):
            make_run(tmp_path, "new-1", 0, inputs=KEY_B)

    monkeypatch.setattr(prune, "_say", submit)
    prune.prune(tmp_path, 30, dry_run=False)
    assert [path.name for path in (tmp_path / "inputs").iterdir()] == [KEY_B]


def test_a_run_is_not_looked_through_again_for_inputs_that_it_does_not_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With many runs and inputs that took hours."""
    young = make_run(tmp_path, "young-1", 1, inputs=KEY_C)
    for key in (KEY_A, KEY_B, KEY_C):
        age(write(tmp_path / "inputs" / key / "data.jsonl").parent, 31)
    looked_at: list[Path] = []
    last_written = prune._last_written

    def count(path: Path) -> float:
        looked_at.append(path)
        return last_written(path)

    monkeypatch.setattr(prune, "_last_written", count)
    prune.prune(tmp_path, 30, dry_run=False)
    assert [path.name for path in (tmp_path / "inputs").iterdir()] == [KEY_C]
    assert looked_at.count(young) == 2, "for its checkpoints, and for the input that it names"


def test_what_is_no_input_of_ours_stays(tmp_path: Path, pruned: Prune) -> None:
    mine = age(write(tmp_path / "inputs" / "my-corpus" / "data.jsonl").parent, 400)
    pruned()
    assert mine.exists()


def test_a_prepared_dataset_goes_when_no_young_run_uses_it(tmp_path: Path, pruned: Prune) -> None:
    old, young = make_run(tmp_path, "old-1", 31), make_run(tmp_path, "young-1", 1)
    unused = make_entry(tmp_path, KEY_A, 40, used_by=old)
    long_in_use = make_entry(tmp_path, KEY_B, 40, used_by=young)  # it was opened when the run began
    just_used = make_entry(tmp_path, KEY_C, 40, used_by=old, used_days=2)
    _, lines = pruned()
    assert f"removed prepared dataset cache/{KEY_A}: 512 B" in lines
    assert [path.exists() for path in (unused, long_in_use, just_used)] == [False, True, True]


def test_a_cache_of_another_name_is_found_by_the_runs_that_use_it(tmp_path: Path, pruned: Prune) -> None:
    entry = make_entry(tmp_path, KEY_A, 40)
    entry.parent.rename(tmp_path / "team")
    make_run(tmp_path, "old-1", 31, data_cache_path=str(tmp_path / "team"))
    pruned()
    assert not list((tmp_path / "team").iterdir())


def test_a_cache_outside_the_root_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = make_entry(tmp_path / "elsewhere", KEY_A, 40)
    make_run(tmp_path / "root", "old-1", 31, data_cache_path=str(elsewhere.parent))
    assert prune.main(["--root", str(tmp_path / "root"), "--older-than", "30"]) == 0
    assert elsewhere.exists()


def test_leftovers_go_after_a_day(tmp_path: Path, pruned: Prune) -> None:
    names = [
        f"inputs/.{KEY_A}.0123.part", f"cache/.{KEY_A}.0123.building/train/data.bin", f"cache/.{KEY_A}.0123.beat",
        "runs/.old-1.0123.deleted/config.yaml",
    ]  # fmt: skip
    for name in names:
        age(write(tmp_path / name), 1.1)
    make_entry(tmp_path, KEY_B, 3, used_by=make_run(tmp_path, "young-1", 3))
    _, lines = pruned()
    assert [line.split()[1] for line in lines[:-1]] == ["leftover"] * 4
    assert not list(tmp_path.glob("[ir]*/.*"))
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [cache.USES_DIR, KEY_B]


def test_an_upload_that_goes_on_stays(tmp_path: Path, pruned: Prune) -> None:
    part = age(write(tmp_path / "inputs" / f".{KEY_A}.0123.part"), 0.9)
    building = age(write(tmp_path / "cache" / f".{KEY_A}.0123.building" / "data.bin"), 2)
    write(building.parent / "more.bin")
    pruned()
    assert part.exists()
    assert building.exists()


# --- the command --------------------------------------------------------------------------------------


def test_a_dry_run_says_the_same_and_removes_nothing(tmp_path: Path, pruned: Prune) -> None:
    make_run(tmp_path, "old-1", 31)
    before = sorted(tmp_path.rglob("*"))
    assert pruned("--dry-run") == (
        0,
        ["would remove checkpoints runs/old-1/checkpoints: 2.0 KiB", "would free 2.0 KiB"],
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_root_and_a_second_pruning_have_nothing_to_do(tmp_path: Path, pruned: Prune) -> None:
    assert pruned() == (0, ["freed 0 B"])
    make_run(tmp_path, "old-1", 31)
    pruned()
    assert pruned() == (0, ["freed 0 B"])


def test_what_cannot_be_removed_is_said_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path, "a-1", 31)
    other = make_run(tmp_path, "b-1", 31)
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.parent.name == "a-1":
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    assert prune.main(["--root", str(tmp_path), "--older-than", "30"]) == 1
    printed = capsys.readouterr()
    assert printed.err == f"error: {tmp_path}/runs/a-1/checkpoints: Permission denied\n"
    assert printed.out.endswith("freed 2.0 KiB\n")
    assert not (other / "checkpoints").exists()


@pytest.mark.parametrize(
    "arguments", [["--root", "/nowhere", "--older-than", "30"], ["--root", "/", "--older-than", "0"]]
)
def test_arguments_that_make_no_sense_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        prune.main(arguments)
    assert refused.value.code == 2


def test_a_run_that_removes_its_own_checkpoints_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = write(tmp_path / "runs" / "a" / "checkpoints" / "step-1" / "state.pt").parent
    write(tmp_path / "runs" / "a" / "events.jsonl")
    scandir = os.scandir

    def vanishes(path: str | Path) -> object:
        if Path(path) == gone:
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", vanishes)
    assert prune.prune(tmp_path, 30, dry_run=True) == 0
