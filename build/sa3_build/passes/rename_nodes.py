"""Give nodes names that ModelOpt can distinguish."""

from __future__ import annotations

import itertools
import re

import onnx_ir as ir

from sa3_build.passes.base import PassResult


class RenameNodes:
    """Give every node a unique name of one width without regular expression characters.

    ModelOpt treats an excluded name as the prefix of a regular expression: `linear` also excludes `linear_10`.
    """

    name = "rename"

    def requires(self, model: ir.Model) -> None:
        """Accept any graph."""

    def call(self, model: ir.Model) -> PassResult:
        nodes = list(model.graph)
        width = len(str(len(nodes)))
        for index, node in enumerate(nodes):
            node.name = f"n{index:0{width}d}_{node.op_type}"
        return PassResult(self.name, {"nodes": len(nodes)})

    def ensures(self, model: ir.Model) -> None:
        names = [str(node.name) for node in model.graph]
        assert len(set(names)) == len(names), "node names are not unique"
        assert all(re.fullmatch(r"\w+", name) for name in names), "a node name contains a pattern character"
        ordered = sorted(names)
        assert not any(b.startswith(a) for a, b in itertools.pairwise(ordered)), "a name is a prefix of another"
