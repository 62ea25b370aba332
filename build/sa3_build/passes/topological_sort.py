"""Sort the nodes of a graph topologically."""

from __future__ import annotations

import onnx_ir as ir

from sa3_build.passes.base import Pass, PassResult


class SortTopologically(Pass):
    """Move every node after the nodes it reads from; the sort is stable. Published graphs append casts at the end."""

    name = "sort"

    def requires(self, model: ir.Model) -> None:
        """Accept any graph without a cycle."""

    def call(self, model: ir.Model) -> PassResult:
        before = [id(node) for node in model.graph]
        model.graph.sort()
        moved = sum(a != id(b) for a, b in zip(before, model.graph, strict=True))
        return PassResult(self.name, {"moved": moved})
