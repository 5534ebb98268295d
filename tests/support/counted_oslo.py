"""`oslo`, which at its end says on stderr how many requests it has sent to the cluster: python counted_oslo.py ARGS."""

from __future__ import annotations

import collections
import sys
from typing import Any

import urllib3
import websocket

from runner.cli import run

SENT: collections.Counter[str] = collections.Counter()


def counted(name: str, call: Any) -> Any:
    def counting(*arguments: Any, **more: Any) -> Any:
        SENT[name] += 1
        return call(*arguments, **more)

    return counting


urllib3.PoolManager.urlopen = counted("HTTP", urllib3.PoolManager.urlopen)  # type: ignore[method-assign]
websocket.WebSocket.connect = counted("exec", websocket.WebSocket.connect)  # type: ignore[method-assign]

code = run(sys.argv[1:])
sys.stderr.write(f"requests: {SENT['HTTP']} HTTP, {SENT['exec']} exec\n")
sys.exit(code)
