"""PyTorch engines: packed from ONNX, compared with ONNX Runtime on the same file, tuned on this GPU."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa3_build.engines import torch_dit, torch_stages
from sa3_build.engines.tensorrt import CURRENT, Built, check_graph
from sa3_build.graph import io as graph_io
from sa3_build.graph.check_row_files import engine_check_rows
from sa3_trt_core import gpu, shapes
from sa3_trt_core.artifacts import files
from sa3_trt_core.artifacts.build import build
from sa3_trt_core.engines.packed import tiles_path
from sa3_trt_core.engines.torch import BACKEND
from sa3_trt_core.targets import Target


@dataclass(frozen=True)
class Recipe:
    """Functions of one kind of engine.

    `make` writes and checks it, `tune` measures tile sizes, `warm` compiles kernels.
    """

    format: str
    make: Callable[[Path, Target, Path], dict[str, Any]]
    tune: Callable[[Path, Path], dict[str, Any] | None]
    warm: Callable[[Path], None]


RECIPES = {
    "dit": Recipe(torch_dit.FORMAT, torch_dit.make, torch_dit.tune, torch_dit.warm),
    "t5gemma": Recipe(torch_stages.TEXT_FORMAT, torch_stages.make_text, torch_stages.no_tiles, torch_stages.warm_text),
    "same-decoder": Recipe(
        torch_stages.SAME_FORMAT, torch_stages.make_decoder, torch_stages.tune_same, torch_stages.warm_decoder
    ),
    "same-encoder": Recipe(
        torch_stages.SAME_FORMAT, torch_stages.make_encoder, torch_stages.no_tiles, torch_stages.warm_encoder
    ),
}


def build_settings(target: Target, arch: str) -> dict[str, Any]:
    """Return the settings that a packed network depends on besides its ONNX."""
    profile = {symbol: list(limits) for symbol, limits in shapes.CONTRACTS[target.kind].profile.items()}
    return {
        "target": target.name, "backend": BACKEND.name, "backend_version": RECIPES[target.kind].format, "arch": arch,
        "precision": target.precision, "profile": profile,
    }  # fmt: skip


def pack_engine(onnx: Path, target: Target, arch: str, out: Path, force: bool = False) -> Built:
    """Pack `onnx` into `out`, or keep it when its manifest is current.

    On a GPU of that architecture the kernels are tuned and compiled too, so that the next start does not compile.
    Raises ToolError when the graph is not recognised, GateError when the packed network differs from the graph.
    """
    BACKEND.require_engine(target)
    check_graph(onnx, target)
    recipe = RECIPES[target.kind]
    settings = build_settings(target, arch)
    inputs = {file.name: files.sha256_of(file) for file in graph_io.files_of(onnx)}
    with build(out, "engine", inputs, settings, force) as draft:
        if draft is None:
            return Built(out, 0.0, out.stat().st_size, reused=True, why=CURRENT)
        started = time.monotonic()
        with files.atomic_path(out) as temporary:
            gates = recipe.make(onnx, target, temporary)
            on_this_gpu = gpu.current_arch() == arch and BACKEND.on_gpu()
            tiles = recipe.tune(temporary, out) if on_this_gpu else None
            draft.retire()
        written = [out, *engine_check_rows(onnx, target, out)]
        tiles_path(out).unlink(missing_ok=True)
        if tiles is not None:
            files.write_atomic_text(tiles_path(out), json.dumps(tiles, indent=2) + "\n")
            written.append(tiles_path(out))
        if on_this_gpu:
            recipe.warm(out)
        draft.finish(written, gates | {"tuned_on_gpu": on_this_gpu})
    return Built(out, time.monotonic() - started, out.stat().st_size, reused=False, why=draft.why)
