"""Rollouts compared with a reference: shared noise, controls, and the equivalent input perturbation."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import compare_rollouts
import numpy as np
import pytest

from helpers.commands import CommandResult, assert_user_error, run
from sa3_build.calibration.writer import CalibrationWriter
from sa3_build.recipes.fp8 import report_path
from sa3_build.verification import rollouts
from sa3_trt_core.artifacts.calibration_set import CalibrationSet
from sa3_trt_core.targets import dit_target

HALF, FP8 = (dit_target("medium", precision).onnx[0] for precision in ("fp16mixed", "fp8"))
CONTROLS = [1e-6, 9e-6, 1e-4, 9e-4]  # 1 - cosine goes with the square of the size
SIZES = rollouts.CONTROLS[: len(CONTROLS)]


@pytest.mark.parametrize(
    ("distance", "expected"), [(1e-6, 1e-3), (3e-6, math.sqrt(3) * 1e-3), (9e-4, 3e-2), (1e-8, 1e-4), (0.0, 0.0)]
)
def test_a_drift_is_read_between_the_controls_and_below_them(distance: float, expected: float) -> None:
    assert rollouts.equivalent_perturbation(distance, CONTROLS, SIZES) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("distance", [1e-3, math.nan])
def test_a_drift_above_the_largest_control_has_no_size(distance: float) -> None:
    assert rollouts.equivalent_perturbation(distance, CONTROLS, SIZES) == math.inf


def test_a_control_that_falls_back_does_not_break_the_reading() -> None:
    sizes = [
        rollouts.equivalent_perturbation(height, [1e-6, 5e-5, 4e-5, 9e-4], SIZES) for height in (1e-6, 2e-5, 1e-4, 9e-4)
    ]
    assert sizes == sorted(sizes) and sizes[0] == pytest.approx(1e-3) and sizes[-1] == pytest.approx(3e-2)
    between = rollouts.equivalent_perturbation(
        8e-5, [1e-6, 5e-5, 4e-5, 9e-4], SIZES
    )  # the third control counts as 5e-5
    assert between == pytest.approx(1e-2 * 3 ** (math.log(1.6) / math.log(18)))


@pytest.fixture(scope="module")
def document_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rollouts") / "rollouts.json"


@pytest.fixture(scope="module")
def compared(tiny_fp8: Path, tiny_calib: Path, document_path: Path) -> CommandResult:
    """Compare rollouts of one prompt: the tiny FP16-mixed DiT with itself and with the FP8 DiT."""
    argv = ["--reference", tiny_fp8 / HALF, "--candidate", tiny_fp8 / HALF, "--candidate", tiny_fp8 / FP8]
    return run(
        compare_rollouts.main, [*argv, "--calib", tiny_calib, "--prompts", 1, "--rows", 4, "--json", document_path]
    )


def test_noise_is_shared_and_controls_grow(compared: CommandResult, document_path: Path) -> None:
    """The reference compared with itself is exact: unshared noise or an unseeded control would show."""
    assert compared.code == 0, compared.err
    document = json.loads(document_path.read_text())
    same, fp8 = document["candidates"]
    assert same["rollouts"] == [{"cosine": pytest.approx(1.0, abs=1e-12), "perturbation": pytest.approx(0.0, abs=1e-6)}]
    (controls,) = document["controls"]
    assert 1 > controls[0] > controls[1] > controls[2] > controls[3] > 0.9
    assert 0.5 < fp8["rollouts"][0]["cosine"] < 0.99999
    expected = rollouts.equivalent_perturbation(1 - fp8["rollouts"][0]["cosine"], [1 - control for control in controls])
    assert fp8["rollouts"][0]["perturbation"] == (None if math.isinf(expected) else pytest.approx(expected))


def test_the_start_alone_is_soon_replaced_by_noise(
    compared: CommandResult, document_path: Path, tiny_fp8: Path, tiny_calib: Path, tmp_path: Path
) -> None:
    every_step = json.loads(document_path.read_text())["controls"][0]
    out = tmp_path / "start.json"
    argv = ["--reference", tiny_fp8 / HALF, "--candidate", tiny_fp8 / HALF, "--calib", tiny_calib, "--json", out]
    result = run(compare_rollouts.main, [*argv, "--prompts", 1, "--rows", 1, "--perturb", "start"])
    assert result.code == 0, result.err
    start = json.loads(out.read_text())["controls"][0]
    assert start[3] < 1 - 1e-12 and 1 - min(start) < (1 - every_step[3]) / 10


def test_rows_and_shares_stand_beside_the_rollouts(
    compared: CommandResult, document_path: Path, tiny_fp8: Path
) -> None:
    same, fp8 = json.loads(document_path.read_text())["candidates"]
    stages = json.loads(report_path(tiny_fp8 / FP8).read_text())["stages"]
    assert min(same["worst_by_sigma"].values()) == pytest.approx(1.0, abs=1e-12) and same["fp8_share"] == 0.0
    assert fp8["fp8_share"] == pytest.approx(stages["quantize"]["fp8_share_of_token_macs"], rel=1e-12)
    assert len(fp8["worst_by_sigma"]) == 4 and 0.99 < min(fp8["worst_by_sigma"].values()) < 0.9999999
    words = [line for line in compared.out.splitlines() if str(tiny_fp8 / FP8) in line and "%" in line]
    assert len(words) == 1 and f"{fp8['fp8_share']:.1%}" in words[0]


def test_a_set_without_a_start_is_refused(tiny_fp8: Path, tiny_calib: Path, tmp_path: Path) -> None:
    path = tmp_path / "late.npz"
    writer = CalibrationWriter(path, 1, 70, {})
    writer.append({key: np.array(value) for key, value in list(CalibrationSet.open(tiny_calib))[1].items()})
    writer.finish()
    argv = ["--reference", tiny_fp8 / HALF, "--candidate", tiny_fp8 / FP8, "--calib", path]
    assert_user_error(run(compare_rollouts.main, argv), "late.npz has no row of sigma 1")


def test_a_candidate_that_is_no_dit_is_refused(tiny_fp8: Path, tiny_calib: Path, tmp_path: Path) -> None:
    candidate = tmp_path / "text.onnx"
    shutil.copy(tiny_fp8 / "t5gemma" / "encoder.onnx", candidate)
    shutil.copy(tiny_fp8 / "t5gemma" / "encoder.onnx.data", tmp_path / "encoder.onnx.data")
    argv = ["--reference", tiny_fp8 / HALF, "--candidate", candidate, "--calib", tiny_calib]
    assert_user_error(run(compare_rollouts.main, argv), "is not a dit graph")
