"""What every pass is: requirements, one change, a count, a promise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import onnx_ir as ir

from sa3_trt_core.errors import ToolError

HINT = "give a DiT exported by build/export_onnx.py, or one of the published style"


@dataclass(frozen=True)
class PassResult:
    """What one pass did: counts by name, and remarks worth a line in the report."""

    name: str
    counts: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Pass(Protocol):
    """One change of a graph, in place."""

    name: str

    def requires(self, model: ir.Model) -> None:
        """Raise ToolError, naming the node, when the graph is not one that this pass can take."""

    def call(self, model: ir.Model) -> PassResult:
        """Change the graph and say what was done."""

    def ensures(self, model: ir.Model) -> None:
        """Raise AssertionError when the graph is not what this pass promises: that is our bug."""


class GraphNotRecognised(ToolError):
    """A graph without the structure that a pass looks for: refused whole, never half converted."""

    def __init__(self, what: str, hint: str = HINT) -> None:
        super().__init__(f"the graph was not recognised: {what}", hint)


@contextlib.contextmanager
def naming(source: Path) -> Iterator[None]:
    """Say in a refusal which file the graph came from."""
    try:
        yield
    except GraphNotRecognised as error:
        raise ToolError(f"{source}: {error.message}", error.hint) from None


def run_passes(model: ir.Model, passes: Iterable[Pass]) -> list[PassResult]:
    """Run passes in order; each one's promise is checked before the next begins."""
    results = []
    for one in passes:
        one.requires(model)
        results.append(one.call(model))
        one.ensures(model)
    return results


def described(node: ir.Node) -> str:
    """A node as a refusal names it: its own name, or its first output's when it has none, and its op."""
    domain = f"{node.domain}::" if node.domain not in ("", "ai.onnx") else ""
    return f"node {node.name or node.outputs[0].name} ({domain}{node.op_type})"


def check_sorted(model: ir.Model) -> None:
    """Raise AssertionError when a node stands before a node that it reads from."""
    seen: set[ir.Node] = set()
    for node in model.graph:
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            assert producer is None or producer in seen, f"{node.name} stands before {producer.name}"
        seen.add(node)
