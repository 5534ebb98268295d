"""What the quickstart says of a run, and the config that it hands to `oslo submit`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import run
from make_data import Case, Order, make_cases, write_cases

from runner.config_file import Target, load_file

CASE = Case("Send a red lamp to Ada Costa in Oslo.", Order("Ada Costa", "red lamp", 1, "Oslo"))


@pytest.fixture
def quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the config with its data, in the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(run.CONFIG, tmp_path)
    write_cases(make_cases(train=20, heldout=1)[0], tmp_path / "data" / "train.jsonl")
    monkeypatch.setattr(run, "CONFIG", tmp_path / "sft.yaml")
    return tmp_path


def test_the_config_is_valid_and_trains_what_the_script_writes(quickstart: Path):
    loaded = load_file(quickstart / "sft.yaml", ["training.bf16=true"], None, Target(quickstart / "root"))
    assert [dataset.path for dataset in loaded.run.dataset] == [str(quickstart / "data" / "train.jsonl")]
    assert loaded.run.name == "quickstart"
    assert loaded.run.opensloth.sequence_packing


def test_a_refused_config_ends_the_script_with_the_commands_own_code(
    quickstart: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as ended:
        run.submit(["training.learning_rate=-1"], cluster=False)
    shown = capsys.readouterr().out
    assert ended.value.code == 2
    assert shown.startswith("$ ")
    assert "submit sft.yaml --local --follow -y --set training.learning_rate=-1\n" in shown
    assert "learning_rate" in shown.partition("\n")[2]


def test_the_score_counts_exact_answers():
    answers = [CASE.order.to_json(), "a red lamp", CASE.order.to_json() + "\n"]
    assert run.score(answers, [CASE] * 3) == "2 of 3"


@pytest.mark.parametrize(("right", "good"), [(9, True), (8, False)])
def test_nine_of_ten_are_good_enough(right: int, good: bool):
    after = [CASE.order.to_json()] * right + [""] * (10 - right)
    assert run.Answers([CASE] * 10, [""] * 10, after).good() is good


def test_the_speed_is_that_of_the_last_attempt():
    events = [
        {"event": "step", "attempt": 1, "tokens": 1000},
        {"event": "end", "attempt": 1},
        {"event": "step", "attempt": 2, "tokens": 300},
        {"event": "step", "attempt": 2, "tokens": 100},
        {"event": "result", "attempt": 2, "steps": 60, "seconds": 8.0},
        {"event": "end", "attempt": 2},
    ]
    assert run.training_speed(events) == "60 steps, 400 tokens in 8 s: 50 tokens/s"


def test_a_long_answer_is_cut_to_one_line():
    assert run.on_one_line("a\n  b") == "a b"
    cut = run.on_one_line("word " * 50)
    assert len(cut) == 100
    assert cut.endswith(" ...")


def test_the_report_shows_samples_scores_speed_and_what_to_do_next(
    quickstart: Path, capsys: pytest.CaptureFixture[str]
):
    answers = run.Answers([CASE] * 4, ["no"] * 4, [CASE.order.to_json()] * 4)
    run.report(answers, "local://quickstart-0", quickstart / "final", "1 steps in 2 s", run.Clock())
    shown = capsys.readouterr().out
    assert shown.count(f"sentence   {CASE.sentence}\n") == run.SHOWN
    assert "exact      0 of 4 before training, 4 of 4 after\n" in shown
    assert "training   1 steps in 2 s\n" in shown
    assert f"adapter    {quickstart / 'final'}\n" in shown
    assert "status local://quickstart-0\n" in shown
    assert "Fewer than" not in shown
