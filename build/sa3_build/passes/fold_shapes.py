"""Compute once what a graph computes from its own fixed sizes at every run: widths of slices, the attention scale."""

from __future__ import annotations

import onnx_ir as ir

from sa3_build.graph import query, shape_values
from sa3_build.graph.rewrite import drop_unused_initializers, replace_uses
from sa3_build.graph.shape_inference import Shapes, declared, follow
from sa3_build.passes.base import Pass, PassResult


class FoldShapes(Pass):
    """Replace a value that follows from fixed sizes alone by an initializer, and remove what nothing reads any more.

    The older exporter writes sqrt(1 / sqrt(64)) as six nodes behind a Shape, in front of every product of the attention
    core: an fp32 or run-time scale there keeps it from fusing. What depends on the length stays as it is, and so does
    every weight: a float is folded only where it comes from a size, or a constant that somebody has rounded to 16 bits
    would no longer be seen to be one.
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
            found = shapes.numbers(result)
            if found is None or result.dtype is None or result.is_graph_output():
                continue
            if result.dtype.is_floating_point() and result not in from_sizes:
                continue
            array = shape_values.as_constant(found, result.dtype)
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
        return PassResult(self.name, {"folded": folded, "nodes removed": removed, "nodes": before - removed})


def _remove_unread(model: ir.Model) -> int:
    removed = 0
    for node in reversed(list(model.graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            model.graph.remove(node, safe=True)
            removed += 1
    return removed
