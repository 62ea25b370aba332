"""The error of a graph that was not recognised, with the node named."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from sa3_trt_core.errors import ToolError

HINT = "give a DiT exported by build/export_onnx.py, or one of the published style"


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


def described(node: ir.Node) -> str:
    """A node as a refusal names it: its own name, or its first output's when it has none, and its op."""
    domain = f"{node.domain}::" if node.domain not in ("", "ai.onnx") else ""
    return f"node {node.name or node.outputs[0].name} ({domain}{node.op_type})"
