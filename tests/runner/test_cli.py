"""`oslo` as people and pipelines use it: outputs, exit codes, what comes next."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from stand_in import SMALLEST, Answer, launcher_command

from runner import starter
from runner.backend import RunStatus
from runner.cli import COMMANDS, cli
from runner.config_file import Target, load_file

Oslo = Callable[..., Answer]
OSLO = Path(sys.executable).with_name("oslo")
HANDLE = re.compile(r"local://sft-[0-9a-f]{8}(-\d+)?")


def test_submit_prints_the_handle_last_and_what_comes_next(oslo: Oslo, sft: Path) -> None:
    answer = oslo("submit", sft, "--local", steps=1)
    assert answer.code == 0
    assert HANDLE.fullmatch(answer.out.strip())
    assert "2 rows x 4 accumulation x 1 process = 8 rows a step" in answer.err
    for command in ("oslo logs -f", "oslo status", "oslo cancel"):
        assert f"{command} {answer.handle}" in answer.err


def test_follow_shows_the_log_and_how_to_use_the_result(oslo: Oslo, sft: Path) -> None:
    answer = oslo("submit", sft, "--local", "--follow", steps=2, step_seconds=0.1)
    assert answer.code == 0
    lines = answer.out.splitlines()
    assert "[0] step 1/2  loss 4  1,234 target tok/s  3.0 MiB  ETA 0s" in lines
    assert "[0] a raw line of step 2" in lines
    assert HANDLE.fullmatch(lines[-1])
    final = re.search(r"succeeded: (.*)", answer.err)
    assert final is not None
    assert f'AutoPeftModelForCausalLM.from_pretrained("{final[1]}")' in answer.err


def test_follow_of_a_failure_ends_with_the_cause_and_the_next_command(oslo: Oslo, sft: Path) -> None:
    answer = oslo("submit", sft, "--local", "--follow", steps=2, fail_at={"1": "row 3 has no messages"})
    assert answer.code == 100
    assert answer.err.splitlines()[-2:] == [
        f"error: {answer.handle} failed (data): row 3 has no messages",
        f"  oslo logs {answer.handle}   shows the log",
    ]


def test_submitting_the_same_content_again(oslo: Oslo, sft: Path) -> None:
    first = oslo("submit", sft, "--local", steps=1, step_seconds=30)
    again = oslo("submit", sft, "--local", steps=1)
    assert again.handle == first.handle
    assert "is running already: attached" in again.err
    assert oslo("cancel", first.handle).code == 0
    resumed = oslo("submit", sft, "--local", "--follow", steps=1)
    assert (resumed.code, resumed.handle) == (0, first.handle)
    assert "taken up again as a new attempt" in resumed.err
    done = oslo("submit", sft, "--local", "--follow", steps=1)
    assert (done.code, done.handle) == (0, first.handle)
    assert "has succeeded already" in done.err
    assert "from_pretrained" in done.err


def test_fresh_starts_anew_and_is_then_the_run_of_that_content(oslo: Oslo, sft: Path) -> None:
    first = oslo("submit", sft, "--local", "--follow", steps=1)
    fresh = oslo("submit", sft, "--local", "--follow", "--fresh", steps=1)
    assert fresh.handle == f"{first.handle}-2"
    assert oslo("submit", sft, "--local", steps=1).handle == fresh.handle
    assert oslo("submit", sft, "--local", "--fresh", steps=1).handle == f"{first.handle}-3"


def test_edited_data_is_another_run(oslo: Oslo, sft: Path) -> None:
    first = oslo("submit", sft, "--local", steps=1)
    (sft.parent / "train.jsonl").write_text('{"messages": [1]}\n')
    assert oslo("submit", sft, "--local", steps=1).handle != first.handle


def test_json_is_one_document(oslo: Oslo, sft: Path) -> None:
    answer = oslo("submit", sft, "--local", "--follow", "-o", "json", steps=1)
    document = answer.json()
    assert document["outcome"] == "started"
    assert set(document) == {"outcome", *RunStatus.__dataclass_fields__}
    assert document["state"] == "succeeded"
    assert "[0] step 1/1" in answer.err
    assert oslo("status", "sft", "-o", "json").json() == {k: v for k, v in document.items() if k != "outcome"}
    assert [one["run"] for one in oslo("list", "-o", "json").json()] == [document["run"]]
    lines = [json.loads(line) for line in oslo("logs", "sft", "-o", "json").out.splitlines()]
    assert {tuple(line) for line in lines} == {("rank", "text", "event")}
    assert oslo("wait", "sft", "-o", "json").json()["state"] == "succeeded"
    assert oslo("delete", "sft", "-o", "json").json() == {"run": document["run"], "deleted": True}


def test_a_plain_name_is_its_latest_run(oslo: Oslo, sft: Path) -> None:
    oslo("submit", sft, "--local", "--follow", steps=1)
    latest = oslo("submit", sft, "--local", "--follow", "--set", "training.seed=1", steps=1)
    assert oslo("status", "sft", "-o", "json").json()["handle"] == latest.handle
    assert oslo("status", latest.handle, "-o", "json").json()["handle"] == latest.handle
    assert oslo("status", latest.handle.removeprefix("local://"), "-o", "json").json()["handle"] == latest.handle


@pytest.mark.parametrize("command", ["status", "logs", "wait", "cancel", "resume", "delete"])
def test_a_run_that_is_not_there(oslo: Oslo, sft: Path, command: str) -> None:
    oslo("submit", sft, "--local", "--follow", steps=1)
    answer = oslo(command, "stf")
    assert (answer.code, answer.out) == (102, "")
    assert answer.err == "error: there is no run stf\n  did you mean sft?\n"


def test_a_handle_of_a_cluster_where_none_is_configured(oslo: Oslo) -> None:
    answer = oslo("status", "kubernetes://team/sft-12345678")
    assert (answer.code, answer.out) == (1, "")
    assert "error: no cluster is configured: there is no /nonexistent" in answer.err
    assert oslo("status", "kubernetes://team").code == 2


def test_submit_without_local(oslo: Oslo, sft: Path) -> None:
    answer = oslo("submit", sft)
    assert (answer.code, answer.out) == (2, "")
    assert "job.image: missing" in answer.err
    assert "job.volume: missing" in answer.err
    answer = oslo("submit", sft, "--set", "job.image=i:1", "--set", "job.volume=v")
    assert (answer.code, answer.out) == (1, "")
    assert "no cluster is configured" in answer.err
    assert "--local" in answer.err


def test_wait_tells_how_it_ended(oslo: Oslo, sft: Path) -> None:
    oslo("submit", sft, "--local", steps=2, step_seconds=0.2)
    answer = oslo("wait", "sft")
    assert answer.code == 0
    assert "succeeded: " in answer.err
    oslo("submit", sft, "--local", "--fresh", steps=1, fail_at={"1": "why"})
    assert oslo("wait", "sft").code == 100


def test_wait_gives_up_and_the_run_goes_on(oslo: Oslo, sft: Path) -> None:
    oslo("submit", sft, "--local", steps=1, step_seconds=30)
    began = time.monotonic()
    answer = oslo("wait", "sft", "--timeout", "1s")
    assert answer.code == 124
    assert 1 <= time.monotonic() - began < 5
    assert "gave up after 1 s: local://sft-" in answer.err
    assert oslo("status", "sft", "-o", "json").json()["state"] in ("preparing", "running")


def test_wait_for_a_run_that_is_cancelled_or_deleted(oslo: Oslo, sft: Path, root: Path) -> None:
    oslo("submit", sft, "--local", steps=1, step_seconds=30)
    assert oslo("cancel", "sft").code == 0
    answer = oslo("wait", "sft")
    assert answer.code == 103
    assert "oslo resume local://sft-" in answer.err


def test_following_a_run_that_is_deleted(oslo: Oslo, sft: Path, root: Path) -> None:
    handle = oslo("submit", sft, "--local", steps=1, step_seconds=30).handle
    folder = root / "runs" / handle.removeprefix("local://")
    pid = json.loads((folder / "attempts" / "1" / "started.json").read_text())["pid"]

    def delete() -> None:
        folder.rename(root / "gone")
        os.kill(pid, signal.SIGKILL)

    threading.Timer(0.5, delete).start()
    answer = oslo("submit", sft, "--local", "--follow", "-o", "json")
    assert answer.code == 103
    assert f"{handle} has been deleted" in answer.err
    assert answer.json() == {"outcome": "attached", "run": handle.removeprefix("local://"), "deleted": True}


def test_status_of_a_failure_is_answered_and_explained(oslo: Oslo, sft: Path) -> None:
    oslo("submit", sft, "--local", "--follow", steps=2, fail_at={"1": "row 3 has no messages"})
    answer = oslo("status", "sft")
    assert answer.code == 0
    rows = dict(line.split("  ", 1) for line in answer.out.splitlines())
    assert rows["state"].strip() == "failed (data)"
    assert rows["reason"].strip() == "row 3 has no messages"
    assert rows["step"].strip() == "1/2"
    assert "shows the log" in answer.err


def test_status_watches_to_the_end(oslo: Oslo, sft: Path) -> None:
    oslo("submit", sft, "--local", steps=2, step_seconds=0.3)
    answer = oslo("status", "-w", "sft")
    assert answer.code == 0
    assert answer.out.splitlines()[-1].startswith("succeeded")
    states = [json.loads(line)["state"] for line in oslo("status", "-w", "sft", "-o", "json").out.splitlines()]
    assert states == ["succeeded"]


def test_list_by_name_shows_what_differs_and_the_loss(oslo: Oslo, sft: Path) -> None:
    assert oslo("list").out == ""
    for seed in (1, 2):
        oslo("submit", sft, "--local", "--follow", "--set", f"training.seed={seed}", steps=4)
    header, *rows = [line.split() for line in oslo("list", "--name", "sft").out.splitlines()]
    assert header == ["RUN", "STATE", "LOSS", "EVAL", "LOSS", "training.seed"]
    assert [(row[1], row[2], row[4]) for row in rows] == [("succeeded", "1", "2"), ("succeeded", "1", "1")]
    document = oslo("list", "--name", "sft", "-o", "json").json()
    assert [one["differs"] for one in document] == [{"training.seed": 2}, {"training.seed": 1}]
    assert oslo("list").out.startswith("RUN ")


def test_logs_filter(oslo: Oslo, sft: Path) -> None:
    oslo("submit", sft, "--local", "--follow", steps=3, ranks=2)
    assert oslo("logs", "sft", "--rank", "1", "--tail", "1").out == "[1] rank 1 at step 3\n"
    assert oslo("logs", "sft", "--grep", "raw.*[23]$").out == "[0] a raw line of step 2\n[0] a raw line of step 3\n"
    assert oslo("logs", "sft", "--attempt", "2").code == 102
    assert oslo("logs", "sft", "--since", "1h").out == oslo("logs", "sft").out
    assert oslo("logs", "sft", "--grep", "(").code == 2
    assert oslo("logs", "sft", "--since", "soon").code == 2


def test_resume_and_follow(oslo: Oslo, sft: Path) -> None:
    handle = oslo("submit", sft, "--local", steps=1, step_seconds=30).handle
    oslo("cancel", "sft")
    answer = oslo("resume", "sft", "--follow", steps=2)
    assert (answer.code, answer.handle) == (0, handle)
    assert "goes on as attempt 2" in answer.err


def test_what_a_run_does_not_allow(oslo: Oslo, sft: Path) -> None:
    oslo("submit", sft, "--local", steps=1, step_seconds=30)
    refused = oslo("delete", "-y", "sft")
    assert refused.code == 1
    assert "oslo cancel local://sft-" in refused.err
    assert oslo("cancel", "--force", "sft").code == 0
    assert oslo("cancel", "sft").code == 1
    assert oslo("delete", "-y", "sft").code == 0
    assert oslo("list").err.startswith("no runs yet")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_who_stops_watching_does_not_stop_the_job(
    sft: Path, root: Path, oslo: Oslo, number: signal.Signals, code: int
) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from runner.cli import run; from runner.commands.common import Settings\n"
        f"settings = Settings(Path({str(root)!r}), None, {tuple(launcher_command(steps=2, step_seconds=1))!r})\n"
        f"sys.exit(run(['submit', {str(sft)!r}, '--local', '--follow'], obj=settings))"
    )
    watching = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    assert watching.stdout is not None
    assert watching.stdout.readline() == "[launcher] -- preparing the dataset\n"
    watching.send_signal(number)
    out, err = watching.communicate(timeout=20)
    assert watching.returncode == code
    assert HANDLE.fullmatch(out.splitlines()[-1])
    assert "goes on" in err
    assert "oslo cancel local://sft-" in err
    assert "Traceback" not in err
    assert oslo("wait", "sft").code == 0


def test_no_traceback_for_a_file_with_problems(oslo: Oslo, sft: Path) -> None:
    sft.write_text(SMALLEST + "training: {sede: 1}\n")
    for command in ("validate", "render"):
        answer = oslo(command, sft)
        assert (answer.code, answer.out) == (2, "")
        assert "sft.yaml:3: training.sede: unknown key (did you mean seed?)" in answer.err
    answer = oslo("validate", sft, "-o", "json")
    assert answer.code == 2
    assert answer.json() == {
        "valid": False,
        "problems": [
            {"path": "training.sede", "message": "unknown key", "hint": "did you mean seed?", "where": "sft.yaml:3"}
        ],
    }


@pytest.mark.parametrize(
    "arguments", [("submit",), ("nonsense",), ("status", "--nonsense", "x"), ("wait", "x", "--timeout", "1x")]
)
def test_wrong_usage(oslo: Oslo, arguments: tuple[str, ...]) -> None:
    answer = oslo(*arguments)
    assert (answer.code, answer.out) == (2, "")
    assert "Usage: oslo" in answer.err


def test_without_the_training_packages(oslo: Oslo, sft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.training_side._NEEDED", ("torch", "a_package_that_is_not_there"))
    answer = oslo("validate", sft)
    assert answer.code == 0
    assert "pip install 'opensloth[train]'" in answer.err
    assert "8 rows a step" in answer.out
    for command in (("data", "build", sft), ("data", "preview", sft), ("data", "ls")):
        answer = oslo(*command)
        assert answer.code == 1
        assert answer.err.endswith("which are not installed\n  pip install 'opensloth[train]'\n")


def test_init_writes_a_file_that_passes_and_overwrites_nothing(
    oslo: Oslo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert oslo("init").out == "sft.yaml\n"
    Path("train.jsonl").write_text("{}\n")
    load_file(Path("sft.yaml"), (), None, Target(tmp_path))
    again = oslo("init")
    assert again.code == 1
    assert "sft.yaml is there already" in again.err
    assert oslo("init", "none/other.yaml").code == 1


def test_what_the_starter_comments_out_is_the_default(tmp_path: Path) -> None:
    """Uncommented, the file means the same, apart from what only shows the form."""
    (tmp_path / "train.jsonl").write_text("{}\n")
    for name, text in (
        ("plain", starter.STARTER),
        ("whole", re.sub(r"(?m)^( *)# ?(?=[ a-z_]+:)", r"\1", starter.STARTER)),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sft.yaml").write_text(text.replace("train.jsonl", "../train.jsonl"))
    plain = load_file(tmp_path / "plain" / "sft.yaml", (), None, Target(tmp_path))
    whole = load_file(tmp_path / "whole" / "sft.yaml", ("dataset.columns={}",), None, Target(tmp_path))
    assert whole.job.image == "registry.example/opensloth:1.0"
    assert len(whole.run.explicit) > len(plain.run.explicit) + 10
    ignored: dict[str, Any] = {"exclude": {"explicit"}}
    assert plain.run.model_dump(**ignored) == whole.run.model_dump(**ignored)


def test_the_table_of_commands_says_what_the_commands_say() -> None:
    context = click.Context(cli)
    for name, (_, line) in COMMANDS.items():
        command = cli.get_command(context, name)
        assert command is not None
        assert command.name == name
        assert (command.help or "").split("\n\n")[0].strip() == line


def test_every_command_takes_json() -> None:
    context = click.Context(cli)
    commands = [(name, cli.get_command(context, name)) for name in COMMANDS]
    data = cli.get_command(context, "data")
    assert isinstance(data, click.Group)
    commands += list(data.commands.items())
    without = {
        name
        for name, command in commands
        if command and not any("-o" in option.opts for option in command.params if isinstance(option, click.Option))
    }
    assert without == {"schema", "completion", "data"}  # the schema is JSON as it is; data is a group


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(oslo: Oslo, shell: str) -> None:
    answer = oslo("completion", shell)
    assert answer.code == 0
    assert "_OSLO_COMPLETE" in answer.out


def test_completion_of_jobs(oslo: Oslo, sft: Path, root: Path) -> None:
    handle = oslo("submit", sft, "--local", "--follow", steps=1).handle
    environ = {"_OSLO_COMPLETE": "bash_complete", "COMP_WORDS": "oslo status sf", "COMP_CWORD": "2"}
    done = subprocess.run(
        [OSLO],
        env=os.environ | environ | {"OSLO_ROOT": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"plain,{handle.removeprefix('local://')}\n"


def test_no_colour_off_a_terminal(oslo: Oslo, sft: Path) -> None:
    oslo("submit", sft, "--local", "--follow", steps=1)
    for command in (("list",), ("status", "sft"), ("logs", "sft")):
        assert "\x1b" not in oslo(*command).out


@pytest.mark.parametrize(
    ("root", "arguments", "says"),
    [
        ("a file", ("submit", "sft.yaml", "--local"), "a file/runs/sft-"),
        ("/proc/none", ("submit", "sft.yaml", "--local"), "/proc/none: No such file or directory"),
        ("root", ("submit", "mem.yaml", "--local"), "Input/output error"),
        ("root", ("render", "mem.yaml", "--set", "job.image=i", "--set", "job.volume=v"), "Input/output error"),
    ],
)
def test_what_the_system_refuses_is_one_line(
    sft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str, arguments: tuple[str, ...], says: str
) -> None:
    (tmp_path / "a file").write_text("")
    (tmp_path / "mem.yaml").write_text(SMALLEST.replace("train.jsonl", "/proc/self/mem"))  # there, and unreadable
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OSLO_ROOT", root)
    done = subprocess.run([OSLO, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert says in last
    assert "Traceback" not in done.stderr


def test_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([OSLO, "schema"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")


def test_what_only_the_target_tells_of_a_file_has_its_line(
    oslo: Oslo, sft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.training_side._NEEDED", ("a_package_that_is_not_there",))
    sft.write_text(SMALLEST + "training: {global_batch_size: 8}\njob: {gpus_per_node: 3}\n")
    assert oslo("validate", sft).code == 0
    answer = oslo("validate", sft, "--cluster")
    assert (answer.code, answer.out) == (2, "")
    assert "sft.yaml:3: training.global_batch_size: 8 rows cannot be spread over 3 processes" in answer.err
    problems = oslo("validate", sft, "--cluster", "-o", "json").json()["problems"]
    found = {problem["path"]: problem["where"] for problem in problems}
    assert found["training.global_batch_size"] == "sft.yaml:3"
    assert {"job.image", "job.volume"} < set(found)  # a cluster needs them, this machine does not


def test_what_only_the_data_tells_of_a_file_has_its_line(oslo: Oslo, trainable: Path) -> None:
    trainable.write_text(trainable.read_text() + "training:\n  dataloader_drop_last: true\n")
    answer = oslo("validate", trainable, "-o", "json")
    assert answer.code == 2
    assert "sft.yaml:4: training.dataloader_drop_last: 1 row" in answer.err
    document = answer.json()
    assert document["valid"] is False
    assert [problem["where"] for problem in document["problems"]] == ["sft.yaml:4"]


def test_preview_marks_targets_by_brackets_in_a_pipe(trainable: Path) -> None:
    done = subprocess.run([OSLO, "data", "preview", trainable], capture_output=True, text=True, check=True)
    assert "\x1b" not in done.stdout
    assert "<|im_start|>user\nhello<|im_end|>" in done.stdout
    assert "⟦hi<|im_end|>" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("environ", "colour"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_preview_on_a_terminal_obeys_no_color(trainable: Path, environ: dict[str, str], colour: bool) -> None:
    ours, theirs = pty.openpty()
    environ = {**os.environ, "TERM": "xterm", **environ}
    with subprocess.Popen([OSLO, "data", "preview", trainable], stdout=theirs, stdin=theirs, env=environ) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # how a terminal says that nobody writes any more
            while data := os.read(ours, 4096):
                shown += data
    os.close(ours)
    assert process.returncode == 0
    assert (b"\x1b[32mhi" in shown) is colour
    assert ("⟦hi".encode() in shown) is not colour
