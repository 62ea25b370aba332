"""The two-sample test: statistics compared with other libraries, features of known sounds, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import validate_fp8
from conftest import onnx_of
from onnx import TensorProto, helper, numpy_helper

from helpers.broken_fp8 import quantised_products
from helpers.commands import assert_user_error, listing, run
from helpers.graphs import private_copy
from sa3_trt_core.shapes import SAMPLE_RATE
from sa3_validation import sound_features, two_sample
from sa3_validation.embedding import Embedder
from sa3_validation.frechet import frechet_distance
from sa3_validation.kept_span import COUNT, kept_decibels, kept_features, kept_frames
from sa3_validation.scaled_control import scaled_graph
from sa3_validation.sound_features import features_of, spectrogram_of

SHORT = ["--prompts", 1, "--seconds", 0.5, "--steps", 2, "--extra", 0, "--backend", "onnxruntime"]


def draws(seed: int, rows: int = 80, width: int = 6, shift: float = 0.0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal((rows, width)) + shift * np.eye(1, width)


def test_the_frechet_distance_is_that_of_the_textbook_formula() -> None:
    scipy_linalg = pytest.importorskip("scipy.linalg")
    first, second = draws(0) @ np.diag([1, 2, 3, 1, 1, 0.5]), draws(1, 60, shift=2.0)
    covariances = [np.cov(side, rowvar=False) for side in (first, second)]
    root = scipy_linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = np.square(first.mean(0) - second.mean(0)).sum() + np.trace(sum(covariances) - 2 * root)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(first, first) == pytest.approx(0.0, abs=1e-9)
    moved = frechet_distance(first, first + np.eye(1, 6))
    assert moved == pytest.approx(1.0, rel=1e-9), "equal spreads: the square of the shift"


def test_the_frechet_distance_refuses_what_has_none() -> None:
    for pair in ((draws(0), draws(0, width=5)), (draws(0)[:1], draws(0)), (draws(0) * np.nan, draws(0))):
        with pytest.raises(ValueError, match=r"of one width|not finite"):
            frechet_distance(*pair)


def test_the_auc_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    first, second = draws(0, width=1)[:, 0].round(1), draws(1, width=1)[:, 0].round(1) + 0.5  # rounded: with ties
    expected = metrics.roc_auc_score(np.repeat([0, 1], len(first)), np.concatenate([first, second]))
    interval = two_sample.interval(first, second, np.arange(len(first)), 0)
    assert interval.auc == pytest.approx(expected) == two_sample.area(first, second)
    assert interval.low < expected < interval.high


def test_equal_distributions_are_chance_and_others_are_told_apart() -> None:
    prompts = list(range(80))
    for auc in two_sample.compare(draws(0), draws(1), prompts).values():
        assert auc.low < 0.5 < auc.high
    for auc in two_sample.compare(draws(0), draws(1, shift=2.0), prompts).values():
        assert auc.low > 0.7


def test_a_prompt_is_never_learnt_and_asked_about() -> None:
    """Labels depend on the prompt only: a classifier that had seen a prompt would separate them, else it cannot."""
    prompts = [index % 8 for index in range(80)]
    place = np.random.RandomState(0).standard_normal((8, 6))
    first = np.stack([place[prompt] for prompt in prompts]) + 0.01 * draws(1)
    second = np.stack([place[(prompt + 1) % 8] for prompt in prompts]) + 0.01 * draws(2)
    for auc in two_sample.compare(first, second, prompts).values():
        assert auc.auc < 0.7


def test_the_interval_of_the_whole_procedure_is_wider_than_that_of_its_scores() -> None:
    pair = draws(0), draws(1)
    prompts = list(range(80))
    plain, refitted = (
        two_sample.compare(*pair, prompts, 0, ("logistic_regression",), refit) for refit in (False, True)
    )
    widths = [result["logistic_regression"].high - result["logistic_regression"].low for result in (plain, refitted)]
    assert widths[1] > widths[0] and plain["logistic_regression"].auc == refitted["logistic_regression"].auc


def test_shifts_are_in_deviations_and_by_group() -> None:
    first = draws(0, 400)
    shifts = two_sample.shifts(first, first + [3, 3, 0, 0, 0, 0] * first.std(axis=0), ["a", "a", "b", "b", "b", "c"])
    assert shifts == pytest.approx({"a": 3.0, "b": 0.0, "c": 0.0}, abs=1e-9)


def tone(frequency: float, level: float = 0.2, seconds: float = 4.0) -> np.ndarray:
    wave = level * np.sin(2 * np.pi * frequency * np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE)
    return np.stack([wave, wave], axis=1)


def value(features: sound_features.Features, name: str) -> float:
    return float(features.values[features.names.index(name)])


def test_features_say_what_is_in_a_sound() -> None:
    low, high = features_of(tone(440.0)), features_of(tone(3520.0))
    pitches = [value(low, f"mean of pitch class {i}") for i in range(12)]
    assert int(np.argmax(pitches)) == 9, "A, counted from C"
    assert value(high, "mean of rolloff") - value(low, "mean of rolloff") == pytest.approx(3.0, abs=0.1)  # octaves
    softer = features_of(tone(440.0, 0.1))
    assert value(low, "loudness") - value(softer, "loudness") == pytest.approx(6.02, abs=0.02)  # half the amplitude
    noise = features_of(np.random.RandomState(0).standard_normal((SAMPLE_RATE, 2)) * 0.1)
    assert value(noise, "mean of flatness") > value(low, "mean of flatness") + 1
    assert value(low, "side level") < value(noise, "side level") - 50, "a mono sound has no side"


def test_features_of_silence_and_of_a_short_sound_are_numbers() -> None:
    for samples in (np.zeros((SAMPLE_RATE, 2)), tone(440.0, seconds=0.1)):
        features = features_of(samples, np.zeros((256, 8)))
        assert np.isfinite(features.values).all() and len(features.values) == len(features.names) == len(
            features.groups
        )
    with pytest.raises(ValueError, match="samples"):
        features_of(np.zeros((100, 2)))


def test_distances_of_an_in_painting_are_of_what_was_to_be_kept_alone() -> None:
    before, other_tone = tone(440.0, seconds=3.0), tone(587.33, seconds=3.0)
    curves = [
        spectrogram_of(sound) for sound in (before, joined(before, other_tone, 0.75, 2.25), other_tone, 0.5 * before)
    ]
    kept = kept_frames(3.0, curves[0].levels.shape[1])
    same, anew, lost, softer = (
        kept_features((curves[0].levels, curves[0].pitches), (curve.levels, curve.pitches), kept) for curve in curves
    )
    assert np.abs(same).max() < 1e-9 and len(same) == COUNT
    assert np.abs(anew[:-1]).max() < 0.5, "only the middle half is another note"
    assert lost[-2] > 0.5 and kept_decibels(lost[None]) > 3.0, "the notes that were to be kept are others"
    assert softer[-3] == pytest.approx(-6.02 * np.mean(curves[0].levels[:, kept] > -73.9), abs=0.6)


def joined(outer: np.ndarray, inner: np.ndarray, start: float, end: float) -> np.ndarray:
    """`outer` with `inner` between two times in seconds."""
    sound = outer.copy()
    middle = slice(round(start * SAMPLE_RATE), round(end * SAMPLE_RATE))
    sound[middle] = inner[middle]
    return sound


def test_the_broken_control_differs_in_one_weight_scale(tiny_fp8: Path, tmp_path: Path) -> None:
    path = private_copy(onnx_of(tiny_fp8, "sa3-m-fp8"), tmp_path)
    before = path.read_bytes()
    graph, product = scaled_graph(path)
    models = [onnx.load(path, load_external_data=False), onnx.load_from_string(graph)]
    for model in models:
        onnx.load_external_data_for_model(model, str(path.parent))
    pairs = list(zip(*(quantised_products(model) for model in models), strict=True))
    changed = [
        (source, scaled) for source, scaled in pairs if source.weight_scales.raw_data != scaled.weight_scales.raw_data
    ]  # fmt: skip
    assert [source.node for source, _ in changed] == [product] and path.read_bytes() == before
    source, scaled = (numpy_helper.to_array(side.weight_scales).astype(np.float64) for side in changed[0])
    assert np.allclose(scaled / source, 1.25, rtol=1e-3)
    sizes = [int(np.prod(source.weight.dims)) for source, _ in pairs]
    assert int(np.prod(changed[0][0].weight.dims)) == max(sizes)


def embedder_file(path: Path, channels: int = 1) -> Path:
    """Write a network whose embedding is the mean and the mean square of the samples."""
    nodes = [
        helper.make_node("Mul", ["audio", "audio"], ["square"]),
        helper.make_node("Concat", ["audio", "square"], ["both"], axis=1),
        helper.make_node("ReduceMean", ["both"], ["vector"], axes=[2], keepdims=0),
    ]
    audio = helper.make_tensor_value_info("audio", TensorProto.FLOAT, [1, channels, "N"])
    vector = helper.make_tensor_value_info("vector", TensorProto.FLOAT, [1, 2 * channels])
    graph = helper.make_graph(nodes, "embedder", [audio], [vector])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, path)
    return path


def test_an_embedder_gives_its_own_vector(tmp_path: Path) -> None:
    sound = tone(440.0)
    sound[:, 1] *= 0.5
    mono = Embedder(embedder_file(tmp_path / "mono.onnx")).embed(sound)
    assert mono == pytest.approx([sound.mean(), np.square(sound.mean(axis=1)).mean()], abs=1e-6)
    stereo = Embedder(embedder_file(tmp_path / "stereo.onnx", 2)).embed(sound)
    assert stereo == pytest.approx([*sound.mean(axis=0), *np.square(sound).mean(axis=0)], abs=1e-6)


def test_the_command_runs_every_comparison_and_goes_on_from_what_it_kept(tiny_fp8: Path, tmp_path: Path) -> None:
    embedder = embedder_file(tmp_path / "embedder.onnx")
    published = onnx_of(tiny_fp8, "sa3-m-fp8")  # any FP8 graph: what it must be caught for is tried at full length
    argv = [
        "--onnx-root", tiny_fp8, "--out", tmp_path / "out", *SHORT, "--two-sample", 4, "--published", published,
        "--embedder", "onnx", embedder, "--html",
    ]  # fmt: skip
    result = run(validate_fp8.main, argv)
    assert result.code in (0, 3), result.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())["two_sample"]
    names = ["control", "independent", "same_noise", "inpainted", "scaled", "published"]
    assert list(report["comparisons"]) == names and "judged" not in report
    for comparison in report["comparisons"].values():
        for classifier in ("logistic_regression", "gradient_boosting", "latent"):
            assert 0.0 <= comparison[classifier]["low"] <= comparison[classifier]["high"] <= 1.0
    assert report["comparisons"]["control"]["frechet_of_control"] == 1.0
    assert (report["sounds"], report["prompts"]) == (4, 4) and report["features"]["sound"] > 60
    assert set(report["kept_decibels"]) == {f"{arm}_inpainted" for arm in ("reference", "candidate", "published")}
    assert 0 < report["kept_decibels"]["candidate_inpainted"] == report["kept_decibels"]["published_inpainted"]
    inpainted, published_too = (report["comparisons"][name]["frechet"] for name in ("inpainted", "published"))
    assert inpainted == pytest.approx(published_too), "the same graph on the same noise gives the same sounds"
    for text in (result.out, (tmp_path / "out" / "report.md").read_text()):
        assert "Classifier two-sample test" in text and "Gates apply from 200 sounds on" in text
    page = (tmp_path / "out" / "listen.html").read_text()
    assert "defective control" in page and "Of 100 such pairs" in page
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "two_sample").iterdir()}
    assert len(kept) == 7
    again = run(validate_fp8.main, argv)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["two_sample"] == report, again.err
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "two_sample").iterdir()} == kept


def test_two_sample_figures_are_judged_by_the_shipped_gates() -> None:
    from sa3_validation import gates

    limits = [gate for gate in gates.read_gates(None) if gate.figure.startswith("two_sample.")]
    good = {"control": {"l": {"chance": 0.0}}, "independent": {"l": {"outside": 0.0}},
            "same_noise": {"l": {"high": 0.58}}, "latent": {"high": 0.65},
            "inpainted": {"decibels": 0.2}, "scaled": {"caught": 0.3}, "published": {"caught": 0.05}}  # fmt: skip

    def failing(**bad: object) -> list[str]:
        report = {"two_sample": {"judged": {**good, **bad}}}
        return [verdict.figure for verdict in gates.judge(report, limits) if not verdict.passed]

    assert failing() == [] and len(limits) == 7
    assert failing(same_noise={"l": {"high": 0.61}}) == ["two_sample.judged.same_noise.l.high"]
    assert failing(independent={"l": {"outside": 0.01}}) == ["two_sample.judged.independent.l.outside"]
    assert failing(scaled={"caught": -0.05}) == ["two_sample.judged.scaled.caught"]
    assert failing(published={"caught": -0.05}) == ["two_sample.judged.published.caught"]
    assert failing(latent={"high": 0.71}) == ["two_sample.judged.latent.high"]
    assert failing(inpainted={"decibels": 0.4}) == ["two_sample.judged.inpainted.decibels"]
    assert failing(control={"l": {"chance": 0.02}}) == ["two_sample.judged.control.l.chance"]
    assert [verdict.figure for verdict in gates.judge({"two_sample": None}, limits)] == [], "not run: nothing to judge"


def test_mistakes_are_two_lines_and_write_nothing(tiny_fp8: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    base = ["--onnx-root", tiny_fp8, "--out", out, *SHORT]
    assert_user_error(run(validate_fp8.main, [*base, "--two-sample", 4, "--no-audio"]), "--no-audio disables it")
    assert_user_error(run(validate_fp8.main, [*base, "--published", "x.onnx"]), "require --two-sample")
    assert_user_error(
        run(validate_fp8.main, [*base, "--two-sample", 4, "--published", tmp_path / "x.onnx"]), "file not found"
    )
    assert_user_error(run(validate_fp8.main, [*base, "--two-sample", 4, "--embedder", "clap", "x"]), "unsupported kind")
    assert_user_error(run(validate_fp8.main, [*base, "--two-sample", 1]), "--two-sample")
    wrong = onnx_of(tiny_fp8, "sa3-m-fp8")
    assert_user_error(run(validate_fp8.main, [*base, "--two-sample", 4, "--embedder", "onnx", wrong]), "--embedder: ")
    assert listing(tmp_path) == {}
