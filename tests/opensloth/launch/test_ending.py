"""The first cause among many ends."""

from __future__ import annotations

import pytest

from opensloth.contract import Cause
from opensloth.launch.ending import Ending, NodeFacts, ending_of_node, first_cause, killed

ROOT_CAUSE = "Root Cause (first observed failure):\n[0]:\n  rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 7)\n"
VICTIM_FIRST = (
    "Failures:\n[1]:\n  rank      : 3 (local_rank: 1)\n  exitcode  : -9 (pid: 7)\n"
    "Root Cause (first observed failure):\n[0]:\n  rank      : 0 (local_rank: 0)\n  exitcode  : 143 (pid: 6)\n"
)


def ending(cause: str, time: float = 0.0, message: str = "m") -> Ending:
    return Ending(cause, message, "", time)


@pytest.mark.parametrize(
    ("causes", "expected"),
    [
        ([Cause.PEER_LOST, Cause.DATA], Cause.DATA),
        ([Cause.PEER_LOST, Cause.KILLED], Cause.KILLED),
        ([Cause.PEER_LOST, Cause.VOLUME], Cause.VOLUME),
        ([Cause.PEER_LOST, Cause.HUNG], Cause.HUNG),
        ([Cause.HUNG, Cause.DATA], Cause.DATA),
        ([Cause.VOLUME, Cause.DATA], Cause.DATA),
        ([Cause.KILLED, Cause.TERMINATED], Cause.TERMINATED),
        ([Cause.TERMINATED, Cause.NON_FINITE], Cause.NON_FINITE),
        ([Cause.OUT_OF_MEMORY, Cause.ERROR], Cause.OUT_OF_MEMORY),
        ([Cause.SUCCEEDED, Cause.PEER_LOST], Cause.PEER_LOST),
    ],
)
def test_victims_come_last_and_the_earliest_fault_first(causes: list[str], expected: str) -> None:
    found = first_cause(ending(cause, time) for time, cause in enumerate(causes))
    assert found is not None
    assert found.cause == expected
    assert first_cause([ending(Cause.SUCCEEDED)]) is None


def node(code: int = 1, **facts: object) -> Ending:
    return ending_of_node(NodeFacts(code, **{"outcomes": [], "torchrun_says": "", **facts}))  # type: ignore[arg-type]


def test_how_it_ended_on_a_node() -> None:
    lost, cut = ending(Cause.PEER_LOST), ending(Cause.SUPERSEDED)
    assert node(0).cause == Cause.SUCCEEDED
    assert node(outcomes=[lost, ending(Cause.DATA)]).cause == Cause.DATA
    assert node(-9, cut=cut, outcomes=[lost]) == cut
    assert node(-9, asked=Cause.CANCELLED).cause == Cause.CANCELLED
    assert node(torchrun_says=ROOT_CAUSE, outcomes=[lost]).message == "rank 1 was killed (SIGKILL)"
    assert node(torchrun_says=VICTIM_FIRST, outcomes=[lost]).message == "rank 3 was killed (SIGKILL)"
    assert node(-9).message == "torchrun was killed (SIGKILL)"
    assert node(-9, alone=True).message == "rank 0 was killed (SIGKILL)"
    assert node(outcomes=[lost]).cause == Cause.PEER_LOST
    assert node(nodes=2).cause == Cause.PEER_LOST, "torchrun fell over the other nodes' end"
    assert node(nodes=2, torchrun_says="Root Cause").cause == Cause.ERROR
    assert node().cause == Cause.ERROR


def test_a_container_at_its_memory_limit_is_final_and_said() -> None:
    found = node(torchrun_says=ROOT_CAUSE, memory_limit="2.0 GiB")
    assert (found.cause, found.exit_code) == (Cause.OUT_OF_MEMORY, 5)
    assert "container reached its memory limit of 2.0 GiB" in found.message
    assert killed("rank 0", 11, "2.0 GiB").cause == Cause.KILLED, "a crash is not for memory"
