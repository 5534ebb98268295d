"""How many times the best peer's tokens a second oslo makes, for each case of a results file of train.py.

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
from training.results import Outcome, Results, outcome, peak, rate

COLOUR, MARKS = "#1b6ca8", {"must": "#333333", "aim": "#d1811f"}
"""The bars are those of training/cases.py."""
HEIGHT, MARK_HEIGHT = 0.55, 0.75


def main() -> None:
    mpl.rcParams["svg.fonttype"] = "none"  # words, not their outlines
    results, picture = Results.read(Path(sys.argv[1])), Path(sys.argv[2])
    cases = [case for case in CASES.values() if not (case.seconds or case.beside)]
    found = [(case, one) for case in cases if (one := outcome(case, results)).value is not None]
    if not found:
        raise SystemExit(f"{sys.argv[1]}: no case has figures of oslo and of a peer")
    figure, axes = plt.subplots(figsize=(11, 0.9 + 0.6 * len(found)), layout="constrained")
    for name, colour in MARKS.items():
        bars = {place: bar for place, (case, _) in enumerate(found) if (bar := getattr(case, name)) is not None}
        ends = ([place + side * MARK_HEIGHT / 2 for place in bars] for side in (-1, 1))
        axes.vlines(list(bars.values()), *ends, color=colour, label=name, zorder=3)
    for place, (case, one) in enumerate(found):
        axes.barh(place, one.value, HEIGHT, color=COLOUR)
        right = max(one.value, case.must or 0, case.aim or 0)
        words = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
        axes.annotate(_words(one), (right, place), **words).set_in_layout(False)
    axes.set_yticks(range(len(found)), [f"{textwrap.fill(case.title, 36)}  {one.value:.2f}" for case, one in found])
    axes.invert_yaxis()
    axes.set_xlabel(f"tokens a second, times the best peer's; {results.about['gpu']}, {results.about['date']}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(0, 1.75 * axes.dataLim.x1)  # room for the words beside the bars
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(picture, metadata={"Date": None})


def _words(one: Outcome) -> str:
    assert one.own is not None
    assert one.peer is not None
    own, peer = (one.results.figures(leg) for leg in (one.own, one.peer))
    beside = f"{one.peer.program}'s {rate(peer):,.0f} at {peak(peer):.1f}"
    return f"{rate(own):,.0f} tokens/s at {peak(own):.1f} GiB; {beside}"


if __name__ == "__main__":
    main()
