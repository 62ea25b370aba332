"""Query this machine's free memory and return freed memory to the system."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path


def release_to_os() -> None:
    """Return freed memory to the system.

    glibc keeps freed blocks that lie between used ones: 2 GB at full size after the forwards of a stage, in addition to
    the weights that the next session maps. Graphs contain reference cycles, which only the garbage collector frees.
    Without malloc_trim (other C libraries) only the collector runs.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def available_memory() -> int | None:
    """Return the bytes that this process may still allocate here (machine and control group); None if unknown."""
    limits = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        group = Path("/sys/fs/cgroup")
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # not Linux, no control group, or a control group without a limit ("max")
        pass
    return max(min(limits), 0) if limits else None
