"""How much memory and disk a build needs, and whether the machine has it, before anything is started."""

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
MODELOPT_COPIES = 4  # its private copy, what it makes on the way, and its result
ENGINE_SHARE = 3.5  # of memory, over the bytes of a graph, while a builder compiles it: 3.7 to 4.7 measured
MARGIN = 64 << 20  # bytes of graph files, reports and notes


@dataclass(frozen=True)
class Estimate:
    """Bytes: of memory at the peak, of disk while it runs and of that what stays."""

    memory: int
    disk: int
    result: int

    @property
    def by_name(self) -> dict[str, int]:
        """For people."""
        return {"memory": self.memory, "disk": self.disk, "of which stays": self.result}


def estimate(
    source_bytes: int, quantised_bytes: int, rewritten_bytes: int, ptq: str, weights: str, rounding: str
) -> Estimate:
    """What one FP8 build needs.

    `quantised_bytes` of the source are weights that become E4M3 (half of them stays); `rewritten_bytes` are weights
    that a pass turns and that therefore cannot stay in the source's own file. Codes that GPTQ chooses lie in the
    working folder until the result is written.
    """
    result = source_bytes - (quantised_bytes // 2 if weights == "fp8" else 0) + MARGIN
    copies = MODELOPT_COPIES * source_bytes if ptq == "modelopt" else 0
    copies += quantised_bytes // 2 if rounding == "gptq" else 0
    share = MODELOPT_SHARE if ptq == "modelopt" else DIRECT_SHARE
    return Estimate(int(share * source_bytes) + (1 << 30), result + rewritten_bytes + copies, result)


def choose_ptq(source_bytes: int) -> tuple[str, str]:
    """ModelOpt where its memory is there, else our own inserter; and why, in one line."""
    needed, free = int(MODELOPT_SHARE * source_bytes) + (1 << 30), available_memory()
    if free is not None and free >= needed:
        return "modelopt", f"ModelOpt needs about {format_bytes(needed)} of memory, {format_bytes(free)} are free"
    found = "how much is free is not known" if free is None else f"{format_bytes(free)} are free"
    return "direct", f"ModelOpt would need about {format_bytes(needed)} of memory, {found}"


def require_build(source_bytes: int, folder: Path) -> None:
    """Raise ToolError when the machine cannot compile a graph of that size into an engine in `folder`."""
    needed, free = int(ENGINE_SHARE * source_bytes), available_memory()
    if free is not None and free < needed:
        raise ToolError(
            f"compiling takes about {format_bytes(needed)} of memory, {format_bytes(free)} are free",
            "close other programs, or build on a larger machine: TensorRT-RTX needs no GPU for it",
        )
    require_disk(folder, source_bytes + MARGIN, "--models-dir")


def require_disk(folder: Path, needed: int, flag: str = "--work-dir") -> None:
    """Raise ToolError when the disk of `folder` (or of what will hold it) has less than `needed` bytes free."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ToolError(
            f"{existing} has {format_bytes(free)} free, the build needs {format_bytes(needed)}",
            f"free some space, or name another disk with {flag}",
        )
