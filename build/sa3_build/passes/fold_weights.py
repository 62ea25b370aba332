"""Passes that make a private copy fit for a quantizer: order, names, direct weights."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from sa3_build.graph import query
from sa3_build.passes.base import PassResult


class FoldWeights:
    """Make the weight of every product a direct initializer, through Transpose and Cast.

    ModelOpt scales a weight per output channel only when it is a direct initializer.
    """

    name = "fold-weights"

    def requires(self, model: ir.Model) -> None:
        """Any graph."""

    def call(self, model: ir.Model) -> PassResult:
        folded = 0
        for node, source in list(query.weighted_products(model)):
            value = node.inputs[1]
            if value is None or value is source:
                continue
            if len(value.uses()) == 1 or value.producer() is not None:
                node.replace_input_with(1, self._folded(model, value, source))
                folded += 1
        removed = _drop_unused(model)
        return PassResult(self.name, {"folded": folded, "nodes removed": removed})

    def ensures(self, model: ir.Model) -> None:
        for node, weight in query.weighted_products(model):
            assert node.inputs[1] is weight, f"{node.name} still has its weight behind another node"

    @staticmethod
    def _folded(model: ir.Model, value: ir.Value, source: ir.Value) -> ir.Value:
        """The weight as the product reads it; computed when it is written, so that no second copy lies in memory."""
        chain: list[ir.Node] = []
        while value is not source:
            node = value.producer()
            assert node is not None and node.inputs[0] is not None
            chain.insert(0, node)
            value = node.inputs[0]
        stored = source.const_value
        assert stored is not None
        dtype, order = stored.dtype, list(range(len(stored.shape)))
        for node in chain:
            if node.op_type == "Transpose":
                perm = node.attributes.get("perm")
                order = [order[axis] for axis in perm.as_ints()] if perm is not None else order[::-1]
            else:
                dtype = ir.DataType(node.attributes["to"].as_int())

        def fold() -> ir.TensorProtocol:
            array = stored.numpy()
            for node in chain:
                if node.op_type == "Cast":  # every one of them: a chain may round on its way
                    array = array.astype(ir.DataType(node.attributes["to"].as_int()).numpy())
            return ir.tensor(np.ascontiguousarray(np.transpose(array, order)), name=name)

        name = f"{source.name}.folded{len(model.graph.initializers)}"
        shape = ir.Shape([stored.shape.numpy()[axis] for axis in order])
        tensor = ir.LazyTensor(fold, dtype=dtype, shape=shape, name=name)
        folded = ir.val(name, dtype=dtype, shape=shape, const_value=tensor)
        model.graph.register_initializer(folded)
        return folded


def _drop_unused(model: ir.Model) -> int:
    before, held = len(list(model.graph)), dict(model.graph.initializers)
    RemoveUnusedNodesPass()(model)
    for name in held.keys() - model.graph.initializers.keys():
        held[name].const_value = None  # whoever still holds the value would hold the weight
    return before - len(list(model.graph))
