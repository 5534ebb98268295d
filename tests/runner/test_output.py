from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from stand_in import SMALLEST, launcher_command

from opensloth.event_lines import render_event
from runner.output import event_sayer, table, use_colour
from runner.secret_values import looks_secret


class Terminal:
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environ", "colour"), [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)]
)
def test_colour_on_a_terminal(environ: dict[str, str], colour: bool) -> None:
    assert use_colour(Terminal(), environ) is colour  # type: ignore[arg-type]


def test_columns_are_aligned_whatever_their_colour() -> None:
    assert table(("A", "B"), [("\x1b[32mgreen\x1b[0m", "1"), ("x", "22")]).splitlines() == [
        "A      B",
        "\x1b[32mgreen\x1b[0m  1",
        "x      22",
    ]


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (
            {
                "event": "step",
                "step": 12,
                "total_steps": 60,
                "loss": 1.23449,
                "target_tokens_per_second": 1234.4,
                "eta": 80,
            },
            "step 12/60  loss 1.234  1,234 target tok/s  ETA 1m20s",
        ),
        ({"event": "step", "step": 1, "loss": None}, "step 1  loss not finite"),
        (
            {"event": "progress", "phase": "tokenise", "done": 1200, "total": None, "unit": "rows"},
            "tokenise 1,200 rows",
        ),
        ({"event": "note", "level": "warning", "message": "careful"}, "warning: careful"),
        ({"event": "phase", "phase": "model"}, "-- loading the model"),
        (
            {"event": "check", "check": "packing", "cosine": 1.0, "norm_ratio": 0.9999996, "seconds": 1.26},
            "packing checked against single documents: gradient cosine 1.000000, norm ratio 1.000000, 1.3s",
        ),
        (
            {"event": "check", "check": "packing", "cosine": 0.25, "norm_ratio": None, "remembered": True},
            "packing checked against single documents: gradient cosine 0.250000, norm ratio not finite, from an "
            "earlier start",
        ),
        ({"event": "plan", "rows": 1000, "total_steps": 50}, "plan: 1,000 rows, 50 steps"),
        ({"event": "engine", "engine": "torch", "reason": "asked for"}, "engine torch: asked for"),
        ({"event": "resumed", "step": 7, "checkpoint": "c/7"}, "resumed at step 7 from c/7"),
        ({"event": "eval", "step": 7, "loss": 0.5}, "evaluation at step 7  loss 0.5"),
        ({"event": "checkpoint", "step": 7, "path": "c/7", "seconds": 1.26}, "checkpoint at step 7: c/7 in 1.3s"),
        (
            {"event": "result", "steps": 9, "final": "f", "loss": 0.1, "seconds": 90},
            "result after 9 steps in 1m30s: f  loss 0.1",
        ),
        ({"event": "end", "cause": "data", "message": "bad row"}, "ended: data: bad row"),
        ({"event": "of a later version", "x": 1}, '{"event": "of a later version", "x": 1}'),
    ],
)
def test_events_as_lines(event: dict[str, object], line: str) -> None:
    assert render_event(event) == line


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("HF_TOKEN", "x", True),
        ("WANDB_API_KEY", "x", True),
        ("AWS_SECRET_ACCESS_KEY", "x", True),
        ("db_password", "x", True),
        ("X", "hf_" + "a" * 34, True),
        ("X", "ghp_" + "a" * 36, True),
        ("X", "0123456789abcdef0123456789abcdef01234567", True),
        ("TOKENIZERS_PARALLELISM", "false", False),
        ("NCCL_DEBUG", "WARN", False),
        ("MAX_TOKENS", "5", False),
        ("SECRETARY", "x", False),
        ("KEYBOARD", "x", False),
    ],
)
def test_what_looks_secret(name: str, value: str, secret: bool) -> None:
    assert looks_secret(name, value) is secret


@pytest.mark.parametrize(("answer", "code", "started"), [(b"n\n", 1, False), (b"y\n", 0, True)])
def test_submit_asks_on_a_terminal(tmp_path: Path, answer: bytes, code: int, started: bool) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "sft.yaml").write_text(SMALLEST)
    script = (
        "import sys; from pathlib import Path\n"
        "from runner.cli import run; from runner.commands.common import Settings\n"
        f"settings = Settings(Path('root').absolute(), None, {tuple(launcher_command(steps=1))!r})\n"
        "sys.exit(run(['submit', 'sft.yaml', '--local', '--follow'], obj=settings))"
    )
    leader, follower = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, stdin=follower, stdout=subprocess.PIPE, stderr=follower
    )
    os.close(follower)
    assert process.stdout is not None
    with process, process.stdout:
        os.write(leader, answer)
        out = process.stdout.read()
        process.wait(20)
    asked = os.read(leader, 4096)
    os.close(leader)
    assert b"Submit? [Y/n]:" in asked
    assert process.returncode == code
    assert (b"local://sft-" in out) is started
    assert (tmp_path / "root").exists() is started


def test_the_same_progress_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    say_event = event_sayer()
    note = {"event": "note", "level": "info", "message": "one"}
    for done in (100, 200, 200):
        say_event({"event": "progress", "phase": "tokenise", "done": done, "total": 200, "unit": "rows"})
    say_event(note)
    say_event(note)
    assert capsys.readouterr().err.splitlines() == ["tokenise 100/200 rows", "tokenise 200/200 rows", "one", "one"]
