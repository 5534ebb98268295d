"""Faults that come from inside a pod: mounted as sitecustomize.py, and told in POD_FAULTS what to do, as JSON.

    stopped_save_seconds   a checkpoint takes so much longer, once the attempt has been asked to stop
    memory                 {"who": "rank" or "launcher", "step"}: takes memory without end after so many steps
    killed                 {"step"}: rank 0 kills itself, in attempt N after `step` + N steps of its own
    hung_seconds           the watchdog's limit, which job.env does not let through

Python imports it at its start; the product knows nothing of it.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

FAULTS = json.loads(os.environ.get("POD_FAULTS", "{}"))
IS_LAUNCHER = "opensloth.launch" in sys.orig_argv
IS_RANK = "opensloth.train" in sys.orig_argv and "torch.distributed.run" not in sys.orig_argv
HUNGRY = Path("/tmp/hungry")
"""Of the pod alone: a new one has another /tmp."""


def slow_when_stopped(seconds):
    from opensloth import files

    sync, attempt = files.sync_tree, Path(os.environ["OSLO_RUN_DIR"], "attempts", os.environ["OSLO_ATTEMPT"])

    def sync_tree(path):
        if (attempt / "stop.json").exists():
            time.sleep(seconds)
        sync(path)

    files.sync_tree = sync_tree


def after_steps(count, act):
    """Ranks ask once a step whether they have been asked to leave."""
    from opensloth.orders import Orders

    ask, asked = Orders.cause, []

    def cause(self):
        asked.append(1)
        if len(asked) == count:
            act()
        return ask(self)

    Orders.cause = cause


def eat():
    held = []
    while True:
        held.append(b"x" * (32 << 20))


def hunger():
    HUNGRY.touch()
    time.sleep(600)


def eat_when_told():
    while not HUNGRY.exists():
        time.sleep(0.05)
    eat()


def main():
    if IS_LAUNCHER and "hung_seconds" in FAULTS:
        os.environ["OSLO_HUNG_SECONDS"] = str(FAULTS["hung_seconds"])
    memory, killed = FAULTS.get("memory"), FAULTS.get("killed")
    if IS_LAUNCHER and memory and memory["who"] == "launcher":
        threading.Thread(target=eat_when_told, daemon=True).start()
    if not IS_RANK:
        return
    if "stopped_save_seconds" in FAULTS:
        slow_when_stopped(FAULTS["stopped_save_seconds"])
    if os.environ.get("RANK", "0") == "0" and memory:
        after_steps(memory["step"], eat if memory["who"] == "rank" else hunger)
    if os.environ.get("RANK", "0") == "0" and killed:
        after = killed["step"] + int(os.environ["OSLO_ATTEMPT"])
        after_steps(after, lambda: os.kill(os.getpid(), signal.SIGKILL))


main()
