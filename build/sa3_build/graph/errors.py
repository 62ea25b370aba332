"""Errors of a graph whose structure was not recognised; they name the node."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from sa3_trt_core.errors import ToolError

HINT = "give a DiT exported by build/export_onnx.py, or one of the published style"


class GraphNotRecognised(ToolError):
    """Raised for a graph without the structure that a pass requires; nothing is converted."""

    def __init__(self, what: str, hint: str = HINT) -> None:
        super().__init__(f"the graph was not recognised: {what}", hint)


@contextlib.contextmanager
def naming(source: Path) -> Iterator[None]:
    """Add the path of the graph's file to a GraphNotRecognised that the block raises."""
    try:
        yield
    except GraphNotRecognised as error:
        raise ToolError(f"{source}: {error.message}", error.hint) from None


def described(node: ir.Node) -> str:
    """Return the text that names a node in messages: its name (or its first output's) and its op type."""
    domain = f"{node.domain}::" if node.domain not in ("", "ai.onnx") else ""
    return f"node {node.name or node.outputs[0].name} ({domain}{node.op_type})"
