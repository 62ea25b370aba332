"""An fp32 DiT of the older exporter in the published style, through the whole chain, compared with our export."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import build_dit_fp8
import build_dit_fp16mixed
import numpy as np
import onnx
import pytest
from conftest import onnx_of, run_checked

from helpers import published_style
from helpers.layer_scales import amax_by_role, scales_by_role
from sa3_build.graph import io as graph_io, query
from sa3_build.graph.fp32_islands import rms_norms
from sa3_build.recipes.fp8 import report_path
from sa3_build.verification import parity as verification_parity
from sa3_build.verification.probe_rows import check_rows
from sa3_trt_core.artifacts.calibration_set import CalibrationSet, tensors
from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine

DEPTH = 1


@pytest.fixture(scope="module")
def published(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the fp32 graph of the published style. Read only."""
    folder = tmp_path_factory.mktemp("published")
    module = published_style.legacy_module(tiny_checkpoint)
    return published_style.write_fp32(module, folder / "theirs" / "dit.onnx", folder)


@pytest.fixture(scope="module")
def half(published: Path) -> Path:
    """Convert it to FP16-mixed by the command. Read only."""
    path = published.parents[1] / "half" / "dit_fp16mixed.onnx"
    run_checked(build_dit_fp16mixed.main, ["--input", published, "--onnx", path])
    return path


@pytest.fixture(scope="module", params=["direct", "modelopt"])
def quantised(request: pytest.FixtureRequest, half: Path, tiny_calib: Path) -> Path:
    path = half.parents[1] / request.param / "dit_fp8.onnx"
    argv = ["--input", half, "--calib", tiny_calib, "--onnx", path, "--ptq", request.param, "--parity-rows", 8]
    run_checked(build_dit_fp8.main, argv)
    return path


def denoised(path: Path, rows) -> list[tuple[float, np.ndarray]]:  # type: ignore[no-untyped-def]
    with OnnxRuntimeEngine(path) as engine:
        return verification_parity.denoise_rows(engine, rows)


def worst_cosine(first: Path, second: Path, rows) -> float:  # type: ignore[no-untyped-def]
    rows = list(rows)
    parity = verification_parity.parity_by_sigma(denoised(first, rows), denoised(second, rows))
    return min(level.worst_cosine for level in parity)


def product_types(path: Path) -> Counter[str]:
    nodes = graph_io.load(path).graph
    return Counter(str(node.outputs[0].dtype) for node in nodes if node.op_type in query.GEMM_OPS)


def test_the_graph_is_of_the_published_style(published: Path, tiny_onnx: Path) -> None:
    """The graph has the patterns listed in build/FACTS.md and computes the same network as our export."""
    proto = onnx.load(published, load_external_data=False)
    kinds = Counter(node.op_type for node in proto.graph.node)
    assert [entry.version for entry in proto.opset_import] == [17] and not proto.graph.value_info
    with pytest.raises(onnx.checker.ValidationError, match="topologically sorted"):
        onnx.checker.check_model(str(published))
    assert all(node.attribute for node in proto.graph.node if node.op_type == "ReduceMean")
    assert kinds["Constant"] > 100 and kinds["Einsum"] == kinds["Range"] == 1 and kinds["Cos"] == 2 + 4 * DEPTH
    assert "dit.transformer.layers.0.self_attn.to_qkv.weight" in {tensor.name for tensor in proto.graph.initializer}
    transposes = {node.output[0]: node for node in proto.graph.node if node.op_type == "Transpose"}
    products = [node for node in proto.graph.node if node.op_type == "MatMul"]
    names = {tensor.name for tensor in proto.graph.initializer}
    behind = [node for node in products if node.input[1] in transposes and transposes[node.input[1]].input[0] in names]
    assert len(behind) == 9 * DEPTH + 6
    assert [file.name for file in graph_io.files_of(published)] == ["dit.onnx", published_style.SIDECAR]
    assert worst_cosine(onnx_of(tiny_onnx, "sa3-m-fp32"), published, check_rows()) > 1 - 1e-9


def test_it_becomes_fp16_mixed_as_ours_does(published: Path, half: Path, tiny_onnx: Path) -> None:
    """Valid ONNX, direct weights, no Constant node, no redundant cast, and as close to fp32 as our own."""
    onnx.checker.check_model(str(half), full_check=True)
    model = graph_io.load(half)
    assert {tuple(w.shape) for n, w in query.linear_nodes(model) if n.inputs[1] is not w} == set()
    assert not [node.name for node in model.graph if node.op_type in ("Constant", "Identity")]
    casts = [node for node in model.graph if node.op_type == "Cast"]
    assert not [cast.name for cast in casts if cast.inputs[0].dtype == cast.outputs[0].dtype]
    assert product_types(half) == product_types(onnx_of(tiny_onnx, "sa3-m"))
    assert {str(node.outputs[0].dtype) for node in model.graph if node.op_type == "Softmax"} == {"FLOAT16"}
    # No Sqrt but the norms': the attention scale is a constant, one before each input of the first MatMul. Of the 11
    # norms a layer has, those of q and k serve both halves of attention.
    assert sum(node.op_type == "Sqrt" for node in model.graph) == rms_norms(model)[1] == 7 * DEPTH
    assert worst_cosine(published, half, check_rows()) >= 0.99999
    assert worst_cosine(onnx_of(tiny_onnx, "sa3-m"), half, check_rows()) >= 0.999999


def test_the_same_activations_enter_the_same_products(
    published: Path, tiny_onnx: Path, tiny_calib: Path, tmp_path: Path
) -> None:
    """In fp32 without rounding: the limit is 0.01 %, the measured difference 3e-7."""
    exported = amax_by_role(onnx_of(tiny_onnx, "sa3-m-fp32"), tmp_path, tiny_calib)
    published_amax = amax_by_role(published, tmp_path, tiny_calib)
    assert published_amax == pytest.approx(exported, rel=1e-4) and len(published_amax) == 7 * DEPTH + 2


def test_it_becomes_fp8_as_ours_does(quantised: Path, half: Path, tiny_fp8: Path, tiny_calib: Path) -> None:
    """The same products with the same scales: weights' equal, activations' within two fp16 steps."""
    exported = scales_by_role(onnx_of(tiny_fp8, "sa3-m"), onnx_of(tiny_fp8, "sa3-m-fp8"))
    published_scales = scales_by_role(half, quantised)
    assert published_scales.keys() == exported.keys() and len(exported) == 7 * DEPTH + 2
    for role, (activation, weight) in exported.items():
        assert published_scales[role][0] == pytest.approx(activation, rel=2e-3), role
        assert np.array_equal(published_scales[role][1], weight), role
    report = json.loads(report_path(quantised).read_text())
    assert all(claim["holds"] for claim in report["stages"]["scales"]["proof"])
    rows = list(CalibrationSet.open(tiny_calib))
    exported_cosine = worst_cosine(onnx_of(tiny_fp8, "sa3-m"), onnx_of(tiny_fp8, "sa3-m-fp8"), rows)
    assert worst_cosine(half, quantised, rows) == pytest.approx(exported_cosine, abs=5e-4)
    assert worst_cosine(onnx_of(tiny_fp8, "sa3-m-fp8"), quantised, rows) >= 0.998


def test_the_velocity_at_a_long_duration_is_that_of_fp32(published: Path, half: Path) -> None:
    """A frequency table behind an Unsqueeze stays fp32: in fp16 its angle would be wrong by radians."""
    row = next(iter(check_rows()))
    velocities = []
    for path in (published, half):
        with OnnxRuntimeEngine(path) as engine:
            velocities.append(engine.run(tensors({**row, "seconds_total": np.array([183.25], np.float32)}))["velocity"])
    assert verification_parity.relative(*(velocity.numpy() for velocity in velocities)) < 2e-3
