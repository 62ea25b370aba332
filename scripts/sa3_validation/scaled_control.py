"""Build a defective control for the two-sample test: an FP8 DiT graph with one weight scale 1.25 times too large."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from sa3_trt_core.errors import ToolError

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

FACTOR = 1.25
LINEAR_OPS = ("MatMul", "Gemm")


def scaled_graph(path: Path, factor: float = FACTOR) -> tuple[bytes, str]:
    """Return a serialised FP8 graph with the scales of one weight multiplied by `factor`, and the name of its linear.

    The linear is the last of those with the most weights. The scales are those of the DequantizeLinear, so that for
    weights stored in fp16 codes and scales no longer match. The graph refers to the file's own sidecars. Raises
    ToolError for a graph without quantised weights.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    linears = list(_quantised(model.graph))
    if not linears:
        raise ToolError(f"{path} has no quantised weights", "give an FP8 graph")
    size = max(weights for _, _, weights in linears)
    linear, dequantize, _ = [entry for entry in linears if entry[2] == size][-1]
    scales = next(tensor for tensor in model.graph.initializer if tensor.name == dequantize.input[1])
    model.graph.initializer.append(_times(scales, factor, path.parent))
    dequantize.input[1] = model.graph.initializer[-1].name
    return _bytes(model), str(linear.name)


def _quantised(graph: GraphProto) -> list[tuple[NodeProto, NodeProto, int]]:
    """Return linears with the DequantizeLinear and the number of their weights, in the graph's order."""
    makers = {output: node for node in graph.node for output in node.output}
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
    linears = []
    for node in graph.node:
        dequantize = makers.get(node.input[1]) if node.op_type in LINEAR_OPS else None
        if dequantize is None or dequantize.op_type != "DequantizeLinear" or dequantize.input[1] not in sizes:
            continue
        codes = dequantize.input[0]
        if codes not in sizes and codes in makers:  # fp16 weights behind a QuantizeLinear
            codes = makers[codes].input[0]
        if codes in sizes:
            linears.append((node, dequantize, sizes[codes]))
    return linears


def _times(scales: TensorProto, factor: float, folder: Path) -> TensorProto:
    from onnx import TensorProto as Proto, numpy_helper

    private = Proto()
    private.CopyFrom(scales)  # reading external data modifies the tensor
    if private.data_location == Proto.EXTERNAL:
        # Read here: onnx's own reader refuses a sidecar with hard links, as a build's working folder leaves it.
        where = {entry.key: entry.value for entry in private.external_data}
        with (folder / where["location"]).open("rb") as file:
            file.seek(int(where.get("offset", 0)))
            private.raw_data = file.read(int(where["length"]) if "length" in where else -1)
        private.data_location = Proto.DEFAULT
        del private.external_data[:]
    values = numpy_helper.to_array(private)
    return numpy_helper.from_array((values * factor).astype(values.dtype), f"{scales.name}_scaled")


def _bytes(model: ModelProto) -> bytes:
    return bytes(model.SerializeToString())
