"""An API server that restarts ends no command that watches a run."""

from __future__ import annotations

import pytest

from runner.backend import RunStatus, State
from runner.commands import watching
from runner.errors import UnreachableError
from runner.patience import patiently


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.patience._PAUSE_SECONDS", 0.001)


class Restarting:
    """A backend that answers again after a few requests."""

    def __init__(self, misses: int) -> None:
        self.misses = misses

    def get(self, run: str) -> RunStatus:
        if self.misses:
            self.misses -= 1
            raise UnreachableError("get pytorchjobs: the cluster answered 503: not now")
        return RunStatus(run, f"kubernetes://oslo/{run}", run, State.RUNNING)


def test_a_watched_run_outlives_an_outage(capsys: pytest.CaptureFixture[str]) -> None:
    status = watching.still_there(Restarting(misses=3), "x", "kubernetes://oslo/x")  # type: ignore[arg-type]
    assert status.state is State.RUNNING
    assert capsys.readouterr().err == "get pytorchjobs: the cluster answered 503: not now; trying again\n"


def test_patience_ends() -> None:
    with pytest.raises(UnreachableError):
        patiently(lambda: Restarting(misses=1_000_000).get("x"), 0.05, lambda text: None)
