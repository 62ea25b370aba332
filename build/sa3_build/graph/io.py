"""Load, check, save and walk ONNX graphs: what every pass and command needs of a graph.

Tensors stay in their sidecar file and are read each time they are used, so that a graph of several gigabytes never lies
in memory: a mapped file would stay resident once its weights have been looked at.
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
Watch = Callable[[ir.Value], list[ir.Node]]  # the nodes that make a new output of a value; the last one gives it


def load(path: Path) -> ir.Model:
    """Read a graph; its sidecar names are checked first.

    Raises ToolError when the file is absent, is not ONNX, or names external data outside its folder.
    """
    model = mapped(path)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor) and value.const_value.dtype.bitwidth >= 8:
            value.const_value = StoredTensor(value.const_value)
    return model


class StoredTensor(ir.LazyTensor):
    """A tensor in a sidecar; `numpy` reads it from the file every time and nothing is kept."""

    def __init__(self, stored: ir.ExternalTensor) -> None:
        self.stored = stored
        super().__init__(self._read, stored.dtype, ir.Shape(stored.shape.numpy()), name=stored.name)

    def _read(self) -> ir.TensorProtocol:
        dtype, count = self.dtype.numpy(), int(np.prod(self.shape.numpy()))
        flat = np.fromfile(self.stored.path, dtype, count, offset=self.stored.offset or 0)
        return ir.tensor(flat.reshape(self.shape.numpy()), dtype=self.dtype, name=self.name)


def _cause(error: BaseException) -> str:
    """The words of the error that the others were raised from: a name that stands twice, say."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())


def mapped(path: Path) -> ir.Model:
    """Load a graph whose weights are mapped from their file, for one that is not kept. Raises ToolError."""
    if not path.is_file():
        raise ToolError(f"no such ONNX file: {path}", "name an existing .onnx file")
    resolve.external_data_names(path)
    try:
        model = ir.load(path)
    except Exception as error:  # the protobuf and onnx_ir parsers raise many kinds, all meaning the same
        raise ToolError(f"{path} is not a whole ONNX graph ({_cause(error)})", "download or make it again") from None
    _require_whole_sidecars(model, path)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        small = isinstance(tensor, ir.ExternalTensor) and tensor.nbytes <= SIDECAR_THRESHOLD
        if isinstance(tensor, ir.ExternalTensor) and small and tensor.dtype.bitwidth >= 8:
            # Other exporters put these into the sidecar too; shapes and axes are needed before any sidecar is opened.
            # Read here: onnx_ir itself refuses a sidecar of two names, as a working folder's links make it.
            array = StoredTensor(tensor).numpy()
            value.const_value = ir.Tensor(array, tensor.dtype, shape=tensor.shape, name=tensor.name)
    return model


def save(model: ir.Model, path: Path) -> list[Path]:
    """Write graph and sidecar (`<name>.data`), whole or not at all; returns the files written.

    Both are made in a temporary folder beside the target and renamed, the sidecar first; an older manifest is removed
    before, so that a kill between the renames leaves an artefact that every reader takes for incomplete.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.tmp", dir=path.parent))
    try:
        ir.save(model, scratch / path.name, external_data=sidecar_of(path.name), size_threshold_bytes=SIDECAR_THRESHOLD)
        return move(scratch / path.name, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def save_linked(model: ir.Model, path: Path) -> None:
    """Write a graph for a working folder: weights that lie in a file stay there and are linked, the others are written.

    A graph of several gigabytes so costs no disk as long as its weights are another's. On a disk that cannot link,
    the sidecar is copied once.
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


def move(made: Path, path: Path) -> list[Path]:
    """Put a graph of the same name that `save` wrote elsewhere on the disk in place; returns the files.

    An older manifest goes before, and a marker stands while the two are replaced: a kill between leaves an old graph
    with a new sidecar, which only the marker tells every reader not to take.
    """
    assert made.name == path.name, "the sidecar's name stands in the graph"
    written = [file for file in (made.with_name(sidecar_of(made.name)), made) if file.exists()]
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
    """The name of the sidecar that `save` writes beside a graph."""
    return f"{name}.data"


def observed(path: Path, watched: Mapping[str, str], watch: Watch | None = None, alone: bool = False) -> bytes:
    """A graph file with more outputs, for a session that looks inside: nothing is written, weights stay where they are.

    `watched` maps the name of each new output to the name of a value; a value that has such a name already is renamed.
    `watch` gives the nodes from a value to its output (default: the value as it is). `alone`: the other outputs go, and
    with them what only they need.
    """
    model = mapped(path)
    values = {value.name: value for value in model.graph.inputs}
    values.update((value.name, value) for node in model.graph for value in node.outputs)
    for name in watched.keys() & values.keys():  # an exporter may have called a value of its own so
        values[name].name = f"{name}_inside"
    if alone:
        model.graph.outputs.clear()
    for output in watched.keys() & values.keys():  # exporters number their values too: amax, amax_1
        values[output].name = f"{output}_of_the_graph"
    for output, name in watched.items():
        chain = (watch or _as_it_is)(values[name])
        chain[-1].outputs[0].name = output
        model.graph.extend(chain)
        model.graph.outputs.append(chain[-1].outputs[0])
    if alone:
        RemoveUnusedNodesPass()(model)
    return ir.to_proto(model).SerializeToString()


def serialized(model: ir.Model) -> bytes:
    """A loaded graph, its weights left in their sidecar: copied into it they would not fit a protobuf's 2 GB."""
    stored = {v: v.const_value for v in model.graph.initializers.values() if isinstance(v.const_value, StoredTensor)}
    try:
        for value, tensor in stored.items():
            value.const_value = tensor.stored
        return ir.to_proto(model).SerializeToString()
    finally:
        for value, tensor in stored.items():
            value.const_value = tensor


def files_of(path: Path) -> list[Path]:
    """The graph file and every sidecar that it names."""
    return [path, *(path.parent / name for name in resolve.external_data_names(path))]


def bytes_of(path: Path) -> int:
    """The size of a graph with its sidecars. Raises ToolError when one is absent."""
    if not path.is_file():
        raise ToolError(f"no such ONNX file: {path}", "name an existing .onnx file")
    return sum(file.stat().st_size for file in files_of(path) if file.is_file())


def drop_exporter_notes(model: ir.Model) -> None:
    """Remove source paths, stack traces and doc strings: they tell about the maker's machine and change every run."""
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


def forget_weights(model: ir.Model) -> None:
    """Let go of every tensor of a graph that is not needed any more; rewrite rules of onnxscript keep graphs alive."""
    for value in model.graph.initializers.values():
        value.const_value = None


def _as_it_is(value: ir.Value) -> list[ir.Node]:
    twin = ir.node("Identity", [value])
    twin.outputs[0].type, twin.outputs[0].shape = value.type, value.shape
    return [twin]


def _require_whole_sidecars(model: ir.Model, path: Path) -> None:
    """Raise ToolError when a sidecar is missing or ends before the tensors that it should hold."""
    needed: dict[str, int] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
            name = str(tensor.location)
            needed[name] = max(needed.get(name, 0), end)
    for name, end in needed.items():
        sidecar = path.parent / name
        found = sidecar.stat().st_size if sidecar.is_file() else None
        if found is None or found < end:
            what = "is missing" if found is None else f"has {found} bytes, {end} are needed"
            raise ToolError(f"{path} keeps its weights in {name}, which {what}", "get or make both files again")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
