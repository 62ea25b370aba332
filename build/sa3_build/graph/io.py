"""Load, check, save and extend ONNX graphs.

Tensors stay in their sidecar file and are read each time they are used, so that memory does not grow with the graph. A
memory-mapped file would stay resident once its weights have been read.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from sa3_trt_core.artifacts import files, manifest
from sa3_trt_core.artifacts.external_data import unfinished_marker
from sa3_trt_core.errors import ToolError
from sa3_trt_core.hub import resolve

SIDECAR_THRESHOLD = 1024  # bytes; smaller tensors stay in the graph file, as in the published ones
Reduce = Callable[[ir.Value], list[ir.Node]]  # nodes from a value to a probe output, the output of the last one


def load(path: Path) -> ir.Model:
    """Return a graph from its file, after checking its sidecar names.

    Raises ToolError when the file is absent, is not ONNX, or names external data outside its folder.
    """
    model = mapped(path)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor) and value.const_value.dtype.bitwidth >= 8:
            value.const_value = StoredTensor(value.const_value)
    return model


class StoredTensor(ir.LazyTensor):
    """Tensor in a sidecar file; `numpy` reads it from the file every time and caches nothing."""

    def __init__(self, stored: ir.ExternalTensor) -> None:
        self.stored = stored
        super().__init__(self._read, stored.dtype, ir.Shape(stored.shape.numpy()), name=stored.name)

    def _read(self) -> ir.TensorProtocol:
        dtype, count = self.dtype.numpy(), int(np.prod(self.shape.numpy()))
        flat = np.fromfile(self.stored.path, dtype, count, offset=self.stored.offset or 0)
        return ir.tensor(flat.reshape(self.shape.numpy()), dtype=self.dtype, name=self.name)


def _cause(error: BaseException) -> str:
    """Return the message of the exception's root cause, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())


def mapped(path: Path) -> ir.Model:
    """Return a graph whose weights are memory-mapped, for short use. Raises ToolError like `load`."""
    if not path.is_file():
        raise ToolError(f"no such ONNX file: {path}", "name an existing .onnx file")
    resolve.external_data_names(path)
    try:
        model = ir.load(path)
    except Exception as error:  # the protobuf and onnx_ir parsers raise many types for an invalid file
        raise ToolError(
            f"{path} is not a complete ONNX graph ({_cause(error)})", "download or export it again"
        ) from None
    _require_whole_sidecars(model, path)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        small = isinstance(tensor, ir.ExternalTensor) and tensor.nbytes <= SIDECAR_THRESHOLD
        if isinstance(tensor, ir.ExternalTensor) and small and tensor.dtype.bitwidth >= 8:
            # Some exporters put these into the sidecar; shapes and axes are needed before any sidecar is opened.
            # Read here: onnx_ir refuses a sidecar with several hard links, as working folders have.
            array = StoredTensor(tensor).numpy()
            value.const_value = ir.Tensor(array, tensor.dtype, shape=tensor.shape, name=tensor.name)
    return model


def save(model: ir.Model, path: Path) -> list[Path]:
    """Write graph and sidecar (`<name>.data`) atomically; return the files written.

    Both are written in a temporary folder beside the target and renamed, the sidecar first. An older manifest is
    removed before, so that a kill between the renames leaves an artefact that every reader treats as incomplete.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.tmp", dir=path.parent))
    try:
        ir.save(model, scratch / path.name, external_data=sidecar_of(path.name), size_threshold_bytes=SIDECAR_THRESHOLD)
        return move(scratch / path.name, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def save_linked(model: ir.Model, path: Path) -> None:
    """Write a graph into a working folder: weights that are in a file are hard-linked, the others are written.

    A graph of several gigabytes therefore needs no disk space while its weights are unchanged. On a file system without
    hard links the sidecar is copied once.
    """
    stored = {v: v.const_value for v in model.graph.initializers.values() if v.const_value is not None}
    fresh = [v for v, t in stored.items() if not isinstance(t, StoredTensor) and t.nbytes > SIDECAR_THRESHOLD]
    try:
        for value, tensor in stored.items():
            if isinstance(tensor, StoredTensor):
                value.const_value = _linked(tensor.stored, path.parent)
        written = ir.external_data.convert_tensors_to_external(
            [stored[value] for value in fresh], path.parent, sidecar_of(path.name)
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


def move(source: Path, path: Path) -> list[Path]:
    """Move a graph that `save` wrote to another folder, under the same name, into place; return the files.

    An older manifest is removed first. A marker file exists while the two files are replaced: a kill in between leaves
    an old graph with a new sidecar, and readers refuse a graph with a marker.
    """
    assert source.name == path.name, "the graph contains the sidecar's name"
    written = [file for file in (source.with_name(sidecar_of(source.name)), source) if file.exists()]
    for file in written:
        _sync(file)
    manifest.manifest_path(path).unlink(missing_ok=True)
    marker = unfinished_marker(path)
    marker.touch()
    _sync(path.parent)
    for file in written:
        os.replace(file, path.parent / file.name)
    if len(written) == 1:
        (path.parent / sidecar_of(path.name)).unlink(missing_ok=True)
    _sync(path.parent)
    marker.unlink()
    return [path.parent / file.name for file in written]


def sidecar_of(name: str) -> str:
    """Return the name of the sidecar that `save` writes beside a graph."""
    return f"{name}.data"


def with_probe_outputs(
    path: Path, probes: Mapping[str, str], reduce: Reduce | None = None, only_probes: bool = False
) -> bytes:
    """Return the bytes of a graph with added outputs; nothing is written, weights stay in their files.

    `probes` maps the name of each new output to the name of a value; a value that already has such a name is renamed.
    `reduce` returns the nodes from a value to its output (default: Identity). With `only_probes` the graph's own
    outputs, and nodes that only they need, are removed.
    """
    model = mapped(path)
    values = {value.name: value for value in model.graph.inputs}
    values.update((value.name, value) for node in model.graph for value in node.outputs)
    for name in probes.keys() & values.keys():  # an exporter may have used a probe's name
        values[name].name = f"{name}_inside"
    if only_probes:
        model.graph.outputs.clear()
    for output in probes.keys() & values.keys():  # exporters number values with the same scheme: amax, amax_1
        values[output].name = f"{output}_of_the_graph"
    for output, name in probes.items():
        chain = (reduce or _as_it_is)(values[name])
        chain[-1].outputs[0].name = output
        model.graph.extend(chain)
        model.graph.outputs.append(chain[-1].outputs[0])
    if only_probes:
        RemoveUnusedNodesPass()(model)
    return ir.to_proto(model).SerializeToString()


def serialized(model: ir.Model) -> bytes:
    """Return the bytes of a loaded graph with its weights left in their sidecar: a protobuf is limited to 2 GB."""
    stored = {v: v.const_value for v in model.graph.initializers.values() if isinstance(v.const_value, StoredTensor)}
    try:
        for value, tensor in stored.items():
            value.const_value = tensor.stored
        return ir.to_proto(model).SerializeToString()
    finally:
        for value, tensor in stored.items():
            value.const_value = tensor


def files_of(path: Path) -> list[Path]:
    """Return the graph file and every sidecar that it names."""
    return [path, *(path.parent / name for name in resolve.external_data_names(path))]


def bytes_of(path: Path) -> int:
    """Return the size of a graph with its sidecars, in bytes. Raises ToolError when the graph is absent."""
    if not path.is_file():
        raise ToolError(f"no such ONNX file: {path}", "name an existing .onnx file")
    return sum(file.stat().st_size for file in files_of(path) if file.is_file())


def drop_exporter_notes(model: ir.Model) -> None:
    """Remove source paths, stack traces and doc strings, which depend on the exporting machine and run."""
    model.metadata_props.clear()
    model.doc_string = None
    model.producer_name, model.producer_version = "sa3-trt", None
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in (*node.inputs, *node.outputs):
            if value is not None:
                value.metadata_props.clear()
                value.doc_string = None


def release_weights(model: ir.Model) -> None:
    """Drop every tensor of a graph that is no longer needed; rewrite rules of onnxscript keep graphs alive."""
    for value in model.graph.initializers.values():
        value.const_value = None


def _as_it_is(value: ir.Value) -> list[ir.Node]:
    copy = ir.node("Identity", [value])
    copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
    return [copy]


def _require_whole_sidecars(model: ir.Model, path: Path) -> None:
    """Raise ToolError when a sidecar is missing or is shorter than its tensors require."""
    needed: dict[str, int] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
            name = str(tensor.location)
            needed[name] = max(needed.get(name, 0), end)
    for name, end in needed.items():
        sidecar = path.parent / name
        size = sidecar.stat().st_size if sidecar.is_file() else None
        if size is None or size < end:
            problem = "is missing" if size is None else f"has {size} bytes instead of {end}"
            raise ToolError(
                f"{path} keeps its weights in {name}, which {problem}", "download or export both files again"
            )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
