"""Faults that no signal can cause, put into a run's processes from outside: this folder on PYTHONPATH, and in
OSLO_TEST_FAULTS a JSON object with any of

    save_seconds      a checkpoint takes so much longer, before it is complete
    hang              {"how", "rank", "step"}: that rank of the first attempt makes no progress any more
    memory            {"step", "limit"}: rank 0 of the first attempt takes ever more; limit: the kernel gives no more
    steps_per_second  at most so many, so that a test can keep up
    clock             a file with the seconds by which the wall clock is wrong, read at every look at it
    leak              true: the ranks' attention sees all documents of a row as one

Python imports this module at its start. It works in pods too: mount the folder and set the two variables.
"""

import ctypes
import json
import os
import sys
import time

IS_RANK = "opensloth.train" in sys.orig_argv and "torch.distributed.run" not in sys.orig_argv
faults = json.loads(os.environ.get("OSLO_TEST_FAULTS", "{}"))


def slow_saves(seconds):
    from opensloth import files

    sync = files.sync_tree

    def sync_tree(path):
        time.sleep(seconds)
        sync(path)

    files.sync_tree = sync_tree


def hang(how, rank, step):
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

    at_step(rank, step, stand_still)


def at_step(rank, step, act):
    """Call `act` in that rank of the first attempt when it comes to its step number `step`."""
    from opensloth.orders import Orders

    ask, asked = Orders.cause, []

    def cause(self):
        asked.append(self)
        if len(asked) == step:
            act()
        return ask(self)

    if IS_RANK and (os.environ.get("RANK", "0"), os.environ.get("OSLO_ATTEMPT")) == (str(rank), "1"):
        Orders.cause = cause


def take_memory(step, limit=False):
    def take():
        import resource

        if limit:
            pages = int(open("/proc/self/statm").read().split()[0])  # noqa: SIM115
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (256 << 20),) * 2)
        taken = []
        while True:
            taken.append(b"1" * (32 << 20))

    at_step(0, step, take)


def slow_steps(steps_per_second):
    from opensloth.orders import Orders

    ask = Orders.cause

    def cause(self):
        time.sleep(1 / steps_per_second)
        return ask(self)

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


def leak():
    from opensloth import attention

    by_documents = attention._one_by_one

    def as_one(query, key, value, offsets, *options):
        return by_documents(query, key, value, offsets[[0, -1]], *options)

    attention._one_by_one = as_one


if "save_seconds" in faults:
    slow_saves(faults["save_seconds"])
if "hang" in faults:
    hang(**faults["hang"])
if "memory" in faults:
    take_memory(**faults["memory"])
if "steps_per_second" in faults:
    slow_steps(faults["steps_per_second"])
if "clock" in faults:
    wrong_clock(faults["clock"])
if "leak" in faults and IS_RANK:
    leak()
