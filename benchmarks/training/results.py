"""What has been measured, in one JSON file that a later call goes on with; which leg is next; what the figures say."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from training.cases import CASES, Case
from training.legs import Leg


@dataclass
class Results:
    """legs: by name, {"leg", "turns": {turn: figures}, and "failed" or "unfinished": why it is not tried again}.

    gates: by kind, {cosine, norm, passed}. left_out: by name, why a leg was not started.
    """

    path: Path
    gates: dict[str, dict[str, Any]] = field(default_factory=dict)
    legs: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def read(path: Path) -> Results:
        """Of an earlier call, or none yet."""
        return Results(path, **json.loads(path.read_text())) if path.exists() else Results(path)

    def write(self) -> None:
        """At once or not at all: a call may be ended at any time."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        kept = {"about": self.about, "gates": self.gates, "left_out": self.left_out, "legs": self.legs}
        new.write_text(json.dumps(kept, indent=1) + "\n")
        os.replace(new, self.path)

    def of(self, leg: Leg) -> dict[str, Any]:
        return self.legs.setdefault(leg.name, {"leg": asdict(leg), "turns": {}})

    def figures(self, leg: Leg) -> list[dict[str, Any]]:
        """One for each turn that it has finished."""
        return list(self.legs.get(leg.name, {"turns": {}})["turns"].values())

    def of_machine(self, machine: str | None) -> Results:
        """Without the turns that others ran."""
        legs = {name: dict(leg) for name, leg in self.legs.items()}
        for leg in legs.values():
            leg["turns"] = {turn: one for turn, one in leg["turns"].items() if one.get("machine") == machine}
        return dataclasses.replace(self, legs=legs)

    def barred(self, leg: Leg) -> bool:
        """Whether it is not to be tried (again)."""
        known = self.legs.get(leg.name, {})
        wrong = not self.gates.get(leg.kind, {"passed": True})["passed"]
        return wrong or leg.name in self.left_out or "failed" in known or "unfinished" in known

    def duration(self, leg: Leg) -> float | None:
        """Seconds that its longest turn took; None: it has had none."""
        return max((figures["leg_seconds"] for figures in self.figures(leg)), default=None)


def queue(names: Iterable[str], repeat: int) -> list[tuple[int, Leg]]:
    """(turn, leg) in the order in which they run: whole turns of what matters, then once what is known to be behind."""
    chosen = [CASES[name] for name in names]
    main = dict.fromkeys(leg for case in chosen for leg in (*case.own, *case.peers))
    others = dict.fromkeys(leg for case in chosen for leg in case.also if leg not in main)
    return [(turn, leg) for turn in range(1, repeat + 1) for leg in main] + [(1, leg) for leg in others]


def is_due(results: Results, turn: int, leg: Leg, seconds_left: float) -> bool:
    """Not done, not barred, and it would end in time; one that never ran is given the benefit of the doubt."""
    if results.barred(leg) or str(turn) in results.legs.get(leg.name, {"turns": {}})["turns"]:
        return False
    return (results.duration(leg) or 0.0) < seconds_left


def rate(figures: list[dict[str, Any]]) -> float:
    return statistics.median(one["tokens_per_second"] for one in figures)


def peak(figures: list[dict[str, Any]]) -> float:
    return max(float(one["peak_gib"]) for one in figures)


def first_step(figures: list[dict[str, Any]]) -> float:
    return statistics.median(one["first_step_seconds"] for one in figures)


def best(results: Results, legs: Iterable[Leg], better: Callable[[list[dict[str, Any]]], float]) -> Leg | None:
    """The leg with the largest `better` of its figures, among those that have any and passed the gate."""
    measured = [leg for leg in legs if results.figures(leg) and not results.barred(leg)]
    return max(measured, key=lambda leg: better(results.figures(leg)), default=None)


@dataclass(frozen=True)
class Outcome:
    """own, peer: the legs compared. value: the ratio, or with `seconds` the difference; None: not measured.

    results: those of the machine that ran both.
    """

    own: Leg | None
    peer: Leg | None
    value: float | None
    results: Results


def outcome(case: Case, results: Results) -> Outcome:
    """As measured on one machine, since machines differ; of several the one in the middle, or the worse of two."""
    machines = {one.get("machine") for leg in results.legs.values() for one in leg["turns"].values()}
    found = [_outcome(case, results.of_machine(machine)) for machine in machines]
    told = sorted((one for one in found if one.value is not None), key=lambda one: one.value or 0.0)
    if told:
        return told[len(told) // 2 if case.seconds else (len(told) - 1) // 2]
    return dataclasses.replace(_outcome(case, results), value=None)


def _outcome(case: Case, results: Results) -> Outcome:
    if case.seconds:
        own, peer = (best(results, legs, lambda f: -first_step(f)) for legs in (case.own, case.peers))
        value = first_step(results.figures(own)) - first_step(results.figures(peer)) if own and peer else None
        return Outcome(own, peer, value, results)
    rivals = CASES[case.beside].own if case.beside else (*case.peers, *case.also)
    peer = best(results, rivals, rate)
    bound = case.bound_gib
    if bound == "peer":
        bound = peak(results.figures(peer)) if peer else None
    measured = [leg for leg in case.own if results.figures(leg)]
    fitting = [leg for leg in measured if bound is None or peak(results.figures(leg)) <= float(bound)]
    own = best(results, fitting, rate)
    value = rate(results.figures(own)) / rate(results.figures(peer)) if own and peer else None
    return Outcome(own, peer, value, results)


def verdict(case: Case, value: float | None, bar: float | None) -> str:
    """Of one bar: what it asks for, and whether `value` meets it."""
    if bar is None:
        return ""
    asked = f"{bar:+g} s at most" if case.seconds else f"{bar:g}x"
    if value is None:
        return f"{asked}: not measured"
    return f"{asked}: {'met' if (value <= bar if case.seconds else value >= bar) else 'missed'}"
