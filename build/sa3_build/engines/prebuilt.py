"""Install prebuilt engines from the hub, which match one TensorRT version. Engines are code: see build/README.md."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from sa3_trt_core.artifacts import files
from sa3_trt_core.artifacts.build import build
from sa3_trt_core.errors import ToolError
from sa3_trt_core.hub import resolve
from sa3_trt_core.paths import ModelSource
from sa3_trt_core.targets import PREBUILT_FOLDER, Target


def names(target: Target, arch: str) -> list[str]:
    """Return the possible paths of a target's engine on the hub: its own name, then those of its ONNX files."""
    folder = PurePosixPath(target.engine).parent
    stems = [PurePosixPath(target.engine).name, *(PurePosixPath(name).stem for name in target.onnx)]
    return [f"{PREBUILT_FOLDER}/{arch}/{folder}/{stem}.trt" for stem in dict.fromkeys(stems)]


def take(
    target: Target,
    arch: str,
    out: Path,
    settings: Mapping[str, Any],
    source: ModelSource,
) -> tuple[int, bool]:
    """Install the hub's engine with a manifest; return its size, and True if it was current already.

    `settings` are those of an engine built here; the runtime checks backend, version and architecture. The caller has
    checked that the version matches the hub's engines. Raises ToolError.
    """
    path = resolve.resolve_file(names(target, arch), target, source)
    if path is None:
        raise ToolError(f"the hub has no engine of {target.name} for {arch}", "omit --prebuilt to compile it")
    inputs, recorded = {path.name: files.sha256_of(path)}, {**settings, "prebuilt": True}
    with build(out, "engine", inputs, recorded) as draft:
        if draft is None:
            return out.stat().st_size, True
        draft.retire()
        with files.atomic_path(out) as temporary:
            try:
                os.link(path.resolve(), temporary)  # saves a copy of several gigabytes on the same file system
            except OSError:
                shutil.copyfile(path, temporary)
        draft.finish([out], {"run_on_gpu": False})
    return out.stat().st_size, False
