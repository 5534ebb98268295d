"""Faults that no signal can cause, put into a run's processes from outside: this folder on PYTHONPATH, and in
OSLO_TEST_FAULTS a JSON object with any of

    save_seconds  a checkpoint takes so much longer, before it is complete
    hang          {"how", "rank", "step"}: that rank of the first attempt makes no progress any more
    clock         a file with the seconds by which the wall clock is wrong, read at every look at it

Python imports this module at its start. It works in pods too: mount the folder and set the two variables.
"""

import ctypes
import json
import os
import time

faults = json.loads(os.environ.get("OSLO_TEST_FAULTS", "{}"))


def slow_saves(seconds):
    from opensloth import files

    sync = files.sync_tree

    def sync_tree(path):
        time.sleep(seconds)
        sync(path)

    files.sync_tree = sync_tree


def hang(how, rank, step):
    from opensloth.orders import Orders

    def stand_still():
        if how == "an endless loop":
            while True:
                pass
        if how == "a lock":
            import threading

            lock = threading.Lock()
            lock.acquire()
            lock.acquire()
        if how == "a pipe that nobody writes to":
            os.mkfifo(os.environ["OSLO_PULSE_DIR"] + "/fifo")
            open(os.environ["OSLO_PULSE_DIR"] + "/fifo")  # noqa: SIM115
        if how == "native code that holds the interpreter":
            while True:  # a signal ends the call
                ctypes.PyDLL(None).pause()

    ask, asked = Orders.cause, []

    def cause(self):
        asked.append(self)
        if len(asked) == step:
            stand_still()
        return ask(self)

    if (os.environ.get("RANK"), os.environ.get("OSLO_ATTEMPT")) == (str(rank), "1") and "LOCAL_RANK" in os.environ:
        Orders.cause = cause


def wrong_clock(file):
    right = time.time

    def wrong():
        try:
            with open(file) as stream:
                return right() + float(stream.read() or 0)
        except FileNotFoundError:
            return right()

    time.time = wrong


if "save_seconds" in faults:
    slow_saves(faults["save_seconds"])
if "hang" in faults:
    hang(**faults["hang"])
if "clock" in faults:
    wrong_clock(faults["clock"])
