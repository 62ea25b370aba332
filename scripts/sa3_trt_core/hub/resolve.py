"""Locate ONNX files and the tokenizer: in `onnx_root` if set, else in the hub's cache, else on the hub."""

from __future__ import annotations

import contextlib
from pathlib import Path

from sa3_trt_core.artifacts.external_data import external_data_names
from sa3_trt_core.errors import ToolError
from sa3_trt_core.hub import download
from sa3_trt_core.paths import ModelSource
from sa3_trt_core.targets import (
    CHECKPOINT_REPOSITORY,
    CHECKPOINT_TOKENIZER_FOLDER,
    HUB_FOLDER,
    HUB_REPOSITORY,
    HUB_REVISION,
    TOKENIZER_FILES,
    Target,
)

__all__ = ["external_data_names", "local_onnx", "local_tokenizer", "resolve_onnx", "resolve_tokenizer"]


def local_onnx(root: Path, target: Target) -> Path | None:
    """Return the target's first existing ONNX file under a root, or None. Raises ToolError for a missing sidecar."""
    for name in target.onnx:
        path = root / name
        if path.is_file():
            for sidecar in external_data_names(path):
                if not (path.parent / sidecar).is_file():
                    raise ToolError(
                        f"{path} needs {sidecar} beside it, which is missing",
                        f"copy it there, or make both again: {target.produced_by}",
                    )
            return path
    return None


def resolve_onnx(target: Target, source: ModelSource) -> Path:
    """Return the target's ONNX file with its sidecars beside it.

    With `onnx_root` only that folder is searched: a file of the hub instead would be another model. Otherwise the hub's
    cache is searched at the target's pinned revision, then the hub itself. A `revision` that is a branch is resolved by
    the hub first. With `offline` or HF_HUB_OFFLINE no request is sent. Graph and sidecars always belong to one commit.
    Raises ToolError.
    """
    onnx_root, revision, offline = source.onnx_root, source.revision, source.offline
    if onnx_root is not None:
        path = local_onnx(onnx_root, target)
        if path is None:
            raise ToolError(f"no {' or '.join(target.onnx)} under {onnx_root}", f"make it: {target.produced_by}")
        return path
    names = [f"{HUB_FOLDER}/{name}" for name in target.onnx]
    was_here = any(download.cached(HUB_REPOSITORY, name, revision or target.revision) is not None for name in names)
    path = _find(HUB_REPOSITORY, names, target.revision, revision, offline)
    if path is None:
        raise ToolError(
            f"{target.onnx[0]} is not published yet in {HUB_REPOSITORY}",
            f"make it: {target.produced_by}; then give `onnx_root=ROOT`",
        )
    commit = download.commit_of(path)
    folder = next(name for name in names if path.as_posix().endswith(name)).rpartition("/")[0]
    for sidecar in external_data_names(path):
        if _find(HUB_REPOSITORY, [f"{folder}/{sidecar}"], commit or target.revision, None, offline) is None:
            raise ToolError(
                f"{sidecar} of {target.name} is not published, only the graph that needs it",
                f"make both: {target.produced_by}; then give `onnx_root=ROOT`",
            )
    if not was_here:
        from sa3_trt_core.artifacts.check_rows import check_path  # numpy comes with it

        with contextlib.suppress(ToolError):  # graphs of the original publisher have no check rows
            download.fetch(HUB_REPOSITORY, f"{folder}/{check_path(path).name}", commit or target.revision)
    return path


def resolve_file(names: list[str], target: Target, source: ModelSource) -> Path | None:
    """Return the cached file of the first existing of these paths of the repository, or None. Raises ToolError."""
    return _find(HUB_REPOSITORY, names, target.revision, source.revision, source.offline)


def local_tokenizer(root: Path) -> Path | None:
    """Return tokenizer.json under a local root; None unless its config exists too."""
    files = [root / name for name in TOKENIZER_FILES]
    return files[0] if all(file.is_file() for file in files) else None


def resolve_tokenizer(source: ModelSource) -> Path:
    """Return tokenizer.json with its config beside it: from the root if set, else from the checkpoint's repository."""
    if source.onnx_root is not None:
        path = local_tokenizer(source.onnx_root)
        if path is None:
            raise ToolError(
                f"no {' and '.join(TOKENIZER_FILES)} under {source.onnx_root}",
                "make them: python build/export_onnx.py --model-dir DIR --onnx-root ROOT",
            )
        return path
    paths: list[Path] = []
    for name in TOKENIZER_FILES:
        file = f"{CHECKPOINT_TOKENIZER_FOLDER}/{name.rpartition('/')[2]}"
        pinned = (download.commit_of(paths[0]) if paths else None) or HUB_REVISION
        path = _find(CHECKPOINT_REPOSITORY, [file], pinned, None, source.offline)
        if path is None:
            raise ToolError(f"{CHECKPOINT_REPOSITORY} has no {file}", "give `onnx_root=ROOT` with t5gemma/ in it")
        paths.append(path)
    return paths[0]


def _find(repository: str, names: list[str], pinned: str, requested: str | None, offline: bool) -> Path | None:
    """Return the first of the names in the cache, else the first on the hub; None if neither has one."""
    revision = requested or pinned
    moves = requested is not None and download.COMMIT.fullmatch(requested) is None
    off = "`offline`" if offline else "HF_HUB_OFFLINE" if download.switched_off() else None
    if off or not moves:
        for name in names:
            path = download.cached(repository, name, revision)
            if path is not None:
                return path
    if off:
        raise download.unreachable(repository, names[0], off)
    for name in names:
        path = download.fetch(repository, name, revision)
        if path is not None:
            return path
    return None
