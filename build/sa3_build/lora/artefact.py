"""Write merged graphs as artefacts: kept when current, otherwise written under a lock, the manifest last."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sa3_build.engines.dit_facts import dit_facts
from sa3_build.graph import io as graph_io
from sa3_build.graph.check_row_files import place_check_rows, write_check_rows
from sa3_build.lora.merge import Merged
from sa3_trt_core.artifacts import files
from sa3_trt_core.artifacts.build import build
from sa3_trt_core.errors import GateError, ToolError
from sa3_trt_core.lora.lora_set import LoraSet
from sa3_trt_core.targets import Precision, find_target


def make(
    out: Path,
    precision: Precision,
    sources: Sequence[Path],
    loras: LoraSet,
    settings: dict[str, Any],
    work: Callable[[Path], Merged],
    force: bool,
) -> Merged | None:
    """Write a merged graph by calling `work`; return None if the manifest of `out` is current.

    `work` writes the graph to the path that it receives. The manifest records bases, adapters and strengths; check rows
    are written beside the graph. Raises ToolError, and GateError for a graph whose output is not finite, with nothing
    written.
    """
    inputs: dict[str, str] = {}
    for source in sources:
        if source.suffix == ".onnx":
            inputs |= {file.name: files.sha256_of(file) for file in graph_io.files_of(source)}
        elif source.is_file():
            inputs[source.name] = files.sha256_of(source)
        else:
            raise ToolError(f"no such file: {source}", "give an existing file")
    adapters = [{"name": adapter.path.name, "kind": adapter.kind.name} for adapter, _ in loras.adapters]
    recorded_settings = {**settings, "loras": loras.to_manifest(), "digest": loras.digest, "adapters": adapters}
    kind = "dit_fp8_lora" if precision == "fp8" else "dit_lora"
    with build(out, kind, inputs, recorded_settings, force) as draft:
        if draft is None:
            return None
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.tmp", dir=out.parent) as scratch:
            trial = Path(scratch) / out.name
            merged = work(trial)
            checks = _check_rows(trial, precision)
            graph_io.move(trial, out)
            written = [*graph_io.files_of(out), place_check_rows(checks, out)]
        gates = {
            "layers_changed": len(merged.changes), "mean_change": merged.mean_change,
            "null_row": dit_facts(out, find_target("sa3-m"))["null_row"],  # same structure in every size
        }  # fmt: skip
        draft.finish(written, gates)
    return merged


def _check_rows(graph: Path, precision: Precision) -> Path:
    try:
        return write_check_rows(graph, "dit", precision)
    except GateError as error:
        raise GateError(
            f"with these adapters {error.message}; nothing was written", "lower the strengths, or merge fewer adapters"
        ) from None
