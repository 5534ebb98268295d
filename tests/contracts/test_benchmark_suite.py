"""The training benchmark's pure part: which leg is next, what is not tried again, ratios, and bars met or missed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from training import legs
from training.cases import CASES, DEFAULT
from training.legs import Leg
from training.results import Results, is_due, outcome, queue, rate, verdict

CASE = CASES["0.5b"]


def measured(results: Results, leg: Leg, *rates: float, peak: float = 1.0) -> None:
    for turn, told in enumerate(rates, start=1):
        figures: dict[str, Any] = {"tokens_per_second": told, "peak_gib": peak, "first_step_seconds": told}
        results.of(leg)["turns"][str(turn)] = {**figures, "leg_seconds": 50.0}


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results(tmp_path / "results.json")


def test_a_whole_turn_of_the_main_legs_comes_first_and_no_leg_twice() -> None:
    order = queue(DEFAULT, 2)
    turns = [turn for turn, _ in order]
    first = turns.index(2)
    assert order[0] == (1, CASE.own[0])
    assert {leg.name for _, leg in order[:first]} >= {leg.name for leg in (*CASE.own, *CASE.peers)}
    assert order[-1][0] == 1
    assert len({(turn, leg.name) for turn, leg in order}) == len(order)


def test_flash_attention_is_the_newest_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    leg, installed = Leg(program="trl+liger/flash", shape="0.5b", rows=2), {"trl", "liger_kernel"}
    monkeypatch.setattr(legs, "_is_installed", lambda package: package in installed)
    assert leg in CASE.also
    assert legs.lacking(leg) == "flash-attn-4 or flash-attn"
    for package, attention in (("flash-attn", "flash_attention_2"), ("flash-attn-4", "flash_attention_4")):
        installed.add(package)
        assert (legs.lacking(leg), leg.attention) == (None, attention)
    installed.remove("trl")
    assert legs.lacking(leg) == "trl"


def test_what_is_done_failed_or_too_long_is_not_due(results: Results) -> None:
    own, peer = CASE.own[0], CASE.peers[0]
    measured(results, own, 100.0)
    assert not is_due(results, 1, own, 1000)
    assert is_due(results, 2, own, 51)
    assert not is_due(results, 2, own, 49)
    assert is_due(results, 1, peer, 1)
    results.of(peer)["failed"] = "out of memory"
    assert not is_due(results, 1, peer, 1000)


def test_a_leg_whose_gradient_is_wrong_neither_runs_nor_counts(results: Results) -> None:
    peer = CASE.peers[0]
    measured(results, CASE.own[0], 300.0)
    measured(results, peer, 100.0)
    results.gates[peer.kind] = {"cosine": 0.5, "norm": 1.0, "passed": False}
    assert not is_due(results, 2, peer, 1000)
    assert outcome(CASE, results).value is None


def test_a_later_call_reads_what_an_earlier_one_wrote(results: Results) -> None:
    measured(results, CASE.own[0], 100.0)
    results.write()
    assert not is_due(Results.read(results.path), 1, CASE.own[0], 1000)


def test_the_ratio_is_of_medians_to_the_best_of_all_peers(results: Results) -> None:
    measured(results, CASE.own[0], 300.0, 330.0, 900.0)
    measured(results, CASE.peers[0], 100.0)
    measured(results, CASE.also[0], 110.0)
    found = outcome(CASE, results)
    assert (found.peer, found.value) == (CASE.also[0], pytest.approx(3.0))
    assert verdict(CASE, found.value, 3) == "3x: met"
    assert verdict(CASE, found.value, 4) == "4x: missed"
    assert verdict(CASE, None, 4) == "4x: not measured"


def test_machines_are_not_mixed(results: Results) -> None:
    """Of a and b, which ran both, the worse is told; on b another peer is the best; c is fast, and ran one alone."""
    own, peer, other = CASE.own[0], CASE.peers[0], CASE.also[0]
    measured(results, own, 300.0, 1000.0)
    measured(results, peer, 100.0, 400.0, 900.0)
    measured(results, other, 500.0)
    for leg, machines in ((own, "ab"), (peer, "abc"), (other, "b")):
        for figures, machine in zip(results.figures(leg), machines, strict=True):
            figures["machine"] = machine
    found = outcome(CASE, results)
    assert (found.peer, found.value) == (other, pytest.approx(1000 / 500))
    assert [rate(found.results.figures(leg)) for leg in (own, other)] == [1000.0, 500.0]
    for figures in results.figures(own):
        figures["machine"] = "d"
    assert outcome(CASE, results).value is None


def test_within_a_bound_of_memory_the_fastest_leg_that_fits_counts(results: Results) -> None:
    case = CASES["full"]
    measured(results, case.own[0], 400.0, peak=17.5)
    measured(results, case.own[1], 300.0, peak=15.5)
    measured(results, case.peers[0], 200.0, peak=16.2)
    assert outcome(case, results).value == pytest.approx(1.5)
    lean = CASES["7b-19gib"]
    measured(results, lean.peers[0], 200.0, peak=16.2)
    for peak, value in ((19.1, None), (18.9, pytest.approx(2.0))):
        measured(results, lean.own[0], 400.0, peak=peak)
        assert outcome(lean, results).value == value


def test_the_start_is_compared_in_seconds(results: Results) -> None:
    case = CASES["start"]
    measured(results, case.own[0], 25.0)
    measured(results, case.peers[0], 20.0)
    value = outcome(case, results).value
    assert value == pytest.approx(5.0)
    assert [verdict(case, value, bar).rsplit(" ", 1)[1] for bar in (case.must, case.aim)] == ["met", "missed"]
