"""What the submitting side and the training side agree on: names, paths, exit codes. Constants only.

The runner writes a run folder and starts `python -m opensloth.launch`; everything either side knows of the
other is in this file and in the resolved config (`opensloth.run_config`).
"""

from enum import IntEnum
from typing import Final

# --- the root and what lies under it -------------------------------------------------------------

ROOT_ENV: Final = "OSLO_ROOT"
"""Environment variable that names the root folder. Unset: `~/.oslo`; in a pod `/shared`."""

RUNS_DIR: Final = "runs"
"""`<root>/runs/<run>/` holds one run; the folder alone tells what happened to it."""

INPUTS_DIR: Final = "inputs"
"""`<root>/inputs/<sha256>` holds a data file that came from a laptop."""

# --- a run folder ---------------------------------------------------------------------------------

CONFIG_FILE: Final = "config.yaml"
"""The resolved config, as `opensloth.run_config.dump` writes it."""

EVENTS_FILE: Final = "events.jsonl"
"""One event a line, appended by rank 0 (and by the launcher before rank 0 exists)."""

CHECKPOINTS_DIR: Final = "checkpoints"
CHECKPOINT_PREFIX: Final = "step-"
"""`checkpoints/step-00000020`: whole under this name, or absent."""

FINAL_DIR: Final = "final"
"""The adapter or the model, the tokenizer and the template."""

TENSORBOARD_DIR: Final = "tensorboard"
REPORT_FILE: Final = "report.json"
"""Written once, when the run has succeeded: final loss, steps, tokens, paths, versions."""

ATTEMPTS_DIR: Final = "attempts"
"""`attempts/<n>/`, n from 1: one start of the launcher each; made with an exclusive mkdir."""

# --- an attempt's folder --------------------------------------------------------------------------

STARTED_FILE: Final = "started.json"
"""{"pid", "pid_started", "boot_id", "host", "time"}: enough to tell whether the launcher still lives.

And {"nodes", "checkpoint_step"}: how many take part, and the newest checkpoint's step (null: none).
"""

ENDED_FILE: Final = "ended.json"
"""{"cause", "exit_code", "message", "hint", "time"}. An attempt without one was killed."""

STOP_FILE: Final = "stop.json"
"""{"cause", "time"}: whoever writes it asks the ranks to agree on a step, save and leave."""

DATA_FILE: Final = "data.json"
"""What `python -m opensloth.data build` answered: where the prepared dataset lies, and its counts."""

LAUNCHER_LOG: Final = "launcher.log"
TORCHRUN_LOG: Final = "torchrun.log"
"""What torchrun prints: when ranks leave, that is a page which says less than `ended.json`."""

RANK_LOG: Final = "rank-{rank}.log"
RANK_STACKS: Final = "rank-{rank}.stacks"
"""Where each thread of a rank stood when the ranks made no progress."""
RANK_OUTCOME: Final = "rank-{rank}.outcome.json"
"""{"cause", "message", "hint", "time"}: why this rank left, written by the rank itself."""

LAUNCHER_RANK: Final = -1
"""Rank of the launcher's lines and events; on node n of several it is LAUNCHER_RANK - n."""

# What the launchers of several nodes say to each other: each file has one writer, and is whole or absent.

JOINED_FILE: Final = "joined-{node}.json"
"""{"host", "token", "pid", "time"}: made exclusively by the launcher that takes this node's place."""

READY_FILE: Final = "ready-{node}.json"
"""The node's dataset is there."""

GO_FILE: Final = "go.json"
"""{"address", "time"}: all nodes are ready; the ranks meet at node 0's address."""

BEAT_FILE: Final = "beat.json"
"""{"beat", "train_seconds"}: node 0 lives while the number changes; how long its ranks have trained."""

LOST_FILE: Final = "lost.json"
"""{"node", "host", "time"}: the pod of a node vanished without a word; its successor asks for another attempt."""

HUNG_FILE: Final = "hung.json"
"""{"node", "rank", "seconds", "doing"}: that rank makes no progress; all save their ranks' stacks and end them."""

NODE_FILE: Final = "node-{node}.json"
"""{"cause", "message", "hint", "time"}: how it ended on this node. `ended.json` is how the attempt ended."""

NODE_EVENTS: Final = "node-{node}.events.jsonl"
NODE_LAUNCHER_LOG: Final = "node-{node}.launcher.log"
NODE_TORCHRUN_LOG: Final = "node-{node}.torchrun.log"
"""The same as the files of node 0 (events.jsonl, launcher.log, torchrun.log), of the other nodes' launchers."""

# --- what the launcher gives to each rank through the environment --------------------------------

RUN_DIR_ENV: Final = "OSLO_RUN_DIR"
ATTEMPT_ENV: Final = "OSLO_ATTEMPT"
PULSE_DIR_ENV: Final = "OSLO_PULSE_DIR"
"""A folder on the node's own disk, where its ranks say that they make progress (`opensloth.pulse`)."""
LAUNCHER_ENV: Final = "OSLO_LAUNCHER_PID"
"""The launcher's process number: ranks that have lost it stop."""

# --- what a pod's template gives to the launcher through the environment --------------------------

CONFIG_PATH_ENV: Final = "OSLO_CONFIG"
"""The resolved config as a file (downward API); the launcher copies it to `<run>/config.yaml`."""
DEADLINE_ENV: Final = "OSLO_DEADLINE_SECONDS"
"""Training time over all attempts. Unset: no end."""
MAX_RESTARTS_ENV: Final = "OSLO_MAX_RESTARTS"
"""Attempts that may be lost in a row without progress before the run is given up. Unset: any number."""
START_TIMEOUT_ENV: Final = "OSLO_START_TIMEOUT_SECONDS"
"""How long the first pod waits for the others to start."""
GRACE_ENV: Final = "OSLO_GRACE_SECONDS"
"""How long ranks may take to agree, save and leave once they were asked to."""
STALE_ENV: Final = "OSLO_STALE_SECONDS"
"""Node 0 counts as gone when its beat has not changed for so long. Unset: 60."""
HUNG_ENV: Final = "OSLO_HUNG_SECONDS"
"""Ranks that make no progress for so long, longer where their steps are long, are ended. Unset: 600."""
TERMINATION_LOG_ENV: Final = "OSLO_TERMINATION_LOG"
TERMINATION_LOG: Final = "/dev/termination-log"
"""Where the launcher leaves its last word (pod_log.format_end) for the kubelet."""

# --- what the operator gives to the launcher; torchrun reads the same names ------------------------

NODES_ENV: Final = "PET_NNODES"
NODE_ENV: Final = "PET_NODE_RANK"
RANKS_PER_NODE_ENV: Final = "PET_NPROC_PER_NODE"
MASTER_ADDRESS_ENV: Final = "PET_MASTER_ADDR"
"""A name that the cluster's DNS may still give the address of an earlier pod for: see GO_FILE."""

# --- events ---------------------------------------------------------------------------------------

EVENT_PREFIX: Final = "oslo.event "
"""A log line of rank 0 that begins so carries a JSON object: an event."""


class ExitCode(IntEnum):
    """Exit codes of the launcher. 1 to 127 are final, 128 and above are retried by the operator."""

    SUCCEEDED = 0
    ERROR = 1
    CONFIG = 2
    DATA = 3
    NON_FINITE = 4
    OUT_OF_MEMORY = 5
    DEADLINE = 6
    BUDGET = 7
    START_TIMEOUT = 8
    INFRASTRUCTURE = 143


class Cause:
    """Why an attempt ended: the words in `ended.json`, in the ranks' outcomes and in `oslo status`."""

    SUCCEEDED: Final = "succeeded"
    ERROR: Final = "error"
    CONFIG: Final = "config"
    DATA: Final = "data"
    NON_FINITE: Final = "non_finite"
    OUT_OF_MEMORY: Final = "out_of_memory"
    DEADLINE: Final = "deadline"
    BUDGET: Final = "budget"
    START_TIMEOUT: Final = "start_timeout"
    """Not all pods of an attempt started in time."""
    CANCELLED: Final = "cancelled"
    TERMINATED: Final = "terminated"
    KILLED: Final = "killed"
    HUNG: Final = "hung"
    """A rank made no progress; its stack and those of all others are saved."""
    VOLUME: Final = "volume"
    """A fault of the volume that may pass: an I/O error, a stale handle, no answer."""
    PEER_LOST: Final = "peer_lost"
    """Another rank or node went away: a consequence, never the first cause."""
    SUPERSEDED: Final = "superseded"
    """A newer attempt has started: this one leaves without writing anything."""


EXIT_CODE_OF_CAUSE: Final = {
    Cause.SUCCEEDED: ExitCode.SUCCEEDED,
    Cause.ERROR: ExitCode.ERROR,
    Cause.CONFIG: ExitCode.CONFIG,
    Cause.DATA: ExitCode.DATA,
    Cause.NON_FINITE: ExitCode.NON_FINITE,
    Cause.OUT_OF_MEMORY: ExitCode.OUT_OF_MEMORY,
    Cause.DEADLINE: ExitCode.DEADLINE,
    Cause.BUDGET: ExitCode.BUDGET,
    Cause.START_TIMEOUT: ExitCode.START_TIMEOUT,
    Cause.CANCELLED: ExitCode.INFRASTRUCTURE,
    Cause.TERMINATED: ExitCode.INFRASTRUCTURE,
    Cause.KILLED: ExitCode.INFRASTRUCTURE,
    Cause.HUNG: ExitCode.INFRASTRUCTURE,
    Cause.VOLUME: ExitCode.INFRASTRUCTURE,
    Cause.PEER_LOST: ExitCode.INFRASTRUCTURE,
    Cause.SUPERSEDED: ExitCode.INFRASTRUCTURE,
}
