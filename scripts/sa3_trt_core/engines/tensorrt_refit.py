"""Replace weights and scales of a refittable TensorRT engine by those of a graph with adapters merged into it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3_trt_core import gpu
from sa3_trt_core.artifacts import manifest
from sa3_trt_core.errors import ToolError

if TYPE_CHECKING:
    import tensorrt as trt

SETTING = "refittable"  # key in the manifest settings of an engine


def require_refittable(path: Path, rebuild: str, graph: Path | None = None) -> None:
    """Raise ToolError unless an engine can be refitted, by its manifest, with the weights of `graph`.

    `graph` is a merged graph; the digests of its base in its manifest must be those of the engine's graph. `rebuild` is
    the command that builds the engine.
    """
    record = manifest.read_manifest(path)
    if record is None or record.settings.get(SETTING) is not True:
        raise ToolError(f"{path} was not built to be refitted", f"build it so: {rebuild} --refittable")
    merged = manifest.read_manifest(graph) if graph is not None else None
    if graph is None:
        return
    reason = manifest.verify_manifest(graph)
    if merged is None or reason is not None:
        raise ToolError(f"{graph} is not whole: {reason}", "merge it again: build/merge_lora.py")
    other = [name for name, digest in record.inputs.items() if merged.inputs.get(name) != digest]
    if other:
        raise ToolError(
            f"{graph} was not merged from the {other[0]} that {path} was built of",
            f"merge it again: build/merge_lora.py; or build the engine again: {rebuild} --refittable",
        )


def refit(module: Any, engine: trt.ICudaEngine, graph: Path, label: str) -> None:
    """Refit a deserialised engine from a graph file: every weight that was marked when it was built.

    No context may run meanwhile. After a ToolError (with TensorRT's reason) the engine is unusable.
    """
    again = "build the engine again with --refittable, or build an engine of the merged graph"
    if not engine.refittable:
        raise ToolError(f"{label} was not built to be refitted", again)
    logger = gpu.tensorrt_logger(module)
    logger.last = ""
    refitter = module.Refitter(engine, logger)
    parser = module.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(str(graph)):
        reasons = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors)) or logger.last
        raise ToolError(f"{label} does not take the weights of {graph}: {reasons or 'it gave no reason'}", again)
    missing = refitter.get_missing_weights()
    if missing:
        raise ToolError(f"{label} also wants {len(missing)} weights that {graph} lacks: {missing[0]}, ...", again)
    if not refitter.refit_cuda_engine():
        raise ToolError(f"{label} could not be refitted: {logger.last or 'it gave no reason'}", again)
