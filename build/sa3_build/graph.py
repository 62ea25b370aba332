"""Load, check, save and walk ONNX graphs: what every pass and command needs of a graph.

Tensors stay in their sidecar file and are read each time they are used, so that a graph of several gigabytes never lies
in memory: a mapped file would stay resident once its weights have been looked at.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from sa3_trt_core import hub, manifest
from sa3_trt_core.errors import ToolError
from sa3_trt_core.protobuf import unfinished_marker
from sa3_trt_core.shapes import CONTRACTS, GraphContract

SIDECAR_THRESHOLD = 1024  # bytes; smaller tensors stay in the graph file, as in the published ones
PRODUCTS = ("MatMul", "Gemm")
DTYPES = {"float32": ir.DataType.FLOAT, "int64": ir.DataType.INT64, "int32": ir.DataType.INT32}
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


def mapped(path: Path) -> ir.Model:
    """Load a graph whose weights are mapped from their file, for one that is not kept. Raises ToolError."""
    if not path.is_file():
        raise ToolError(f"no such ONNX file: {path}", "name an existing .onnx file")
    hub.external_data_names(path)
    try:
        model = ir.load(path)
    except Exception as error:  # the protobuf and onnx_ir parsers raise many kinds, all meaning the same
        raise ToolError(f"{path} is not a whole ONNX graph ({error})", "download or make it again") from None
    _require_whole_sidecars(model, path)
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

    `watched` maps the name of each new output to the name of a value; `watch` gives the nodes from that value to the
    output (default: the value as it is). `alone`: the other outputs go, and with them what only they need.
    """
    model = mapped(path)
    values = {value.name: value for value in model.graph.inputs}
    values.update((value.name, value) for node in model.graph for value in node.outputs)
    if alone:
        model.graph.outputs.clear()
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
    return [path, *(path.parent / name for name in hub.external_data_names(path))]


def bytes_of(path: Path) -> int:
    """The size of a graph with its sidecars. Raises ToolError when one is absent."""
    if not path.is_file():
        raise ToolError(f"no such ONNX file: {path}", "name an existing .onnx file")
    return sum(file.stat().st_size for file in files_of(path) if file.is_file())


def require_contract(model: ir.Model, kind: str, source: Path) -> GraphContract:
    """Check that inputs and outputs are those of the contract, in name, type and fixed axes. Raises ToolError."""
    contract = CONTRACTS[kind]
    for values, specs, what in (
        (model.graph.inputs, contract.inputs, "input"),
        (model.graph.outputs, contract.outputs, "output"),
    ):
        by_name = {value.name: value for value in values}
        for spec in specs:
            value = by_name.pop(spec.name, None)
            if value is None:
                found = ", ".join(str(v.name) for v in values) or "none"
                raise _not_a(kind, source, f"it has no {what} {spec.name} (its {what}s: {found})")
            if value.dtype != DTYPES[spec.dtype]:
                raise _not_a(kind, source, f"{what} {spec.name} is {value.dtype}, not {spec.dtype}")
            shape = value.shape
            if shape is None or len(shape) != len(spec.dims):
                raise _not_a(kind, source, f"{what} {spec.name} has not {len(spec.dims)} axes")
            for found_dim, wanted in zip(shape, spec.dims, strict=True):
                if isinstance(wanted, int) and isinstance(found_dim, int) and found_dim != wanted:
                    raise _not_a(kind, source, f"{what} {spec.name} has an axis of {found_dim}, not {wanted}")
        if by_name:
            raise _not_a(kind, source, f"it has an unknown {what} {next(iter(by_name))}")
    return contract


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


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """The value of an initializer or of a Constant node's output; None for anything computed."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def weight_of(product: ir.Node) -> ir.Value | None:
    """The weight behind a MatMul or Gemm, seen through Transpose and Cast; None when both sides are data."""
    if product.op_type not in PRODUCTS:
        return None
    value = product.inputs[1]
    while value is not None and not value.is_initializer():
        node = value.producer()
        if node is None or node.op_type not in ("Transpose", "Cast"):
            return None
        value = node.inputs[0]
    return value


def weighted_products(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Every MatMul or Gemm with a weight, in graph order."""
    for node in model.graph:
        weight = weight_of(node)
        if weight is not None:
            yield node, weight


def ancestors(values: Iterable[ir.Value | None], stop: Callable[[ir.Node], bool] = lambda _: False) -> set[ir.Node]:
    """Every node that the values depend on, not looking behind nodes for which `stop` holds (those are included)."""
    found: set[ir.Node] = set()
    queue = [value.producer() for value in values if value is not None]
    while queue:
        node = queue.pop()
        if node is None or node in found:
            continue
        found.add(node)
        if not stop(node):
            queue.extend(value.producer() for value in node.inputs if value is not None)
    return found


def gives_sizes(node: ir.Node) -> bool:
    """Does this node say how large a tensor is? Behind it there is no data."""
    return node.op_type in ("Shape", "Size")


def graph_inputs_behind(model: ir.Model) -> dict[ir.Node, frozenset[str]]:
    """For every node of a sorted graph: the names of the graph inputs that it depends on through data."""
    names = {value: frozenset([str(value.name)]) for value in model.graph.inputs}
    behind: dict[ir.Node, frozenset[str]] = {}
    for node in model.graph:
        union: frozenset[str] = frozenset()
        if not gives_sizes(node):
            for value in node.inputs:
                if value is not None:
                    producer = value.producer()
                    union |= (
                        behind.get(producer, frozenset()) if producer is not None else names.get(value, frozenset())
                    )
        behind[node] = union
    return behind


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


def _not_a(kind: str, source: Path, why: str) -> ToolError:
    return ToolError(f"{source} is not a {kind} graph: {why}", f"give the {kind} ONNX of Stable Audio 3")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
