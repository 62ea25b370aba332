"""Take engines that the hub has ready, for the one TensorRT version that made them. They are code: build/README.md."""

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
    """Where the hub may have a target's engine: under our name, then under the names that its ONNX has had."""
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
    """Put the hub's engine in place, with a manifest; its size, and whether it was there already.

    `settings` are those of an engine built here: backend, version and architecture are what the runtime asks for. The
    caller has made sure that the version is the one the hub's engines are of. Raises ToolError.
    """
    path = resolve.resolve_file(names(target, arch), target, source)
    if path is None:
        raise ToolError(f"the hub has no engine of {target.name} for {arch}", "leave --prebuilt away: it is compiled")
    inputs, recorded = {path.name: files.sha256_of(path)}, {**settings, "prebuilt": True}
    with build(out, "engine", inputs, recorded) as draft:
        if draft is None:
            return out.stat().st_size, True
        draft.retire()
        with files.atomic_path(out) as temporary:
            try:
                os.link(path.resolve(), temporary)  # no second copy of some gigabytes where one disk holds both
            except OSError:
                shutil.copyfile(path, temporary)
        draft.finish([out], {"run_on_gpu": False})
    return out.stat().st_size, False
