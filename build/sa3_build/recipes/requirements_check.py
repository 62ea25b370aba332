"""Memory and disk requirements of a build, checked before it starts."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from sa3_build.memory import available_memory
from sa3_trt_core.console import format_bytes
from sa3_trt_core.errors import ToolError

# Peak memory over the bytes of the FP16-mixed graph, measured at full size (build/FACTS.md, ModelOpt; build/NOTES.md).
MODELOPT_SHARE = 7.5
DIRECT_SHARE = 1.8
MODELOPT_COPIES = 4  # of the source on disk: private copy, intermediate files and result
ENGINE_SHARE = 3.5  # memory of a TensorRT build over the bytes of the graph; 3.7 to 4.7 measured
MARGIN = 64 << 20  # bytes of graph files, reports and notes


@dataclass(frozen=True)
class Estimate:
    """Requirements in bytes: peak memory, disk during the build, and the size of the result."""

    memory: int
    disk: int
    result: int

    @property
    def as_dict(self) -> dict[str, int]:
        """Sizes by name, in bytes."""
        return {"memory": self.memory, "disk": self.disk, "result": self.result}


def estimate(
    source_bytes: int, quantised_bytes: int, rewritten_bytes: int, ptq: str, weights: str, rounding: str
) -> Estimate:
    """Return the requirements of one FP8 build.

    `quantised_bytes` of the source are weights stored as E4M3 (half of them remains); `rewritten_bytes` are weights
    that a pass changes and that cannot stay in the source's file. GPTQ's codes are in the working folder until the
    result is written.
    """
    result = source_bytes - (quantised_bytes // 2 if weights == "fp8" else 0) + MARGIN
    copies = MODELOPT_COPIES * source_bytes if ptq == "modelopt" else 0
    copies += quantised_bytes // 2 if rounding == "gptq" else 0
    share = MODELOPT_SHARE if ptq == "modelopt" else DIRECT_SHARE
    return Estimate(int(share * source_bytes) + (1 << 30), result + rewritten_bytes + copies, result)


def choose_ptq(source_bytes: int) -> tuple[str, str]:
    """Return "modelopt" if its memory is free, else "direct"; and the reason in one line."""
    needed, free = int(MODELOPT_SHARE * source_bytes) + (1 << 30), available_memory()
    if free is not None and free >= needed:
        return "modelopt", f"ModelOpt needs about {format_bytes(needed)} of memory ({format_bytes(free)} free)"
    available = "unknown" if free is None else format_bytes(free)
    return "direct", f"ModelOpt would need about {format_bytes(needed)} of memory (free: {available})"


def require_build(source_bytes: int, folder: Path) -> None:
    """Raise ToolError when the machine cannot compile a graph of that size into an engine in `folder`."""
    needed, free = int(ENGINE_SHARE * source_bytes), available_memory()
    if free is not None and free < needed:
        raise ToolError(
            f"compiling needs about {format_bytes(needed)} of memory ({format_bytes(free)} free)",
            "close other programs, or build on a machine with more memory (TensorRT-RTX needs no GPU to build)",
        )
    require_disk(folder, source_bytes + MARGIN, "--models-dir")


def require_disk(folder: Path, needed: int, flag: str = "--work-dir") -> None:
    """Raise ToolError when the disk of `folder` (or of its nearest existing parent) has less than `needed` bytes."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ToolError(
            f"{existing} has {format_bytes(free)} free; the build needs {format_bytes(needed)}",
            f"free some space, or choose another disk with {flag}",
        )
