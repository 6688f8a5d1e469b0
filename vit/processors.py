"""Read CPUs, memory and signs of a GPU for this process, and set how threads wait; without torch."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


@functools.cache
def count_cpus() -> int:
    """Count the CPUs for this process, by affinity and the container's quota (cgroup v2 and v1); at least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read_cpu_quota()
    return max(1, min(count, math.ceil(quota)) if quota else count)


def _read_cpu_quota() -> float | None:
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
    """Return the free main memory in bytes, at most the container's limit; None if unknown."""
    try:
        with open("/proc/meminfo") as file:
            available = [int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:")]
        free = available[0] if available else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None
    with contextlib.suppress(OSError, ValueError):  # no container, or no limit
        free = min(free, int((_CGROUP / "memory.max").read_text()))
    return free


def set_passive_waiting() -> None:
    """Let OpenMP threads sleep while they wait for each other, unless the environment sets how they wait.

    By default they spin, and can occupy the CPU that the awaited thread needs.  Call it before torch, NumPy or
    scikit-learn load OpenMP; child processes inherit the setting.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        # the second is GNU's: spin for tens of microseconds first, as a sleep costs more than that
        os.environ.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="1000")


def may_have_gpu() -> bool:
    """Return whether there are signs of a GPU driver.  False is certain; torch must confirm True."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return False
    signs = ("/dev/nvidiactl", "/proc/driver/nvidia/version", "/dev/dxg", "/dev/kfd")
    return any(Path(sign).exists() for sign in signs)
