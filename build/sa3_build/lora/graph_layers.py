"""The adaptable layers of a DiT graph, found by what each computes, with their weights in native rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from sa3_build.engines.pack_weights import Weight, cores, one, only, weight_of
from sa3_build.export import torch_to_onnx
from sa3_build.graph import io as graph_io, query
from sa3_build.graph.errors import GraphNotRecognised, described
from sa3_trt_core.lora.layers import NATIVE_ORDER, QKV_PARTS, REGROUPED, layer_of_role
from sa3_trt_core.shapes import CONTRACTS, LOCAL_CHANNELS

STREAM = ("self_qkv", "self_out", "cross_q", "cross_out", "ff_in", "ff_out")  # layers of a block that see x, in order
FRONT = (
    (frozenset({"t"}), ("time.0", "time.2")),
    (frozenset({"seconds_total"}), ("seconds", "global.0", "global.2")),
    (frozenset({"t", "seconds_total"}), ("modulation.0", "modulation.2")),
)
PROBED_FRAMES = 34


@dataclass(frozen=True)
class GraphLayer:
    """One layer: its role in a packed DiT, its node, its weight, and the row order of a fused to_qkv."""

    role: str
    node: ir.Node
    weight: Weight
    regrouped: bool
    columns: int  # of the native weight; a graph may have padded it

    @property
    def name(self) -> str:
        """The native name."""
        return layer_of_role(self.role)

    def native(self) -> np.ndarray:
        """Return the weight (out, in) fp32 in native rows, without padding."""
        if self.weight.scale is None:
            plain = self.weight.plain()
        else:
            plain = self.weight.codes().astype(np.float32) * self.weight.scale.astype(np.float32).reshape(-1, 1)
        plain = plain.reshape(plain.shape[0], -1).astype(np.float32)[:, : self.columns]
        return _reordered(plain, NATIVE_ORDER) if self.regrouped else plain

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the native weight, from the stored shape alone."""
        assert self.weight.stored.const_value is not None
        sizes = [int(size) for size in self.weight.stored.const_value.shape.numpy()]
        return (sizes[1] if self.weight.transposed else sizes[0]), self.columns

    def graph_rows(self, native: np.ndarray) -> np.ndarray:
        """Return a native weight (out, in) as (N, K) in the graph's own row order, padded as the graph's is."""
        rows = _reordered(native, REGROUPED) if self.regrouped else native
        extra = _inputs_of(self.weight) - rows.shape[1]
        return np.pad(rows, ((0, 0), (0, extra))) if extra else rows


def find_layers(path: Path) -> tuple[ir.Model, dict[str, GraphLayer]]:
    """Return a DiT graph file and its layers by native name. Raises GraphNotRecognised with what was not found."""
    model = graph_io.load(path)
    model.graph.sort()
    nodes = _Finder(model).nodes()
    qkv = nodes["blocks.0.self_qkv"]
    regrouped = _is_regrouped(path, str(qkv.outputs[0].name)) if _is_differential(qkv) else False
    layers = {}
    stored: dict[ir.Value, str] = {}
    for role, node in nodes.items():
        weight = _weight(node)
        if weight.stored in stored:
            raise GraphNotRecognised(f"{described(node)} shares its weight with the {stored[weight.stored]} layer")
        stored[weight.stored] = role
        columns = LOCAL_CHANNELS if role.endswith("local_in") else _inputs_of(weight)
        layers[layer_of_role(role)] = GraphLayer(role, node, weight, regrouped and role.endswith("self_qkv"), columns)
    return model, layers


class _Finder:
    """The nodes of every role: the residual stream's layers stand in one order only, the others hang on them."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._behind = query.input_dependencies(model)
        self._weighted = [node for node in model.graph if weight_of(node) is not None]

    def nodes(self) -> dict[str, ir.Node]:
        """Return role -> node. Raises GraphNotRecognised."""
        stream = [node for node in self._weighted if "x" in self._behind[node]]
        depth, left = divmod(len(stream) - 2, len(STREAM))
        if depth < 1 or left:
            raise GraphNotRecognised(f"{len(stream)} products see x, not 2 and {len(STREAM)} a block")
        found = {"input": stream[0], "output": stream[-1], **self._convolutions(), **self._front()}
        for index in range(depth):
            part = stream[1 + index * len(STREAM) : 1 + (index + 1) * len(STREAM)]
            found |= {f"blocks.{index}.{name}": node for name, node in zip(STREAM, part, strict=True)}
        self._text_and_local(found, depth)
        return found

    def _convolutions(self) -> dict[str, ir.Node]:
        nodes = [node for node in self._model.graph if node.op_type == "Conv"]
        if len(nodes) != 2:
            raise GraphNotRecognised(f"{len(nodes)} convolutions, not one at each end")
        return dict(zip(("preprocess", "postprocess"), nodes, strict=True))

    def _front(self) -> dict[str, ir.Node]:
        found: dict[str, ir.Node] = {}
        for inputs, names in FRONT:
            nodes = [node for node in self._weighted if self._behind[node] == inputs]
            if len(nodes) != len(names):
                raise GraphNotRecognised(f"{len(nodes)} products see {' and '.join(sorted(inputs))} alone")
            found |= dict(zip(names, nodes, strict=True))
        return found

    def _text_and_local(self, found: dict[str, ir.Node], depth: int) -> None:
        """Add the text's two layers, and each block's cross_kv, local_in and local_out."""
        text = [
            node for node in self._weighted if {"t5_hidden"} <= self._behind[node] and "x" not in self._behind[node]
        ]
        if len(text) != depth + 2:
            raise GraphNotRecognised(f"{len(text)} products see the text alone, not 2 and one a block")
        found |= {"context_in": text[0], "context_out": text[1]}
        local = {node for node in self._weighted if self._behind[node] == {"local_add_cond"}}
        seen: set[ir.Node] = set()
        for index in range(depth):
            block = f"blocks.{index}."
            cross, into = found[f"{block}cross_q"], found[f"{block}ff_in"]
            keys = self._above(only(cores(cross), "attention of", cross).inputs[1])
            found[f"{block}cross_kv"] = one(keys & set(text[2:]), "cross-attention keys", cross)
            added = (self._above(into.inputs[0]) & local) - seen
            found[f"{block}local_out"] = out = one(added, "local embedding before", into)
            seen |= added
            found[f"{block}local_in"] = one(self._above(out.inputs[0]) & local, "first local product before", out)

    def _above(self, value: ir.Value | None) -> set[ir.Node]:
        return query.ancestors([value], stop=lambda node: node.op_type in query.GEMM_OPS or query.gives_sizes(node))


def _weight(node: ir.Node) -> Weight:
    if node.op_type != "Conv":
        weight = weight_of(node)
        assert weight is not None
        return weight
    value = node.inputs[1]
    while value is not None and not value.is_initializer():
        maker = value.producer()
        value = maker.inputs[0] if maker is not None and maker.op_type in ("Cast", "Identity") else None
    if value is None:
        raise GraphNotRecognised(f"{described(node)} has no stored weight")
    return Weight(value, False, None)


def in_stored_layout(layer: GraphLayer, rows: np.ndarray) -> np.ndarray:
    """Return (N, K) in the shape of the layer's stored tensor: turned, or with a convolution's last axis."""
    assert layer.weight.stored.const_value is not None
    turned = rows.T if layer.weight.transposed else rows
    return np.ascontiguousarray(turned).reshape(layer.weight.stored.const_value.shape.numpy())


def _inputs_of(weight: Weight) -> int:
    """K of a weight as it is stored."""
    shape = weight.stored.const_value.shape.numpy() if weight.stored.const_value is not None else (0, 0)
    return int(shape[0] if weight.transposed else shape[1])


def _is_differential(qkv: ir.Node) -> bool:
    weight = _weight(qkv)
    assert weight.stored.const_value is not None
    sizes = [int(size) for size in weight.stored.const_value.shape.numpy()]
    return max(sizes) == QKV_PARTS * min(sizes)


def _reordered(rows: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    parts = np.split(rows, QKV_PARTS)
    return np.concatenate([parts[index] for index in order])


def _is_regrouped(path: Path, qkv: str) -> bool:
    """Return whether to_qkv's rows are q | q2 | k | k2 | v, and not the native q | k | v | q2 | k2.

    The first block runs with every channel of to_qkv replaced by the number of its fifth: what reaches the attention's
    right-hand side is v's place, whatever cuts, reshapes or stacks lie between. Raises GraphNotRecognised.
    """
    from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine

    model = graph_io.mapped(path)
    model.graph.sort()
    node = next(node for node in model.graph if node.outputs[0].name == qkv)
    values = _values_of(only(cores(node), "attention of", node))
    _number_channels(model, node)
    shown = ir.node("Cast", [values], {"to": int(ir.DataType.FLOAT)})
    shown.outputs[0].name, shown.outputs[0].dtype = "channel_numbers", ir.DataType.FLOAT
    model.graph.append(shown)
    model.graph.outputs.clear()
    model.graph.outputs.append(shown.outputs[0])
    RemoveUnusedNodesPass()(model)
    named = zip(
        CONTRACTS["dit"].inputs, torch_to_onnx.example_inputs("dit", batch=1, frames=PROBED_FRAMES), strict=True
    )
    inputs = {spec.name: value for spec, value in named}
    with OnnxRuntimeEngine(path, ir.to_proto(model).SerializeToString(), low_memory=True) as engine:
        numbers = set(engine.run(inputs)["channel_numbers"].unique().tolist())
    places = {REGROUPED.index(2): True, 2: False}
    if len(numbers) != 1 or (place := int(numbers.pop())) not in places:
        raise GraphNotRecognised(f"{described(node)}: the rows of v were not found among to_qkv's")
    return places[place]


def _number_channels(model: ir.Model, node: ir.Node) -> None:
    """Give the users of a to_qkv product the number of each channel's fifth instead of its value."""
    out = node.outputs[0]
    weight = _weight(node)
    assert weight.stored.const_value is not None
    channels = max(int(size) for size in weight.stored.const_value.shape.numpy())
    numbers = np.repeat(np.arange(QKV_PARTS, dtype=np.float32), channels // QKV_PARTS)
    value = ir.val("channel_numbers_of_qkv", const_value=ir.tensor(numbers, name="channel_numbers_of_qkv"))
    model.graph.register_initializer(value)
    uses = list(out.uses())
    nothing = ir.node("Sub", [out, out])
    typed = ir.node("CastLike", [value, out])
    numbered = ir.node("Add", [nothing.outputs[0], typed.outputs[0]])
    model.graph.insert_after(node, [nothing, typed, numbered])
    for use in uses:
        use.node.replace_input_with(use.idx, numbered.outputs[0])


def _values_of(core: ir.Node) -> ir.Value:
    """The right-hand side of the product that follows an attention's scores."""
    queue, seen = [core], {core}
    while queue:
        for value in queue.pop(0).outputs:
            for use in value.uses():
                if use.node.op_type in query.GEMM_OPS and use.idx == 0 and use.node.inputs[1] is not None:
                    return use.node.inputs[1]
                if use.node not in seen and not query.gives_sizes(use.node):
                    seen.add(use.node)
                    queue.append(use.node)
    raise GraphNotRecognised(f"no product follows the scores of {described(core)}")
