"""The FP8 recipe on a tiny DiT: the graph it writes, the defects that its proof detects, resuming."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import build_dit_fp8
import numpy as np
import onnx_ir as ir
import pytest
import torch

from helpers.commands import kill_when, run
from sa3_build.graph import io as graph_io, quantizers, query
from sa3_build.graph.fp32_islands import find_dit_islands
from sa3_build.passes.base import run_passes
from sa3_build.passes.fold_weights import FoldWeights
from sa3_build.passes.rename_nodes import RenameNodes
from sa3_build.passes.topological_sort import SortTopologically
from sa3_build.quantization import scales, selection as quantization_selection
from sa3_build.recipes.fp8 import report_path
from sa3_build.verification import graph_proof
from sa3_trt_core.artifacts import manifest
from sa3_trt_core.artifacts.calibration_set import CalibrationSet
from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine
from sa3_trt_core.errors import GateError, ToolError
from sa3_trt_core.targets import dit_target

ROOT = Path(__file__).resolve().parents[3]
HALF, FP8 = (dit_target("medium", precision).onnx[0] for precision in ("fp16mixed", "fp8"))


def clean_source(root: Path) -> ir.Model:
    model = graph_io.load(root / HALF)
    run_passes(model, [SortTopologically(), FoldWeights(), RenameNodes()])
    return model


@pytest.fixture(scope="module")
def selection(tiny_fp8: Path) -> quantization_selection.Selection:
    return quantization_selection.select_linears(clean_source(tiny_fp8))


@pytest.fixture(scope="module")
def report(tiny_fp8: Path) -> dict:
    return json.loads(report_path(tiny_fp8 / FP8).read_text())


def test_the_trunk_is_quantised_and_the_rest_is_not(selection: quantization_selection.Selection, report: dict) -> None:
    """A layer has 7 products in the trunk, the context 2; the first and the last product stay fp16."""
    depth = 1
    assert len(selection.quantized) == 7 * depth + 2
    reasons = list(selection.excluded.values())
    assert reasons.count("local embedding") == 2 * depth
    assert reasons.count("attention core: no weight") == 4 * depth  # both halves of attention in one call
    assert sum("front end" in reason for reason in reasons) == 7
    assert [reasons.count(reason) for reason in ("latent in", "velocity out")] == [1, 1]
    assert len(selection.excluded) == 2 * depth + 4 * depth + 7 + 2
    assert report["stages"]["quantize"]["quantized_linears"] == len(selection.quantized)


def test_every_claim_of_the_proof_holds_and_looked_at_something(report: dict) -> None:
    claims = report["stages"]["scales"]["proof"]
    assert len(claims) == 6
    assert all(claim["holds"] and claim["checked"] > 0 for claim in claims)


def test_scales_follow_the_rows(
    tiny_fp8: Path, tiny_calib: Path, selection: quantization_selection.Selection, report: dict
) -> None:
    """An activation's scale is its amax over every row * headroom / 448; a weight's is its channel's amax / 448."""
    headroom = build_dit_fp8.DEFAULT_HEADROOM
    result = {str(node.name): node for node in graph_io.load(tiny_fp8 / FP8).graph}
    sources = clean_source(tiny_fp8).graph.initializers
    amax = {entry["activation"]: entry["amax"] for entry in report["stages"]["amax"]["amax"]}
    rows = list(CalibrationSet.open(tiny_calib))
    assert report["stages"]["amax"]["rows"] == len(rows) == 8
    for product in selection.quantized:
        activation, weight = quantizers.dequantizers(result[product.node])
        scale = query.constant_of(activation.inputs[1])
        assert scale.size == 1
        expected = max(amax[product.activation] * headroom / 448, scales.FP16_SCALE_FLOOR)
        assert expected <= float(scale.reshape(())) <= expected * 1.001
        source = query.constant_of(sources[product.weight]).astype(np.float32)
        channels = query.constant_of(weight.inputs[1]).astype(np.float32)
        assert channels.shape == (product.n,)
        assert np.allclose(channels, np.maximum(np.abs(source).max(axis=0) / 448, scales.FP16_SCALE_FLOOR), rtol=2e-3)


def test_amax_is_kept_per_sigma(report: dict) -> None:
    for entry in report["stages"]["amax"]["amax"]:
        assert len(entry["by_sigma"]) == 4
        assert max(entry["by_sigma"].values()) == entry["amax"] > 0


def test_parity_is_close_but_not_exact(report: dict) -> None:
    """Rounding to 3 mantissa bits has a visible effect; an error over a few per cent would be a defect."""
    parity = report["stages"]["parity"]["parity"]
    assert len(parity) == 4
    assert all(0.99 < entry["worst_cosine"] < 0.9999999 for entry in parity)


def test_the_report_holds_generations_beside_perturbed_ones(report: dict) -> None:
    """FP8 deviates less than the largest control perturbation, and controls deviate more the larger they are."""
    study = report["stages"]["rollouts"]
    assert study["kinds"] == ["text", "text"] and len(study["controls"]) == 2
    for controls, rollout in zip(study["controls"], study["candidates"][0]["rollouts"], strict=True):
        assert len(controls) == len(study["sizes"]) and controls[0] > 0.99999 > controls[-1]
        assert controls[-1] < rollout["cosine"] < 0.9999999
        assert study["sizes"][0] < rollout["perturbation"] < study["sizes"][-1]


def test_generations_are_asked_for_by_number(tiny_fp8: Path, tiny_calib: Path, tmp_path: Path) -> None:
    argv = ["--input", str(tiny_fp8 / HALF), "--calib", str(tiny_calib), "--ptq", "direct", "--parity-rows", "1"]
    studies = []
    for count in (0, 1):
        out = tmp_path / str(count) / "dit_fp8.onnx"
        code, printed, _ = run(build_dit_fp8.main, [*argv, "--onnx", str(out), "--rollouts", str(count)])
        assert code == 0 and ("generation 0 (text): cosine 0.9" in printed) == bool(count)
        studies.append(json.loads(report_path(out).read_text())["stages"].get("rollouts"))
    assert studies[0] is None and len(studies[1]["controls"]) == 1


def test_a_gate_that_says_no_leaves_nothing(tiny_fp8: Path, tiny_calib: Path, tmp_path: Path) -> None:
    out = tmp_path / "x" / "dit_fp8.onnx"
    argv = [
        "--input",
        str(tiny_fp8 / HALF),
        "--calib",
        str(tiny_calib),
        "--onnx",
        str(out),
        "--min-cosine",
        "0.9999999",
    ]
    code, _, errors = run(build_dit_fp8.main, [*argv, "--parity-rows", "4"])
    assert code == 3
    assert "(required >= 1" in errors or "(required >= 0.9999999" in errors
    assert not out.exists() and not manifest.manifest_path(out).exists()
    assert not [path for path in out.parent.iterdir() if path.suffix in (".onnx", ".data", ".json")]


def test_a_current_artefact_is_kept_and_a_changed_one_is_not(tiny_fp8: Path, tiny_calib: Path) -> None:
    out = tiny_fp8 / FP8
    argv = ["--input", str(tiny_fp8 / HALF), "--calib", str(tiny_calib), "--onnx", str(out), "--parity-rows", "8"]
    before = out.stat().st_mtime_ns
    code, printed, _ = run(build_dit_fp8.main, argv)
    assert (code, out.stat().st_mtime_ns) == (0, before)
    assert "is current" in printed
    made = manifest.read_manifest(out)
    assert not manifest.is_current(out, {**made.inputs, "dit_fp16mixed.onnx": "0" * 64}, made.settings)[0]


def test_a_killed_build_resumes_and_gives_the_same_bytes(tiny_fp8: Path, tiny_calib: Path, tmp_path: Path) -> None:
    """After kill -9 behind the ModelOpt stage, the next run does not calibrate again."""
    out = tmp_path / "dit_fp8.onnx"
    argv = [sys.executable, str(ROOT / "build/build_dit_fp8.py"), "--input", str(tiny_fp8 / HALF)]
    argv += ["--calib", str(tiny_calib), "--onnx", str(out), "--parity-rows", "8"]
    stages = tmp_path / ".dit_fp8.partial" / "stages.json"
    kill_when(argv, lambda: stages.exists() and "quantize" in json.loads(stages.read_text())["done"])
    assert not out.exists()
    again = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert "ModelOpt max calibration" not in again.stderr and "parity" in again.stderr
    assert not stages.parent.exists()
    for name in (out.name, f"{out.name}.data"):
        assert (tmp_path / name).read_bytes() == (tiny_fp8 / FP8).with_name(name).read_bytes()


def test_a_folder_with_onnx_in_its_name_is_fine(tiny_fp8: Path, tiny_calib: Path, tmp_path: Path) -> None:
    """ModelOpt replaces ".onnx" everywhere in a path, folders included."""
    out = tmp_path / "my.onnx.files" / "dit_fp8.onnx"
    argv = ["--input", str(tiny_fp8 / HALF), "--calib", str(tiny_calib), "--onnx", str(out), "--parity-rows", "1"]
    assert run(build_dit_fp8.main, argv)[0] == 0
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "dit_fp8.onnx",
        "dit_fp8.onnx.check.npz",
        "dit_fp8.onnx.data",
        "dit_fp8.onnx.manifest.json",
        "dit_fp8.onnx.report.json",
    ]


def bypass(product: ir.Node, side: int) -> None:
    dequantize = quantizers.dequantizers(product)[side]
    product.replace_input_with(side, quantizers.quantized_source(dequantize) or dequantize.inputs[0])


def set_scale(product: ir.Node, side: int, value: float) -> None:
    scale = quantizers.dequantizers(product)[side].inputs[1]
    scale.const_value = ir.tensor(np.full_like(scale.const_value.numpy(), value), name=scale.name)


def flip_a_weight_bit(model: ir.Model, product: ir.Node) -> None:
    halves = (value for value in model.graph.initializers.values() if value.dtype == ir.DataType.FLOAT16)
    weight = next(value for value in halves if len(value.shape) == 2)
    array = weight.const_value.numpy().copy()
    array.reshape(-1).view(np.uint16)[0] ^= 1
    weight.const_value = ir.tensor(array, name=weight.name)


def flip_a_stored_code(model: ir.Model, product: ir.Node) -> None:
    weight = quantizers.dequantizers(product)[1].inputs[0]
    codes = weight.const_value.numpy().copy()
    codes.reshape(-1).view(np.uint8)[5] ^= 1
    weight.const_value = ir.tensor(codes, name=weight.name)


def round_an_island(model: ir.Model, product: ir.Node) -> None:
    names = {str(node.name) for node in find_dit_islands(model).norms}
    node = next(node for node in model.graph if str(node.name) in names and node.op_type == "ReduceMean")
    node.outputs[0].dtype = ir.DataType.FLOAT16


def quantise_attention(model: ir.Model, product: ir.Node) -> None:
    core = next(
        node
        for node in model.graph
        if node.op_type == "MatMul"
        and query.weight_initializer(node) is None
        and quantizers.dequantizers(node) == (None, None)
        and node.inputs[1].producer() is not None
    )
    donor = quantizers.dequantizers(product)[0]
    core.replace_input_with(0, donor.outputs[0])


def change_an_attribute(model: ir.Model, product: ir.Node) -> None:
    node = next(node for node in model.graph if node.op_type == "Softmax")
    node.attributes["axis"] = ir.AttrInt64("axis", 1)


DAMAGE: list[tuple[str, Callable[[ir.Model, ir.Node], None], str]] = [
    ("activation side open", lambda m, p: bypass(p, 0), "is not quantised on its activation side"),
    ("weight side open", lambda m, p: bypass(p, 1), "is not quantised on its weight side"),
    ("scale zero", lambda m, p: set_scale(p, 0, 0.0), "under the floor"),
    ("scale NaN", lambda m, p: set_scale(p, 0, float("nan")), "not finite"),
    ("weight scale infinite", lambda m, p: set_scale(p, 1, float("inf")), "not finite"),
    ("a weight bit", flip_a_weight_bit, "is not bit-identical"),
    ("a stored code", flip_a_stored_code, "does not have the nearest E4M3 codes"),
    ("an island in fp16", round_an_island, "returns FLOAT16"),
    ("attention quantised", quantise_attention, "is quantised but must not be (attention core"),
    ("an attribute", change_an_attribute, "has changed"),
]


@pytest.fixture(scope="module")
def nearest(tiny_fp8: Path, tiny_calib: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same build with every weight rounded to its nearest code."""
    out = tmp_path_factory.mktemp("nearest") / "dit_fp8.onnx"
    argv = ["--input", str(tiny_fp8 / HALF), "--calib", str(tiny_calib), "--onnx", str(out), "--ptq", "direct"]
    assert run(build_dit_fp8.main, [*argv, "--rounding", "nearest", "--parity-rows", "8"])[0] == 0
    return out


@pytest.mark.parametrize(("damage", "words"), [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE])
def test_the_proof_sees_damage(
    tiny_fp8: Path, nearest: Path, selection: quantization_selection.Selection, damage: Callable, words: str
) -> None:
    source, result = clean_source(tiny_fp8), graph_io.load(nearest)
    assert graph_proof.failures_of(graph_proof.prove(source, result, selection)) == []
    node = next(node for node in result.graph if str(node.name) == selection.quantized[3].node)
    damage(result, node)
    failures = graph_proof.failures_of(graph_proof.prove(source, result, selection))
    assert [line for line in failures if words in line], failures


@pytest.fixture(scope="module")
def at_run_time(tiny_fp8: Path, tiny_calib: Path, tmp_path_factory) -> Path:
    """Return the same build with weights stored as fp16 and quantised at run time."""
    out = tmp_path_factory.mktemp("fp16weights") / "dit_fp8.onnx"
    argv = ["--input", str(tiny_fp8 / HALF), "--calib", str(tiny_calib), "--onnx", str(out), "--weights", "fp16"]
    assert run(build_dit_fp8.main, [*argv, "--parity-rows", "8"])[0] == 0
    return out


def test_stored_fp8_weights_are_smaller_and_give_the_same_velocity(
    nearest: Path, at_run_time: Path, tiny_calib: Path, selection: quantization_selection.Selection
) -> None:
    sizes = [sum(file.stat().st_size for file in graph_io.files_of(path)) for path in (nearest, at_run_time)]
    elements = sum(product.k * product.n for product in selection.quantized)
    assert sizes[1] - sizes[0] == pytest.approx(elements, rel=0.05)  # two bytes an element became one
    row = {key: torch.from_numpy(value.copy()) for key, value in next(iter(CalibrationSet.open(tiny_calib))).items()}
    velocities = []
    for path in (nearest, at_run_time):
        with OnnxRuntimeEngine(path) as engine:
            velocities.append(engine.run(row)["velocity"].numpy())
    assert np.linalg.norm(velocities[0] - velocities[1]) / np.linalg.norm(velocities[0]) < 1e-3


def scales_of(result: ir.Model, selection: quantization_selection.Selection, side: int) -> list[np.ndarray]:
    by_name = {str(node.name): node for node in result.graph}
    pairs = [quantizers.dequantizers(by_name[product.node]) for product in selection.quantized]
    return [query.constant_of(pair[side].inputs[1]).astype(np.float64).copy() for pair in pairs]


def amax_of(result: ir.Model, selection: quantization_selection.Selection) -> np.ndarray:
    """Return one row of amax that agrees with the activation scales of a result."""
    names = [product.activation for product in selection.quantized]
    first = dict(zip(names, scales_of(result, selection, 0), strict=True))
    return np.array([[float(first[name].reshape(())) * 448 for name in selection.activations]], np.float32)


def test_our_own_inserter_agrees_with_modelopt(tiny_fp8: Path, tiny_calib: Path, tmp_path: Path) -> None:
    """Same quantized products, scales, weight bytes and velocity."""
    out = tmp_path / "dit_fp8.onnx"
    argv = ["--input", str(tiny_fp8 / HALF), "--calib", str(tiny_calib), "--onnx", str(out), "--ptq", "direct"]
    code, _, errors = run(build_dit_fp8.main, [*argv, "--parity-rows", "4"])
    assert code == 0 and "ModelOpt" not in errors
    scales_by_side = []
    for path in (tiny_fp8 / FP8, out):
        pairs = {}
        for node in graph_io.load(path).graph:
            for side, dequantize in enumerate(quantizers.dequantizers(node) if node.op_type in query.GEMM_OPS else ()):
                if dequantize is not None:
                    pairs[str(node.name), side] = query.constant_of(dequantize.inputs[1]).reshape(-1).tolist()
        scales_by_side.append(pairs)
    assert scales_by_side[0] == scales_by_side[1] and len(scales_by_side[0]) == 18
    row = {key: torch.from_numpy(value.copy()) for key, value in next(iter(CalibrationSet.open(tiny_calib))).items()}
    with OnnxRuntimeEngine(tiny_fp8 / FP8) as first, OnnxRuntimeEngine(out) as second:
        assert torch.equal(first.run(row)["velocity"], second.run(row)["velocity"])


def test_a_dead_activation_is_named(at_run_time: Path, selection: quantization_selection.Selection) -> None:
    amax = np.ones((2, len(selection.activations)), np.float32)
    amax[:, 1] = 0.0
    with pytest.raises(ToolError, match=f"activation {selection.activations[1]} of .* is 0 in every row"):
        scales.apply_scales(graph_io.load(at_run_time), selection, amax, headroom=1.0)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_dead_weight_is_named(at_run_time: Path, selection: quantization_selection.Selection, value: float) -> None:
    result, product = graph_io.load(at_run_time), selection.quantized[2]
    weight = result.graph.initializers[product.weight]
    weight.const_value = ir.tensor(np.full_like(weight.const_value.numpy(), value), name=weight.name)
    with pytest.raises(ToolError, match=f"weight {product.weight} of {product.node} is all zero"):
        scales.apply_scales(result, selection, amax_of(result, selection), headroom=1.0)


def test_a_calibration_that_disagrees_with_modelopts_is_refused(
    at_run_time: Path, selection: quantization_selection.Selection
) -> None:
    result = graph_io.load(at_run_time)
    amax = amax_of(result, selection)
    scales.apply_scales(result, selection, amax, headroom=1.0)
    amax[0, 0] *= 1.1
    with pytest.raises(GateError, match="disagree"):
        scales.apply_scales(result, selection, amax, headroom=1.0)


def test_headroom_widens_activation_scales_only(at_run_time: Path, selection: quantization_selection.Selection) -> None:
    result = graph_io.load(at_run_time)
    before, weights = scales_of(result, selection, 0), scales_of(result, selection, 1)
    scales.apply_scales(result, selection, amax_of(result, selection), headroom=4.0)
    for old, new in zip(before, scales_of(result, selection, 0), strict=True):
        assert float(new.reshape(())) == pytest.approx(4 * float(old.reshape(())), rel=2e-3)
    assert all(np.array_equal(old, new) for old, new in zip(weights, scales_of(result, selection, 1), strict=True))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="mapped files are read from Linux's /proc")
def test_a_closed_engine_lets_go_of_its_weights(tiny_fp8: Path, tmp_path: Path) -> None:
    """At full size they are 3 GB, and the next engine is loaded while a variable still refers to the closed one."""
    copies = [Path(shutil.copy(file, tmp_path)) for file in graph_io.files_of(tiny_fp8 / HALF)]

    def mapped() -> bool:
        return str(copies[1]) in Path("/proc/self/maps").read_text()

    engine = OnnxRuntimeEngine(copies[0], low_memory=True)
    assert mapped()
    engine.close()
    assert not mapped()
