"""The validation command: an identical file passes exactly, every kind of broken FP8 file fails a gate."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import validate_fp8
from conftest import onnx_of

from helpers import broken_fp8
from helpers.commands import CommandResult, assert_user_error, listing, run

SHORT = ["--prompts", 1, "--seconds", 0.5, "--steps", 4, "--extra", 1]
GATE = "single_step.by_kind.text.denoised.cosine.worst"
VELOCITY_GATE = "single_step.by_kind.text.velocity.cosine.worst"  # untrained blocks hardly change the denoised latent


def validate(root: Path, out: Path, *line: object) -> CommandResult:
    return run(validate_fp8.main, ["--onnx-root", root, "--out", out, "--backend", "onnxruntime", *SHORT, *line])


def report_of(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def good(tiny_fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a complete validation of the valid FP8 file, page included."""
    out = tmp_path_factory.mktemp("validation") / "good"
    result = validate(tiny_fp8, out, "--html")
    assert result.code == 0, result.err
    return out


def failing(result: CommandResult) -> list[str]:
    """Return the figures of the gates that failed, from the command's output."""
    assert result.code == 3, (result.out, result.err)
    return [line.split("FAIL ")[1].split(": ")[0] for line in result.err.splitlines() if "FAIL " in line]


def test_fp16mixed_against_itself_passes_with_exact_equality(tiny_fp8: Path, tmp_path: Path) -> None:
    result = validate(tiny_fp8, tmp_path, "--reference", "fp16mixed", "--candidate", "fp16mixed")
    assert result.code == 0 and "Outputs are bit-identical to the reference." in result.out
    report = report_of(tmp_path)
    assert report["identical"] is True
    for kind in ("text", "inpaint", "guided"):
        for figure in ("velocity", "denoised", "euler"):
            distances = report["single_step"]["by_kind"][kind][figure]
            assert (distances["cosine"]["worst"], distances["relative"]["worst"], distances["gain"]["worst"]) == (
                1.0,
                0.0,
                1.0,
            )
        assert report["rollouts"]["ping_pong"][kind]["candidate"]["relative"]["worst"] == 0.0
        assert report["audio"][kind]["candidate"]["spectral"]["worst"] == 0.0
    assert report["rollouts"]["euler"]["text"]["candidate"]["cosine"]["worst"] == 1.0


def test_a_good_fp8_file_passes_and_is_not_identical(good: Path) -> None:
    report = report_of(good)
    assert report["identical"] is False and all(gate["passed"] for gate in report["gates"])
    text = report["single_step"]["by_kind"]["text"]["denoised"]
    assert text["relative"]["worst"] > 0 and text["cosine"]["worst"] < 1.0


@pytest.mark.parametrize(
    ("damage", "gate"),
    [
        pytest.param(partial(broken_fp8.quadruple_weight_scales, product=-1), GATE, id="one scale x 4"),
        pytest.param(
            partial(broken_fp8.round_island_to_fp16, input_name="t"), "resolution.t.share.worst",
            id="an island in fp16: t",
        ),
        pytest.param(
            partial(broken_fp8.round_island_to_fp16, input_name="seconds_total"), "resolution.seconds.share.worst",
            id="an island in fp16: the duration",
        ),
        pytest.param(broken_fp8.reset_activation_scales, GATE, id="uncalibrated scales"),
        pytest.param(broken_fp8.swap_weights, VELOCITY_GATE, id="two swapped weights"),
    ],
)  # fmt: skip
def test_a_broken_fp8_file_is_caught_by_a_gate(
    tiny_fp8: Path, tmp_path: Path, damage: Callable[[onnx.ModelProto], None], gate: str
) -> None:
    broken = broken_fp8.break_graph(onnx_of(tiny_fp8, "sa3-m-fp8"), tmp_path / "dit_fp8.onnx", damage)
    result = validate(tiny_fp8, tmp_path / "out", "--candidate", broken, "--extra", 0, "--no-audio")
    assert gate in failing(result)
    assert gate in result.err.splitlines()[0] or any(gate in line for line in result.err.splitlines())
    report = report_of(tmp_path / "out")
    assert [entry["figure"] for entry in report["gates"] if not entry["passed"]] == failing(result)


def test_the_report_has_its_documented_parts(good: Path) -> None:
    report = report_of(good)
    page = (Path(validate_fp8.__file__).parents[1] / "build/docs/validation.md").read_text()
    assert report["format"] == 1 and all(f"`{key}`" in page for key in report), (
        "build/docs/validation.md documents every key"
    )
    assert [case["kind"] for case in report["cases"]] == ["text", "inpaint", "guided"]
    sigmas = [entry["sigma"] for entry in report["single_step"]["by_sigma"]]
    assert sigmas == sorted(sigmas, reverse=True) and len(sigmas) == 4 and sigmas[0] == 1.0
    for kind, entry in report["single_step"]["by_kind"].items():
        cosine = entry["denoised"]["cosine"]
        assert entry["rows"] == 4 and cosine["worst"] <= cosine["p5"] <= cosine["median"], kind
        assert report["single_step"]["worst"][kind]["cosine"] == cosine["worst"]
    assert [entry["rows"] for entry in report["batch"]["candidate"]] == list(range(2, 9))
    assert report["speed"]["skipped"] in ("no NVIDIA GPU is visible", "no --bench")
    assert {path.name for path in good.iterdir()} == {
        "report.json", "report.md", "listen.html", "steps.png", "rollouts.png", "audio.png"
    }  # fmt: skip


def test_x_plus_dt_v_is_nearly_blind_where_the_denoised_latent_sees(good: Path) -> None:
    first = report_of(good)["single_step"]["by_sigma"][0]
    assert first["euler"]["relative"]["worst"] < first["denoised"]["relative"]["worst"] / 10


def test_controls_stand_beside_the_candidate_and_are_nearer(good: Path) -> None:
    text = report_of(good)["rollouts"]["ping_pong"]["text"]
    assert set(text) == {"candidate", "perturbed", "other_kernels"}
    for control in ("perturbed", "other_kernels"):
        assert 0 < text[control]["relative"]["worst"] < text["candidate"]["relative"]["worst"]


def test_a_calibration_set_gives_starts_and_rows(tiny_fp8: Path, tiny_calib: Path, tmp_path: Path) -> None:
    argv = ["--onnx-root", tiny_fp8, "--out", tmp_path, "--backend", "onnxruntime", "--calib", tiny_calib]
    result = run(validate_fp8.main, [*argv, "--prompts", 1, "--rows", 8, "--steps", 2, "--extra", 0, "--no-audio"])
    assert result.code == 0, result.err
    report = report_of(tmp_path)
    assert report["single_step"]["by_kind"]["text"]["rows"] == 8 + 2 and report["audio"] == {}
    assert report["cases"][0]["name"] == "row 0, text" and "BPM" in report["cases"][0]["prompt"]


def test_a_gate_file_of_ones_own_decides(tiny_fp8: Path, tmp_path: Path) -> None:
    strict = tmp_path / "gates.toml"
    figure = "single_step.by_kind.text.denoised.cosine.mean"
    strict.write_text(f'format = 1\n[[gate]]\nfigure = "{figure}"\nat_least = 1\nwhy = "strict"\n')
    result = validate(tiny_fp8, tmp_path / "out", "--gate", strict, "--extra", 0, "--no-audio")
    assert failing(result) == [figure] and ": strict" in result.err
    assert result.err.splitlines()[-2].startswith("error: fp8 FAIL ")
    assert (tmp_path / "out" / "report.json").is_file()


def test_mistakes_are_two_lines_and_write_nothing(tiny_fp8: Path, tiny_calib: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    wrong = tmp_path / "gates.toml"
    wrong.write_text("format = 1\n")
    assert_user_error(validate(tiny_fp8, out, "--gate", wrong), "gates.toml has no [[gate]]")
    assert_user_error(validate(tiny_fp8, out, "--candidate", "fp7"), "unknown DiT fp7")
    assert_user_error(validate(tiny_fp8, out, "--html", "--no-audio"), "--html requires audio")
    assert_user_error(validate(tiny_fp8, out, "--calib", tmp_path / "a.npz"), "no such calibration file")
    assert_user_error(validate(tiny_fp8, out, "--calib", tiny_calib, "--prompts-file", wrong), "exclude each other")
    assert_user_error(validate(tiny_fp8, out, "--prompts", 1000), "--prompts 1000")
    absent = shutil.copytree(tiny_fp8, tmp_path / "root", ignore=shutil.ignore_patterns("dit_fp8*"))
    assert_user_error(validate(absent, out), "dit_fp8.onnx")
    assert not out.exists()


def test_the_producer_validates_what_it_has_built(tiny_fp8: Path, tiny_calib: Path, tmp_path: Path) -> None:
    """The engine is current, so only the validation runs, with the decoder under the same root."""
    import build_dit_fp8

    root = shutil.copytree(tiny_fp8, tmp_path / "root")
    argv = ["--input", onnx_of(root, "sa3-m"), "--calib", tiny_calib, "--onnx", onnx_of(root, "sa3-m-fp8")]
    result = run(build_dit_fp8.main, [*argv, "--parity-rows", 8, "--validate"])
    assert result.code == 0 and "is current" in result.out, result.err
    folder = root / "sa3-m" / "dit_fp8.onnx.validation"
    assert f"validated: {folder}" in result.out and (folder / "listen.html").is_file()
    assert report_of(folder)["settings"]["calib"] == str(tiny_calib)


def test_the_consumer_validates_only_dits(tiny_fp8: Path, tmp_path: Path) -> None:
    import build_from_onnx

    pytest.importorskip("tensorrt_rtx", reason="the RTX builder is part of requirements-cpu.txt only")
    argv = ["--backend", "tensorrt_rtx", "--arch", "sm_89", "--onnx-root", tiny_fp8, "--models-dir", tmp_path / "m"]
    assert_user_error(
        run(build_from_onnx.main, ["t5gemma", *argv, "--validate"]), "--validate requires at least one DiT"
    )
    assert listing(tmp_path) == {}


def test_the_page_holds_the_sounds_of_the_report(good: Path) -> None:
    text = (good / "listen.html").read_text()
    data = json.loads(text.split('<script type="application/json" id="data">')[1].split("</script>")[0])
    assert [case["name"] for case in data["cases"]] == [case["name"] for case in report_of(good)["cases"]]
    assert data["names"] == ["fp16mixed", "fp8"] and "https://" not in text and "http://" not in text
    sounds = [decoded(sound) for case in data["cases"] for sound in case["sounds"]]
    assert all(sound.shape == (22050, 2) for sound in sounds)
    assert not any(np.array_equal(first, second) for first, second in zip(sounds[::2], sounds[1::2], strict=True))


def decoded(sound: str) -> np.ndarray:
    import soundfile

    return soundfile.read(io.BytesIO(base64.b64decode(sound)), dtype="int16")[0]
