"""What the environment tells a launcher: where it is, how many take part, how long things may last."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from opensloth import contract
from opensloth.beat import STALE_SECONDS
from opensloth.launch.watchdog import HUNG_SECONDS

GRACE_SECONDS = 120.0
"""How long ranks may take to agree, save and leave once they were asked to."""
START_TIMEOUT_SECONDS = 1800.0
POLL_SECONDS = 0.1
POD_POLL_SECONDS = 0.5
"""Each look lists folders of a volume that many may share."""


@dataclass(frozen=True)
class Settings:
    """One launcher's part in a run. Outside of a pod: the only one, without budget or deadline.

    config: the resolved config that this launcher reads. torchrun_from_environment: the operator's PET_* drive it.
    ranks_per_node: None: `opensloth.devices` says. max_restarts, deadline_seconds: None: no limit.
    """

    run: Path
    config: Path
    in_pod: bool = False
    torchrun_from_environment: bool = False
    node: int = 0
    nodes: int = 1
    ranks_per_node: int | None = None
    master_address: str = ""
    grace_seconds: float = GRACE_SECONDS
    start_timeout_seconds: float = START_TIMEOUT_SECONDS
    stale_seconds: float = STALE_SECONDS
    hung_seconds: float = HUNG_SECONDS
    max_restarts: int | None = None
    deadline_seconds: float | None = None
    termination_log: Path | None = None

    @property
    def is_main(self) -> bool:
        return self.node == 0

    @property
    def poll_seconds(self) -> float:
        """Between two looks at what the others have written."""
        return POD_POLL_SECONDS if self.in_pod else POLL_SECONDS


def read(run: Path, env: Mapping[str, str] = os.environ) -> Settings:
    config = env.get(contract.CONFIG_PATH_ENV)
    deadline, restarts = env.get(contract.DEADLINE_ENV), env.get(contract.MAX_RESTARTS_ENV)
    per_node = env.get(contract.RANKS_PER_NODE_ENV, "")
    return Settings(
        run=run,
        config=Path(config) if config else run / contract.CONFIG_FILE,
        in_pod=config is not None,
        torchrun_from_environment=contract.NODES_ENV in env,
        node=int(env.get(contract.NODE_ENV, 0)),
        nodes=int(env.get(contract.NODES_ENV, "1")),
        ranks_per_node=int(per_node) if per_node.isdigit() else None,
        master_address=env.get(contract.MASTER_ADDRESS_ENV, ""),
        grace_seconds=float(env.get(contract.GRACE_ENV, GRACE_SECONDS)),
        start_timeout_seconds=float(env.get(contract.START_TIMEOUT_ENV, START_TIMEOUT_SECONDS)),
        stale_seconds=float(env.get(contract.STALE_ENV, STALE_SECONDS)),
        hung_seconds=float(env.get(contract.HUNG_ENV, HUNG_SECONDS)),
        max_restarts=int(restarts) if restarts else None,
        deadline_seconds=float(deadline) if deadline else None,
        termination_log=Path(env.get(contract.TERMINATION_LOG_ENV, contract.TERMINATION_LOG)) if config else None,
    )
