"""Runs this node's ranks, under torchrun when they are several, and ends them when they must not go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from opensloth import contract
from opensloth.contract import Cause
from opensloth.launch import machine
from opensloth.launch.ending import Ending, NodeFacts, ending_of_node
from opensloth.launch.part import Part
from opensloth.launch.settings import Settings
from opensloth.launch.stacks import await_stacks, hung_ending, save_stacks
from opensloth.launch.watchdog import Watchdog
from opensloth.run_config import RunConfig

FAILED_ELSEWHERE_SECONDS = 10.0
"""Ranks that wait in a collective for those of a node that has failed get this long to notice by themselves."""
_RANK = ("-m", "opensloth.start", "opensloth.train")


def ranks_of_node(settings: Settings, config: RunConfig) -> int:
    """How many ranks run here."""
    if settings.ranks_per_node is not None:
        return settings.ranks_per_node
    return max(1, len(machine.visible_devices())) if settings.in_pod else len(config.opensloth.devices)


def missing_devices(settings: Settings, config: RunConfig) -> Ending | None:
    """How the attempt ends when GPUs are asked for that are not there; machines without any train on the CPU."""
    visible, wanted = machine.visible_devices(), config.opensloth.devices
    if not visible or config.training.use_cpu:
        return None
    ranks = ranks_of_node(settings, config)
    if settings.in_pod:
        said = f"{ranks} processes for {len(visible)} GPUs in the pod of node {settings.node}"
        return Ending(Cause.CONFIG, said, "see job.gpus_per_node") if ranks > len(visible) else None
    if max(wanted) < len(visible):
        return None
    have = ", ".join(map(str, range(len(visible))))
    return Ending(Cause.CONFIG, f"opensloth.devices: asks for {wanted}; this machine has {have}")


def run_ranks(part: Part, config: RunConfig, master: str, check_time: Callable[[], None]) -> Ending:
    """From the start of the ranks to how it ended on this node.

    master: the address that the ranks of several nodes meet at. check_time: called again and again meanwhile.
    """
    count = ranks_of_node(part.settings, config)
    first = part.settings.node * count
    logs = [(rank, part.attempt.folder / contract.RANK_LOG.format(rank=rank)) for rank in range(first, first + count)]
    if part.relay:
        part.relay.follow(logs)
    with tempfile.TemporaryDirectory(prefix="oslo-pulse-", ignore_cleanup_errors=True) as pulses:
        with part.torchrun_log.open("wb") as log:
            child = subprocess.Popen(
                _command(part.settings, count, master),
                stdout=log,
                stderr=log,
                env=_environment(part, config, count) | {contract.PULSE_DIR_ENV: pulses},
                start_new_session=True,
            )
        part.begin_training()
        watchdog = Watchdog(Path(pulses), range(first, first + count), part.settings.hung_seconds)
        try:
            cut = _oversee(child, part, watchdog, check_time)
        except BaseException:  # the volume failed: ranks that hang would never notice that their launcher is gone
            _kill(child, part.settings)
            raise
        part.end_training()
        kill_strays(part.settings)  # torchrun ends its ranks, unless it was killed itself
    facts = NodeFacts(
        code=child.returncode,
        outcomes=part.attempt.outcomes(range(first, first + count)),
        torchrun_says=part.torchrun_log.read_text(errors="replace"),
        asked=part.attempt.stop_cause(),
        cut=cut,
        memory_limit=part.memory_limit_hit(),
        torchrun_log=str(part.torchrun_log),
        nodes=part.settings.nodes,
        alone=_alone(part.settings, count),
    )
    return ending_of_node(facts)


def _command(settings: Settings, count: int, master: str) -> list[str]:
    """In a pod the operator's PET_* variables say all the rest; the master's name may be answered from memory.

    A rank that is alone needs no torchrun, whose start takes as long as importing torch once more.
    """
    if _alone(settings, count):
        return [sys.executable, *_RANK]
    if settings.torchrun_from_environment:
        where = ["--master-addr", f"[{master}]" if ":" in master else master]
    else:
        where = ["--standalone", "--local-addr", "127.0.0.1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    return [*torchrun, *where, "--nproc-per-node", str(count), *_RANK]


def _alone(settings: Settings, count: int) -> bool:
    return count == 1 and settings.nodes == 1


def _environment(part: Part, config: RunConfig, count: int) -> dict[str, str]:
    settings = part.settings
    env = dict(os.environ)
    if _alone(settings, count):  # by these, which the operator sets, libraries would look for other processes
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            env.pop(name, None)
    env[contract.RUN_DIR_ENV] = str(part.attempt.run)
    env[contract.ATTEMPT_ENV] = str(part.attempt.number)
    env[contract.LAUNCHER_ENV] = str(os.getpid())
    env.setdefault("OMP_NUM_THREADS", str(max(1, machine.cores() // count)))
    if settings.nodes == 1:
        env.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    visible = machine.visible_devices()
    if visible and not settings.in_pod:  # a pod shows its ranks all it has; they choose by LOCAL_RANK
        env["CUDA_VISIBLE_DEVICES"] = ",".join(visible[device] for device in config.opensloth.devices)
    return env


def _oversee(
    child: subprocess.Popen[bytes], part: Part, watchdog: Watchdog, check_time: Callable[[], None]
) -> Ending | None:
    """Until the ranks have left; says why its ranks were killed, unless it was for a request they did not heed."""
    asked, failed = _Since(), _Since()
    while child.poll() is None:
        check_time()
        elsewhere = part.failed_elsewhere()
        cut = part.interruption()
        if cut is None and failed.seconds(elsewhere is not None) > FAILED_ELSEWHERE_SECONDS:
            cut = elsewhere
        asked_for = asked.seconds(part.attempt.stop_cause() is not None)
        if cut is None and not asked_for:  # who was asked to leave has the grace period for it
            cut = _hung(part, watchdog)
        if cut is not None:
            _kill(child, part.settings)
            return cut
        if asked_for > part.settings.grace_seconds:
            _kill(child, part.settings)
        time.sleep(part.settings.poll_seconds)
    return None


def _hung(part: Part, watchdog: Watchdog) -> Ending | None:
    """The end when ranks here or on another node make no progress; their stacks have been saved by then."""
    stall = watchdog.look()
    if stall is not None:
        part.attempt.declare_hung(part.settings.node, stall.rank, stall.seconds, stall.doing)
    if contract.HUNG_FILE not in part.attempt.files():
        return None
    save_stacks(part.attempt, watchdog.ranks, watchdog.folder)
    await_stacks(part.attempt, len(watchdog.ranks) * part.settings.nodes)
    return hung_ending(part.attempt)


class _Since:
    """For how long something has been so."""

    def __init__(self) -> None:
        self._begin: float | None = None

    def seconds(self, is_so: bool) -> float:
        if not is_so:
            return 0.0
        if self._begin is None:
            self._begin = time.monotonic()
        return time.monotonic() - self._begin


def _kill(child: subprocess.Popen[bytes], settings: Settings) -> None:
    os.killpg(child.pid, signal.SIGKILL)
    kill_strays(settings)
    child.wait()


def kill_strays(settings: Settings) -> None:
    """Kill every rank of this run and node: torchrun starts each in a session of its own, but all know the run."""
    mine = {f"{contract.RUN_DIR_ENV}={settings.run}".encode()}
    if settings.torchrun_from_environment:  # two nodes' launchers may share a machine
        mine.add(f"{contract.NODE_ENV}={settings.node}".encode())
    for process in Path("/proc").glob("[0-9]*"):
        try:
            is_rank = b"opensloth.train" in (process / "cmdline").read_bytes()
            if is_rank and mine <= set((process / "environ").read_bytes().split(b"\0")):
                os.kill(int(process.name), signal.SIGKILL)
        except (OSError, ProcessLookupError):
            continue  # it left, or is another user's
