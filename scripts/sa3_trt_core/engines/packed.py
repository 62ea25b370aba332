"""Base class of the packed PyTorch engines: file check, device, compiled-kernel folder, out-of-memory errors."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sa3_trt_core import gpu
from sa3_trt_core.artifacts import manifest
from sa3_trt_core.engines.base import DeviceEngine
from sa3_trt_core.errors import ToolError
from sa3_trt_core.shapes import CONTRACTS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FP8_CAPABILITY = (8, 9)
KERNELS_FOLDER = "kernels"  # kernels compiled by Triton, beside the engine folders in models/<arch>/
CACHE_VARIABLE = "TRITON_CACHE_DIR"
FEWER = "free GPU memory, or ask for fewer `seconds` or a smaller `batch`"


class PackedEngine(DeviceEngine):
    """Engine of one packed network with the contract `kind`. Not thread-safe."""

    kind: str
    keeps_device = True  # tensors on the GPU stay there

    def __init__(self, path: Path, rebuild: str) -> None:
        """Check that `path` is a packed file of this project; `rebuild` is the build command named in errors.

        Raises ToolError if the file is missing or incomplete, or if the GPU does not support its FP8 weights.
        """
        import torch

        if not path.is_file():
            raise ToolError(f"no engine {path}", f"build it: {rebuild}")
        reason = manifest.verify_manifest(path)
        if reason is not None:
            raise ToolError(f"{path} is not a finished engine of this project: {reason}", f"build it again: {rebuild}")
        contract = CONTRACTS[self.kind]
        self.input_names = tuple(spec.name for spec in contract.inputs)
        self.output_names = tuple(spec.name for spec in contract.outputs)
        self.max_batch: int | None = None
        self._path = path
        os.environ.setdefault(CACHE_VARIABLE, str(kernels_folder(path)))
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        lost = self.device == "cpu" and gpu.has_nvidia_gpu()
        self.cpu_reason = f"PyTorch {torch.__version__} here cannot use the GPU" if lost else ""
        self._place = torch.device(self.device)
        if self.device == "cuda":
            prepare_compiler()

    def require_inputs(self, inputs: Mapping[str, Tensor]) -> None:
        """Raise ToolError unless the input names are exactly those of the contract."""
        if set(inputs) != set(self.input_names):
            raise ToolError(
                f"{self._path} takes {', '.join(self.input_names)}, not {', '.join(inputs)}",
                f"give {', '.join(self.input_names)}",
            )

    def guarded(self, work: Callable[[], Tensor], asked: str) -> Tensor:
        """Return `work()`, run in inference mode. Raises ToolError, which names `asked`, if GPU memory is exhausted."""
        import torch

        try:
            with torch.inference_mode():
                return work()
        except torch.OutOfMemoryError:
            raise ToolError(f"no GPU memory for {asked} in {self._path}", FEWER) from None


@functools.cache
def prepare_compiler() -> None:
    """Start a thread that imports and hashes Triton, for which the first kernel launch waits.

    Triton hashes its own files (0.4 s on an H100's host) for the key of every compiled kernel, cached ones included.
    """

    def hash_once() -> None:
        with contextlib.suppress(ImportError, AttributeError):  # moved in another version: the first launch hashes
            importlib.import_module("triton.runtime.cache").triton_key()

    threading.Thread(target=hash_once, name="sa3-triton", daemon=True).start()


def tiles_path(path: Path) -> Path:
    """Return the path of the tile file measured for a packed network; the file may be absent."""
    return path.with_suffix(".tiles.json")


def kernels_folder(path: Path) -> Path:
    """Return the folder of the kernels compiled by Triton, shared by all engines of a GPU architecture."""
    return path.parent.parent / KERNELS_FOLDER


def require_kernels(path: Path, fp8: bool, device: torch.device, without_fp8: str) -> None:
    """Raise ToolError for FP8 on a GPU without FP8, or without Triton; the hint for FP8 recommends `without_fp8`."""
    import torch

    if fp8 and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise ToolError(f"{path} needs FP8 tensor cores and this {name} has none", f"choose {without_fp8}")
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise ToolError(f"the kernels need Triton ({error})", "pip install triton, or take another `backend`") from None
