"""TensorRT (10.15 to 11.x) and TensorRT-RTX (1.x) backends: two packages with the same API."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3_trt_core import gpu
from sa3_trt_core.engines import tensorrt_refit
from sa3_trt_core.engines.backend import Backend
from sa3_trt_core.engines.base import DeviceEngine, run_rows
from sa3_trt_core.engines.tensorrt_checks import require_inside, require_ours, require_version
from sa3_trt_core.engines.tensorrt_context import BoundContext, Loaded, deserialize, extents, torch_type
from sa3_trt_core.errors import ToolError
from sa3_trt_core.targets import Target

if TYPE_CHECKING:
    import torch
    from torch import Tensor

REBUILD = "python build/build_from_onnx.py NAME --backend {backend} --arch {arch}"
MAX_BOUND = 8  # contexts kept, one per set of shapes (a ring runs 1 to 8 rows); LRU eviction


class TensorRtEngine(DeviceEngine):
    """One deserialised engine, with a cached context for each of the last sets of shapes. Not thread-safe."""

    def __init__(
        self, path: Path, backend: str, rebuild: str = "", onnx: Path | None = None, capture: bool = False
    ) -> None:
        """Load an engine that this project built for this machine; its manifest is verified first (`require_ours`).

        `rebuild` is the command in messages; `onnx` the graph in use (None: unknown); `capture` allows CUDA graphs for
        repeated shapes, as of a DiT. Raises ToolError.
        """
        arch = gpu.current_arch()
        self._rebuild = rebuild or REBUILD.format(backend=backend, arch=arch or "ARCH")
        module = gpu.tensorrt_module(backend)
        if module is None:
            raise ToolError(f"the Python package {backend} is not installed", "install it, or choose another `backend`")
        if arch is None:
            raise ToolError(f"{backend} needs an NVIDIA GPU; no GPU is visible", "choose `backend=onnxruntime`")
        require_version(backend, str(module.__version__))
        require_ours(path, backend, str(module.__version__), arch, self._rebuild, onnx)
        _require_cuda_torch()
        self._trt: Any = module
        refused, again = f"{backend} refuses {path} on this {arch} GPU", f"build it again: {self._rebuild}"
        self._loaded: Loaded | None = deserialize(module, path.read_bytes(), refused, again)
        engine = self._loaded.engine
        self._path, self._capture = path, capture
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        is_input = {name: engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT for name in names}
        self.input_names = tuple(name for name in names if is_input[name])
        self.output_names = tuple(name for name in names if not is_input[name])
        first = self._limits(self.input_names[0])[1]
        self.max_batch: int | None = first[0] if first else None
        self._bound: OrderedDict[tuple[tuple[int, ...], ...], BoundContext] = OrderedDict()
        self._scratch: Tensor | None = None
        self._stream: torch.cuda.Stream | None = None

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs for named inputs, on the first one's device; an engine of batch 1 runs row by row."""
        if set(inputs) != set(self.input_names):
            raise ToolError(
                f"{self._path} takes {', '.join(self.input_names)}, not {', '.join(inputs)}",
                f"build it again: {self._rebuild}",
            )
        first = next(iter(inputs.values()))
        if first.dim() and first.shape[0] > 1 and self.max_batch == 1:
            return run_rows(self._run_once, inputs)
        return self._run_once(inputs)

    def refit(self, graph: Path) -> None:
        """Replace the weights by those of a merged graph. After a ToolError the engine is unusable."""
        assert self._loaded is not None
        tensorrt_refit.require_refittable(self._path, self._rebuild, graph)
        self._bound.clear()  # contexts and their CUDA graphs
        tensorrt_refit.refit(self._trt, self._loaded.engine, graph, str(self._path))

    def close(self) -> None:
        self._bound.clear()  # contexts first: TensorRT frees an engine only after its contexts
        self._scratch = None
        self._loaded = None

    def _run_once(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        import torch

        fitted = {name: self._fitted(name, inputs[name]) for name in self.input_names}
        try:
            return self._bound_to(fitted).run(fitted, self._capture)
        except torch.cuda.OutOfMemoryError:
            self._bound.clear()
            raise ToolError(
                f"{self._path}: the GPU has no memory left for this length and number of rows",
                "ask for fewer `seconds`, a smaller `batch` or `depth`, or `free_models`",
            ) from None

    def _bound_to(self, inputs: Mapping[str, Tensor]) -> BoundContext:
        """Return the context of these shapes, created on first use."""
        import torch

        assert self._loaded is not None
        key = tuple(tuple(value.shape) for value in inputs.values())
        if key in self._bound:
            self._bound.move_to_end(key)
            return self._bound[key]
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        made = BoundContext(self._trt, self._loaded.engine, inputs, self._stream, str(self._path))
        if self._scratch is None or self._scratch.numel() < made.scratch_bytes:
            # Other contexts and their CUDA graphs refer to the address of the old scratch memory.
            self._bound.clear()
            self._scratch = None
            self._scratch = torch.empty(max(made.scratch_bytes, 1), dtype=torch.uint8, device="cuda")
        made.lend(self._scratch)
        self._bound[key] = made
        if len(self._bound) > MAX_BOUND:
            self._bound.popitem(last=False)
        return made

    def _fitted(self, name: str, value: Tensor) -> Tensor:
        """Return an input with the engine's dtype and rank, checked against its profile."""
        assert self._loaded is not None
        declared = extents(self._loaded.engine.get_tensor_shape(name))
        if value.dim() == 0 and declared:
            value = value.reshape((1,) * len(declared))  # a scalar may be declared as [] or [1]
        require_inside(self._path, name, tuple(value.shape), self._limits(name), self._rebuild)
        return value.to(torch_type(self._trt, self._loaded.engine, name))

    def _limits(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the min and max shape of an input."""
        assert self._loaded is not None
        shape = extents(self._loaded.engine.get_tensor_shape(name))
        if -1 not in shape:
            return shape, shape
        least, _, largest = self._loaded.engine.get_tensor_profile_shape(name, 0)
        return extents(least), extents(largest)


def _require_cuda_torch() -> None:
    import torch

    if not torch.cuda.is_available():
        raise ToolError("this PyTorch cannot use the GPU", "install requirements.txt, or choose `backend=onnxruntime`")


def open_tensorrt(backend: str, path: Path, target: Target, rebuild: str, onnx: Path | None) -> TensorRtEngine:
    """Load an engine of either package; a DiT repeats shapes, so CUDA graphs are allowed."""
    return TensorRtEngine(path, backend, rebuild, onnx, capture=target.kind == "dit")


BACKEND = Backend(
    name="tensorrt",
    label="TensorRT",
    package="tensorrt",
    open=functools.partial(open_tensorrt, "tensorrt"),
    suffix=".trt",
    find_package=gpu.tensorrt_module,
    refits=True,
)
