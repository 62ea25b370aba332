"""Lower fused ops of newer opsets and of ONNX Runtime's optimiser to the ops that they replace."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from sa3_build.graph.errors import GraphNotRecognised, described
from sa3_build.graph.rewrite import replace_uses, type_like
from sa3_build.graph.shape_inference import Shapes, declared
from sa3_build.passes.base import PassResult, check_sorted

PLAIN = ("", "ai.onnx")
HINT = (
    "give the graph as it was exported (torch.onnx.export with optimize=True), or optimised at ONNX Runtime's BASIC "
    "level at most"
)
MOVES_SEQUENCES = ("SplitToSequence", "SequenceAt", "ConcatFromSequence", "SequenceConstruct")


class LowerFused:
    """Lower RMSNormalization and Attention (opset 23), and ONNX Runtime's norm, QuickGelu and FusedMatMul.

    Other ops of custom domains are refused by name: their definition is unknown.
    """

    name = "lower-fused"

    def requires(self, model: ir.Model) -> None:
        check_sorted(model)
        for node in model.graph:
            fused = node.op_type in RULES
            if (node.domain not in PLAIN and not fused) or node.op_type in MOVES_SEQUENCES:
                raise GraphNotRecognised(f"{described(node)} is an op of a custom domain", HINT)

    def call(self, model: ir.Model) -> PassResult:
        shapes = Shapes(model, {str(value.name): declared(value) for value in model.graph.inputs})
        lowered = 0
        for node in list(model.graph):
            if node.op_type not in RULES:
                _step(shapes, node)
                continue
            writer = _Writer(model, node, shapes)
            RULES[node.op_type](writer)
            replace_uses(node.outputs[0], writer.last)
            if node.outputs[0].is_graph_output():
                raise GraphNotRecognised(f"{described(node)} computes a graph output", HINT)
            model.graph.remove(node, safe=True)
            lowered += 1
        if lowered:
            for domain in [name for name in model.opset_imports if name not in PLAIN]:
                del model.opset_imports[domain]
        return PassResult(self.name, {"lowered": lowered})

    def ensures(self, model: ir.Model) -> None:
        check_sorted(model)
        assert not any(node.op_type in RULES for node in model.graph), "a fused op was not lowered"


class _Writer:
    """Inserts nodes before the node that they replace."""

    def __init__(self, model: ir.Model, node: ir.Node, shapes: Shapes) -> None:
        self._model, self.node, self.shapes = model, node, shapes
        self._count = 0
        self.last = node.outputs[0]

    def input(self, index: int) -> ir.Value:
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        if value is None:
            raise GraphNotRecognised(f"{described(self.node)} has no input {index}", HINT)
        return value

    def add(self, op_type: str, inputs: list[ir.Value], **attributes: int | list[int]) -> ir.Value:
        self._count += 1
        name = f"{self.node.outputs[0].name}_plain_{self._count}"
        node = ir.node(op_type, inputs, attributes, name=name)
        node.outputs[0].name = f"{name}_value"
        type_like(node.outputs[0], self.node.outputs[0])
        self._model.graph.insert_before(self.node, node)
        _step(self.shapes, node)
        self.last = node.outputs[0]
        return self.last

    def number(self, entry: float | list[int]) -> ir.Value:
        """Return a constant: a float of the node's type, or int64 numbers."""
        self._count += 1
        stated = self.node.outputs[0].dtype
        dtype = np.float32 if stated is None else stated.numpy()
        array = np.array(entry, np.int64) if isinstance(entry, list) else np.array(entry, dtype)
        name = f"{self.node.outputs[0].name}_constant_{self._count}"
        value = ir.val(name, const_value=ir.tensor(array, name=name))
        self._model.graph.register_initializer(value)
        return value

    def swapped(self, value: ir.Value) -> ir.Value:
        """Return a value with its last two axes transposed."""
        rank = len(self.shapes.shape(value) or ())
        if rank < 2:
            raise GraphNotRecognised(f"{described(self.node)} transposes a value of unknown rank", HINT)
        return self.add("Transpose", [value], perm=[*range(rank - 2), rank - 1, rank - 2])

    def require(self, **values: int) -> None:
        """Raise GraphNotRecognised if an attribute has a value other than the supported one."""
        for name, value in values.items():
            if self.node.attributes.get_int(name, value) != value:
                raise GraphNotRecognised(f"{described(self.node)} has an unsupported {name} (supported: {value})", HINT)


def _rms_norm(write: _Writer) -> None:
    write.require(axis=-1)
    x, gamma = write.input(0), write.input(1)
    mean = write.add("ReduceMean", [write.add("Mul", [x, x]), write.number([-1])], keepdims=1)
    shifted = write.add("Add", [mean, write.number(write.node.attributes.get_float("epsilon", 1e-5))])
    inverse = write.add("Reciprocal", [write.add("Sqrt", [shifted])])
    write.add("Mul", [write.add("Mul", [x, inverse]), gamma])


def _attention(write: _Writer) -> None:
    write.require(is_causal=0, qk_matmul_output_mode=0)
    shapes = [write.shapes.shape(write.input(index)) for index in range(3)]
    width = shapes[0][-1] if shapes[0] else None
    extra = [value for value in write.node.inputs[3:] if value is not None]
    if extra or any(shape is None or len(shape) != 4 for shape in shapes) or width is None or width.number is None:
        raise GraphNotRecognised(f"{described(write.node)} has a mask, a cache, or no axis of heads", HINT)
    if write.node.attributes.get_float("softcap", 0.0):
        raise GraphNotRecognised(f"{described(write.node)} has a soft cap", HINT)
    scale = write.node.attributes.get_float("scale", 1.0 / math.sqrt(width.number))
    root = write.number(math.sqrt(scale))
    q = write.add("Mul", [write.input(0), root])
    k = write.add("Mul", [write.swapped(write.input(1)), root])
    weights = write.add("Softmax", [write.add("MatMul", [q, k])], axis=-1)
    write.add("MatMul", [weights, write.input(2)])


def _quick_gelu(write: _Writer) -> None:
    x, alpha = write.input(0), write.node.attributes.get_float("alpha", 1.702)
    inner = x if alpha == 1.0 else write.add("Mul", [x, write.number(alpha)])
    write.add("Mul", [x, write.add("Sigmoid", [inner])])


def _fused_matmul(write: _Writer) -> None:
    write.require(transBatchA=0, transBatchB=0)
    sides = [
        write.swapped(write.input(index)) if write.node.attributes.get_int(flag, 0) else write.input(index)
        for index, flag in enumerate(("transA", "transB"))
    ]
    alpha = write.node.attributes.get_float("alpha", 1.0)
    if alpha != 1.0:  # on the first operand, as in the attention core
        sides[0] = write.add("Mul", [sides[0], write.number(alpha)])
    write.add("MatMul", sides)


def _step(shapes: Shapes, node: ir.Node) -> None:
    try:
        shapes.step(node)
    except ValueError:
        return  # a pass that needs the shape refuses the node by name


RULES: dict[str, Callable[[_Writer], None]] = {
    "RMSNormalization": _rms_norm,
    "SimplifiedLayerNormalization": _rms_norm,
    "Attention": _attention,
    "QuickGelu": _quick_gelu,
    "FusedMatMul": _fused_matmul,
}
