"""Rounding with error feedback (GPTQ): smaller error, resuming after a kill, and detection of wrong codes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import build_dit_fp8
import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch

from helpers.commands import run
from sa3_build.e4m3 import E4M3_MAX, quantized
from sa3_build.graph import io as graph_io, quantizers
from sa3_build.passes.base import run_passes
from sa3_build.passes.fold_weights import FoldWeights
from sa3_build.passes.rename_nodes import RenameNodes
from sa3_build.passes.topological_sort import SortTopologically
from sa3_build.quantization import gptq, round_weights, selection as quantization_selection
from sa3_build.quantization.switchable_graph import switchable
from sa3_build.recipes.fp8 import report_path
from sa3_build.verification import graph_proof
from sa3_trt_core.artifacts.calibration_set import CalibrationSet, representative, tensors
from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine
from sa3_trt_core.targets import dit_target

HALF, FP8 = (dit_target("medium", precision).onnx[0] for precision in ("fp16mixed", "fp8"))
K, N, TOKENS = 96, 40, 2000


@pytest.fixture(scope="module")
def weight() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((K, N)).astype(np.float16)


def scale_of(weight: np.ndarray, axis: int = 1) -> np.ndarray:
    return (np.abs(weight).max(axis=1 - axis) / np.float16(E4M3_MAX)).astype(np.float16)


def correlated() -> torch.Tensor:
    """Return activations whose energy lies mostly in few directions, as in a network; one input is always zero."""
    dice = torch.Generator().manual_seed(2)
    tokens = torch.randn(TOKENS, 12, generator=dice) @ torch.randn(12, K, generator=dice)
    tokens += 0.3 * torch.randn(TOKENS, K, generator=dice)
    tokens[:, 7] = 0.0
    return tokens


def error(tokens: torch.Tensor, weight: np.ndarray, codes: np.ndarray) -> float:
    off = codes.astype(np.float32) * scale_of(weight).astype(np.float32) - weight.astype(np.float32)
    return float((tokens @ torch.from_numpy(off)).square().sum())


def test_inputs_that_have_nothing_in_common_are_rounded_to_the_nearest(weight: np.ndarray) -> None:
    codes = gptq.rounded(weight, scale_of(weight), 1, torch.eye(K), damping=0.1)
    assert codes.dtype == ml_dtypes.float8_e4m3fn
    assert np.array_equal(codes.view(np.uint8), quantized(weight, scale_of(weight), 1).view(np.uint8))


def test_the_product_is_nearer_on_tokens_that_the_codes_have_not_seen(weight: np.ndarray) -> None:
    tokens = correlated()
    seen, unseen = tokens[: TOKENS // 2], tokens[TOKENS // 2 :]
    codes = gptq.rounded(weight, scale_of(weight), 1, seen.T @ seen, damping=0.1)
    nearest = quantized(weight, scale_of(weight), 1)
    assert error(unseen, weight, codes) < 0.5 * error(unseen, weight, nearest)
    assert gptq.deviation(weight, nearest, scale_of(weight), 1) < gptq.deviation(weight, codes, scale_of(weight), 1)
    assert gptq.deviation(weight, codes, scale_of(weight), 1) < graph_proof.MAX_DEVIATION


def test_a_weight_stored_the_other_way_round_gets_the_same_codes(weight: np.ndarray) -> None:
    tokens = correlated()
    gram = tokens.T @ tokens
    codes = gptq.rounded(weight, scale_of(weight), 1, gram, 0.1)
    transposed = np.ascontiguousarray(weight.T)
    assert np.array_equal(
        gptq.rounded(transposed, scale_of(transposed, axis=0), 0, gram, 0.1).T.view(np.uint8), codes.view(np.uint8)
    )


def test_a_weight_that_errors_push_over_the_end_is_held_there() -> None:
    """Two equal inputs: the second weight would have to be 448 plus the error of the first."""
    weight = np.full((2, 1), 441.0, np.float32)  # a fifth of the way from 448 down to 416
    gram = torch.ones(2, 2)
    codes = gptq.rounded(weight, np.ones(1, np.float32), 1, gram, damping=1e-4).astype(np.float32)
    assert np.isfinite(codes).all() and np.abs(codes).max() <= E4M3_MAX


@pytest.fixture(scope="module")
def clean(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = graph_io.load(tiny_onnx / HALF)
    run_passes(model, [SortTopologically(), FoldWeights(), RenameNodes()])
    path = tmp_path_factory.mktemp("clean") / "clean.onnx"
    graph_io.save(model, path)
    return path


def every_row(calibration: Path) -> CalibrationSet:
    return CalibrationSet.open(calibration)


def test_an_interrupted_stage_goes_on_and_gives_the_same_codes(
    clean: Path, tiny_calib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    selection, rows = quantization_selection.select_linears(graph_io.load(clean)), every_row(tiny_calib)
    report = round_weights.round_weights(clean, selection, rows, tmp_path / "codes")
    assert report["linears"] == len(selection.quantized) and 0.05 < report["codes_not_nearest"] < 0.6
    codes = {path: path.read_bytes() for path in sorted((tmp_path / "codes").iterdir())}
    assert len(codes) == len(selection.quantized)
    kept, *_, deleted = codes
    before = kept.stat().st_mtime_ns
    deleted.unlink()
    monkeypatch.setattr(round_weights, "GRAM_BYTES", 1)  # an activation at a time: memory changes nothing else
    assert round_weights.round_weights(clean, selection, rows, tmp_path / "codes") == report
    assert kept.stat().st_mtime_ns == before
    assert {path: path.read_bytes() for path in codes} == codes


def test_a_session_for_some_activations_stops_at_the_last_of_them(clean: Path) -> None:
    selection = quantization_selection.select_linears(graph_io.load(clean))
    whole, first = (
        len(
            ir.from_proto(
                parsed(graph_io.with_probe_outputs(clean, {"seen": selection.activations[0]}, only_probes=only_probes))
            ).graph
        )
        for only_probes in (False, True)
    )
    assert first < whole / 4


def test_the_switchable_graph_leaves_weights_and_codes_on_the_disk(clean: Path, tiny_calib: Path) -> None:
    """With them inside, a full-size graph would exceed the 2 GB limit of a protobuf."""
    model = graph_io.load(clean)
    selection = quantization_selection.select_linears(model)
    amax = np.ones((1, len(selection.activations)), np.float32)
    round_weights.round_weights(clean, selection, every_row(tiny_calib), clean.parent)
    codes = round_weights.stored_codes(selection, clean.parent)
    graph = parsed(switchable(clean, selection, amax, 2.0, codes))
    large = [tensor for tensor in graph.graph.initializer if np.prod(tensor.dims) > graph_io.SIDECAR_THRESHOLD]
    assert large and not [tensor.name for tensor in large if not tensor.external_data]
    stored = {entry.value for tensor in large for entry in tensor.external_data if entry.key == "location"}
    assert len(stored) == 1 + len(selection.quantized)


def parsed(made: bytes):
    import onnx

    return onnx.load_model_from_string(made)


def test_rows_of_the_parity_are_not_fitted_on_where_there_are_others(tmp_path: Path, tiny_calib: Path) -> None:
    whole = CalibrationSet.open(tiny_calib)
    assert whole.rows == 8
    parity = representative(whole, 4)
    assert not round_weights.rows_of(whole, parity, limit=4).indices & parity.indices
    assert round_weights.rows_of(whole, parity, limit=8).indices == frozenset(range(8))


def test_the_build_is_nearer_than_with_the_nearest_codes(tiny_fp8: Path, tiny_calib: Path, tmp_path: Path) -> None:
    out = tmp_path / "dit_fp8.onnx"
    argv = ["--input", str(tiny_fp8 / HALF), "--calib", str(tiny_calib), "--onnx", str(out), "--parity-rows", "8"]
    assert run(build_dit_fp8.main, [*argv, "--ptq", "direct", "--rounding", "nearest"])[0] == 0
    chosen, nearest = (json.loads(report_path(path).read_text()) for path in (tiny_fp8 / FP8, out))
    assert nearest["settings"]["rounding"] == "nearest" and "rounding" not in nearest["stages"]
    assert chosen["stages"]["rounding"]["rows_also_in_parity"] == chosen["stages"]["rounding"]["rows"] == 8

    def lost(report: dict) -> float:
        return sum(1 - entry["mean_cosine"] for entry in report["stages"]["parity"]["parity"])

    assert lost(chosen) < 0.9 * lost(nearest)


@pytest.fixture(scope="module")
def proven(tiny_fp8: Path, clean: Path, tiny_calib: Path):
    """Return a source, its finished graph, and the codes that the build chose."""
    selection = quantization_selection.select_linears(graph_io.load(clean))
    round_weights.round_weights(clean, selection, every_row(tiny_calib), clean.parent)
    return graph_io.load(clean), tiny_fp8 / FP8, selection, round_weights.stored_codes(selection, clean.parent)


def test_the_proof_knows_the_chosen_codes(proven) -> None:
    source, path, selection, codes = proven
    assert graph_proof.failures_of(graph_proof.prove(source, graph_io.load(path), selection, codes)) == []
    result = graph_io.load(path)
    stored = quantizers.dequantizers({str(node.name): node for node in result.graph}[selection.quantized[2].node])[
        1
    ].inputs[0]
    flipped = stored.const_value.numpy().copy()
    flipped.reshape(-1).view(np.uint8)[5] ^= 1
    stored.const_value = ir.tensor(flipped, name=stored.name)
    failures = graph_proof.failures_of(graph_proof.prove(source, result, selection, codes))
    assert [line for line in failures if "does not have the E4M3 codes chosen for it" in line]


def test_the_proof_does_not_take_codes_of_another_weight(proven) -> None:
    source, path, selection, codes = proven
    pairs = itertools.combinations(selection.quantized, 2)
    product, other_product = next(
        (first_product, second_product)
        for first_product, second_product in pairs
        if (first_product.k, first_product.n) == (second_product.k, second_product.n)
    )
    result = graph_io.load(path)
    node_by_name = {str(node.name): node for node in result.graph}
    stored = [
        quantizers.dequantizers(node_by_name[first_product.node])[1].inputs[0]
        for first_product in (product, other_product)
    ]
    stored[0].const_value, stored[1].const_value = stored[1].const_value, stored[0].const_value
    swapped = {**codes, product.weight: codes[other_product.weight], other_product.weight: codes[product.weight]}
    failures = graph_proof.failures_of(graph_proof.prove(source, result, selection, swapped))
    assert len([line for line in failures if "differs by more than 25% from its source" in line]) == 2


@pytest.mark.parametrize(
    ("flags", "named"), [(["--weights", "fp16"], "--weights fp16"), (["--recipe", "reference"], "--recipe reference")]
)
def test_flags_that_are_at_odds_answer_in_two_lines(
    tiny_fp8: Path, tiny_calib: Path, tmp_path: Path, flags: list[str], named: str
) -> None:
    out = tmp_path / "x" / "dit_fp8.onnx"
    argv = ["--input", str(tiny_fp8 / HALF), "--calib", str(tiny_calib), "--onnx", str(out), "--rounding", "gptq"]
    code, _, errors = run(build_dit_fp8.main, [*argv, *flags])
    assert code == 2 and len(errors.strip().splitlines()) == 2 and named in errors
    assert not out.parent.exists()


def test_new_outputs_of_a_graph_may_bear_a_name_that_the_exporter_gave(tiny_onnx: Path, tiny_calib: Path) -> None:
    half = tiny_onnx / "sa3-m" / "dit_fp16mixed.onnx"
    taken = str(next(node for node in graph_io.load(half).graph if node.op_type == "ReduceMax").outputs[0].name)
    row = tensors(next(iter(CalibrationSet.open(tiny_calib))))
    with OnnxRuntimeEngine(half, graph_io.with_probe_outputs(half, {taken: "x"})) as engine:
        assert torch.equal(engine.run(row)[taken], row["x"])
