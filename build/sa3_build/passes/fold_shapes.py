"""Constant-fold values that depend on fixed sizes only, such as widths of slices and the attention scale."""

from __future__ import annotations

import onnx_ir as ir

from sa3_build.graph import query, shape_values
from sa3_build.graph.rewrite import drop_unused_initializers, replace_uses
from sa3_build.graph.shape_inference import Shapes, declared, follow
from sa3_build.passes.base import Pass, PassResult


class FoldShapes(Pass):
    """Replace values that depend on fixed sizes only by initializers, and remove nodes that become unused.

    The older exporter writes sqrt(1 / sqrt(64)) as six nodes after a Shape, before every MatMul of the attention core:
    an fp32 or run-time scale there prevents fusion. Values that depend on the length stay, and so do weights: a float
    is folded only if it is computed from a size. Otherwise a constant that was rounded to 16 bits could no longer be
    detected.
    """

    name = "fold-shapes"

    def call(self, model: ir.Model) -> PassResult:
        shapes = Shapes(model, {str(value.name): declared(value) for value in model.graph.inputs})
        before, folded = len(model.graph), 0
        from_sizes: set[ir.Value] = set()
        for node in list(model.graph):
            follow(shapes, node)
            result = node.outputs[0]
            if query.gives_sizes(node) or any(value in from_sizes for value in node.inputs if value is not None):
                from_sizes.add(result)
            numbers = shapes.numbers(result)
            if numbers is None or result.dtype is None or result.is_graph_output():
                continue
            if result.dtype.is_floating_point() and result not in from_sizes:
                continue
            array = shape_values.as_constant(numbers, result.dtype)
            if array is not None:
                name = f"{result.name}_folded"
                constant = ir.val(name, const_value=ir.tensor(array, name=name))
                model.graph.register_initializer(constant)
                replace_uses(result, constant)
                if result in from_sizes:
                    from_sizes.add(constant)
                folded += 1
        removed = _remove_unread(model)
        drop_unused_initializers(model)
        return PassResult(self.name, {"folded": folded, "nodes_removed": removed, "nodes": before - removed})


def _remove_unread(model: ir.Model) -> int:
    removed = 0
    for node in reversed(list(model.graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            model.graph.remove(node, safe=True)
            removed += 1
    return removed
