"""Bars of tokens a second, oslo's best leg and the best peer's, for each case of a results file of train.py.

python benchmarks/plot.py RESULTS.json PICTURE.svg
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parent))

from training.cases import CASES
from training.legs import Leg
from training.results import Results, outcome, rate

COLOURS = {"oslo": "#1b6ca8", "best peer": "#b5b5b5"}
WIDTH = 0.38


def main() -> None:
    mpl.rcParams["svg.fonttype"] = "none"  # words, not their outlines
    results, picture = Results.read(Path(sys.argv[1])), Path(sys.argv[2])
    found = {case.title: outcome(case, results) for case in CASES.values() if not (case.seconds or case.beside)}
    found = {textwrap.fill(title, 36): one for title, one in found.items() if one.value is not None}
    if not found:
        raise SystemExit(f"{sys.argv[1]}: no case has figures of oslo and of a peer")
    figure, axes = plt.subplots(figsize=(11, 0.9 + 0.75 * len(found)), layout="constrained")
    for place, one in enumerate(found.values()):
        for offset, who, leg in ((-WIDTH / 2, "oslo", one.own), (WIDTH / 2, "best peer", one.peer)):
            assert leg is not None
            _bar(axes, place + offset, who, leg, results)
    axes.set_yticks(range(len(found)), [f"{title}\n{one.value:.2f}x" for title, one in found.items()])
    axes.invert_yaxis()
    axes.set_xlabel(f"tokens a second, median and range; {results.about['gpu']}, {results.about['date']}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(0, 1.5 * axes.dataLim.x1)  # room for the words beside the bars
    figure.savefig(picture, metadata={"Date": None})


def _bar(axes: plt.Axes, place: float, who: str, leg: Leg, results: Results) -> None:
    figures = results.figures(leg)
    middle, rates = rate(figures), [one["tokens_per_second"] for one in figures]
    spread = [[middle - min(rates)], [max(rates) - middle]]
    axes.barh(place, middle, WIDTH, xerr=spread, color=COLOURS[who], error_kw={"elinewidth": 1})
    words = f"  {middle:,.0f} {leg.program}, {leg.rows} x {leg.row:,}, recompute {leg.recompute}"
    axes.text(max(rates), place, words, va="center", fontsize=8).set_in_layout(False)


if __name__ == "__main__":
    main()
