"""What the results say, in Markdown."""

from __future__ import annotations

import statistics
from typing import Any

from training.cases import CASES, Case
from training.legs import Leg
from training.results import Results, first_step, outcome, peak, verdict


def text(results: Results, names: list[str]) -> str:
    """Two tables: a line for each case with its bars, a line for each leg; then what was left out."""
    chosen = {name: CASES[name] for name in names}
    about = results.about
    packages = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines = [
        f"{about['date']}, {about['gpu']}, {packages}. Random weights; median (range) of the turns.",
        "",
        "| | oslo, tokens/s | GiB | best peer, tokens/s | GiB | oslo / peer | must | aim |",
        "|---|---|---|---|---|---|---|---|",
        *(_case_line(case, results) for case in chosen.values()),
        "",
        "| leg | tokens/s | target tokens/s | GiB | first step after | gradient: cosine, norm | turns | timed steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    legs = dict.fromkeys(leg for case in chosen.values() for leg in (*case.own, *case.peers, *case.also))
    lines += [_leg_line(leg, results) for leg in legs if results.figures(leg)]
    lines += [""] + [f"- {leg.name}: {why}" for leg in legs if (why := _why_not(leg, results))]
    if (machines := len({one["machine"] for leg in legs for one in results.figures(leg)})) > 1:
        lines.append(f"\nFrom {machines} machines, which differ. A case tells of one that ran both, the worse of two.")
    return "\n".join(lines) + "\n"


def _case_line(case: Case, results: Results) -> str:
    found = outcome(case, results)
    cells = []
    for leg in (found.own, found.peer):
        figures = found.results.figures(leg) if leg else []
        shown = "first_step_seconds" if case.seconds else "tokens_per_second"
        name = f" ({leg.name})" if leg else ""
        cells += [_spread(figures, shown) + name, f"{peak(figures):.2f}" if figures else ""]
    value = "" if found.value is None else f"{found.value:+.1f} s" if case.seconds else f"{found.value:.2f}"
    bars = [verdict(case, found.value, bar) for bar in (case.must, case.aim)]
    return f"| {' | '.join([case.title, *cells, value, *bars])} |"


def _leg_line(leg: Leg, results: Results) -> str:
    figures = results.figures(leg)
    gate = results.gates.get(leg.kind)
    first = [one for one in figures if "first_step_seconds" in one]
    cells = [
        leg.name,
        _spread(figures, "tokens_per_second"),
        _spread(figures, "target_tokens_per_second"),
        f"{peak(figures):.2f}",
        f"{first_step(first):.1f} s" if first else "",
        f"{gate['cosine']:.5f}, {gate['norm']:.4f}" if gate else "",
        str(len(figures)),
        "" if leg.start else ", ".join(sorted({str(one["steps"]) for one in figures})),
    ]
    return f"| {' | '.join(cells)} |"


def _spread(figures: list[dict[str, Any]], name: str) -> str:
    values = [one[name] for one in figures if name in one]
    if not values:
        return ""
    form = ",.1f" if name == "first_step_seconds" else ",.0f"
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _why_not(leg: Leg, results: Results) -> str | None:
    """Why a leg has no figures, or not all."""
    gate = results.gates.get(leg.kind)
    if gate and not gate["passed"]:
        return f"its gradient is wrong: cosine {gate['cosine']:.5f}, norm {gate['norm']:.4f}"
    known = results.legs.get(leg.name, {})
    why = known.get("failed") or known.get("unfinished") or results.left_out.get(leg.name)
    return f"{lines[0]} {lines[-1]}" if len(lines := str(why or "").strip().splitlines()) > 1 else why
