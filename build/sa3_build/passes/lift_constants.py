"""Turn Constant nodes into initializers."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import IdentityEliminationPass, LiftConstantsToInitializersPass, RemoveUnusedNodesPass

from sa3_build.graph.errors import GraphNotRecognised, described
from sa3_build.passes.base import PassResult, check_sorted


class LiftConstants:
    """Convert Constant nodes to initializers and remove Identity nodes and unused nodes.

    The older exporter writes every number as a Constant node, and an Identity before a weight that layers share, which
    would hide the weight. Graphs of this project's exporter have neither.
    """

    name = "lift-constants"

    def requires(self, model: ir.Model) -> None:
        check_sorted(model)
        for function in model.functions.values():
            raise GraphNotRecognised(f"the graph contains the function {function.name}")
        for node in model.graph:
            for attribute in node.attributes.values():
                if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
                    raise GraphNotRecognised(f"{described(node)} contains a subgraph")

    def call(self, model: ir.Model) -> PassResult:
        before = len(model.graph)
        constants = sum(node.op_type == "Constant" for node in model.graph)
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        IdentityEliminationPass()(model)
        if len(model.graph) != before:
            RemoveUnusedNodesPass()(model)
        return PassResult(self.name, {"constants": constants, "nodes_removed": before - len(model.graph)})

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            assert node.op_type != "Constant", f"{node.name} is still a Constant node"
