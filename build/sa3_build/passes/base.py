"""What every pass is: requirements, one change, a count, a promise."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import onnx_ir as ir


@dataclass(frozen=True)
class PassResult:
    """What one pass did: counts by name, and remarks worth a line in the report."""

    name: str
    counts: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def as_dict(self) -> dict[str, Any]:
        """Name, counts and, where there are any, notes: as the report holds them."""
        return {"name": self.name, **self.counts, **({"notes": list(self.notes)} if self.notes else {})}


class Pass(Protocol):
    """One change of a graph, in place. A subclass takes a sorted graph and leaves one, unless it says otherwise."""

    name: str

    def requires(self, model: ir.Model) -> None:
        """Raise ToolError, naming the node, when the graph is not one that this pass can take."""
        check_sorted(model)

    def call(self, model: ir.Model) -> PassResult:
        """Change the graph and say what was done."""

    def ensures(self, model: ir.Model) -> None:
        """Raise AssertionError when the graph is not what this pass promises: that is our bug."""
        check_sorted(model)


def run_passes(model: ir.Model, passes: Iterable[Pass]) -> list[PassResult]:
    """Run passes in order; each one's promise is checked before the next begins."""
    results = []
    for one in passes:
        one.requires(model)
        results.append(one.call(model))
        one.ensures(model)
    return results


def check_sorted(model: ir.Model) -> None:
    """Raise AssertionError when a node stands before a node that it reads from."""
    seen: set[ir.Node] = set()
    for node in model.graph:
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            assert producer is None or producer in seen, f"{node.name} stands before {producer.name}"
        seen.add(node)
