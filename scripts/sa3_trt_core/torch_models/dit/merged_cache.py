"""Disk cache of merged adapter weights, in `<engine>.loras/` beside the packed DiT. Deleting the folder is safe.

Used on a CPU, where merging takes seconds. On a GPU merging takes less time than reading and verifying the file.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from sa3_trt_core.artifacts import files, manifest
from sa3_trt_core.errors import ToolError
from sa3_trt_core.lora.lora_set import LoraSet

FOLDER_SUFFIX = ".loras"
LIMIT_BYTES = 8 << 30  # limit for the folder; the least recently read files are removed
NAME_LETTERS = 32


class MergedCache:
    """Cache files of one engine. A damaged file is written again; a folder that cannot be written is not an error."""

    def __init__(self, own: Path, base: Path) -> None:
        """Set the packed DiT `own` and the FP16-mixed one `base`. Without their manifests nothing is cached."""
        self._folder = own.with_name(own.name + FOLDER_SUFFIX)
        self._engines = [_digest(own), _digest(base)]

    def read(self, loras: LoraSet, checkpoint: Path | None) -> dict[str, Tensor] | None:
        """Return the tensors of an adapter set by their names in the packed DiT.

        None unless the file's manifest names this set and the file's digest matches.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._path(loras, checkpoint)
        if path is None or not path.is_file():
            return None
        try:
            current, _ = manifest.is_current(path, {}, self._stated(loras, checkpoint))
            if not current or manifest.verify_manifest(path, deep=True) is not None:
                return None
            tensors: dict[str, Tensor] = load_file(str(path))
            path.touch()
        except (ToolError, OSError, ValueError, SafetensorError):
            return None
        return tensors

    def write(self, loras: LoraSet, checkpoint: Path | None, tensors: dict[str, Tensor]) -> None:
        """Write the tensors of a set, then its manifest, and remove the oldest files beyond LIMIT_BYTES."""
        from safetensors.torch import save_file

        path = self._path(loras, checkpoint)
        if path is None or not tensors:
            return
        try:
            manifest.manifest_path(path).unlink(missing_ok=True)
            with files.atomic_path(path) as temporary:
                save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, str(temporary))
            manifest.write_manifest(path, "merged weights", [path], {}, self._stated(loras, checkpoint), tools={})
            self._prune(path)
        except (ToolError, OSError):
            return

    def _prune(self, newest: Path) -> None:
        kept = sorted(self._folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True)
        total = 0
        for file in kept:
            total += file.stat().st_size
            if total > LIMIT_BYTES and file != newest:
                manifest.manifest_path(file).unlink(missing_ok=True)
                file.unlink(missing_ok=True)

    def _path(self, loras: LoraSet, checkpoint: Path | None) -> Path | None:
        if None in self._engines:
            return None
        text = json.dumps(self._stated(loras, checkpoint), sort_keys=True)
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:NAME_LETTERS]}.safetensors"

    def _stated(self, loras: LoraSet, checkpoint: Path | None) -> dict[str, Any]:
        stated: dict[str, Any] = {"engines": self._engines, "loras": loras.to_manifest()}
        if loras.options.partial:
            stated["partial"] = True
        if checkpoint is not None and any(adapter.kind.svd for adapter, _ in loras.adapters):
            status = checkpoint.stat()
            stated["bases"] = [str(checkpoint.resolve()), status.st_size, status.st_mtime_ns]
        return stated


def _digest(path: Path) -> str | None:
    record = manifest.read_manifest(path)
    return record.files[path.name].sha256 if record is not None and path.name in record.files else None
