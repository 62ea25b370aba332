"""Keep TensorRT's timing cache between builds, and time a forward of a built engine. Needs a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sa3_trt_core import shapes
from sa3_trt_core.artifacts import files
from sa3_trt_core.engines.tensorrt_context import BoundContext, deserialize, extents, torch_type
from sa3_trt_core.targets import Target

WARM_UP, RUNS = 10, 50


def cache_path(out: Path, backend: str, version: str) -> Path:
    """Return the timing cache of an architecture and TensorRT version: models/<arch>/.timing-...; it may be deleted."""
    return out.parent.parent / f".timing-{backend}-{version}.cache"


def read_cache(config: Any, path: Path) -> None:
    """Load a timing cache into a builder's configuration; a cache that TensorRT rejects is replaced by an empty one."""
    for data in (path.read_bytes() if path.is_file() else b"", b""):
        cache = config.create_timing_cache(data)
        if cache is not None and config.set_timing_cache(cache, False):
            return


def write_cache(config: Any, path: Path) -> None:
    """Write the builder's timing cache."""
    cache = config.get_timing_cache()
    if cache is not None:
        files.write_atomic_bytes(path, bytes(cache.serialize()))


def milliseconds(module: Any, plan: Any, target: Target) -> float:
    """Return the median time of RUNS forwards of a serialised engine, in ms.

    Shapes are the middle of its profile, inputs are zero. Raises ToolError if this machine's GPU cannot run it.
    """
    import torch

    message = f"this GPU cannot run the engine that it built ({target.name})"
    loaded = deserialize(module, plan, message, "omit --best-of")
    engine, contract = loaded.engine, shapes.CONTRACTS[target.kind]
    inputs: dict[str, torch.Tensor] = {}
    for spec in contract.inputs:
        engine_shape, opt_shape = extents(engine.get_tensor_shape(spec.name)), contract.shapes(spec, "opt")
        shape = tuple(opt if size == -1 else size for size, opt in zip(engine_shape, opt_shape, strict=True))
        inputs[spec.name] = torch.zeros(shape, dtype=torch_type(module, engine, spec.name))
    stream, times = torch.cuda.Stream(), []
    bound = BoundContext(module, engine, inputs, stream, target.name)
    scratch = torch.empty(max(bound.scratch_bytes, 1), dtype=torch.uint8, device="cuda")
    bound.lend(scratch)
    bound.run(inputs, capture=False)
    for run in range(WARM_UP + RUNS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(stream)
        bound.enqueue()
        end.record(stream)
        stream.synchronize()
        if run >= WARM_UP:
            times.append(start.elapsed_time(end))
    return sorted(times)[RUNS // 2]
