"""A calibration set that covers deployment: its rows, its ragged file, and the FP8 recipe's report on it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import build_dit_fp8
import make_calib
import numpy as np
import pytest
import torch
from conftest import onnx_of, run_checked
from hypothesis import given, settings, strategies as st

from helpers import damage
from helpers.commands import run
from sa3_build.calibration.capture import CheckpointModel
from sa3_build.calibration.writer import CalibrationWriter
from sa3_build.graph import io as graph_io
from sa3_build.quantization import activation_ranges, selection
from sa3_build.recipes.fp8 import report_path
from sa3_build.verification import rollouts
from sa3_trt_core import shapes
from sa3_trt_core.artifacts.calibration_layout import KEYS, KINDS, row_shape
from sa3_trt_core.artifacts.calibration_set import CalibrationSet, parity_selection, representative, tensors
from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine
from sa3_trt_core.errors import ToolError
from sa3_trt_core.sampling import schedule

SECONDS, STEPS, SEED, EXTRA = (1.0, 0.5), 2, 1528, 10_000
DRAWN = [shapes.latent_frames(seconds) for seconds in SECONDS]
FRAMES = [shapes.valid_frames(seconds, drawn) for seconds, drawn in zip(SECONDS, DRAWN, strict=True)]
Tensor = torch.Tensor


@pytest.fixture(scope="module")
def covering(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 4 prompts of 2 steps at 2 durations: every kind at the first, text and in-painting at the second."""
    path = tmp_path_factory.mktemp("kinds") / "sa3-m.calib.npz"
    config, weights = tiny_checkpoint / "model_config.json", tiny_checkpoint / "model.safetensors"
    argv = ["--model-config", config, "--checkpoint", weights, "--out", path, "--prompts", 4, "--steps", STEPS]
    run_checked(make_calib.main, [*argv, "--duration", *SECONDS])
    return path


@pytest.fixture(scope="module")
def rows(covering: Path) -> list[dict[str, Tensor]]:
    return [tensors(row) for row in CalibrationSet.open(covering)]


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> CheckpointModel:
    return CheckpointModel(tiny_checkpoint / "model_config.json", tiny_checkpoint / "model.safetensors", "cpu")


def velocity(model: CheckpointModel, row: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        return model.module(*(row[key] for key in KEYS))


def noises(seed: int, frames: int, count: int) -> list[Tensor]:
    """Return the first draws of a seed; the padded frames are drawn and cut off."""
    generator = torch.Generator().manual_seed(seed)
    drawn = DRAWN[FRAMES.index(frames)]
    return [torch.randn(1, 256, drawn, generator=generator)[..., :frames] for _ in range(count)]


def finished(model: CheckpointModel, rows: list[dict[str, Tensor]], prompt: int) -> Tensor:
    """Return the final latents of a prompt's text rows: the last step's noise is multiplied by 0."""
    last = rows[4 * prompt + STEPS - 1]
    return last["x"] - last["t"] * velocity(model, last)


def test_numpy_reads_the_ragged_file(covering: Path) -> None:
    with np.load(covering, allow_pickle=False) as archive:
        assert sorted(archive.files) == sorted([*KEYS, "latent_frames", "kind"])
        lengths = archive["latent_frames"]
        assert lengths.tolist() == [FRAMES[0]] * 12 + [FRAMES[1]] * 4 and lengths.dtype == np.int32
        codes = [0, 0, 1, 1, 0, 0, 2, 2, 0, 0, 3, 3, 0, 0, 1, 1]
        assert archive["kind"].tolist() == codes and archive["kind"].dtype == np.uint8
        assert archive["x"].shape == (256 * lengths.sum(),) and archive["local_add_cond"].shape == (
            257 * lengths.sum(),
        )
        calibration = CalibrationSet.open(covering)
        assert calibration.kinds() == [KINDS[code] for code in codes]
        assert calibration.lengths() == lengths.tolist()
        place = 0
        for index, row in enumerate(calibration):
            flat = archive["x"][256 * place : 256 * (place + lengths[index])]
            assert np.array_equal(row["x"], flat.reshape(1, 256, lengths[index]))
            assert np.array_equal(row["t5_hidden"][0], archive["t5_hidden"][index])
            place += lengths[index]


def test_the_summary_counts_kinds_and_lengths(covering: Path) -> None:
    gates = json.loads(covering.with_name(covering.name + ".manifest.json").read_text())["gates"]
    first, second = map(str, FRAMES)
    assert gates["kinds"] == {
        "text": {first: 6, second: 2}, "inpaint": {first: 2, second: 2}, "audio": {first: 2}, "null": {first: 2},
    }  # fmt: skip
    assert gates["latent_frames"] == sorted(FRAMES)


def test_text_rows_come_before_the_others_of_their_prompt(rows: list[dict[str, Tensor]]) -> None:
    for prompt in range(4):
        frames, seconds = (FRAMES[prompt // 3], SECONDS[prompt // 3])
        assert torch.equal(rows[4 * prompt]["x"], noises(SEED + prompt, frames, 1)[0])
        assert float(rows[4 * prompt]["seconds_total"]) == seconds
        assert not rows[4 * prompt]["local_add_cond"].any()


@pytest.mark.parametrize(("prompt", "parts"), [(0, (0.25, 0.75)), (3, (0.5, 1.0))])
def test_in_painting_keeps_the_latents_just_made(
    model: CheckpointModel, rows: list[dict[str, Tensor]], prompt: int, parts: tuple[float, float]
) -> None:
    seconds, frames = SECONDS[prompt // 3], FRAMES[prompt // 3]
    first, last, end = (-(-int(part * seconds * 44100) // 4096) for part in (*parts, 1.0))
    latents = finished(model, rows, prompt)
    keep = torch.ones(1, 1, frames)
    keep[..., first:last] = 0
    keep[..., end:] = 0
    assert 0 < int((keep == 0).sum()) < frames
    for row in rows[4 * prompt + 2 : 4 * prompt + 4]:
        assert torch.equal(row["local_add_cond"][:, :1], keep)
        assert torch.allclose(row["local_add_cond"][:, 1:], keep * latents, atol=1e-4)
        assert torch.equal(row["t5_hidden"], rows[4 * prompt]["t5_hidden"])
    first_noise, second_noise = noises(SEED + prompt + EXTRA, frames, 2)
    start, after = rows[4 * prompt + 2], rows[4 * prompt + 3]
    assert torch.equal(start["x"], first_noise)
    level = after["t"]
    denoised = start["x"] - start["t"] * velocity(model, start)
    assert torch.allclose(after["x"], (1 - level) * denoised + level * second_noise, atol=1e-4)


def test_audio_starts_between_its_latents_and_noise(model: CheckpointModel, rows: list[dict[str, Tensor]]) -> None:
    """Prompt 1's latents, mixed with noise at 0.9, start prompt 0's rows; levels are warped, then scaled."""
    start, after = rows[6:8]
    assert [float(row["t"]) for row in (start, after)] == pytest.approx([0.9, 0.9 * float(schedule.sigmas(2)[1])])
    first, second = noises(SEED + 1 + EXTRA, FRAMES[0], 2)
    assert torch.allclose(start["x"], 0.1 * finished(model, rows, 1) + 0.9 * first, atol=1e-4)
    assert torch.equal(start["t5_hidden"], rows[0]["t5_hidden"])
    assert not torch.equal(start["t5_hidden"], rows[4]["t5_hidden"])
    denoised = start["x"] - start["t"] * velocity(model, start)
    assert torch.allclose(after["x"], (1 - after["t"]) * denoised + after["t"] * second, atol=1e-4)


def test_null_rows_are_those_of_a_guided_generation(model: CheckpointModel, rows: list[dict[str, Tensor]]) -> None:
    """The rows have no text, and x follows from velocity = null + 3 (text - null)."""
    start, after = rows[10:12]
    assert not start["t5_hidden"].any() and not start["t5_mask"].any()
    assert float(start["seconds_total"]) == SECONDS[0] and not start["local_add_cond"].any()
    first, second = noises(SEED + 2 + EXTRA, FRAMES[0], 2)
    assert torch.equal(start["x"], first)
    with_prompt = {**start, "t5_hidden": rows[8]["t5_hidden"], "t5_mask": rows[8]["t5_mask"]}
    without, with_text = velocity(model, start), velocity(model, with_prompt)
    denoised = start["x"] - start["t"] * (without + 3.0 * (with_text - without))
    assert torch.allclose(after["x"], (1 - after["t"]) * denoised + after["t"] * second, atol=1e-4)
    assert not torch.allclose(without, with_text, atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(plan=st.lists(st.tuples(st.integers(1, 6), st.sampled_from(KINDS)), min_size=1, max_size=5))
def test_rows_of_any_plan_come_back(tmp_path_factory, plan: list[tuple[int, str]]) -> None:
    target = tmp_path_factory.mktemp("ragged") / "x.npz"
    frames, kinds = [length for length, _ in plan], [kind for _, kind in plan]
    rng = np.random.default_rng(0)
    written = [{key: rng.random((1, *row_shape(key, length)), np.float32) for key in KEYS} for length in frames]
    for row, kind in zip(written, kinds, strict=True):
        row["local_add_cond"] *= kind == "inpaint"  # without stored kinds, a nonzero mask marks a row as in-painting
    writer = CalibrationWriter(target, len(plan), frames, {}, kinds)
    for row in written:
        writer.append(row)
    writer.finish()
    calibration = CalibrationSet.open(target)
    assert (calibration.lengths(), calibration.kinds()) == (frames, kinds)
    for row, again in zip(written, calibration, strict=True):
        assert all(np.array_equal(row[key], again[key]) for key in KEYS)
    with np.load(target) as archive:
        assert ("kind" in archive) == (len(set(frames)) > 1 or set(kinds) != {"text"})


def changed(key: str, make: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path, damage.Arrays], None]:
    return lambda path, arrays: np.savez(path, **{**arrays, key: make(arrays[key])})


def without(key: str) -> Callable[[Path, damage.Arrays], None]:
    return lambda path, arrays: np.savez(path, **{name: array for name, array in arrays.items() if name != key})


def put(index: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda array: np.where(np.arange(len(array)) == index, array.dtype.type(value), array)


FAULTS = {
    "no kinds": (without("kind"), ("no member kind",)),
    "lengths left out": (without("latent_frames"), ("member x", "shape")),
    "an unknown kind": (changed("kind", put(3, 9)), ("row 3", "kind 9")),
    "no frames": (changed("latent_frames", put(5, 0)), ("row 5", "0 latent frames")),
    "fewer than none": (changed("latent_frames", put(5, -70)), ("row 5", "-70 latent frames")),
    "too many frames": (changed("latent_frames", put(2, 5000)), ("row 2", "5000 latent frames")),
    "one frame more": (changed("latent_frames", put(0, FRAMES[0] + 1)), ("member x", "shape")),
    "lengths of fewer rows": (changed("latent_frames", lambda a: a[:-1]), ("latent_frames", "[15]", "[16]")),
    "kinds of more rows": (changed("kind", lambda a: np.append(a, a[:1])), ("kind", "[17]", "[16]")),
    "wide lengths": (changed("latent_frames", lambda a: a.astype(np.int64)), ("latent_frames", "int64", "int32")),
    "pickled kinds": (changed("kind", lambda a: a.astype(object)), ("member kind", "pickled objects")),
    "x too short": (changed("x", lambda a: a[:-256]), ("member x", "shape")),
    "x in two axes": (changed("x", lambda a: a.reshape(256, -1)), ("member x", "shape")),
    "a local channel too few": (changed("local_add_cond", lambda a: a[:-1]), ("local_add_cond", "shape")),
    "a million rows": (lambda p, a: damage.write_false_row_count(p, a, 1 << 20), ()),
    "too many rows": (lambda p, a: damage.write_false_row_count(p, a, 1 << 40), (f"{1 << 40} rows",)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_ragged_set_is_named(covering: Path, tmp_path: Path, fault: str) -> None:
    write, words = FAULTS[fault]
    bad = tmp_path / "bad.npz"
    with np.load(covering) as good:
        write(bad, dict(good))
    with pytest.raises(ToolError) as caught:
        CalibrationSet.open(bad).check_values()
    assert all(word in str(caught.value) for word in (str(bad), *words)), caught.value


def test_a_bad_value_names_its_row(covering: Path, tmp_path: Path) -> None:
    with np.load(covering) as good:
        arrays = {key: good[key].copy() for key in good.files}
    np.savez(tmp_path / "good.npz", **arrays)
    assert CalibrationSet.open(tmp_path / "good.npz").check_values()["t"][1] == 1.0
    arrays["x"][256 * 12 * FRAMES[0]] = np.nan  # the first number of row 12, the first of another length
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ToolError, match="row 12 of x holds NaN"):
        CalibrationSet.open(tmp_path / "bad.npz").check_values()


@pytest.fixture(scope="module")
def built(tiny_onnx: Path, covering: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    """Return the report and the output of an FP8 build by ModelOpt on the ragged set."""
    out = tmp_path_factory.mktemp("kinds") / "dit_fp8.onnx"
    argv = ["--input", onnx_of(tiny_onnx, "sa3-m"), "--calib", covering, "--onnx", out, "--ptq", "modelopt"]
    result = run(build_dit_fp8.main, argv)
    assert result.code == 0, result.err
    return json.loads(report_path(out).read_text()), result.out


def test_every_row_sets_the_scales(built: tuple[dict, str], tiny_onnx: Path, covering: Path) -> None:
    """ModelOpt calibrates on rows of two lengths, and its scales and ours agree."""
    stages = built[0]["stages"]
    assert stages["amax"]["rows"] == 16 and stages["scales"]["agreement_with_modelopt"] < 0.01
    for entry in stages["amax"]["amax"]:
        assert set(entry["by_kind"]) == set(KINDS)
        assert max(entry["by_kind"].values()) == entry["amax"] == max(entry["by_sigma"].values())


def test_parity_is_told_by_kind(built: tuple[dict, str]) -> None:
    parity = built[0]["stages"]["parity"]
    assert [(entry["kind"], entry["rows"]) for entry in parity["by_kind"]] == [
        ("text", 8), ("inpaint", 4), ("audio", 2), ("null", 2),
    ]  # fmt: skip
    assert min(entry["worst_cosine"] for entry in parity["by_kind"]) == parity["worst"] > 0.9
    for entry in parity["by_kind"]:
        assert f"{entry['kind']} " in built[1] and f"{entry['worst_cosine']:.6f}" in built[1]


def test_shares_are_told_by_product_and_sigma(built: tuple[dict, str]) -> None:
    """With every row calibrated nothing saturates; each quantised activation has shares at each sigma."""
    stages = built[0]["stages"]
    assert [e["activation"] for e in stages["shares"]["shares"]] == [e["activation"] for e in stages["amax"]["amax"]]
    for entry, amax in zip(stages["shares"]["shares"], stages["amax"]["amax"], strict=True):
        assert list(entry["by_sigma"]) == list(amax["by_sigma"]) and len(entry["by_sigma"]) == 4
        assert all(at["saturated"] == 0 and 0 < at["subnormal"] < 1 for at in entry["by_sigma"].values())


def test_shares_are_those_of_the_tensors(tiny_onnx: Path, covering: Path) -> None:
    source = onnx_of(tiny_onnx, "sa3-m")
    names = selection.select_linears(graph_io.load(source)).activations[:4]
    few = representative(CalibrationSet.open(covering), 1)
    watched = {f"w{index}": name for index, name in enumerate(names)}
    values: dict[tuple[str, str], list[np.ndarray]] = {}
    with OnnxRuntimeEngine(source, graph_io.with_probe_outputs(source, watched)) as engine:
        for row in few:
            outputs = engine.run(tensors(row))
            for output, name in watched.items():
                flat = np.abs(outputs[output].float().numpy().reshape(-1))
                values.setdefault((name, f"{float(row['t'][0]):.6g}"), []).append(flat)
    scales = {name: float(np.median(np.concatenate(values[name, "1"]))) / 40 for name in names}
    for entry in activation_ranges.measure_shares(source, scales, few):
        for sigma, shares in entry["by_sigma"].items():
            x = np.concatenate(values.pop((entry["activation"], sigma))) / entry["scale"]
            assert shares["saturated"] == pytest.approx((x > 448).mean(), abs=2e-4)
            assert shares["subnormal"] == pytest.approx(((x > 0) & (x < 2.0**-6)).mean(), abs=2e-4)
    assert not values
    tight = activation_ranges.measure_shares(source, {name: scale / 20 for name, scale in scales.items()}, few)
    assert all(shares["saturated"] > 0.3 for entry in tight for shares in entry["by_sigma"].values())


def test_parity_rows_hold_every_kind_and_sigma(covering: Path) -> None:
    calibration = CalibrationSet.open(covering)
    all_pairs = set(zip(calibration.kinds(), calibration.sigmas(), strict=True))
    for limit in (1, 8, 100):
        chosen = representative(calibration, limit)
        assert set(zip(chosen.kinds(), chosen.sigmas(), strict=True)) == all_pairs
        assert chosen.rows == (16 if limit == 100 else 8)
        assert chosen.lengths() == [calibration.lengths()[index] for index in sorted(chosen.indices)]
    kinds, sigmas = ["text"] * 40 + ["null"] * 8, [1.0, 0.5] * 24
    count_by_kind = Counter(kinds[index] for index in parity_selection(sigmas, 16, kinds))
    assert count_by_kind == {"text": 8, "null": 8}


def test_generations_start_from_kinds_in_turn(covering: Path) -> None:
    """Audio to audio starts below sigma 1; among the others each kind comes once before any comes twice."""
    calibration = CalibrationSet.open(covering)
    kinds, sigmas = calibration.kinds(), calibration.sigmas()
    starts = rollouts.varied_starts(calibration, 3)
    assert sorted(kinds[start] for start in starts) == ["inpaint", "null", "text"]
    every = rollouts.varied_starts(calibration, 100)
    assert every == [index for index, sigma in enumerate(sigmas) if sigma == 1.0] and len(every) > 5
    assert Counter(kinds[start] for start in rollouts.varied_starts(calibration, 5))["text"] == 2
