"""What the launcher asks of the machine or the container: processors, GPUs, memory limit, address."""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path
from typing import Final

from opensloth.human import human_bytes

CGROUP: Final = Path("/sys/fs/cgroup")
_NO_LIMIT_BYTES: Final = 1 << 60
"""cgroup v1 says a number near 2**63 for "none"."""


def cores(cgroup: Path = CGROUP) -> int:
    """Processors that this process may use: those of its affinity, at most the container's quota."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota(cgroup)
    return mine if quota is None else max(1, min(mine, int(quota)))


def _cpu_quota(cgroup: Path) -> float | None:
    """The container's limit in processors, by cgroup v2 or v1; None: there is none."""
    quota, period = [*_words(cgroup / "cpu.max"), "", ""][:2]
    if not quota:
        quota = "".join(_words(cgroup / "cpu" / "cpu.cfs_quota_us"))
        period = "".join(_words(cgroup / "cpu" / "cpu.cfs_period_us"))
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def oom_kills(cgroup: Path = CGROUP) -> int:
    """How many processes of this container the kernel has killed for memory, by cgroup v2 or v1."""
    words = _words(cgroup / "memory.events") or _words(cgroup / "memory" / "memory.oom_control")
    counts = dict(zip(words[::2], words[1::2], strict=False))
    return int(counts.get("oom_kill", 0))


def memory_limit(cgroup: Path = CGROUP) -> str:
    """The container's memory limit for people."""
    limit = _memory_limit(cgroup)
    return "unknown size" if limit is None else human_bytes(limit)


def usable_memory(cgroup: Path = CGROUP, meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes that the machine has left, and the container within its limit; None: neither is known."""
    left, limit = _number_after("MemAvailable:", meminfo), _memory_limit(cgroup)
    known = [] if left is None else [left * 1024]
    return min(known if limit is None else [*known, max(0, limit - _memory_in_use(cgroup))], default=None)


def _memory_in_use(cgroup: Path) -> int:
    """Bytes of the container, but for what it has read from files."""
    v1 = cgroup / "memory"
    used = "".join(_words(cgroup / "memory.current") or _words(v1 / "memory.usage_in_bytes"))
    files = _number_after("file", cgroup / "memory.stat") or _number_after("total_cache", v1 / "memory.stat")
    return int(used or 0) - (files or 0)


def _number_after(name: str, file: Path) -> int | None:
    words = _words(file)
    return int(words[words.index(name) + 1]) if name in words else None


def _memory_limit(cgroup: Path) -> int | None:
    limit = "".join(_words(cgroup / "memory.max") or _words(cgroup / "memory" / "memory.limit_in_bytes"))
    return int(limit) if limit.isdigit() and int(limit) < _NO_LIMIT_BYTES else None


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []


def visible_devices() -> list[str]:
    """What CUDA_VISIBLE_DEVICES lists, or else the numbers of all NVIDIA GPUs; a variable set to nothing hides all."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [device for device in given.split(",") if device]
    return [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def own_address(known: str) -> str:
    """The IP address that other pods reach this one at.

    known: what others were told: an address is taken as it is; the name of an earlier pod may still be answered
    with that pod's address, so a name is not asked for.
    """
    if _is_address(known):
        return known
    for family, _, _, _, address in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM):
        found = str(address[0])
        if family in (socket.AF_INET, socket.AF_INET6) and not ipaddress.ip_address(found).is_loopback:
            return found
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: it only asks which address packets would leave from
        return str(probe.getsockname()[0])


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
