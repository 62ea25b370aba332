"""Graph rewrites of a DiT: baked rotary table, stacked attention halves, K = 257 padded; each with a switch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import build_dit_fp16mixed
import numpy as np
import onnx_ir as ir
import pytest
from conftest import onnx_of, run_checked

from helpers import published_style
from sa3_build.export import torch_to_onnx
from sa3_build.graph import io as graph_io, query
from sa3_build.graph.fp32_islands import find_dit_islands
from sa3_build.passes.bake_rope import BakeRope
from sa3_build.passes.base import Pass, PassResult, run_passes
from sa3_build.passes.canonicalize import canonicalize
from sa3_build.passes.fold_weights import FoldWeights
from sa3_build.passes.pad_k import PadK
from sa3_build.passes.stack_attention import StackAttention
from sa3_build.verification import parity
from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine
from sa3_trt_core.shapes import CONTRACTS, MAX_FRAMES

SIZES = ((1, 1), (2, 3), (3, 37), (1, 700))  # rows, latent frames
ROUNDING = 5e-6  # relative L2 of a velocity when only the order of fp32 sums or a rounding of a cosine changed
MEMORY_TOKENS = 64


@pytest.fixture(scope="module", params=["ours", "older exporter"])
def single(request: pytest.FixtureRequest, tiny_onnx: Path, tiny_checkpoint: Path, tmp_path_factory) -> Path:
    """Return an fp32 DiT of either exporter, one layer. Read only."""
    if request.param == "ours":
        return onnx_of(tiny_onnx, "sa3-m-fp32")
    folder = tmp_path_factory.mktemp("published")
    module = published_style.legacy_module(tiny_checkpoint)
    return published_style.write_fp32(module, folder / "dit.onnx", folder)


def adopted(path: Path) -> ir.Model:
    model = graph_io.load(path)
    canonicalize(model)
    run_passes(model, [FoldWeights()])
    return model


def velocities(path: Path) -> list[np.ndarray]:
    names = [spec.name for spec in CONTRACTS["dit"].inputs]
    with OnnxRuntimeEngine(path) as engine:
        return [
            engine.run(dict(zip(names, torch_to_onnx.example_inputs("dit", batch=b, frames=n, seed=n), strict=True)))[
                "velocity"
            ].numpy()
            for b, n in SIZES
        ]


def kinds(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def shaped(path: Path, rewrite: Pass, folder: Path) -> tuple[ir.Model, PassResult, list[np.ndarray]]:
    model = adopted(path)
    (result,) = run_passes(model, [rewrite])
    graph_io.save(model, folder / "dit.onnx")
    return model, result, velocities(folder / "dit.onnx")


@pytest.mark.parametrize("rewrite", [BakeRope(), StackAttention(), PadK()], ids=lambda rewrite: rewrite.name)
def test_a_pass_changes_no_velocity_at_any_size_and_does_nothing_twice(
    single: Path, rewrite: Pass, tmp_path: Path
) -> None:
    model, _, rewritten = shaped(single, rewrite, tmp_path)
    for expected, actual in zip(velocities(single), rewritten, strict=True):
        assert parity.relative(expected, actual) < ROUNDING
    before = [node.name for node in model.graph]
    (again,) = run_passes(model, [rewrite])
    assert [node.name for node in model.graph] == before and not any(again.counts.get(k) for k in ("baked", "stacked"))
    assert find_dit_islands(model).rotary


def test_the_table_is_every_position_and_has_no_angle_left(single: Path) -> None:
    model = adopted(single)
    behind = query.input_dependencies(model)
    trig = sum(node.op_type in ("Cos", "Sin") and not behind[node] for node in model.graph)
    run_passes(model, [BakeRope()])
    tables = {name: v for name, v in model.graph.initializers.items() if name.startswith("rotary_table") and v.uses()}
    big = [v.const_value.numpy() for v in tables.values() if v.const_value is not None and v.const_value.size > 9]
    assert trig >= 2 and len(big) == 2
    frequencies = 10000.0 ** (-np.arange(16) / 16)
    for table in big:
        assert table.reshape(table.shape[0], -1).shape == (MAX_FRAMES + MEMORY_TOKENS, 32) and table.dtype == np.float32
        angles = np.tile(np.arange(len(table))[:, None] * frequencies, 2)
        expected = min(
            (np.cos(angles), np.sin(angles)),
            key=lambda candidate: np.abs(candidate - table.reshape(angles.shape)).max(),
        )
        assert np.abs(expected - table.reshape(angles.shape)).max() < 1e-3  # the angle's own fp32 rounding at 4159 rad
    assert "Range" not in kinds(model)


def test_one_call_serves_both_halves(single: Path, request: pytest.FixtureRequest) -> None:
    """One norm serves both halves too; in the older exporter's head order this holds for half of the norms."""
    model = adopted(single)
    before = kinds(model)
    norms = before["ReduceMean"]
    (result,) = run_passes(model, [StackAttention()])
    after = kinds(model)
    assert (before["Softmax"], after["Softmax"]) == (4, 2) and before["MatMul"] - after["MatMul"] == 4
    expected = 4 if "[ours]" in request.node.name else 2
    assert norms - after["ReduceMean"] == expected
    assert result.counts["stacked"] == 2 and result.counts["not_matched"] == 0


def test_local_products_are_padded_to_272_once(single: Path) -> None:
    model = adopted(single)
    (result,) = run_passes(model, [PadK()])
    assert result.counts["padded"] == result.counts["activations"] == kinds(model)["Pad"] == 1
    for _, weight in query.linear_nodes(model):
        assert weight.const_value is not None and weight.const_value.shape.numpy()[0] % 16 == 0


def test_what_is_not_recognised_is_left_with_a_reason(single: Path) -> None:
    model = adopted(single)
    softmax = next(node for node in model.graph if node.op_type == "Softmax")
    values = softmax.outputs[0].uses()[0].node
    twin = ir.node("Neg", [values.inputs[1]], name="a_v_of_its_own")
    twin.outputs[0].name, twin.outputs[0].type = "a_v_of_its_own", values.inputs[1].type
    model.graph.insert_before(values, twin)
    values.replace_input_with(1, twin.outputs[0])
    (result,) = run_passes(model, [StackAttention()])
    assert result.counts["stacked"] == 1 and result.counts["not_matched"] == 2
    assert any("with different v" in note for note in result.notes)

    model = adopted(single)
    counter = next(node for node in model.graph if node.op_type == "Range")
    two = ir.val("two", const_value=ir.tensor(np.array(2, counter.inputs[0].dtype.numpy()), name="two"))
    model.graph.register_initializer(two)
    counter.replace_input_with(2, two)
    before = kinds(model)
    (result,) = run_passes(model, [BakeRope()])
    assert result.counts["baked"] == 0 and kinds(model) == before
    assert "does not count 0, 1, ..." in result.notes[0]


def test_switches(tiny_onnx: Path, tmp_path: Path) -> None:
    """Each switch turns its own pass off."""
    source = onnx_of(tiny_onnx, "sa3-m-fp32")
    counts_by_switch = {}
    for switch in ("", "--no-bake-rope", "--no-stack-attention", "--no-pad-k"):
        path = tmp_path / f"d{switch}" / "dit.onnx"
        run_checked(build_dit_fp16mixed.main, ["--input", source, "--onnx", path, *([switch] if switch else [])])
        counts = kinds(graph_io.load(path))
        counts_by_switch[switch] = ("Range" in counts, counts["Softmax"], counts["Pad"])
    assert counts_by_switch == {
        "": (False, 2, 1), "--no-bake-rope": (True, 2, 1), "--no-stack-attention": (False, 4, 1), "--no-pad-k":
        (False, 2, 0),
    }  # fmt: skip


def test_the_fp8_build_takes_a_shaped_graph(tiny_fp8: Path) -> None:
    model = graph_io.load(onnx_of(tiny_fp8, "sa3-m-fp8"))
    counts = kinds(model)
    assert counts["Softmax"] == 2 and counts["Pad"] == 1 and "Range" not in counts and counts["DequantizeLinear"] > 10
    assert {str(v.dtype) for node in find_dit_islands(model).rotary for v in node.outputs} == {"FLOAT"}
