"""The command that shows what enters the FP8 products, on a tiny real DiT: against the recipe, and against NumPy."""

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

from helpers.commands import Done, listing, run, two_lines
from sa3_build.graph import io as graph_io, quantizers, query
from sa3_build.quantization import selection as quantization_selection
from sa3_build.quantization.layer_roles import KINDS, places
from sa3_build.recipes.activation_stats import FIGURES, Subject, aggregate, table_of
from sa3_build.recipes.fp8 import report_path
from sa3_trt_core.artifacts.calibration_set import CalibrationSet, tensors
from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine
from sa3_trt_core.targets import find_target

FP32, HALF, FP8 = (find_target(name).onnx[0] for name in ("sa3-m-fp32", "sa3-m", "sa3-m-fp8"))


def arguments(root: Path, calib: Path, *more: object) -> list[object]:
    return ["--input", root / HALF, "--calib", calib, *more]


@pytest.fixture(scope="module")
def done(tiny_fp8: Path, tiny_calib: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, str]:
    """The command with --json and --out: what it printed and what it wrote."""
    before = listing(tiny_fp8)
    out = tmp_path_factory.mktemp("stats") / "new" / "stats.json"
    printed = run(activation_stats.main, arguments(tiny_fp8, tiny_calib, "--json", "--out", out))
    assert printed.code == 0, printed.err
    assert listing(tiny_fp8) == before
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    return printed, out.read_text()


@pytest.fixture(scope="module")
def document(done: tuple[Done, str]) -> dict:
    return json.loads(done[0].out)


def test_the_document_is_printed_and_written_and_progress_is_elsewhere(done: tuple[Done, str]) -> None:
    printed, written = done
    assert printed.out == written
    assert "activation statistics: 8/8 rows" in printed.err and "activation amax: 8/8 rows" in printed.err


def test_amax_and_scale_are_the_recipes(tiny_fp8: Path, document: dict) -> None:
    """The same activations, products, amax at every sigma and stored scales as in the FP8 build of that graph.

    A fetched value is rounded to fp16; the recipe's, reduced in the graph, is not on a CPU.
    """
    recorded = json.loads(report_path(tiny_fp8 / FP8).read_text())["stages"]["amax"]["amax"]
    found = document["models"][0]["activations"]
    assert [one["tensor"] for one in found] == [entry["activation"] for entry in recorded]
    assert [len(one["products"]) for one in found] == [len(entry["products"]) for entry in recorded]
    for one, entry in zip(found, recorded, strict=True):
        assert {f"{at['sigma']:g}": at["amax"] for at in one["by_sigma"]} == pytest.approx(entry["by sigma"], rel=2e-3)
    result = graph_io.load(tiny_fp8 / FP8)
    pairs = [quantizers.dequantizers(node)[0] for node in result.graph if node.op_type in query.PRODUCTS]
    scales = [query.constant_of(pair.inputs[1]) for pair in pairs if pair is not None]
    assert Counter(one["scale"] for one in found for _ in one["products"]) == Counter(float(s) for s in scales)


def test_the_document_says_what_it_is_of(tiny_fp8: Path, tiny_calib: Path, document: dict) -> None:
    (model,) = document["models"]
    assert document["headroom"] == DEFAULT_HEADROOM
    assert (model["input"], model["calib"], model["rows"]) == (str(tiny_fp8 / HALF), str(tiny_calib), 8)
    assert set(model["sha256"]) == {"dit_fp16mixed.onnx", "dit_fp16mixed.onnx.data", tiny_calib.name}
    assert [one["name"] for one in model["activations"]][2:4] == [
        "layer 0 self-attention qkv",
        "layer 0 self-attention out",
    ]
    assert sorted(one["kind"] for one in model["activations"]) == sorted(KINDS)


def test_figures_are_those_of_the_tensors(tiny_fp8: Path, tiny_calib: Path, document: dict) -> None:
    """Every activation at every sigma, from all its elements at once, in NumPy."""
    found = document["models"][0]["activations"]
    watched = {f"w{index}": one["tensor"] for index, one in enumerate(found)}
    whole: dict[tuple[str, float], list[np.ndarray]] = {}
    with OnnxRuntimeEngine(tiny_fp8 / HALF, graph_io.observed(tiny_fp8 / HALF, watched), low_memory=True) as engine:
        for row in CalibrationSet.open(tiny_calib):
            values = engine.run(tensors(row))
            for output, name in watched.items():
                whole.setdefault((name, round(float(row["t"][0]), 6)), []).append(values[output].double().numpy())
    seen = 0
    for one in found:
        for at in one["by_sigma"]:
            x = np.concatenate(whole.pop((one["tensor"], at["sigma"])), axis=1).reshape(-1, one["channels"])
            rms = np.sqrt((x**2).mean())
            assert (at["rows"], at["amax"]) == (2, np.abs(x).max())
            assert at["rms"] == pytest.approx(rms, rel=1e-9)
            assert at["crest"] == pytest.approx(np.abs(x).max() / rms, rel=1e-9)
            assert at["kurtosis"] == pytest.approx(((x - x.mean()) ** 4).mean() / x.var() ** 2, rel=1e-9)
            assert at["channel_share"] == (np.abs(x).max(axis=0) >= np.abs(x).max() / 2).mean()
            flushed = (x != 0) & (np.abs(x / one["scale"]) <= 2.0**-10)
            assert at["underflow"] == pytest.approx(flushed.sum() / (x != 0).sum(), abs=1e-12)
            seen += flushed.sum()
    assert not whole
    assert seen > 0, "nothing was flushed: the comparison would not see a wrong limit"


def test_groups_do_not_change_the_figures(
    tiny_onnx: Path, tiny_calib: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One session, and one an activation; they round to fp16 in other places, and so differ a little."""
    subject = Subject(tiny_onnx / HALF, tiny_calib, limit=4)
    together, apart = (subject.measure(DEFAULT_HEADROOM, fetched) for fetched in (1 << 27, 1))
    progress = capsys.readouterr().err
    assert "statistics: 4/4 rows" in progress and f"statistics: {4 * len(KINDS)}/{4 * len(KINDS)} rows" in progress
    assert len(together) == len(KINDS) and len(together[0].by_sigma) == 4
    for one, other in zip(together, apart, strict=True):
        assert (one.tensor, one.products, one.scale) == (other.tensor, other.products, other.scale)
        for at, again in zip(one.by_sigma, other.by_sigma, strict=True):
            assert (at.sigma, at.rows) == (again.sigma, again.rows)
            assert (at.rms, at.amax, at.kurtosis) == pytest.approx((again.rms, again.amax, again.kurtosis), rel=1e-2)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|" if "|" in line else "  ") if cell.strip()]


def test_the_table_has_a_row_a_kind_and_sigma(tiny_onnx: Path, tiny_calib: Path) -> None:
    printed = run(activation_stats.main, arguments(tiny_onnx, tiny_calib))
    assert printed.code == 0, printed.err
    label, empty, header, _, *rows = printed.out.splitlines()
    assert str(tiny_onnx / HALF) in label and "8 rows" in label and "9 inputs" in label and not empty
    assert cells(header) == ["input of", "sigma", *FIGURES]
    sigmas = sorted({round(sigma, 4) for sigma in CalibrationSet.open(tiny_calib).sigmas()}, reverse=True)
    wanted = [[kind, f"{sigma:.4f}"] for kind in KINDS for sigma in sigmas]
    assert [cells(row)[:2] for row in rows] == wanted
    assert {len(cells(row)) for row in rows} == {7}


@pytest.mark.parametrize(("by", "count"), [("kind", 9), ("sigma", 4)])
def test_the_markdown_holds_the_worst_of_each_group(
    tiny_onnx: Path, tiny_calib: Path, document: dict, by: str, count: int
) -> None:
    line = arguments(tiny_onnx, tiny_calib, "--markdown", "--by", by)
    label, _, header, rule, *rows = run(activation_stats.main, line).out.splitlines()
    assert label.startswith("- ") and set(rule) <= set("|- ")
    assert cells(header) == [{"kind": "input of"}.get(by, by), *FIGURES]
    assert len(rows) == count
    key = {"kind": lambda one, at: one["kind"], "sigma": lambda one, at: f"{at['sigma']:.4f}"}[by]
    for row in rows:
        name, *figures = cells(row)
        group = [at for one in document["models"][0]["activations"] for at in one["by_sigma"] if key(one, at) == name]
        assert group
        assert figures == [
            f"{max(at['amax'] for at in group):.4g}",
            f"{np.median([at['crest'] for at in group]):.2f}",
            f"{max(at['kurtosis'] for at in group):.4g}",
            f"{min(at['channel_share'] for at in group):.4f}",
            f"{max(at['underflow'] for at in group):.2e}",
        ]


@pytest.fixture
def altered(tiny_onnx: Path, tmp_path: Path) -> Path:
    """An ONNX root of one's own."""
    return Path(shutil.copytree(tiny_onnx, tmp_path / "onnx"))


def enlarge(root: Path, kind: str, factor: float, channel: int | slice) -> None:
    """Multiply one output channel, or all, of the product of a kind."""
    model = graph_io.load(root / HALF)
    model.graph.sort()
    selection = quantization_selection.select_products(model)
    found = places(model, selection)
    (product,) = (p for p in selection.quantized if found[p.node].kind == kind)
    weight = model.graph.initializers[product.weight]
    assert weight.shape == (product.k, product.n)
    array = weight.const_value.numpy().copy()
    array[:, channel] *= np.float16(factor)
    weight.const_value = ir.tensor(array, name=weight.name)
    graph_io.save(model, root / HALF)


def test_an_outlier_channel_is_seen_beside_the_model_without(
    tiny_onnx: Path, altered: Path, tiny_calib: Path, tmp_path: Path
) -> None:
    """One channel of the text projection made 200 times as large: its readers are the cross-attention's k and v."""
    enlarge(altered, "text out", 200.0, channel=7)
    beside = ["--beside-input", altered / HALF, "--beside-calib", tiny_calib]
    line = arguments(tiny_onnx, tiny_calib, *beside, "--markdown", "--by", "kind", "--rows", 4)
    result = run(activation_stats.main, line)
    assert result.code == 0, result.err
    first, second, _, header, _, *rows = result.out.splitlines()
    assert first.startswith(f"- A: {tiny_onnx / HALF}, 4 rows") and second.startswith(f"- B: {altered / HALF}, 4 rows")
    assert cells(header) == ["input of", *(f"{figure} {side}" for figure in FIGURES for side in "AB")]
    by_kind = {cells(row)[0]: [float(cell) for cell in cells(row)[1:]] for row in rows}
    for kind in ("text in", "text out", "self-attention qkv"):
        assert by_kind[kind][0::2] == by_kind[kind][1::2], kind
    amax, other, _, _, kurtosis, sharp, share, narrow, lost, more = by_kind["cross-attention kv"]
    assert other > 50 * amax and sharp > 10 * kurtosis and more > 10 * lost
    channels = Subject(altered / HALF, tiny_calib, 1).measure(DEFAULT_HEADROOM)[5].channels
    assert narrow == pytest.approx(1 / channels, abs=5e-5) and share > 10 * narrow


def test_a_group_that_one_model_lacks_is_a_dash(tiny_onnx: Path, tiny_calib: Path) -> None:
    whole = aggregate(Subject(tiny_onnx / HALF, tiny_calib, 1).measure(DEFAULT_HEADROOM), by_kind=False, by_sigma=True)
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
        ("--input {root}/" + FP8 + " --calib {calib}", "is quantised already"),
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
    two_lines(run(activation_stats.main, line.format(root=tiny_fp8, calib=tiny_calib).split()), named)
    assert (listing(tmp_path), listing(tiny_fp8)) == before
