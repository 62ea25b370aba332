"""Lower the window attention plug-in of published autoencoders to standard ONNX ops, which every backend supports."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sa3_build.graph import query as graph_query
from sa3_build.graph.errors import GraphNotRecognised, described
from sa3_build.graph.rewrite import drop_unused_initializers
from sa3_build.passes.base import PassResult, check_sorted

DOMAIN, OP = "samel", "diff_attn_swa"
SEGMENT = 17  # tokens per latent frame, and the reach of attention in tokens: N = 17 L
MIN_OPSET, CASTLIKE_OPSET = 13, 15
SPLIT_NUM_OUTPUTS_OPSET = 18  # since this opset Split states its number of parts
# Added to masked scores, once outside the band and once beyond an end of the sequence; the sum still fits fp16.
BLOCKED = -3e4
END = 2**63 - 1
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
HINT = "export the autoencoder with plain operators: python build/export_onnx.py --model-dir DIR --onnx-root ROOT"
IGNORED = ("num_heads", "plugin_version", "plugin_namespace", "plugin_id")


class LowerAttention:
    """Replace every samel::diff_attn_swa(q, k, v, num_heads) by MatMul, Softmax and data movement.

    q, k, v are (B, N, 2H, D) of one float type, N = 17 L. The result (B, N, H, D) is the first H heads minus the last H
    of softmax(q k^T / sqrt(D)) v over the keys with |i - j| <= 17. A segment of 17 queries attends only to the 51 keys
    of the previous, the same and the next segment, so that the block form is exact, and linear in L. Source:
    build/FACTS.md, Contracts and Autoencoder.
    """

    name = "lower-attention"

    def requires(self, model: ir.Model) -> None:
        check_sorted(model)
        if plugged(model) and (model.opset_imports.get("") or 0) < MIN_OPSET:
            raise _refusal(f"unsupported opset {model.opset_imports.get('')} (supported: >={MIN_OPSET})")
        for node in plugged(model):
            _require_known(node)
            if (model.opset_imports.get("") or 0) < CASTLIKE_OPSET and _type(node) is None:
                raise _refusal(f"{described(node)} has no declared type")

    def call(self, model: ir.Model) -> PassResult:
        plugins = plugged(model)
        for number, node in enumerate(plugins):
            _Lowering(model, node, f"window_attention_{number}").replace()
        if plugins:
            model.opset_imports.pop(DOMAIN, None)
            model.graph.sort()
            drop_unused_initializers(model)
        return PassResult(self.name, {"lowered": len(plugins)})

    def ensures(self, model: ir.Model) -> None:
        check_sorted(model)
        assert not plugged(model), "a plug-in was not lowered"


def plugged(model: ir.Model) -> list[ir.Node]:
    """Return the plug-in nodes of a graph, in its order."""
    return [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, OP)]


class _Lowering:
    """Lowering of one plug-in node; values are named after `prefix`."""

    def __init__(self, model: ir.Model, node: ir.Node, prefix: str) -> None:
        self._model, self._node, self._prefix = model, node, prefix
        self._made: list[ir.Node] = []
        known = [value for value in (*node.inputs[:3], *node.outputs) if value is not None]
        self._type = _type(node)
        self._width = next((w for w in map(_width, known) if w is not None), None)

    def replace(self) -> None:
        """Replace the node by standard ops."""
        q, k, v = self._node.inputs[:3]
        assert q is not None and k is not None and v is not None
        query = self._op("Transpose", [self._segments(self._scaled(q))], perm=[0, 2, 1, 3])  # (BL, 2H, 17, D)
        keys = self._op("Transpose", [self._neighbours(k)], perm=[0, 2, 3, 1])  # (BL, 2H, D, 51)
        values = self._op("Transpose", [self._neighbours(v)], perm=[0, 2, 1, 3])  # (BL, 2H, 51, D)
        scores = self._op("Add", [self._op("MatMul", [query, keys]), self._mask(q)])
        attended = self._op("MatMul", [self._op("Softmax", [scores], axis=-1), values])  # (BL, 2H, 17, D)
        difference = self._op("Sub", self._halves(attended))
        turned = self._op("Transpose", [difference], perm=[0, 2, 1, 3])  # (BL, 17, H, D)
        result, old = self._op("Reshape", [turned, self._rows_and_tokens(q)]), self._node.outputs[0]
        result.type, result.shape = ir.TensorType(self._type) if self._type is not None else None, old.shape
        self._model.graph.insert_before(self._node, self._made)
        ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
        self._model.graph.remove(self._node, safe=True)

    def _scaled(self, q: ir.Value) -> ir.Value:
        """Return q / sqrt(D): attention kernels expect the scale on q, before the MatMul."""
        if self._width is not None and self._type is not None:
            number = np.array(self._width**-0.5, self._type.numpy())
            return self._op("Mul", [q, self._constant(f"scale_{self._width}_{self._type}", number)])
        width = self._op("Gather", [self._op("Shape", [q]), self._constant("last", np.array(3))])
        root = self._op("Sqrt", [self._op("Cast", [width], to=int(ir.DataType.FLOAT))])
        return self._op("Mul", [q, self._like(self._op("Reciprocal", [root]), q)])

    def _mask(self, q: ir.Value) -> ir.Value:
        """Return the additive mask (BL, 1, 17, 51): the band |i - j| <= 17, without positions outside the sequence."""
        query, key = np.arange(SEGMENT)[:, None], np.arange(-SEGMENT, 2 * SEGMENT)[None, :]
        band = np.where(np.abs(key - query) <= SEGMENT, 0.0, BLOCKED).astype(np.float32)
        sizes = self._op("Slice", [self._op("Shape", [q]), *self._vectors("rows", [0], [2])])
        zero = ir.AttrTensor("value", ir.tensor(np.zeros(1, np.float32)))
        inside = self._op("ConstantOfShape", [sizes], value=zero)  # (B, N)
        pads = self._constant("ends", np.array([0, SEGMENT, 0, SEGMENT]))
        blocked = self._constant("blocked", np.array(BLOCKED, np.float32))
        padded = self._op("Pad", [inside, pads, blocked])
        outside = self._windows(padded, self._constant("flat", np.array([-1, SEGMENT])))  # (BL, 51)
        outside = self._op("Reshape", [outside, self._constant("spread", np.array([-1, 1, 1, 3 * SEGMENT]))])
        return self._like(self._op("Add", [outside, self._constant("band", band)]), q)

    def _neighbours(self, value: ir.Value) -> ir.Value:
        """Return every segment with the previous and the next one: (B, N, 2H, D) -> (BL, 51, 2H, D)."""
        pads = self._constant("around", np.array([0, SEGMENT, 0, 0, 0, SEGMENT, 0, 0]))
        return self._windows(self._op("Pad", [value, pads]), self._segment_shape())

    def _windows(self, padded: ir.Value, shape: ir.Value) -> ir.Value:
        parts = []
        for index, (start, end) in enumerate(((0, -2 * SEGMENT), (SEGMENT, -SEGMENT), (2 * SEGMENT, END))):
            cut = self._op("Slice", [padded, *self._vectors(f"window_{index}", [start], [end], [1])])
            parts.append(self._op("Reshape", [cut, shape]))
        return self._op("Concat", parts, axis=1)

    def _segments(self, value: ir.Value) -> ir.Value:
        """Return the segments (BL, 17, 2H, D) of a value (B, N, 2H, D)."""
        return self._op("Reshape", [value, self._segment_shape()])

    def _segment_shape(self) -> ir.Value:
        return self._constant("segments", np.array([-1, SEGMENT, 0, 0]))  # 0 leaves an axis as it is

    def _halves(self, value: ir.Value) -> list[ir.Value]:
        parts = {"num_outputs": 2} if (self._model.opset_imports.get("") or 0) >= SPLIT_NUM_OUTPUTS_OPSET else {}
        node = ir.node("Split", [value], {"axis": 1, **parts}, num_outputs=2)
        return self._keep(node)

    def _rows_and_tokens(self, q: ir.Value) -> ir.Value:
        """Return the Reshape target (B, N, copy, copy), a constant where B is known."""
        rows = q.shape[0] if q.shape is not None else None
        if isinstance(rows, int):
            return self._constant(f"tokens_of_{rows}", np.array([rows, -1, 0, 0]))
        sizes = self._op("Slice", [self._op("Shape", [q]), *self._vectors("rows", [0], [2])])
        return self._op("Concat", [sizes, self._constant("as_it_is", np.array([0, 0]))], axis=0)

    def _like(self, value: ir.Value, like: ir.Value) -> ir.Value:
        """Return an fp32 value in the type of the data: at run time (CastLike) if the graph declares no types."""
        if self._type == ir.DataType.FLOAT:
            return value
        if self._type is None:
            return self._op("CastLike", [value, like])
        return self._op("Cast", [value], to=int(self._type))

    def _vectors(self, name: str, *numbers: list[int]) -> list[ir.Value]:
        return [self._constant(f"{name}_{index}", np.array(entries)) for index, entries in enumerate(numbers)]

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        """Return an initializer that all lowered nodes share."""
        name = f"window_attention_{name}"
        if name not in self._model.graph.initializers:
            self._model.graph.register_initializer(ir.val(name, const_value=ir.tensor(array, name=name)))
        return self._model.graph.initializers[name]

    def _op(self, op_type: str, inputs: list[ir.Value], **attributes: object) -> ir.Value:
        return self._keep(ir.node(op_type, inputs, attributes))[0]  # type: ignore[arg-type]  # ints, lists, a tensor

    def _keep(self, node: ir.Node) -> list[ir.Value]:
        node.name = f"{self._prefix}_{len(self._made):02d}_{node.op_type}"
        for index, value in enumerate(node.outputs):
            value.name = f"{node.name}_{index}"
        self._made.append(node)
        return list(node.outputs)


def _require_known(node: ir.Node) -> None:
    """Raise GraphNotRecognised, naming the difference, for a node that is not of the described form."""
    values = node.inputs[:3]
    if len(values) < 3 or None in values or len(node.inputs) > 4 or len(node.outputs) != 1:
        raise _refusal(f"{described(node)} does not have inputs q, k, v and one output")
    for attribute in node.attributes:
        if attribute not in IGNORED:
            raise _refusal(f"{described(node)} has the unknown attribute {attribute}")
    types = {value.dtype for value in (*values, *node.outputs) if value is not None and value.dtype is not None}
    if len(types) > 1 or not types <= set(FLOATS):
        raise _refusal(f"unsupported types of {described(node)}: {', '.join(sorted(map(str, types)))}")
    shapes = [value.shape for value in values if value is not None and value.shape is not None]
    for shape in shapes:
        tokens, heads = (shape[1], shape[2]) if len(shape) == 4 else (None, 1)
        if isinstance(heads, int) and heads % 2:
            raise _refusal(f"{described(node)} has an input of shape {list(shape)}, expected (B, N, 2H, D)")
        if isinstance(tokens, int) and tokens % SEGMENT:
            raise _refusal(f"{described(node)} has {tokens} tokens, which is not a multiple of {SEGMENT}")
    declared, actual = _num_heads(node), [shape[2] for shape in shapes if isinstance(shape[2], int)]
    if declared is not None and actual and declared not in (actual[0], actual[0] // 2):
        raise _refusal(f"{described(node)} declares {declared} heads and has {actual[0]}")


def _num_heads(node: ir.Node) -> int | None:
    """Return the number of heads that a node declares, as an attribute or as a fourth input; None if it does not."""
    if "num_heads" in node.attributes:
        return node.attributes["num_heads"].as_int()
    number = graph_query.constant_of(node.inputs[3]) if len(node.inputs) > 3 else None
    return None if number is None else int(number.reshape(-1)[0])


def _type(node: ir.Node) -> ir.DataType | None:
    """Return the declared float type of a node's data, or None."""
    values = [value for value in (*node.inputs[:3], *node.outputs) if value is not None]
    return next((value.dtype for value in values if value.dtype is not None), None)


def _width(value: ir.Value) -> int | None:
    width = value.shape[-1] if value.shape is not None else None
    return width if isinstance(width, int) else None


def _refusal(what: str) -> GraphNotRecognised:
    return GraphNotRecognised(what, HINT)
