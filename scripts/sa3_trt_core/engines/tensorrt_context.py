"""TensorRT execution context at fixed input shapes, with its own buffers and, if bit-exact, a CUDA graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from sa3_trt_core import gpu
from sa3_trt_core.cuda_graph import capture
from sa3_trt_core.errors import ToolError

if TYPE_CHECKING:
    import tensorrt as trt
    import torch
    from torch import Tensor

RUNS_BEFORE_CAPTURE = 2  # the first run may still initialize


class Loaded(NamedTuple):
    """A deserialised engine and its runtime, which must be freed after it."""

    runtime: trt.Runtime
    engine: trt.ICudaEngine


def deserialize(module: Any, data: Any, refused: str, hint: str) -> Loaded:
    """Load a serialised engine (bytes, or an object with the buffer protocol).

    Raises ToolError that begins with `refused` and ends with TensorRT's reason.
    """
    logger = gpu.tensorrt_logger(module)
    logger.last = ""
    runtime = module.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise ToolError(f"{refused}: {logger.last or 'it gave no reason'}", hint)
    return Loaded(runtime, engine)


class BoundContext:
    """One engine at fixed shapes. It owns its input and output buffers, whose addresses never change.

    Scratch memory belongs to the engine: its contexts run one at a time and share it.
    """

    def __init__(
        self, module: Any, engine: trt.ICudaEngine, inputs: Mapping[str, Tensor], stream: torch.cuda.Stream, label: str
    ) -> None:
        """Bind the shapes of `inputs`, which have the engine's dtypes; `label` names the engine in messages.

        Raises ToolError if GPU memory is exhausted, RuntimeError if TensorRT rejects a shape.
        """
        context = engine.create_execution_context(module.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise ToolError(f"no GPU memory for {label}", "free GPU memory, or ask for fewer `seconds`")
        self._context: trt.IExecutionContext = context
        self._stream, self._label = stream, label
        # Contiguous new buffers: the inputs may have other strides than TensorRT reads.
        self._inputs = {name: _buffer(tuple(value.shape), value.dtype) for name, value in inputs.items()}
        for name, buffer in self._inputs.items():
            if not context.set_input_shape(name, tuple(buffer.shape)):
                raise RuntimeError(f"{label}: TensorRT refuses the shape {list(buffer.shape)} of {name}")
            self._place(name, buffer)
        missing = context.infer_shapes()
        if missing:
            raise RuntimeError(f"{label}: shapes are unknown for {missing}")
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self._outputs = {}
        for name in names:
            if name not in self._inputs:
                shape, dtype = extents(context.get_tensor_shape(name)), torch_type(module, engine, name)
                self._outputs[name] = _buffer(shape, dtype)
                self._place(name, self._outputs[name])
        self.scratch_bytes = int(context.update_device_memory_size_for_shapes())
        self._graph: torch.cuda.CUDAGraph | None = None
        self._runs = 0

    def lend(self, scratch: Tensor) -> None:
        """Set the scratch memory (bytes on the GPU), which must outlive the context."""
        self._context.set_device_memory(scratch.data_ptr(), scratch.numel())

    @property
    def captured(self) -> bool:
        """True if the context runs as a CUDA graph."""
        return self._graph is not None

    def run(self, inputs: Mapping[str, Tensor], capture: bool) -> dict[str, Tensor]:
        """Return the outputs for inputs of the bound shapes, on their device; `capture` allows a CUDA graph."""
        import torch

        device = next(iter(inputs.values())).device
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for name, buffer in self._inputs.items():
                buffer.copy_(inputs[name])
            if self._graph is not None:
                self._graph.replay()
            else:
                self.enqueue()
            outputs = {name: buffer.to(device, copy=True) for name, buffer in self._outputs.items()}
        self._stream.synchronize()
        self._runs += 1
        if capture and self._runs == RUNS_BEFORE_CAPTURE:
            self._capture()
        return outputs

    def _capture(self) -> None:
        """Keep a CUDA graph of the run if its replay reproduces the outputs of the last run bit for bit."""
        import torch

        wanted = {name: buffer.clone() for name, buffer in self._outputs.items()}
        torch.cuda.synchronize()
        try:
            graph, _ = capture(self.enqueue, self._stream, warm_runs=0)
            with torch.cuda.stream(self._stream):
                for buffer in self._outputs.values():
                    buffer.zero_()
                graph.replay()
            self._stream.synchronize()
        except (RuntimeError, ToolError):
            return  # continue without a CUDA graph
        if all(torch.equal(buffer, wanted[name]) for name, buffer in self._outputs.items()):
            self._graph = graph

    def enqueue(self) -> None:
        """Enqueue one run with the current input buffers on the context's stream. Raises ToolError."""
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise ToolError(f"{self._label}: the GPU could not run it", "free GPU memory, or ask for fewer `seconds`")

    def _place(self, name: str, buffer: Tensor) -> None:
        if not self._context.set_tensor_address(name, buffer.data_ptr()):
            raise RuntimeError(f"{self._label}: {name} has no place in the engine")


def _buffer(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Allocate GPU memory outside inference mode, so that it can be written in any mode."""
    import torch

    with torch.inference_mode(False):
        return torch.empty(shape, dtype=dtype, device="cuda")


def extents(dims: trt.Dims) -> tuple[int, ...]:
    """Return the sizes in a TensorRT shape."""
    return tuple(dims[axis] for axis in range(len(dims)))


def torch_type(module: Any, engine: trt.ICudaEngine, name: str) -> torch.dtype:
    """Return the torch type of an engine's input or output."""
    import torch

    kinds = module.DataType
    known = {
        kinds.FLOAT: torch.float32,
        kinds.HALF: torch.float16,
        kinds.BF16: torch.bfloat16,
        kinds.INT32: torch.int32,
        kinds.INT64: torch.int64,
    }
    return known[engine.get_tensor_dtype(name)]
