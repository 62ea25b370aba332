"""The search for the fewest fp16 products: switches, order, Pareto frontier, build, and the published recipe."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import build_dit_fp8
import numpy as np
import pytest

from helpers.commands import ROOT, assert_user_error, kill_when, listing, run
from sa3_build.graph import io as graph_io, quantizers, query
from sa3_build.passes.base import run_passes
from sa3_build.passes.fold_weights import FoldWeights
from sa3_build.passes.rename_nodes import RenameNodes
from sa3_build.passes.topological_sort import SortTopologically
from sa3_build.quantization import (
    amax as quantization_amax,
    pareto,
    reference_recipe,
    round_weights,
    scales as quantization_scales,
    selection as quantization_selection,
)
from sa3_build.quantization.pareto import Effect
from sa3_build.quantization.switchable_graph import QuantizerGroup, SwitchableDit
from sa3_build.recipes.fp8 import report_path
from sa3_build.verification import parity
from sa3_trt_core.artifacts import manifest
from sa3_trt_core.artifacts.calibration_layout import Layout
from sa3_trt_core.artifacts.calibration_set import CalibrationSet, representative
from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine
from sa3_trt_core.targets import dit_target

HALF, FP8 = (dit_target("medium", precision).onnx[0] for precision in ("fp16mixed", "fp8"))
MADE = ("dit_fp8.onnx", "dit_fp8.onnx.data", "dit_fp8.onnx.frontier.png")


def command(root: Path, calib: Path, out: Path, *more: object) -> list[str]:
    argv = ["--input", root / HALF, "--calib", calib, "--onnx", out, "--parity-rows", 8, *more]
    return [str(word) for word in argv]


@pytest.fixture(scope="module")
def all_in_fp8(tiny_fp8: Path) -> dict:
    return json.loads(report_path(tiny_fp8 / FP8).read_text())


@pytest.fixture(scope="module")
def target(all_in_fp8: dict) -> float:
    """Return the cosine whose distance from 1 is half of that of the graph entirely in FP8."""
    return 1 - (1 - all_in_fp8["stages"]["parity"]["worst"]) / 2


@pytest.fixture(scope="module")
def searched(tiny_onnx: Path, tiny_calib: Path, target: float, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a build for the target by our own Q/DQ inserter."""
    out = tmp_path_factory.mktemp("searched") / "dit_fp8.onnx"
    result = run(build_dit_fp8.main, command(tiny_onnx, tiny_calib, out, "--target-cosine", target, "--ptq", "direct"))
    assert result.code == 0, result.err
    return out


@pytest.fixture(scope="module")
def report(searched: Path) -> dict:
    return json.loads(report_path(searched).read_text())


@pytest.fixture(scope="module")
def switchable(tiny_onnx: Path, tiny_calib: Path, tmp_path_factory: pytest.TempPathFactory):
    """Yield a session of the canonical tiny DiT with FP8 switches."""
    model = graph_io.load(tiny_onnx / HALF)
    run_passes(model, [SortTopologically(), FoldWeights(), RenameNodes()])
    clean = tmp_path_factory.mktemp("clean") / "clean.onnx"
    graph_io.save(model, clean)
    selection = quantization_selection.select_linears(model)
    calibration = CalibrationSet.open(tiny_calib)
    amax = quantization_amax.measure_amax(clean, selection, calibration)
    round_weights.round_weights(clean, selection, representative(calibration, round_weights.ROWS), clean.parent)
    codes = round_weights.stored_codes(selection, clean.parent)
    with SwitchableDit(clean, selection, amax, build_dit_fp8.DEFAULT_HEADROOM, codes) as dit:
        yield dit


def test_switched_off_it_is_the_source_and_on_it_is_the_fp8_graph(
    switchable: SwitchableDit, tiny_fp8: Path, tiny_calib: Path
) -> None:
    row = next(iter(CalibrationSet.open(tiny_calib)))
    expected = []
    for path in (tiny_fp8 / HALF, tiny_fp8 / FP8):
        with OnnxRuntimeEngine(path) as engine:
            expected.append(parity.denoise_rows(engine, [row])[0][1].astype(np.float64))
    count = len(switchable.groups)
    off, on = (switchable.denoised(row, [state] * count) for state in (False, True))
    assert parity.relative(expected[0], off) < 1e-3  # a branch rounds to 16 bits what ONNX Runtime would not
    assert parity.relative(expected[1], on) < parity.relative(off, on) / 2  # other codes at the edges between two
    assert parity.relative(expected[0], on) == pytest.approx(parity.relative(*expected), rel=0.1)


def test_every_switch_has_an_effect_of_its_own_and_their_squares_add_up(
    switchable: SwitchableDit, tiny_calib: Path
) -> None:
    row = next(iter(CalibrationSet.open(tiny_calib)))
    count = len(switchable.groups)
    reference = switchable.denoised(row, [False] * count)
    alone = [
        parity.relative(reference, switchable.denoised(row, [index == active for index in range(count)])) ** 2
        for active in range(count)
    ]
    together = parity.relative(reference, switchable.denoised(row, [True] * count)) ** 2
    assert min(alone) > 0 and len(set(alone)) == count
    assert sum(alone) == pytest.approx(together, rel=0.5)


def effect(name: str, macs: int, *squared: float) -> Effect:
    unit = QuantizerGroup(name, (quantization_selection.Linear(name, f"{name}.weight", name, macs, 1, 1),))
    return Effect(unit, "kind", 0, dict(zip((1.0, 0.5), squared, strict=True)))


def test_the_order_goes_by_error_per_multiply_add_where_it_is_worst() -> None:
    """`large` has the most error, `dense` the most per MAC; without `dense`, sigma 0.5 is worst, so `late` is next."""
    effects = [effect("large", 10, 4e-3, 1e-3), effect("dense", 1, 3e-3, 0.0), effect("late", 2, 0.0, 3.5e-3)]
    assert [item.group.activation for item in pareto.greedy_order(effects)] == ["dense", "late", "large"]


def test_points_count_products_share_bytes_and_error() -> None:
    order = [effect("a", 20, 2e-3, 1e-3), effect("b", 30, 1e-3, 4e-3)]
    first, second = pareto.predicted_points(order, 50, "fp8")
    assert (first.fp16_linears, first.fp8_share, first.weight_bytes, first.predicted) == (0, 0.5, 150, 1 - 5e-3 / 2)
    assert (second.fp16_linears, second.fp8_share, second.weight_bytes, second.predicted) == (1, 0.3, 170, 1 - 4e-3 / 2)
    assert pareto.predicted_points(order, 50, "fp16")[1].weight_bytes == 200


def test_the_target_is_reached_with_the_fewest_that_were_measured(report: dict, target: float) -> None:
    search, chosen = report["stages"]["sensitivity"], report["stages"]["sensitivity"]["frontier"]["chosen"]
    points = search["frontier"]["points"]
    assert report["stages"]["parity"]["worst"] >= target
    assert chosen > 0 and len(search["kept"]) == points[chosen]["fp16_linears"] < 9
    assert min(points[chosen]["worst_cosine"].values()) >= search["frontier"]["aim"] > target
    assert min(points[chosen - 1]["worst_cosine"].values()) < search["frontier"]["aim"]
    assert [name for point in points[: chosen + 1] for name in point["adds"]] == search["kept"]


def test_what_is_kept_is_excluded_with_its_reason_and_the_proof_holds(searched: Path, report: dict) -> None:
    kept, stages = report["stages"]["sensitivity"]["kept"], report["stages"]
    assert {name for name, why in stages["scales"]["excluded"].items() if why == quantization_selection.KEPT} == set(
        kept
    )
    assert all(claim["holds"] for claim in stages["scales"]["proof"])
    nodes = {str(node.name): node for node in graph_io.load(searched).graph}
    assert all(quantizers.dequantizers(nodes[name]) == (None, None) for name in kept)
    assert stages["quantize"]["quantized_linears"] == 9 - len(kept)
    chosen = stages["sensitivity"]["frontier"]["points"][stages["sensitivity"]["frontier"]["chosen"]]
    assert stages["quantize"]["fp8_share_of_token_macs"] == chosen["fp8_share"]


def test_the_plot_belongs_to_the_artefact(searched: Path, tiny_onnx: Path, tiny_calib: Path, target: float) -> None:
    plot = searched.with_name(MADE[2])
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert plot.name in manifest.read_manifest(searched).files
    again = command(tiny_onnx, tiny_calib, searched, "--target-cosine", target, "--ptq", "direct")
    assert "is current" in run(build_dit_fp8.main, again).out


def test_a_killed_search_is_not_repeated_and_gives_the_same_bytes(
    searched: Path, tiny_onnx: Path, tiny_calib: Path, target: float, tmp_path: Path
) -> None:
    out = tmp_path / "dit_fp8.onnx"
    argv = [sys.executable, str(ROOT / "build/build_dit_fp8.py"), *command(tiny_onnx, tiny_calib, out)]
    argv += ["--target-cosine", str(target), "--ptq", "direct"]
    stages = tmp_path / ".dit_fp8.partial" / "stages.json"
    kill_when(argv, lambda: stages.exists() and "sensitivity" in json.loads(stages.read_text())["done"])
    again = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert "sensitivity" not in again.stderr and "parity" in again.stderr
    assert [out.with_name(name).read_bytes() for name in MADE] == [
        searched.with_name(name).read_bytes() for name in MADE
    ]


def test_modelopt_honours_what_is_kept(
    searched: Path, tiny_onnx: Path, tiny_calib: Path, target: float, tmp_path: Path
) -> None:
    out = tmp_path / "dit_fp8.onnx"
    result = run(build_dit_fp8.main, command(tiny_onnx, tiny_calib, out, "--target-cosine", target))
    assert result.code == 0 and "ModelOpt" in result.err
    modelopt_stages, direct_stages = (json.loads(report_path(path).read_text())["stages"] for path in (out, searched))
    assert modelopt_stages["sensitivity"]["kept"] == direct_stages["sensitivity"]["kept"]
    assert modelopt_stages["parity"]["parity"] == direct_stages["parity"]["parity"]


def test_a_target_out_of_reach_is_refused_with_the_frontier(
    tiny_onnx: Path, tiny_calib: Path, target: float, tmp_path: Path
) -> None:
    out = tmp_path / "dit_fp8.onnx"
    line = command(tiny_onnx, tiny_calib, out, "--ptq", "direct", "--target-cosine", target, "--max-fp16-products", 0)
    result = run(build_dit_fp8.main, line)
    assert result.code == 3
    assert "not reached with 0 layers in 16 bits; nothing was written" in result.err
    table = result.err[result.err.index(pareto.HEADER[0]) :].splitlines()
    assert [row.split()[0] for row in table[2:]] == ["0"]
    assert not [name for name in listing(tmp_path) if name.startswith("dit_fp8")]


def test_a_target_that_holds_already_keeps_nothing(
    tiny_onnx: Path, tiny_calib: Path, tiny_fp8: Path, tmp_path: Path
) -> None:
    out = tmp_path / "dit_fp8.onnx"
    result = run(build_dit_fp8.main, command(tiny_onnx, tiny_calib, out, "--target-cosine", 0.9, "--ptq", "direct"))
    assert result.code == 0, result.err
    assert json.loads(report_path(out).read_text())["stages"]["sensitivity"]["kept"] == []
    assert out.with_name(MADE[1]).stat().st_size == (tiny_fp8 / FP8).with_name(MADE[1]).stat().st_size


def test_limits_without_a_target_are_a_mistake(tiny_onnx: Path, tiny_calib: Path, tmp_path: Path) -> None:
    out = tmp_path / "dit_fp8.onnx"
    assert_user_error(
        run(build_dit_fp8.main, command(tiny_onnx, tiny_calib, out, "--max-fp16-linears", 3)), "--target-cosine"
    )
    both = command(tiny_onnx, tiny_calib, out, "--recipe", "reference", "--target-cosine", 0.99)
    assert_user_error(run(build_dit_fp8.main, both), "--recipe reference")
    assert listing(tmp_path) == {}


def test_the_report_holds_every_setting(all_in_fp8: dict, report: dict, target: float) -> None:
    """Without the value, a later change of a default would change the meaning of an old report."""
    assert {"target_cosine": None, "max_fp16_products": None, "recipe": "ours"}.items() <= all_in_fp8[
        "settings"
    ].items()
    assert report["settings"] == {**all_in_fp8["settings"], "target_cosine": target, "ptq": "direct"}


def test_the_published_choices_are_made_and_proved(tiny_onnx: Path, tiny_calib: Path, tmp_path: Path) -> None:
    """All token products, the local embedding too; one scale per weight; amax / 36; the floor for an input of zeros."""
    out = tmp_path / "dit_fp8.onnx"
    result = run(build_dit_fp8.main, command(tiny_onnx, tiny_calib, out, "--recipe", "reference"))
    assert result.code == 0, result.err
    stages = json.loads(report_path(out).read_text())["stages"]
    assert all(claim["holds"] for claim in stages["scales"]["proof"])
    assert stages["quantize"] | {"seconds": 0} == {
        "quantized_linears": 9 + 2 + 2, "fp8_share_of_token_macs": 1.0, "seconds": 0
    }  # fmt: skip
    assert set(stages["scales"]["excluded"].values()) == {
        "attention core: no weight",
        "front end: timestep and duration embedding",
    }
    amax = {product: entry["amax"] for entry in stages["amax"]["amax"] for product in entry["linears"]}
    pairs = {str(n.name): quantizers.dequantizers(n) for n in graph_io.load(out).graph if n.op_type in query.GEMM_OPS}
    scales = {name: [float(query.constant_of(side.inputs[1])) for side in pairs[name]] for name in amax}  # one each
    assert min(amax.values()) == 0  # local_add_cond of text rows
    for name, (activation, _) in scales.items():
        assert activation == pytest.approx(max(amax[name] / 36, quantization_scales.FP16_SCALE_FLOOR), rel=2e-3)


def test_the_published_recipe_looks_at_the_last_rows_only(tiny_calib: Path) -> None:
    assert sorted(
        reference_recipe.rows_of(CalibrationSet(tiny_calib, Layout(False, (70,) * 40, ("text",) * 40))).indices
    ) == list(range(24, 40))
    assert reference_recipe.rows_of(CalibrationSet.open(tiny_calib)).rows == 8
