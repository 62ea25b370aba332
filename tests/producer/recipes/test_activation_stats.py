"""Activation statistics of the FP8 products of a tiny DiT, compared with the recipe's amax and with NumPy."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import activation_stats
import numpy as np
import onnx_ir as ir
import pytest
from build_dit_fp8 import DEFAULT_HEADROOM

from helpers.commands import CommandResult, assert_user_error, listing, run
from sa3_build.graph import io as graph_io, quantizers, query
from sa3_build.quantization import selection as quantization_selection
from sa3_build.quantization.layer_roles import KINDS, roles_of
from sa3_build.recipes.activation_stats import FIGURES, MeasuredDit, aggregate, table_of
from sa3_build.recipes.fp8 import report_path
from sa3_trt_core.artifacts.calibration_set import CalibrationSet, tensors
from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine
from sa3_trt_core.targets import find_target

FP32, HALF, FP8 = (find_target(name).onnx[0] for name in ("sa3-m-fp32", "sa3-m", "sa3-m-fp8"))


def arguments(root: Path, calib: Path, *more: object) -> list[object]:
    return ["--input", root / HALF, "--calib", calib, *more]


@pytest.fixture(scope="module")
def command_run(
    tiny_fp8: Path, tiny_calib: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[CommandResult, str]:
    """Run the command with --json and --out; return its result and the file it wrote."""
    before = listing(tiny_fp8)
    out = tmp_path_factory.mktemp("stats") / "new" / "stats.json"
    printed = run(activation_stats.main, arguments(tiny_fp8, tiny_calib, "--json", "--out", out))
    assert printed.code == 0, printed.err
    assert listing(tiny_fp8) == before
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    return printed, out.read_text()


@pytest.fixture(scope="module")
def document(command_run: tuple[CommandResult, str]) -> dict:
    return json.loads(command_run[0].out)


def test_the_document_is_printed_and_written_and_progress_is_elsewhere(command_run: tuple[CommandResult, str]) -> None:
    printed, written = command_run
    assert printed.out == written
    assert "activation statistics: 8/8 rows" in printed.err and "activation amax: 8/8 rows" in printed.err


def test_amax_and_scale_are_the_recipes(tiny_fp8: Path, document: dict) -> None:
    """Same activations, products, amax at every sigma and stored scales as in the FP8 build of that graph.

    A fetched value is rounded to fp16; the recipe's value, reduced in the graph, is not rounded on a CPU.
    """
    recorded = json.loads(report_path(tiny_fp8 / FP8).read_text())["stages"]["amax"]["amax"]
    activations = document["models"][0]["activations"]
    assert [activation["tensor"] for activation in activations] == [entry["activation"] for entry in recorded]
    assert [len(activation["linears"]) for activation in activations] == [len(entry["linears"]) for entry in recorded]
    for activation, entry in zip(activations, recorded, strict=True):
        assert {f"{figures['sigma']:g}": figures["amax"] for figures in activation["by_sigma"]} == pytest.approx(
            entry["by_sigma"], rel=2e-3
        )
    result = graph_io.load(tiny_fp8 / FP8)
    pairs = [quantizers.dequantizers(node)[0] for node in result.graph if node.op_type in query.GEMM_OPS]
    scales = [query.constant_of(pair.inputs[1]) for pair in pairs if pair is not None]
    assert Counter(activation["scale"] for activation in activations for _ in activation["linears"]) == Counter(
        float(s) for s in scales
    )


def test_the_document_says_what_it_is_of(tiny_fp8: Path, tiny_calib: Path, document: dict) -> None:
    (model,) = document["models"]
    assert document["headroom"] == DEFAULT_HEADROOM
    assert (model["input"], model["calib"], model["rows"]) == (str(tiny_fp8 / HALF), str(tiny_calib), 8)
    assert set(model["sha256"]) == {"dit_fp16mixed.onnx", "dit_fp16mixed.onnx.data", tiny_calib.name}
    assert [activation["name"] for activation in model["activations"]][2:4] == [
        "layer 0 self-attention qkv",
        "layer 0 self-attention out",
    ]
    assert sorted(activation["kind"] for activation in model["activations"]) == sorted(KINDS)


def test_figures_are_those_of_the_tensors(tiny_fp8: Path, tiny_calib: Path, document: dict) -> None:
    """Compare every activation at every sigma with NumPy over all its elements at once."""
    activations = document["models"][0]["activations"]
    watched = {f"w{index}": activation["tensor"] for index, activation in enumerate(activations)}
    values_by_name: dict[tuple[str, float], list[np.ndarray]] = {}
    with OnnxRuntimeEngine(
        tiny_fp8 / HALF, graph_io.with_probe_outputs(tiny_fp8 / HALF, watched), low_memory=True
    ) as engine:
        for row in CalibrationSet.open(tiny_calib):
            values = engine.run(tensors(row))
            for output, name in watched.items():
                values_by_name.setdefault((name, round(float(row["t"][0]), 6)), []).append(
                    values[output].double().numpy()
                )
    underflows = 0
    for activation in activations:
        for figures in activation["by_sigma"]:
            x = np.concatenate(values_by_name.pop((activation["tensor"], figures["sigma"])), axis=1).reshape(
                -1, activation["channels"]
            )
            rms = np.sqrt((x**2).mean())
            assert (figures["rows"], figures["amax"]) == (2, np.abs(x).max())
            assert figures["rms"] == pytest.approx(rms, rel=1e-9)
            assert figures["crest"] == pytest.approx(np.abs(x).max() / rms, rel=1e-9)
            assert figures["kurtosis"] == pytest.approx(((x - x.mean()) ** 4).mean() / x.var() ** 2, rel=1e-9)
            assert figures["channel_share"] == (np.abs(x).max(axis=0) >= np.abs(x).max() / 2).mean()
            flushed = (x != 0) & (np.abs(x / activation["scale"]) <= 2.0**-10)
            assert figures["underflow"] == pytest.approx(flushed.sum() / (x != 0).sum(), abs=1e-12)
            underflows += flushed.sum()
    assert not values_by_name
    assert underflows > 0, "nothing was flushed: the comparison would not see a wrong limit"


def test_groups_do_not_change_the_figures(
    tiny_onnx: Path, tiny_calib: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One session for all or one per activation: fp16 rounding differs in places, so figures differ slightly."""
    subject = MeasuredDit(tiny_onnx / HALF, tiny_calib, limit=4)
    together, apart = (subject.measure(DEFAULT_HEADROOM, fetched) for fetched in (1 << 27, 1))
    progress = capsys.readouterr().err
    assert "statistics: 4/4 rows" in progress and f"statistics: {4 * len(KINDS)}/{4 * len(KINDS)} rows" in progress
    assert len(together) == len(KINDS) and len(together[0].by_sigma) == 4
    for entry, entry_apart in zip(together, apart, strict=True):
        assert (entry.tensor, entry.linears, entry.scale) == (
            entry_apart.tensor,
            entry_apart.linears,
            entry_apart.scale,
        )
        for figures, again in zip(entry.by_sigma, entry_apart.by_sigma, strict=True):
            assert (figures.sigma, figures.rows) == (again.sigma, again.rows)
            assert (figures.rms, figures.amax, figures.kurtosis) == pytest.approx(
                (again.rms, again.amax, again.kurtosis), rel=1e-2
            )


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|" if "|" in line else "  ") if cell.strip()]


def test_the_table_has_a_row_a_kind_and_sigma(tiny_onnx: Path, tiny_calib: Path) -> None:
    printed = run(activation_stats.main, arguments(tiny_onnx, tiny_calib))
    assert printed.code == 0, printed.err
    label, empty, header, _, *rows = printed.out.splitlines()
    assert str(tiny_onnx / HALF) in label and "8 rows" in label and "9 inputs" in label and not empty
    assert cells(header) == ["input of", "sigma", *FIGURES]
    sigmas = sorted({round(sigma, 4) for sigma in CalibrationSet.open(tiny_calib).sigmas()}, reverse=True)
    expected = [[kind, f"{sigma:.4f}"] for kind in KINDS for sigma in sigmas]
    assert [cells(row)[:2] for row in rows] == expected
    assert {len(cells(row)) for row in rows} == {7}


@pytest.mark.parametrize(("by", "count"), [("kind", 9), ("sigma", 4)])
def test_the_markdown_holds_the_worst_of_each_group(
    tiny_onnx: Path, tiny_calib: Path, document: dict, by: str, count: int
) -> None:
    argv = arguments(tiny_onnx, tiny_calib, "--markdown", "--by", by)
    label, _, header, rule, *rows = run(activation_stats.main, argv).out.splitlines()
    assert label.startswith("- ") and set(rule) <= set("|- ")
    assert cells(header) == [{"kind": "input of"}.get(by, by), *FIGURES]
    assert len(rows) == count
    key = {
        "kind": lambda activation, entry: activation["kind"],
        "sigma": lambda activation, entry: f"{entry['sigma']:.4f}",
    }[by]
    for row in rows:
        name, *figures = cells(row)
        group = [
            entry
            for activation in document["models"][0]["activations"]
            for entry in activation["by_sigma"]
            if key(activation, entry) == name
        ]
        assert group
        assert figures == [
            f"{max(entry['amax'] for entry in group):.4g}",
            f"{np.median([entry['crest'] for entry in group]):.2f}",
            f"{max(entry['kurtosis'] for entry in group):.4g}",
            f"{min(entry['channel_share'] for entry in group):.4f}",
            f"{max(entry['underflow'] for entry in group):.2e}",
        ]


@pytest.fixture
def altered(tiny_onnx: Path, tmp_path: Path) -> Path:
    """Return a copy of the FP16-mixed DiT's root that the test may change."""
    return Path(shutil.copytree(tiny_onnx, tmp_path / "onnx"))


def enlarge(root: Path, kind: str, factor: float, channel: int | slice) -> None:
    """Multiply one output channel, or all, of the product with role `kind`."""
    model = graph_io.load(root / HALF)
    model.graph.sort()
    selection = quantization_selection.select_linears(model)
    role_by_node = roles_of(model, selection)
    (product,) = (p for p in selection.quantized if role_by_node[p.node].kind == kind)
    weight = model.graph.initializers[product.weight]
    assert weight.shape == (product.k, product.n)
    array = weight.const_value.numpy().copy()
    array[:, channel] *= np.float16(factor)
    weight.const_value = ir.tensor(array, name=weight.name)
    graph_io.save(model, root / HALF)


def test_an_outlier_channel_is_seen_beside_the_model_without(
    tiny_onnx: Path, altered: Path, tiny_calib: Path, tmp_path: Path
) -> None:
    """One channel of the text projection, 200 times as large, appears at the cross-attention's k and v."""
    enlarge(altered, "text out", 200.0, channel=7)
    beside = ["--beside-input", altered / HALF, "--beside-calib", tiny_calib]
    argv = arguments(tiny_onnx, tiny_calib, *beside, "--markdown", "--by", "kind", "--rows", 4)
    result = run(activation_stats.main, argv)
    assert result.code == 0, result.err
    first, second, _, header, _, *rows = result.out.splitlines()
    assert first.startswith(f"- A: {tiny_onnx / HALF}, 4 rows") and second.startswith(f"- B: {altered / HALF}, 4 rows")
    assert cells(header) == ["input of", *(f"{figure} {side}" for figure in FIGURES for side in "AB")]
    by_kind = {cells(row)[0]: [float(cell) for cell in cells(row)[1:]] for row in rows}
    for kind in ("text in", "text out", "self-attention qkv"):
        assert by_kind[kind][0::2] == by_kind[kind][1::2], kind
    amax, amax_b, _, _, kurtosis, kurtosis_b, share, share_b, underflow, underflow_b = by_kind["cross-attention kv"]
    assert amax_b > 50 * amax and kurtosis_b > 10 * kurtosis and underflow_b > 10 * underflow
    channels = MeasuredDit(altered / HALF, tiny_calib, 1).measure(DEFAULT_HEADROOM)[5].channels
    assert share_b == pytest.approx(1 / channels, abs=5e-5) and share > 10 * share_b


def test_a_group_that_one_model_lacks_is_a_dash(tiny_onnx: Path, tiny_calib: Path) -> None:
    whole = aggregate(
        MeasuredDit(tiny_onnx / HALF, tiny_calib, 1).measure(DEFAULT_HEADROOM), by_kind=False, by_sigma=True
    )
    less = dict(list(whole.items())[1:])
    _, rows = table_of([less, whole], ["A", "B"])
    assert [row[0] for row in rows] == sorted((row[0] for row in rows), reverse=True)
    assert rows[0][1::2] == ["-"] * len(FIGURES) and "-" not in rows[0][2::2]
    assert all(row[1::2] == row[2::2] for row in rows[1:])


def test_an_overflow_is_named(altered: Path, tiny_calib: Path) -> None:
    enlarge(altered, "text in", 60000.0, channel=slice(None))
    before = listing(altered)
    result = run(activation_stats.main, arguments(altered, tiny_calib))
    assert (result.code, result.out) == (2, "")
    *progress, error, hint = result.err.splitlines()
    assert all(line.startswith("activation ") for line in progress), progress
    assert error.startswith(f"error: {altered / HALF}: activation ") and "does not fit fp16 at sigma 1:" in error
    assert hint.startswith("  hint: ")
    assert listing(altered) == before


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("--input absent.onnx --calib {calib}", "absent.onnx"),
        ("--input {root}/" + HALF + " --calib absent.npz", "absent.npz"),
        ("--input {root}/" + HALF + " --calib a_file", "a_file"),
        ("--input {root}/" + FP32 + " --calib {calib}", "is not FP16-mixed"),
        ("--input {root}/" + FP8 + " --calib {calib}", "is already quantised"),
        ("--input {root}/" + HALF + " --calib {calib} --beside-input {root}/" + HALF, "--beside-calib"),
        ("--input {root}/" + HALF + " --calib {calib} --beside-calib {calib}", "--beside-input"),
        ("--input {root}/" + HALF + " --calib {calib} --beside-input b.onnx --beside-calib {calib}", "b.onnx"),
        ("--input {root}/" + HALF + " --calib {calib} --out a_file/x.json", "a_file"),
        ("--input {root}/" + HALF + " --calib {calib} --rows 0", "--rows"),
        ("--input {root}/" + HALF + " --calib {calib} --json --markdown", "--json"),
    ],
)
def test_a_mistake_is_two_lines_and_nothing_is_written(
    tiny_fp8: Path, tiny_calib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a_file").write_text("not what is wanted")
    before = listing(tmp_path), listing(tiny_fp8)
    assert_user_error(run(activation_stats.main, line.format(root=tiny_fp8, calib=tiny_calib).split()), named)
    assert (listing(tmp_path), listing(tiny_fp8)) == before
