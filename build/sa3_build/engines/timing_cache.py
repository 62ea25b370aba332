"""What TensorRT timed, kept between builds, and how fast a built engine runs. Needs a GPU; not run on one here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sa3_trt_core import shapes
from sa3_trt_core.artifacts import files
from sa3_trt_core.errors import ToolError
from sa3_trt_core.targets import Target

WARM_UP, RUNS = 10, 50


def cache_path(out: Path, backend: str, version: str) -> Path:
    """One timing cache an architecture and TensorRT version: models/<arch>/.timing-...; it is never needed."""
    return out.parent.parent / f".timing-{backend}-{version}.cache"


def read_cache(config: Any, path: Path) -> None:
    """Give a builder what was timed before; a cache that it does not take is begun anew."""
    for data in (path.read_bytes() if path.is_file() else b"", b""):
        cache = config.create_timing_cache(data)
        if cache is not None and config.set_timing_cache(cache, False):
            return


def write_cache(config: Any, path: Path) -> None:
    """Keep what a builder timed."""
    cache = config.get_timing_cache()
    if cache is not None:
        files.write_atomic_bytes(path, bytes(cache.serialize()))


def milliseconds(module: Any, plan: Any, target: Target) -> float:
    """The median of RUNS forwards of a serialised engine at the middle of its profile, inputs zero.

    Raises ToolError if this machine's GPU cannot run it.
    """
    import torch

    logger = module.Logger(module.Logger.ERROR)
    engine = module.Runtime(logger).deserialize_cuda_engine(plan)
    context = engine.create_execution_context() if engine is not None else None
    if context is None:
        raise ToolError(f"this GPU cannot run the {target.name} that it built", "leave --best-of away")
    kinds = {
        module.DataType.FLOAT: torch.float32,
        module.DataType.INT32: torch.int32,
        module.DataType.INT64: torch.int64,
    }
    contract, held = shapes.CONTRACTS[target.kind], []
    for spec in contract.inputs:
        fixed, wanted = tuple(engine.get_tensor_shape(spec.name)), contract.shapes(spec, "opt")
        shape = tuple(want if size == -1 else size for size, want in zip(fixed, wanted, strict=True))
        held.append(torch.zeros(shape, dtype=kinds[engine.get_tensor_dtype(spec.name)], device="cuda"))
        context.set_input_shape(spec.name, shape)
        context.set_tensor_address(spec.name, held[-1].data_ptr())
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        if engine.get_tensor_mode(name) == module.TensorIOMode.OUTPUT:
            shape = tuple(context.get_tensor_shape(name))
            held.append(torch.empty(shape, dtype=kinds[engine.get_tensor_dtype(name)], device="cuda"))
            context.set_tensor_address(name, held[-1].data_ptr())
    stream, times = torch.cuda.Stream(), []
    for run in range(WARM_UP + RUNS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(stream)
        context.execute_async_v3(stream.cuda_stream)
        end.record(stream)
        stream.synchronize()
        if run >= WARM_UP:
            times.append(start.elapsed_time(end))
    return sorted(times)[RUNS // 2]
