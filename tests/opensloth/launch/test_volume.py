"""A volume that this user may not write: one sentence, everywhere it is looked for."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from volumes import small_volume

from opensloth.contract import Cause
from opensloth.data.file_errors import file_errors
from opensloth.errors import DataError
from opensloth.launch.launcher import Launcher
from opensloth.launch.settings import Settings
from opensloth.pod_log import parse_end

# Drops its rights after the imports: the interpreter may lie where another user cannot read.
SCRIPT = """
import os, sys
from pathlib import Path
import opensloth.launch.launcher as launcher
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(12345)
    os.setuid(12345)
sys.exit(launcher.launch(Path(sys.argv[1])))
"""


def launch(root: Path, node: int = 0) -> tuple[int, str, str]:
    """(exit code, output, termination message) of a launcher in a pod."""
    config, last_word = root.parent / "config.yaml", root.parent / "termination-log"
    config.write_text("{}")
    last_word.touch()
    last_word.chmod(0o666)
    for folder in [*root.parents][:3]:  # pytest's own folders are for their owner only
        folder.chmod(0o755)
    env = {"OSLO_CONFIG": str(config), "OSLO_TERMINATION_LOG": str(last_word), "PATH": "/usr/bin:/bin"}
    env |= {"PET_NNODES": "2", "PET_NODE_RANK": str(node), "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", SCRIPT, str(root / "runs" / "tiny-0")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=50, check=False)
    return done.returncode, done.stdout + done.stderr, last_word.read_text()


@pytest.mark.parametrize(("node", "mode"), [(0, 0o555), (1, 0o555), (0, 0o700)])
def test_a_volume_of_somebody_else(tmp_path: Path, node: int, mode: int) -> None:
    root = tmp_path / "shared"
    root.mkdir(mode=mode)
    code, output, last_word = launch(root, node)
    assert code == 2, output
    end = parse_end(last_word)
    assert end is not None
    cause, message, hint = end
    assert cause == "config"
    assert f"may not write in {root} (mode {mode:04o}, owner " in message
    assert message.startswith("uid ")
    assert "gid " in message
    assert "fsGroup" in hint
    assert message in output.replace('\\"', '"')
    assert not list(root.iterdir())


@pytest.mark.parametrize("node", [0, 1])
def test_a_volume_that_is_mounted_read_only(tmp_path: Path, node: int) -> None:
    with small_volume(tmp_path / "shared", 1, "ro") as root:
        code, output, last_word = launch(root, node)
    assert code == 2, output
    end = parse_end(last_word)
    assert end is not None
    assert end[0] == "config"
    assert f"cannot write, because it is mounted read-only, in {root} (mode " in end[1]


def test_a_volume_that_is_not_mounted(tmp_path: Path) -> None:
    code, _, last_word = launch(tmp_path / "shared")
    assert code == 2
    assert f"{tmp_path / 'shared'} does not exist: the volume is not mounted" in last_word
    assert not (tmp_path / "shared").exists()


def met(number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[str, int, str, str]:
    """(cause, exit code, message, hint) of a launcher that meets this error wherever it goes."""
    run = tmp_path / "shared" / "runs" / "x"
    run.mkdir(parents=True)
    launcher = Launcher(Settings(run=run, config=run / "config.yaml"))
    error = OSError(number, os.strerror(number), str(run / "events.jsonl"))

    def serve() -> None:
        raise error

    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(launcher, "_serve", serve)
    ended = []
    monkeypatch.setattr(launcher, "_say_last", ended.append)
    code = launcher.run()
    return ended[0].cause, code, ended[0].message, ended[0].hint


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_fault_of_the_volume_that_may_pass_is_not_final(
    number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cause, code, message, _ = met(number, monkeypatch, tmp_path)
    assert (cause, code) == (Cause.VOLUME, 143)
    assert os.strerror(number) in message
    assert "events.jsonl" in message


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_volume_is_final_and_says_what_to_do(
    number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cause, code, message, hint = met(number, monkeypatch, tmp_path)
    assert (cause, code) == (Cause.CONFIG, 2)
    assert str(tmp_path / "shared") in message
    assert "submit again" in hint


def test_the_dataset_and_the_ranks_tell_such_faults_apart_too() -> None:
    from opensloth.train import _cause_of  # imports torch

    stale, full = (OSError(number, os.strerror(number)) for number in (errno.ESTALE, errno.ENOSPC))
    assert [_cause_of(error)[0] for error in (stale, full)] == [Cause.VOLUME, Cause.CONFIG]
    for error, cause in ((stale, Cause.VOLUME), (full, Cause.DATA)):
        with pytest.raises(DataError) as caught, file_errors("here"):
            raise error
        assert caught.value.cause == cause


def test_a_rank_names_what_it_may_not_write_in_the_runs_folder(tmp_path: Path) -> None:
    from opensloth.train import _cause_of  # imports torch

    run = tmp_path / "runs" / "x"
    run.mkdir(parents=True)
    run.chmod(0o750)
    refused = PermissionError(errno.EACCES, "Permission denied", str(run / "checkpoints" / "step-1" / "a"))
    cause, message, hint = _cause_of(refused, run)
    assert cause == Cause.CONFIG
    assert f"may not write in {run} (mode 0750, owner " in message
    assert "make the volume writable" in hint
    elsewhere = PermissionError(errno.EACCES, "Permission denied", "/model/config.json")  # read, for all that is known
    assert _cause_of(elsewhere, run)[0] == Cause.ERROR
