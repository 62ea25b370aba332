"""Pass protocol: preconditions, one rewrite with counts, postconditions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import onnx_ir as ir


@dataclass(frozen=True)
class PassResult:
    """Result of one pass: counts by name, and notes for the report."""

    name: str
    counts: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def as_dict(self) -> dict[str, Any]:
        """Name, counts and, if any, notes: the form of the report."""
        return {"name": self.name, **self.counts, **({"notes": list(self.notes)} if self.notes else {})}


class Pass(Protocol):
    """One rewrite of a graph, in place.

    Input and output are topologically sorted unless a subclass states otherwise.
    """

    name: str

    def requires(self, model: ir.Model) -> None:
        """Raise ToolError, naming the node, when the pass does not support the graph."""
        check_sorted(model)

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the graph and return the counts of what was changed."""

    def ensures(self, model: ir.Model) -> None:
        """Raise AssertionError when a postcondition fails, which is a bug of the pass."""
        check_sorted(model)


def run_passes(model: ir.Model, passes: Iterable[Pass]) -> list[PassResult]:
    """Run passes in order and return their results; postconditions are checked before the next pass starts."""
    results = []
    for graph_pass in passes:
        graph_pass.requires(model)
        results.append(graph_pass.call(model))
        graph_pass.ensures(model)
    return results


def check_sorted(model: ir.Model) -> None:
    """Raise AssertionError when a node precedes a node that it reads from."""
    seen: set[ir.Node] = set()
    for node in model.graph:
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            assert producer is None or producer in seen, f"{node.name} precedes {producer.name}, which it reads"
        seen.add(node)
