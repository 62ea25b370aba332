"""Convert a graph to FP16-mixed: a 16-bit trunk around fp32 islands, with casts only on the edges between them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from sa3_build.graph.errors import GraphNotRecognised
from sa3_build.graph.fp32_islands import MOVERS, Islands, is_float
from sa3_build.passes.base import PassResult, check_sorted
from sa3_build.passes.remove_casts import FP16, FP32
from sa3_trt_core.number_formats import FP16_MAX

_NAMES = {FP16: "half", FP32: "float"}
# Ops whose output type is an attribute, independent of their inputs.
_TYPED_BY_ATTRIBUTE = ("Cast", "ConstantOfShape")


class MixPrecision:
    """Convert an fp32 graph to FP16-mixed; graph inputs and outputs keep their types.

    Requires a sorted fp32 graph whose islands `find` recognises. Inserts one Cast per value and direction. A node that
    only moves fp32 data stays fp32 too; otherwise it would round an angle between two island nodes.
    """

    name = "fp16-mixed"

    def __init__(self, find: Callable[[ir.Model], Islands]) -> None:
        self._find = find
        self._islands: Islands | None = None

    def requires(self, model: ir.Model) -> None:
        check_sorted(model)
        for node in model.graph:
            for value in node.outputs:
                if value.dtype is None:
                    raise GraphNotRecognised(f"unknown type of {value.name}, an output of {node.name}")
                if value.dtype in (FP16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE):
                    raise GraphNotRecognised(f"{node.name} returns {value.dtype}; an fp32 graph is required")

    def call(self, model: ir.Model) -> PassResult:
        self._islands = self._find(model)
        fp32_nodes = self._staying(model, self._islands.all())
        caster = _Caster(model)
        fp16_nodes = 0
        for node in list(model.graph):
            dtype = FP32 if node in fp32_nodes else FP16
            if not is_float(node) and not _reads_float(node):
                continue
            if not is_float(node):
                dtype = FP32  # comparisons and shapes: rounding their operands gains nothing
            fp16_nodes += dtype == FP16
            self._retype(node, dtype, caster)
        for value in model.graph.outputs:
            caster.restore_output(value)
        caster.drop_unused_initializers()
        counts = {
            "fp16_nodes": fp16_nodes,
            "fp32_nodes": len(fp32_nodes),
            "casts": caster.casts,
            "norms": self._islands.norm_count,
        }
        return PassResult(self.name, counts)

    def ensures(self, model: ir.Model) -> None:
        assert self._islands is not None
        check_sorted(model)
        for node in self._islands.all():
            for value in node.outputs:
                assert value.dtype != FP16, f"island node {node.name} is fp16"

    @staticmethod
    def _staying(model: ir.Model, islands: frozenset[ir.Node]) -> set[ir.Node]:
        """Return the islands and every data movement node between or after fp32 values."""
        fp32_nodes = set(islands)
        for node in model.graph:
            if node in fp32_nodes or node.op_type not in MOVERS or not is_float(node):
                continue
            data = [v for v in node.inputs if v is not None and v.dtype == FP32 and not v.is_initializer()]
            if data and all(v.is_graph_input() or v.producer() in fp32_nodes for v in data):
                fp32_nodes.add(node)
        return fp32_nodes

    @staticmethod
    def _retype(node: ir.Node, dtype: ir.DataType, caster: _Caster) -> None:
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in (FP16, FP32) and node.op_type != "Cast":
                caster.feed(node, index, dtype)
        if dtype == FP16:
            if node.op_type in _TYPED_BY_ATTRIBUTE:
                _retype_attribute(node)
            elif node.op_type == "Constant":
                raise GraphNotRecognised(f"float Constant node {node.name}; it must be an initializer")
            for value in node.outputs:
                if value.dtype == FP32:
                    value.dtype = FP16


class _Caster:
    """Casts node inputs to a type, with one Cast or one converted initializer per value."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._done: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        values = [*model.graph.inputs, *model.graph.initializers.values(), *(v for n in model.graph for v in n.outputs)]
        self._names = {value.name for value in values}
        self.casts = 0

    def _unused(self, name: str) -> str:
        """Return an unused value name: a second conversion meets the names of the first one."""
        while name in self._names:
            name = f"{name}_"
        self._names.add(name)
        return name

    def feed(self, node: ir.Node, index: int, dtype: ir.DataType) -> None:
        value = node.inputs[index]
        assert value is not None
        if value.dtype == dtype:
            return
        key = (value, dtype)
        if key not in self._done:
            self._done[key] = self._converted(value) if value.is_initializer() else self._cast(value, dtype)
        node.replace_input_with(index, self._done[key])

    def restore_output(self, value: ir.Value) -> None:
        if value.dtype != FP16:
            return
        outputs = self._model.graph.outputs
        name = value.name
        value.name = self._unused(f"{name}_half")
        outputs[outputs.index(value)] = self._cast(value, FP32, str(name))

    def drop_unused_initializers(self) -> None:
        for name, value in list(self._model.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                self._model.graph.initializers.pop(name)

    def _cast(self, value: ir.Value, dtype: ir.DataType, name: str | None = None) -> ir.Value:
        cast = ir.node("Cast", [value], {"to": int(dtype)}, name=f"{value.name}_to_{_NAMES[dtype]}")
        result = cast.outputs[0]
        result.name = name or self._unused(f"{value.name}_as_{_NAMES[dtype]}")
        result.dtype, result.shape = dtype, value.shape
        producer = value.producer()
        if producer is None:
            self._model.graph.insert_before(self._model.graph[0], cast)
        else:
            self._model.graph.insert_after(producer, cast)
        self.casts += 1
        return result

    def _converted(self, value: ir.Value) -> ir.Value:
        """Return an fp16 copy of an initializer, converted when it is written.

        No second copy of the weights stays in memory. Raises GraphNotRecognised for a value outside fp16's range.
        """
        source = value.const_value
        assert source is not None

        if not np.all(np.abs(source.numpy()) <= FP16_MAX):  # NaN fails as well
            raise GraphNotRecognised(f"initializer {value.name} does not fit fp16")

        def convert() -> ir.TensorProtocol:
            return ir.tensor(source.numpy().astype(np.float16), name=name)

        name, shape = self._unused(f"{value.name}_half"), ir.Shape(source.shape.numpy())
        tensor = ir.LazyTensor(convert, dtype=FP16, shape=shape, name=name)
        copy = ir.val(name, dtype=FP16, shape=shape, const_value=tensor)
        self._model.graph.register_initializer(copy)
        return copy


def _reads_float(node: ir.Node) -> bool:
    return any(value is not None and value.dtype in (FP16, FP32) for value in node.inputs)


def _retype_attribute(node: ir.Node) -> None:
    if node.op_type == "Cast":
        node.attributes["to"] = ir.AttrInt64("to", int(FP16))
        return
    fill = node.attributes.get("value")
    if fill is None:
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.zeros(1, np.float16)))
    else:
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(fill.as_tensor().numpy().astype(np.float16)))
