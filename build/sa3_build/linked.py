"""Graphs of a working folder whose weights lie in somebody else's sidecar, so that they cost no disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import onnx_ir as ir

from sa3_build import graph
from sa3_trt_core import files


def save_linked(model: ir.Model, path: Path) -> None:
    """Write a graph for a working folder: weights that lie in a file stay there and are linked, the others are written.

    A graph of several gigabytes so costs no disk as long as its weights are another's. On a disk that cannot link,
    the sidecar is copied once.
    """
    stored = {v: v.const_value for v in model.graph.initializers.values() if v.const_value is not None}
    fresh = [
        v for v, t in stored.items() if not isinstance(t, graph.StoredTensor) and t.nbytes > graph.SIDECAR_THRESHOLD
    ]
    try:
        for value, tensor in stored.items():
            if isinstance(tensor, graph.StoredTensor):
                value.const_value = _linked(tensor.stored, path.parent)
        written = ir.external_data.convert_tensors_to_external(
            [stored[value] for value in fresh], path.parent, graph.sidecar_of(path.name)
        )
        for value, external in zip(fresh, written, strict=True):
            value.const_value = external
        with files.atomic_path(path) as temporary:
            ir.save(model, temporary, format="protobuf")
    finally:
        for value, tensor in stored.items():
            value.const_value = tensor


def _linked(stored: ir.ExternalTensor, folder: Path) -> ir.ExternalTensor:
    source = Path(stored.path).resolve()  # a hub's cache names its files by symbolic links
    name = source.name if source.parent.resolve() == folder.resolve() else f"shared-{source.stat().st_ino}.data"
    if not (folder / name).exists():
        try:
            os.link(source, folder / name)
        except OSError:
            with files.atomic_path(folder / name) as temporary:
                shutil.copyfile(source, temporary)
    return ir.ExternalTensor(
        name, stored.offset, stored.length, stored.dtype, shape=stored.shape, name=str(stored.name), base_dir=folder
    )
