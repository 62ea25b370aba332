"""The weight of a product as the packers read it, compared with ONNX Runtime's product of an identity matrix."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from sa3_build.engines.pack_weights import linear_weight


def quantized_product(op_type: str, inner: int, outer: int) -> onnx.ModelProto:
    """Return x (M, K) -> x W (M, N) with W stored as E4M3 codes and one scale per output channel.

    A MatMul stores (K, N); a Gemm, with transB, stores (N, K).
    """
    axis, shape = (1, (inner, outer)) if op_type == "MatMul" else (0, (outer, inner))
    codes = np.random.default_rng(0).uniform(-100, 100, shape).astype(ml_dtypes.float8_e4m3fn)
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scale"], ["weight"], axis=axis),
        helper.make_node(op_type, ["x", "weight"], ["y"], **({} if op_type == "MatMul" else {"transB": 1})),
    ]
    tensors = [
        helper.make_tensor("codes", TensorProto.FLOAT8E4M3FN, shape, codes.tobytes(), raw=True),
        numpy_helper.from_array(np.arange(1, outer + 1, dtype=np.float32) / 64, "scale"),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", inner])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", outer])], tensors,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)


@pytest.mark.parametrize("op_type", ["MatMul", "Gemm"])
@pytest.mark.parametrize(("inner", "outer"), [(8, 8), (8, 5), (4, 9)])
def test_a_stored_fp8_weight_is_dequantised_by_output_channel(op_type: str, inner: int, outer: int) -> None:
    """A square weight does not show by its shape which axis the scales belong to."""
    proto = quantized_product(op_type, inner, outer)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    (product,) = session.run(None, {"x": np.eye(inner, dtype=np.float32)})
    weight = linear_weight(ir.from_proto(proto).graph.node(1))
    assert weight is not None and np.array_equal(weight.plain(), product.T)
    assert np.array_equal(weight.codes().astype(np.float32) * weight.scale.reshape(-1, 1), product.T)
