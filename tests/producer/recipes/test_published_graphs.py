"""Graphs exported from the model's own code, through both recipes with their defaults, and packed for PyTorch."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import build_dit_fp8
import build_dit_fp16mixed
import numpy as np
import onnx
import pytest
import torch
from conftest import run_checked
from onnx.reference import ReferenceEvaluator

from helpers import published_half, published_style
from helpers.commands import assert_user_error, run
from helpers.published_module import OTHER, PUBLISHED, Conventions, PublishedDit, plain_checkpoint
from sa3_build.engines import pack_dit, torch_dit
from sa3_build.graph import io as graph_io
from sa3_build.passes.null_row import has_null_row
from sa3_build.recipes.fp8 import report_path
from sa3_build.verification import parity
from sa3_build.verification.probe_rows import check_rows
from sa3_trt_core.artifacts import manifest
from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine
from sa3_trt_core.sampling.guidance import guided
from sa3_trt_core.shapes import CONTRACTS
from sa3_trt_core.targets import dit_target

NAMES = [spec.name for spec in CONTRACTS["dit"].inputs]
DURATIONS = (29.72, 47.0, 183.25)
DEPTH = 1
# Casts per layer and outside the layers, without differential attention: 652 and 569 at the published depth of 20.
WIDE_CASTS, DEAD_CASTS, PUBLISHED_DEPTH = (32, 12), (28, 9), 20

STYLES: dict[str, tuple[Conventions, dict]] = {
    "published": (PUBLISHED, {}),
    "other wrapper": (OTHER, {"opset": 16, "length": "T"}),
    "halves apart, batch and length by number": (
        replace(PUBLISHED, stacked=False, left_pad=False), {"opset": 20, "length": None, "batch": None}),
}  # fmt: skip


@pytest.fixture(scope="module")
def singles(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return an fp32 graph of each style. Read only."""
    folder = tmp_path_factory.mktemp("styles")
    return {name: written(PublishedDit(tiny_checkpoint, conventions), folder / str(index) / "dit.onnx", **options)
            for index, (name, (conventions, options)) in enumerate(STYLES.items())}  # fmt: skip


@pytest.fixture(scope="module")
def halves(singles: dict[str, Path]) -> dict[str, Path]:
    """Return each graph converted by build_dit_fp16mixed.py. Read only."""
    half_by_style = {}
    for name, path in singles.items():
        half_by_style[name] = path.parent / "half" / "dit_fp16mixed.onnx"
        run_checked(build_dit_fp16mixed.main, ["--input", path, "--onnx", half_by_style[name]])
    return half_by_style


@pytest.fixture(scope="module")
def surgeon(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an FP16-mixed graph of the published style. Read only."""
    folder = tmp_path_factory.mktemp("surgeon")
    return published_half.write_fp16_mixed(PublishedDit(tiny_checkpoint), folder / "dit_fp16.onnx", folder)


def written(module: PublishedDit, path: Path, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return published_style.save_graph(published_style.exported(module, path.parent, **options), path)


def relative(values: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(values - reference) / np.linalg.norm(reference))


def gates_of(path: Path) -> dict:
    record = manifest.read_manifest(path)
    assert record is not None
    return record.gates


def test_the_fixture_has_the_published_counts(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Casts of the traced graph, extrapolated to the published depth; one Pad with computed pads."""
    plain = plain_checkpoint(tiny_checkpoint, tmp_path / "plain")
    proto = published_style.exported(PublishedDit(plain), tmp_path)
    kinds = Counter(node.op_type for node in proto.graph.node)
    types = {value.name: value.type.tensor_type.elem_type
             for value in (*onnx.shape_inference.infer_shapes(proto).graph.value_info, *proto.graph.input)}  # fmt: skip
    types |= {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    wide = [node for node in proto.graph.node if node.op_type == "Cast" and node.attribute[0].i == 1]
    dead = [node for node in wide if types.get(node.input[0]) == 1]
    assert (len(wide), len(dead)) == (sum(WIDE_CASTS), sum(DEAD_CASTS))
    layer, outside = zip(WIDE_CASTS, DEAD_CASTS, strict=True)
    assert [
        PUBLISHED_DEPTH * in_layer + outside_layers for in_layer, outside_layers in zip(layer, outside, strict=True)
    ] == [652, 569]
    assert kinds["Pad"] == DEPTH and kinds["Softmax"] == 2 * DEPTH and kinds["Einsum"] == kinds["Range"] == 1
    (pad,) = [node for node in proto.graph.node if node.op_type == "Pad"]
    makers = {output: node for node in proto.graph.node for output in node.output}
    chain, value = [], pad.input[1]
    while value in makers and len(chain) < 5:
        chain.append(makers[value].op_type)
        value = makers[value].input[0]
    assert chain == ["Cast", "Reshape", "Transpose", "Slice", "Reshape"]
    assert not any("null" in node.name for node in proto.graph.node)


FLIPPED = {
    "padding": "expand", "two_pi": False, "gamma_first": False, "stacked": False, "left_pad": False, "mask": "greater",
    "fp32_duration": False,
}  # fmt: skip


def census(proto: onnx.ModelProto) -> Counter:
    """Return the number of nodes by op type and by which of their inputs are weights."""
    weights = {tensor.name for tensor in proto.graph.initializer}
    return Counter((node.op_type, tuple(name in weights for name in node.input)) for node in proto.graph.node)


def test_every_convention_is_seen_in_the_graph(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Each convention changes the graph, so that a fixture that lost one would be noticed."""
    counts = [census(published_style.exported(PublishedDit(tiny_checkpoint), tmp_path))]
    for name, flipped in FLIPPED.items():
        module = PublishedDit(tiny_checkpoint, replace(PUBLISHED, **{name: flipped}))
        counts.append(census(published_style.exported(module, tmp_path)))
        assert counts[-1] not in counts[:-1], name
    assert not [key for key in counts[1 + list(FLIPPED).index("left_pad")] if key[0] == "Pad"]


@pytest.mark.parametrize("style", STYLES)
def test_defaults_bake_stack_pad_and_free(singles: dict[str, Path], halves: dict[str, Path], style: str) -> None:
    path = halves[style]
    model = graph_io.load(path)
    kinds = Counter(node.op_type for node in model.graph)
    assert not kinds["Sin"] - 2 and not kinds["Cos"] - 2  # of t and of the duration: the rotary table is a constant
    assert kinds["Softmax"] == 2 * DEPTH and kinds["Range"] == kinds["Constant"] == 0
    assert [[str(axis) for axis in value.shape] for value in (*model.graph.inputs, *model.graph.outputs)] == [
        [str(dim) for dim in spec.dims] for spec in (*CONTRACTS["dit"].inputs, *CONTRACTS["dit"].outputs)
    ]
    gates = gates_of(path)
    assert gates["null_row"] is True and gates["worst_denoised_cosine"] > 0.99999
    counts = {entry["pass"]: entry["counts"] for entry in gates["rewrites"]}
    assert counts["bake-rope"]["baked"] and counts["stack-attention"]["stacked"] == 2 * DEPTH
    assert counts["pad-k"]["padded"] == DEPTH and counts["null-row"]["added"] == 1
    assert not has_null_row(graph_io.load(singles[style]))


@pytest.mark.parametrize("style", STYLES)
def test_every_duration_is_right_in_real_fp16(tiny_checkpoint: Path, halves: dict[str, Path], style: str) -> None:
    """Use the reference evaluator: ONNX Runtime on a CPU removes fp16 casts and their rounding."""
    module = PublishedDit(tiny_checkpoint, STYLES[style][0])
    proto = onnx.load(halves[style])
    evaluator = ReferenceEvaluator(proto)
    row = dict(list(check_rows())[3])
    row = {name: value[..., :24] if name in ("x", "local_add_cond") else value for name, value in row.items()}
    for seconds in DURATIONS:
        row["seconds_total"] = np.array([seconds], np.float32)
        with torch.inference_mode():
            expected = module(*[torch.from_numpy(row[name]) for name in NAMES]).numpy()
        (velocity,) = evaluator.run(None, row)
        assert relative(np.asarray(velocity), expected) < 1.5e-3, seconds


@pytest.mark.parametrize("cfg", [3.0, 7.0])
def test_guidance_needs_the_rule(tiny_checkpoint: Path, halves: dict[str, Path], tmp_path: Path, cfg: float) -> None:
    """With the null-row rule a guided velocity equals that of the fp32 network's null branch; without, it differs."""
    module, without = PublishedDit(tiny_checkpoint), tmp_path / "without.onnx"
    source = halves["published"].parents[1] / "dit.onnx"
    run_checked(build_dit_fp16mixed.main, ["--input", source, "--onnx", without, "--no-null-row"])
    assert gates_of(without)["null_row"] is False
    row = {name: torch.from_numpy(value) for name, value in list(check_rows())[4].items()}
    null = row | {"t5_hidden": torch.zeros_like(row["t5_hidden"]), "t5_mask": torch.zeros_like(row["t5_mask"])}
    with torch.inference_mode():
        text = module(*[row[name] for name in NAMES])
        token = module.duration(row["seconds_total"], torch.float32).squeeze(1)
        branch = module.velocity(row["x"], row["t"], torch.zeros(1, 257, 768), token, row["local_add_cond"])
    expected = guided(text, branch, cfg).numpy()
    errors = []
    for path in (halves["published"], without):
        with OnnxRuntimeEngine(path) as engine:
            both = [engine.run(inputs)["velocity"] for inputs in (row, null)]
        errors.append(relative(guided(*both, cfg).numpy(), expected))
    assert errors[0] < 5e-3 and errors[1] > 0.01, errors


def test_a_published_half_becomes_fp8_with_every_default(
    tiny_checkpoint: Path, surgeon: Path, tiny_calib: Path, tmp_path: Path
) -> None:
    """It is baked, stacked and padded although it is FP16-mixed already; the passes are printed and reported."""
    path = tmp_path / "dit_fp8.onnx"
    argv = ["--input", surgeon, "--calib", tiny_calib, "--onnx", path, "--ptq", "direct", "--rollouts", 0]
    result = run(build_dit_fp8.main, [*argv, "--rounding", "nearest", "--parity-rows", 8])
    assert result.code == 0, result.err
    report = json.loads(report_path(path).read_text())["stages"]
    counts = {level["name"]: level for level in report["clean"]["passes"]}
    assert counts["bake-rope"]["baked"] == 4 * DEPTH and counts["stack-attention"]["stacked"] == 2 * DEPTH
    assert counts["pad-k"]["padded"] == DEPTH and counts["null-row"]["added"] == counts["free-batch"]["freed"] == 1
    for name in ("free-batch", "widen-fp16", "null-row", "bake-rope", "stack-attention", "pad-k"):
        assert f"{name}: " in result.out
    assert len(report["scales"]["proof"]) == 6 and all(claim["holds"] for claim in report["scales"]["proof"])
    assert gates_of(path)["null_row"] is True
    module = PublishedDit(tiny_checkpoint)
    rows = list(check_rows())
    with torch.inference_mode():
        velocities = [module(*[torch.from_numpy(row[name]) for name in NAMES]).numpy() for row in rows]
    expected = [
        (float(row["t"][0]), row["x"] - row["t"] * velocity) for row, velocity in zip(rows, velocities, strict=True)
    ]
    with OnnxRuntimeEngine(path) as engine:
        denoised = parity.denoise_rows(engine, rows)
    assert min(level.worst_cosine for level in parity.parity_by_sigma(expected, denoised)) >= 0.998
    packs(path, "fp8", tmp_path)


@pytest.mark.parametrize("style", STYLES)
def test_pytorch_packs_it(halves: dict[str, Path], tmp_path: Path, style: str) -> None:
    packs(halves[style], "fp16mixed", tmp_path)


def test_pytorch_packs_a_published_half_as_it_is(surgeon: Path, tmp_path: Path) -> None:
    packs(surgeon, "fp16mixed", tmp_path)


def packs(path: Path, precision: str, folder: Path) -> None:
    """Assert that the packed graph gives ONNX Runtime's velocities on the same file."""
    target = dit_target("medium", precision)
    torch_dit._write(path, target, folder / "packed.safetensors")
    torch_dit._compare(path, folder / "packed.safetensors", target)


def test_without_a_second_half_it_is_fp8_and_no_torch_engine(
    tiny_checkpoint: Path, tiny_calib: Path, tmp_path: Path
) -> None:
    """The small DiTs have no halves to stack; all other passes apply."""
    plain = plain_checkpoint(tiny_checkpoint, tmp_path / "plain")
    half = published_half.write_fp16_mixed(PublishedDit(plain), tmp_path / "in" / "dit_fp16.onnx", tmp_path)
    path = tmp_path / "dit_fp8.onnx"
    argv = ["--input", half, "--calib", tiny_calib, "--onnx", path, "--ptq", "direct", "--rollouts", 0]
    run_checked(build_dit_fp8.main, [*argv, "--rounding", "nearest", "--parity-rows", 8])
    report = json.loads(report_path(path).read_text())["stages"]
    assert report["quantize"]["quantized_linears"] == 7 * DEPTH + 2 and report["parity"]["worst"] >= 0.998
    assert all(claim["holds"] for claim in report["scales"]["proof"])
    with pytest.raises(Exception, match="no second half"):
        pack_dit.pack(pack_dit.read_graph(path))


def fixed_length(proto: onnx.ModelProto) -> None:
    for value in (*proto.graph.input, *proto.graph.output):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_value = 34


def half_input(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16


def integer_mask(proto: onnx.ModelProto) -> None:
    next(
        value for value in proto.graph.input if value.name == "t5_mask"
    ).type.tensor_type.elem_type = onnx.TensorProto.INT64


def other_name(proto: onnx.ModelProto) -> None:
    published_style.rename(proto, "t5_hidden", "text")
    next(value for value in proto.graph.input if value.name == "t5_hidden").name = "text"


REFUSED = {
    "a fixed length": (fixed_length, "fixed length of 34 frames", "dynamic length"),
    "fp16 inputs": (half_input, "input x is FLOAT16, expected float32", "export it with float32 for x"),
    "an integer mask": (integer_mask, "input t5_mask is INT64, expected float32", "export it with float32 for t5_mask"),
    "another name": (other_name, "it has no input t5_hidden", "input_names x, t, t5_hidden"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_taken_says_what_to_export(singles: dict[str, Path], tmp_path: Path, case: str) -> None:
    spoil, reason, cure = REFUSED[case]
    proto = onnx.load(singles["published"])
    spoil(proto)
    source = published_style.save_graph(proto, tmp_path / "in" / "dit.onnx")
    result = run(build_dit_fp16mixed.main, ["--input", source, "--onnx", tmp_path / "half.onnx"])
    assert_user_error(result, str(source), reason)
    assert cure in result.err
    assert not (tmp_path / "half.onnx").exists()


def test_what_is_mixed_already_is_sent_on(surgeon: Path, tmp_path: Path) -> None:
    argv = ["--input", surgeon, "--onnx", tmp_path / "half.onnx"]
    result = run(build_dit_fp16mixed.main, argv)
    assert_user_error(result, str(surgeon), "the graph is already FP16-mixed")
    assert "pass it to build/build_dit_fp8.py without this step" in result.err
