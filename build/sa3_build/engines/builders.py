"""Engine builders, one per backend of sa3_trt_core.engines.BACKENDS."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sa3_trt_core.targets import PREBUILT_TENSORRT, Target

if TYPE_CHECKING:
    from sa3_build.engines.tensorrt import Built


class Build(Protocol):
    """Build `out` from `onnx`, or keep it if it is current; the fastest of `best_of` builds is kept."""

    def __call__(
        self, onnx: Path, target: Target, arch: str, out: Path, force: bool = False, best_of: int = 1,
        refits: bool = False,
    ) -> Built: ...  # fmt: skip


@dataclass(frozen=True)
class Builder:
    """Build function of a backend.

    `compiles`: True for TensorRT backends, which support --best-of, --engine-report and --prebuilt. `prebuilt`: the
    version whose engines are on the hub, or None.
    """

    build: Build
    compiles: bool = False
    prebuilt: str | None = None


def compiled(
    backend: str, onnx: Path, target: Target, arch: str, out: Path, force: bool = False, best_of: int = 1,
    refits: bool = False,
) -> Built:  # fmt: skip
    """Compile an engine with one of TensorRT's packages. Raises ToolError."""
    from sa3_build.engines.tensorrt import compile_engine

    return compile_engine(onnx, target, backend, arch, out, force, best_of, refits)


def packed(
    onnx: Path, target: Target, arch: str, out: Path, force: bool = False, best_of: int = 1, refits: bool = False
) -> Built:
    """Pack an engine for PyTorch; `best_of` has no effect. Raises ToolError and GateError."""
    from sa3_build.engines.torch_engine import pack_engine

    return pack_engine(onnx, target, arch, out, force)


BUILDERS: Mapping[str, Builder] = {
    "tensorrt": Builder(functools.partial(compiled, "tensorrt"), compiles=True, prebuilt=PREBUILT_TENSORRT),
    "tensorrt_rtx": Builder(functools.partial(compiled, "tensorrt_rtx"), compiles=True),
    "torch": Builder(packed),
}
