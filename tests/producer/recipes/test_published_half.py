"""An FP16-mixed DiT of the published style converted to FP8: widened to fp32 where wrong, refused where unknown."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import build_dit_fp8
import build_dit_fp16mixed
import build_from_onnx
import numpy as np
import onnx
import pytest
from conftest import onnx_of, run_checked

from helpers import published_half, published_style
from helpers.commands import assert_user_error, listing, run
from helpers.layer_scales import canonical_graph, scales_by_role
from sa3_build.graph import io as graph_io, query
from sa3_build.graph.fp32_islands import find_dit_islands
from sa3_build.passes.widen_fp16 import fp16_mismatches
from sa3_build.quantization import selection
from sa3_build.recipes.fp8 import report_path
from sa3_build.verification import parity as verification_parity
from sa3_build.verification.probe_rows import check_rows
from sa3_trt_core.artifacts.calibration_set import tensors
from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine
from sa3_trt_core.targets import dit_target

DEPTH = 1
SECONDS = (29.72, 30.0, 47.0, 120.0, 183.25)  # 30 and 120 divided by 384 are exact in 16 bits, the others are not


@pytest.fixture(scope="module")
def single(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the fp32 graph, the reference. Read only."""
    folder = tmp_path_factory.mktemp("single")
    return published_style.write_fp32(published_style.legacy_module(tiny_checkpoint), folder / "dit.onnx", folder)


@pytest.fixture(scope="module", params=[onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16], ids=["fp32", "fp16"])
def half(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the FP16-mixed graph with its softmax in this type. Read only."""
    folder = tmp_path_factory.mktemp("half")
    module = published_style.legacy_module(tiny_checkpoint)
    return published_half.write_fp16_mixed(module, folder / "dit_fp16mixed.onnx", folder, request.param)


@pytest.fixture(scope="module")
def quantised(half: Path, tiny_calib: Path) -> Path:
    path = half.parent / "out" / "sa3-m" / "dit_fp8.onnx"
    argv = ["--input", half, "--calib", tiny_calib, "--onnx", path, "--ptq", "direct", "--parity-rows", 8]
    run_checked(build_dit_fp8.main, argv)
    return path


def velocities(path: Path) -> list[np.ndarray]:
    """Return one velocity for each of SECONDS, from the same noise at sigma 1."""
    row = next(iter(check_rows()))
    rows = [{**row, "seconds_total": np.array([seconds], np.float32)} for seconds in SECONDS]
    with OnnxRuntimeEngine(path) as engine:
        return [engine.run(tensors(inputs))["velocity"].numpy() for inputs in rows]


def errors(reference: Path, path: Path) -> list[float]:
    pairs = zip(velocities(reference), velocities(path), strict=True)
    return [verification_parity.relative(expected, actual) for expected, actual in pairs]


def test_the_graph_has_the_defect_and_the_habits(single: Path, half: Path) -> None:
    """Wrong at durations that fp16 rounds and right at the others; norms in a chain of three casts."""
    wrong = errors(single, half)
    assert min(wrong[0], wrong[2], wrong[4]) > 0.005 and max(wrong[1], wrong[3]) < 0.002
    proto = onnx.load(half, load_external_data=False)
    assert not proto.graph.value_info and proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    makers = {name: node for node in proto.graph.node for name in node.output}
    for gamma in (node for node in proto.graph.node if node.name.endswith("norm/Mul_1")):
        chain = [gamma.input[0]]
        while makers[chain[-1]].op_type == "Cast":
            chain.append(makers[chain[-1]].input[0])
        assert len(chain) == 4 and makers[chain[-1]].op_type == "Mul"
    kinds = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    assert kinds["dit.transformer.layers.0.ff.ff.2.weight"] == onnx.TensorProto.FLOAT16


def test_what_was_wrong_in_it_is_right_in_what_is_made_of_it(single: Path, half: Path, tmp_path: Path) -> None:
    """The seconds path is fp32 again: durations that fp16 rounds are as accurate as the others."""
    cleaned = tmp_path / "clean.onnx"
    graph_io.save(canonical_graph(half), cleaned)
    assert max(errors(single, cleaned)) < 1e-3
    model = graph_io.load(cleaned)
    behind = query.input_dependencies(model)
    path = [node for node in model.graph if behind[node] == {"seconds_total"} and node.op_type in ("Clip", "Div")]
    assert {str(node.outputs[0].dtype) for node in path} == {"FLOAT"} and len(path) == 2
    assert {str(value.dtype) for node in find_dit_islands(model).all() for value in node.outputs} == {"FLOAT"}


def test_the_attention_core_is_one_type_afterwards(half: Path) -> None:
    model = canonical_graph(half)
    core = [node for node in model.graph if node.op_type in query.GEMM_OPS and query.weight_initializer(node) is None]
    softmaxes = [node for node in model.graph if node.op_type == "Softmax"]
    assert (len(core), len(softmaxes)) == (4 * DEPTH, 2 * DEPTH)  # both halves of an attention in one call
    assert {str(node.outputs[0].dtype) for node in (*core, *softmaxes)} == {"FLOAT16"}
    for softmax in softmaxes:
        assert softmax.inputs[0].producer() in core
        assert all(use.node in core for use in softmax.outputs[0].uses())


def test_an_fp32_softmax_alone_is_reason_enough(tiny_onnx: Path, tmp_path: Path) -> None:
    """Our own graph with casts around one softmax, its only defect: attention could not fuse."""
    proto = onnx.load(onnx_of(tiny_onnx, "sa3-m"))
    exported = graph_io.load(onnx_of(tiny_onnx, "sa3-m"))
    assert fp16_mismatches(exported, find_dit_islands(exported)) == []
    softmax = next(node for node in proto.graph.node if node.op_type == "Softmax")
    single, half = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    before = onnx.helper.make_node("Cast", [softmax.input[0]], ["/theirs/in"], "/theirs/in", to=single)
    after = onnx.helper.make_node("Cast", ["/theirs/out"], [softmax.output[0]], "/theirs/out", to=half)
    softmax.input[0], softmax.output[0] = "/theirs/in", "/theirs/out"
    proto.graph.node.extend([before, after])
    del proto.graph.value_info[:]
    path = published_style.save_graph(proto, tmp_path / "dit_fp16mixed.onnx")
    cleaned = canonical_graph(path)
    assert {str(node.outputs[0].dtype) for node in cleaned.graph if node.op_type == "Softmax"} == {"FLOAT16"}


def test_every_weight_is_the_source_weight_bit_for_bit(half: Path) -> None:
    """fp16 -> fp32 -> fp16 is exact, and folding only transposes."""
    proto = onnx.load(half)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    model = canonical_graph(half)
    products = selection.select_linears(model).quantized
    assert len(products) == 7 * DEPTH + 2
    for product in products:
        weight = model.graph.initializers[product.weight].const_value.numpy()
        name = next(name for name in stored if product.weight.startswith(name))
        assert weight.dtype == np.float16 and weight.tobytes() == np.ascontiguousarray(stored[name].T).tobytes()


def test_the_fp8_graph_is_as_right_as_ours(
    single: Path, half: Path, quantised: Path, tiny_fp8: Path, tiny_onnx: Path
) -> None:
    exported = scales_by_role(onnx_of(tiny_fp8, "sa3-m"), onnx_of(tiny_fp8, "sa3-m-fp8"))
    published = scales_by_role(half, quantised)
    assert published.keys() == exported.keys()
    for role, (activation, weight) in exported.items():
        assert published[role][0] == pytest.approx(activation, rel=2e-3), role
        assert np.array_equal(published[role][1], weight), role
    exported_errors = errors(single, onnx_of(tiny_fp8, "sa3-m-fp8"))
    assert errors(single, quantised) == pytest.approx(exported_errors, rel=0.15)
    report = json.loads(report_path(quantised).read_text())
    assert len(report["stages"]["scales"]["proof"]) == 6
    assert all(claim["holds"] for claim in report["stages"]["scales"]["proof"])
    assert report["stages"]["clean"]["cosine_with_source"] > 0.99999
    (lifted,) = [entry for entry in report["stages"]["clean"]["passes"] if entry["name"] == "widen-fp16"]
    assert lifted["notes"][0] == "node /duration/Clip (Clip) must be fp32 and returns fp16"


def test_parity_is_measured_against_what_was_put_right(half: Path, tiny_calib: Path, tmp_path: Path) -> None:
    """At 183.25 s the source's own error exceeds FP8's: compared with it, a correct graph would fail."""
    with np.load(tiny_calib) as stored:
        rows = {key: stored[key] for key in stored.files}
    rows["seconds_total"] = np.full_like(rows["seconds_total"], 183.25)
    np.savez(tmp_path / "long.npz", **rows)
    argv = ["--input", half, "--calib", tmp_path / "long.npz", "--onnx", tmp_path / "dit_fp8.onnx", "--ptq", "direct"]
    run_checked(build_dit_fp8.main, [*argv, "--parity-rows", 4])
    parity = json.loads(report_path(tmp_path / "dit_fp8.onnx").read_text())["stages"]["parity"]
    with OnnxRuntimeEngine(half) as first, OnnxRuntimeEngine(tmp_path / "dit_fp8.onnx") as second:
        chosen = [{key: value[:1] for key, value in rows.items()}]
        sides = [verification_parity.denoise_rows(engine, chosen) for engine in (first, second)]
    assert parity["worst"] > 0.998 > verification_parity.parity_by_sigma(*sides)[0].worst_cosine


def test_modelopt_puts_the_same_pairs_and_scales(half: Path, quantised: Path, tiny_calib: Path, tmp_path: Path) -> None:
    path = tmp_path / "dit_fp8.onnx"
    run_checked(build_dit_fp8.main, ["--input", half, "--calib", tiny_calib, "--onnx", path, "--parity-rows", 4])
    direct, modelopt = scales_by_role(half, quantised), scales_by_role(half, path)
    assert direct.keys() == modelopt.keys()
    for place, (activation, weight) in direct.items():
        assert modelopt[place][0] == activation and np.array_equal(modelopt[place][1], weight), place


def test_tensorrt_rtx_compiles_it(quantised: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the RTX builder is part of requirements-cpu.txt only")
    root = tmp_path / "root"
    (root / dit_target("medium", "fp8").onnx[0]).parent.mkdir(parents=True)
    for file in graph_io.files_of(quantised):
        shutil.copy(file, (root / dit_target("medium", "fp8").onnx[0]).parent)
    argv = ["sa3-m-fp8", "--backend", "tensorrt_rtx", "--arch", "sm_89", "--onnx-root", root, "--models-dir", tmp_path]
    result = run(build_from_onnx.main, [*argv, "--json"])
    assert result.code == 0, result.err
    assert json.loads(result.out)[0]["bytes"] > 100_000


def node_named(proto: onnx.ModelProto, *words: str) -> onnx.NodeProto:
    return next(node for node in proto.graph.node if all(word in f"{node.name}({node.op_type})" for word in words))


def insert_behind(proto: onnx.ModelProto, op_type: str, *words: str) -> None:
    """Insert a node between the node so named and its users."""
    node = node_named(proto, *words)
    old, node.output[0] = node.output[0], "/theirs/before"
    proto.graph.node.append(onnx.helper.make_node(op_type, ["/theirs/before"], [old], f"/theirs/{op_type}"))


def short_range(proto: onnx.ModelProto) -> None:
    counter = node_named(proto, "(Range)")
    for index, name in enumerate(list(counter.input)):
        cast = onnx.helper.make_node(
            "Cast", [name], [f"/theirs/{index}"], f"/theirs/{index}", to=onnx.TensorProto.FLOAT16
        )
        counter.input[index] = f"/theirs/{index}"
        proto.graph.node.append(cast)


def round_the_rotary_table(proto: onnx.ModelProto) -> None:
    table = next(tensor for tensor in proto.graph.initializer if tensor.name.endswith("inv_freq"))
    rounded = onnx.numpy_helper.to_array(table).astype(np.float16)
    table.CopyFrom(onnx.numpy_helper.from_array(rounded, table.name))
    cast = onnx.helper.make_node("Cast", [table.name], ["/theirs/wide"], "/theirs/wide", to=onnx.TensorProto.FLOAT)
    einsum = node_named(proto, "(Einsum)")
    einsum.input[1] = "/theirs/wide"
    proto.graph.node.append(cast)


def own_domain(proto: onnx.ModelProto) -> None:
    node_named(proto, "/transformer/layers.0/ff", "(Sigmoid)").domain = "theirs"
    proto.opset_import.append(onnx.helper.make_opsetid("theirs", 1))


DAMAGE: list[tuple[str, Callable[[onnx.ModelProto], None], tuple[str, ...]]] = [
    ("a norm with an extra node", lambda p: insert_behind(p, "Abs", "pre_norm/ReduceMean"),
     ("pre_norm", "(Pow)", "not part of a recognised RMSNorm chain")),
    ("an unknown op in the trunk", lambda p: insert_behind(p, "Tanh", "/transformer/layers.0/ff", "(Sigmoid)"),
     ("node /theirs/Tanh (Tanh)", "not an op of a DiT's trunk")),
    ("a weight behind an op", lambda p: insert_behind(p, "Neg", "to_out/Transpose"),
     ("to_out/MatMul", "has a computed weight", "/theirs/Neg (Neg)")),
    ("a 16-bit Range", short_range, ("/rotary_pos_emb/Range", "float16")),
    ("an op of its own", own_domain, ("theirs::Sigmoid",)),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE])
def test_what_is_not_recognised_is_refused_by_name(
    half: Path, tiny_calib: Path, tmp_path: Path, damage: Callable[[onnx.ModelProto], None], words: tuple[str, ...]
) -> None:
    proto = onnx.load(half)
    damage(proto)
    source = published_style.save_graph(proto, tmp_path / "in" / "dit_fp16mixed.onnx")
    before = listing(tmp_path)
    argv = ["--input", source, "--calib", tiny_calib, "--onnx", tmp_path / "dit_fp8.onnx"]
    assert_user_error(run(build_dit_fp8.main, argv), str(source), *words)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("damage", "words"),
    [case[1:] for case in DAMAGE if "weight" not in case[0]],
    ids=[case[0] for case in DAMAGE if "weight" not in case[0]],
)
def test_the_fp32_entrance_refuses_it_too(
    single: Path, tmp_path: Path, damage: Callable[[onnx.ModelProto], None], words: tuple[str, ...]
) -> None:
    proto = onnx.load(single)
    damage(proto)
    source = published_style.save_graph(proto, tmp_path / "in" / "dit.onnx")
    before = listing(tmp_path)
    argv = ["--input", source, "--onnx", tmp_path / "dit_fp16mixed.onnx"]
    assert_user_error(run(build_dit_fp16mixed.main, argv), str(source), *words)
    assert listing(tmp_path) == before


def test_a_rounded_rotary_table_is_refused(half: Path, tiny_calib: Path, tmp_path: Path) -> None:
    """Precision lost in fp16 cannot be restored, and parity with the source itself would not detect it."""
    proto = onnx.load(half)
    round_the_rotary_table(proto)
    source = published_style.save_graph(proto, tmp_path / "in" / "dit_fp16mixed.onnx")
    argv = ["--input", source, "--calib", tiny_calib, "--onnx", tmp_path / "dit_fp8.onnx"]
    assert_user_error(run(build_dit_fp8.main, argv), "rotary_pos_emb.inv_freq", "rounded to 16 bits")
