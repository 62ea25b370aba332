"""A merged graph as an artefact: kept when current, made under its lock, its manifest written last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sa3_build.graph import io as graph_io
from sa3_build.lora.merge import Merged
from sa3_trt_core.artifacts import files
from sa3_trt_core.artifacts.build import build
from sa3_trt_core.errors import ToolError
from sa3_trt_core.lora.lora_set import LoraSet


def make(
    out: Path,
    kind: str,
    sources: Sequence[Path],
    loras: LoraSet,
    settings: dict[str, Any],
    work: Callable[[], Merged],
    force: bool,
) -> Merged | None:
    """Run `work`, which writes `out`, unless its manifest says that it is current; None when it is.

    The manifest names bases, adapters and strengths. Raises ToolError.
    """
    inputs: dict[str, str] = {}
    for source in sources:
        if source.suffix == ".onnx":
            inputs |= {file.name: files.sha256_of(file) for file in graph_io.files_of(source)}
        elif source.is_file():
            inputs[source.name] = files.sha256_of(source)
        else:
            raise ToolError(f"no such file: {source}", "name an existing file")
    named = [{"name": adapter.path.name, "kind": adapter.kind.name} for adapter, _ in loras.adapters]
    stated = {**settings, "loras": loras.to_manifest(), "digest": loras.digest, "adapters": named}
    with build(out, kind, inputs, stated, force) as draft:
        if draft is None:
            return None
        merged = work()
        gates = {"layers changed": len(merged.changes), "mean change": merged.mean_change}
        draft.finish(graph_io.files_of(out), gates)
    return merged
