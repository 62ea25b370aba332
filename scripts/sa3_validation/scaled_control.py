"""A candidate that is broken on purpose: one weight scale 1.25 times too large, which a two-sample test must notice."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from sa3_trt_core.errors import ToolError

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

FACTOR = 1.25
PRODUCTS = ("MatMul", "Gemm")


def scaled_graph(path: Path, factor: float = FACTOR) -> tuple[bytes, str]:
    """A graph like that of an FP8 DiT file, with the scales of one weight times `factor`, and the product's name.

    The product is the last of those with the most weights. The
    scales are those that the weight is read with, not those that fp16 weights are quantised with: codes and scales no
    longer fit. The graph reads the file's own sidecars. Raises ToolError for a graph without quantised weights.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    products = list(_quantised(model.graph))
    if not products:
        raise ToolError(f"{path} has no quantised weights", "give an FP8 graph")
    size = max(weights for _, _, weights in products)
    product, reader, _ = [one for one in products if one[2] == size][-1]
    scales = next(one for one in model.graph.initializer if one.name == reader.input[1])
    model.graph.initializer.append(_times(scales, factor, path.parent))
    reader.input[1] = model.graph.initializer[-1].name
    return _bytes(model), str(product.name)


def _quantised(graph: GraphProto) -> list[tuple[NodeProto, NodeProto, int]]:
    """Products, the DequantizeLinear of their weights and how many weights there are, in the graph's order."""
    makers = {output: node for node in graph.node for output in node.output}
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
    found = []
    for node in graph.node:
        reader = makers.get(node.input[1]) if node.op_type in PRODUCTS else None
        if reader is None or reader.op_type != "DequantizeLinear" or reader.input[1] not in sizes:
            continue
        codes = reader.input[0]
        if codes not in sizes and codes in makers:  # fp16 weights behind a QuantizeLinear
            codes = makers[codes].input[0]
        if codes in sizes:
            found.append((node, reader, sizes[codes]))
    return found


def _times(scales: TensorProto, factor: float, folder: Path) -> TensorProto:
    from onnx import TensorProto as Proto, numpy_helper

    private = Proto()
    private.CopyFrom(scales)  # reading external data writes into the tensor
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
