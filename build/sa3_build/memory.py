"""This machine's free memory, and handing freed memory back to the system."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path


def return_memory() -> None:
    """Hand freed memory back to the system.

    glibc keeps freed blocks that lie between others: 2 GB at full size after the forwards of a stage, beside which the
    next session maps its weights. Graphs are cycles, which only the collector frees. A C library without malloc_trim
    keeps what it likes.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def available_memory() -> int | None:
    """Bytes that this process may still take: the machine's, or less where its control group has a limit."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        group = Path("/sys/fs/cgroup")
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no Linux, no control group, or one without a limit ("max")
        pass
    return max(min(found), 0) if found else None
