"""Make weights direct initializers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from sa3_build.graph import query
from sa3_build.passes.base import PassResult


class FoldWeights:
    """Make the weight of every linear layer a direct initializer, through Transpose and Cast.

    ModelOpt scales a weight per output channel only when it is a direct initializer.
    """

    name = "fold-weights"

    def requires(self, model: ir.Model) -> None:
        """Accept any graph."""

    def call(self, model: ir.Model) -> PassResult:
        folded = 0
        for node, source in list(query.linear_nodes(model)):
            value = node.inputs[1]
            if value is None or value is source:
                continue
            if len(value.uses()) == 1 or value.producer() is not None:
                node.replace_input_with(1, self._folded(model, value, source))
                folded += 1
        removed = _drop_unused(model)
        return PassResult(self.name, {"folded": folded, "nodes_removed": removed})

    def ensures(self, model: ir.Model) -> None:
        for node, weight in query.linear_nodes(model):
            assert node.inputs[1] is weight, f"the weight of {node.name} is not a direct initializer"

    @staticmethod
    def _folded(model: ir.Model, value: ir.Value, source: ir.Value) -> ir.Value:
        """Return the weight in the layout that the MatMul reads, computed when it is written.

        No second copy of the weights stays in memory.
        """
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
                if node.op_type == "Cast":  # all of them: an intermediate Cast may round
                    array = array.astype(ir.DataType(node.attributes["to"].as_int()).numpy())
            return ir.tensor(np.ascontiguousarray(np.transpose(array, order)), name=name)

        name = f"{source.name}.folded{len(model.graph.initializers)}"
        shape = ir.Shape([stored.shape.numpy()[axis] for axis in order])
        tensor = ir.LazyTensor(fold, dtype=dtype, shape=shape, name=name)
        folded = ir.val(name, dtype=dtype, shape=shape, const_value=tensor)
        model.graph.register_initializer(folded)
        return folded


def _drop_unused(model: ir.Model) -> int:
    before, initializers = len(list(model.graph)), dict(model.graph.initializers)
    RemoveUnusedNodesPass()(model)
    for name in initializers.keys() - model.graph.initializers.keys():
        initializers[name].const_value = None  # a remaining reference to the value would keep the weight in memory
    return before - len(list(model.graph))
