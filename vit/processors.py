"""How many processors there are for this process, how its threads wait, and whether a GPU may be; without torch."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


@functools.cache
def available() -> int:
    """Processors this process may use: its affinity, and the container's quota (cgroup v2 and v1), at least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return max(1, min(count, math.ceil(quota)) if quota else count)


def _quota() -> float | None:
    try:
        limit, period = (_CGROUP / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        pass
    try:
        folder = _CGROUP / "cpu"
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        length = int((folder / "cpu.cfs_period_us").read_text())
        return quota / length if quota > 0 and length > 0 else None
    except (OSError, ValueError):
        return None


def free_memory() -> int | None:
    """Bytes of main memory that are free, at most its container's limit; None where that is not known."""
    try:
        with open("/proc/meminfo") as file:
            found = [int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:")]
        free = found[0] if found else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None
    with contextlib.suppress(OSError, ValueError):  # no container, or no limit
        free = min(free, int((_CGROUP / "memory.max").read_text()))
    return free


def wait_passively() -> None:
    """Let OpenMP's threads sleep while they wait for each other, unless the environment says how they are to wait.

    By default they spin, and beside another busy program they spin for the very processor that the awaited thread
    needs.  Read when torch, NumPy or scikit-learn load OpenMP, so call it before; processes started later inherit it.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        # the second is GNU's, tens of microseconds: a sleep costs more than a wait so short
        os.environ.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="1000")


def gpu_possible() -> bool:
    """Whether a driver of a GPU that torch can use shows itself.  False is sure; True is for torch to confirm."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return False
    signs = ("/dev/nvidiactl", "/proc/driver/nvidia/version", "/dev/dxg", "/dev/kfd")
    return any(Path(sign).exists() for sign in signs)
