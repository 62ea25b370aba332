"""Compiled engines through TensorRT or TensorRT-RTX: the same API from two packages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3_trt_core import device, manifest
from sa3_trt_core.engines.base import Closing, run_rows
from sa3_trt_core.errors import ToolError

if TYPE_CHECKING:
    import tensorrt as trt
    import torch
    from torch import Tensor

REBUILD = "python build/build_from_onnx.py NAME --backend {backend} --arch {arch}"


class TensorRtEngine(Closing):
    """One deserialised engine with one execution context and one stream; not for use from several threads."""

    def __init__(self, path: Path, backend: str, rebuild: str = "") -> None:
        """Load an engine that this project built for this machine.

        Its manifest must be there and agree in the settings "backend", "backend_version" and "arch".
        `rebuild` is the command that a message gives. Raises ToolError.
        """
        arch = device.current_arch()
        self._rebuild = rebuild or REBUILD.format(backend=backend, arch=arch or "ARCH")
        module = device.tensorrt_module(backend)
        if module is None:
            raise ToolError(f"the Python package {backend} is not installed", "install it, or choose another --backend")
        if arch is None:
            raise ToolError(f"{backend} needs an NVIDIA GPU and none is visible", "choose --backend onnxruntime")
        _require_cuda_torch()
        self._require_ours(path, backend, str(module.__version__), arch)
        self._trt: Any = module
        self._logger: trt.ILogger = self._trt.Logger(self._trt.Logger.ERROR)
        self._runtime: trt.Runtime | None = self._trt.Runtime(self._logger)
        assert self._runtime is not None
        engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise ToolError(f"{backend} refuses {path} on this {arch} GPU", f"build it again: {self._rebuild}")
        context = engine.create_execution_context()
        if context is None:
            raise ToolError(f"no GPU memory for {path}", "free GPU memory, or ask for fewer --seconds")
        self._engine: trt.ICudaEngine | None = engine
        self._context: trt.IExecutionContext | None = context
        self._path = path
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        is_input = {name: engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT for name in names}
        self.input_names = tuple(name for name in names if is_input[name])
        self.output_names = tuple(name for name in names if not is_input[name])
        self._stream: torch.cuda.Stream | None = None

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs for named inputs, on the device of the first; an engine fixed at one row runs row by row."""
        if set(inputs) != set(self.input_names):
            raise ToolError(
                f"{self._path} takes {', '.join(self.input_names)}, not {', '.join(inputs)}",
                f"build it again: {self._rebuild}",
            )
        name, first = next(iter(inputs.items()))
        if first.dim() and first.shape[0] > 1 and self._limits(name)[1][0] == 1:
            return run_rows(self._run_once, inputs)
        return self._run_once(inputs)

    def close(self) -> None:
        # The context before the engine before the runtime: TensorRT frees them in that order or not at all.
        self._context = None
        self._engine = None
        self._runtime = None

    def _require_ours(self, path: Path, backend: str, version: str, arch: str) -> None:
        again = f"build it again: {self._rebuild}"
        if not path.is_file():
            raise ToolError(f"no engine {path}", f"build it: {self._rebuild}")
        reason = manifest.verify_manifest(path)
        record = manifest.read_manifest(path)
        if reason is not None or record is None:
            raise ToolError(f"{path} is not a finished engine of this project: {reason}", again)
        settings = record.settings
        built_for = (settings.get("backend"), settings.get("backend_version"), settings.get("arch"))
        if built_for != (backend, version, arch):
            found = " ".join(str(part) for part in built_for)
            raise ToolError(f"{path} was built for {found}; this machine has {backend} {version} {arch}", again)

    def _limits(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Least and largest shape of an input."""
        assert self._engine is not None
        shape = _extents(self._engine.get_tensor_shape(name))
        if -1 not in shape:
            return shape, shape
        least, _, largest = self._engine.get_tensor_profile_shape(name, 0)
        return _extents(least), _extents(largest)

    def _run_once(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        import torch

        assert self._context is not None and self._engine is not None
        place = next(iter(inputs.values())).device
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        # Held until the stream is done: TensorRT keeps bare addresses, and a freed tensor's memory is given away again.
        held = [self._bind_input(name, value) for name, value in inputs.items()]
        missing = self._context.infer_shapes()
        if missing:
            raise RuntimeError(f"{self._path}: shapes are unknown for {missing}")
        outputs = {}
        for name in self.output_names:
            shape = _extents(self._context.get_tensor_shape(name))
            outputs[name] = torch.empty(shape, dtype=self._dtype(name), device="cuda")
            self._bind(name, outputs[name])
        self._stream.wait_stream(torch.cuda.current_stream())
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise ToolError(f"{self._path}: the GPU could not run it", "free GPU memory, or ask for fewer --seconds")
        self._stream.synchronize()
        held.clear()
        return {name: value.to(place) for name, value in outputs.items()}

    def _bind_input(self, name: str, value: Tensor) -> Tensor:
        assert self._context is not None and self._engine is not None
        on_gpu = value.to(device="cuda", dtype=self._dtype(name)).contiguous()
        declared = _extents(self._engine.get_tensor_shape(name))
        if on_gpu.dim() == 0 and declared:
            on_gpu = on_gpu.reshape((1,) * len(declared))
        shape = tuple(on_gpu.shape)
        least, largest = self._limits(name)
        inside = len(shape) == len(least) and all(
            low <= size <= high for low, size, high in zip(least, shape, largest, strict=True)
        )
        if not inside or not self._context.set_input_shape(name, shape):
            raise ToolError(
                f"{name} has shape {list(shape)}; {self._path} serves {list(least)} to {list(largest)}",
                "ask for another --seconds, or build the engine again with a wider profile",
            )
        self._bind(name, on_gpu)
        return on_gpu

    def _bind(self, name: str, value: Tensor) -> None:
        assert self._context is not None
        if not self._context.set_tensor_address(name, value.data_ptr()):
            raise RuntimeError(f"{self._path}: {name} has no place in the engine")

    def _dtype(self, name: str) -> torch.dtype:
        import torch

        assert self._engine is not None
        kinds = self._trt.DataType
        known = {
            kinds.FLOAT: torch.float32,
            kinds.HALF: torch.float16,
            kinds.BF16: torch.bfloat16,
            kinds.INT32: torch.int32,
            kinds.INT64: torch.int64,
        }
        return known[self._engine.get_tensor_dtype(name)]


def _require_cuda_torch() -> None:
    import torch

    if not torch.cuda.is_available():
        raise ToolError("this PyTorch cannot use the GPU", "install requirements.txt, or choose --backend onnxruntime")


def _extents(dims: trt.Dims) -> tuple[int, ...]:
    return tuple(dims[axis] for axis in range(len(dims)))
