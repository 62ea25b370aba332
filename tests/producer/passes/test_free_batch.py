"""Symbolic shapes, folding of shape arithmetic with fixed sizes, and a dynamic batch axis in place of a fixed 1."""

from __future__ import annotations

from pathlib import Path

import build_dit_fp8
import build_dit_fp16mixed
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from conftest import onnx_of, run_checked
from hypothesis import given, strategies as st

from helpers import published_half, published_style
from helpers.commands import assert_user_error, listing, run
from sa3_build.export import torch_to_onnx
from sa3_build.graph import io as graph_io
from sa3_build.graph.errors import GraphNotRecognised
from sa3_build.graph.symbolic_dim import Length, broadcast, quotient, symbol
from sa3_build.passes import canonicalize
from sa3_build.passes.base import run_passes
from sa3_build.passes.dynamic_batch import FreeBatch
from sa3_build.passes.fold_shapes import FoldShapes
from sa3_build.passes.infer_types import InferTypes
from sa3_build.verification import graph_checks
from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine
from sa3_trt_core.errors import GateError
from sa3_trt_core.shapes import CONTRACTS

B, L = symbol("B"), symbol("L")
NAMES = [spec.name for spec in CONTRACTS["dit"].inputs]
NOISE = np.random.default_rng(0)


def small(body: str, **weights: np.ndarray) -> ir.Model:
    """Return a graph from the latent to the velocity with a batch of one."""
    text = f"g (float[1,256,L] x) => (float[1,256,L] velocity) {{ {body} }}"
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 19]>\n{text}')
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    model = ir.from_proto(proto)
    for index, node in enumerate(model.graph):
        node.name = f"/theirs/{node.op_type}_{index}"
    run_passes(model, [InferTypes()])
    return model


def evaluate(model: ir.Model, x: np.ndarray) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    return session.run(None, {"x": x})[0]


INTS = {f"i{number}" if number >= 0 else f"m{-number}": np.array([number]) for number in (-1, 0, 1, 2, 4, 64, 256)}
FREED = {
    "a reshape to one row": ("s = Reshape(x, heads)\n p = Transpose <perm=[0,2,1,3]> (s)\n q = Softmax <axis=-1> (p)\n"
                             "r = Transpose <perm=[0,2,1,3]> (q)\n velocity = Reshape(r, flat)",
                             {"heads": np.array([1, 4, 64, -1]), "flat": np.array([1, 256, -1])}),
    "a computed reshape to one row": ("n = Shape <start=2> (x)\n t = Concat <axis=0> (i1, i4, i64, n)\n"
                                      "s = Reshape(x, t)\n u = Concat <axis=0> (i1, i256, n)\n"
                                      "velocity = Reshape(s, u)",
                                      {name: INTS[name] for name in ("i1", "i4", "i64", "i256")}),
    "rows folded into the length": (
        "t = Transpose <perm=[0,2,1]> (x)\n f = Reshape(t, flat)\n g = Gemm(f, w)\n u = Reshape(g, back)\n"
        "velocity = Transpose <perm=[0,2,1]> (u)",
        {"flat": np.array([-1, 256]), "back": np.array([1, -1, 256]), "w": np.eye(256, dtype=np.float32)}),
    "a padded length": (
        "n = Shape <start=2> (x)\n l = Add(n, i2)\n d = Sub(l, n)\n z = ConstantOfShape <value = int64[1] {0}> (five)\n"
        "j = Concat <axis=0> (d, z)\n p = Reshape(j, pairs)\n r = Slice(p, m1, least, i0, m1)\n"
        "t = Transpose <perm=[1,0]> (r)\n f = Reshape(t, m1)\n y = Pad(x, f)\n velocity = Slice(y, i2, end, i2)",
        {**{name: INTS[name] for name in ("i0", "i2", "m1")}, "pairs": np.array([-1, 2]), "five": np.array([5]),
         "least": np.array([-(2**63) + 1]), "end": np.array([2**63 - 1])}),
    "memory tokens": ("t = Transpose <perm=[0,2,1]> (x)\n j = Concat <axis=1> (memory, t)\n m = MatMul(j, w)\n"
                      "c = Slice(m, i2, end, i1)\n velocity = Transpose <perm=[0,2,1]> (c)",
                      {"memory": NOISE.standard_normal((1, 2, 256)).astype(np.float32),
                       "w": NOISE.standard_normal((256, 256)).astype(np.float32) / 16,
                       "i2": INTS["i2"], "i1": INTS["i1"], "end": np.array([2**63 - 1])}),
}  # fmt: skip


@pytest.mark.parametrize("case", FREED)
def test_a_graph_of_one_row_takes_any_number(case: str) -> None:
    body, weights = FREED[case]
    model, rows = small(body, **weights), NOISE.standard_normal((3, 256, 5)).astype(np.float32)
    expected = np.concatenate([evaluate(model, rows[index : index + 1]) for index in range(3)])
    (result,) = run_passes(model, [FreeBatch()])
    assert result.counts["freed"] == 1
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert [str(axis) for axis in model.graph.outputs[0].shape] == ["B", "256", "L"]
    assert np.allclose(evaluate(model, rows), expected, atol=1e-6)
    assert run_passes(model, [FreeBatch()])[0].counts == {"freed": 0}


MIXING = {
    "a softmax across rows": ("velocity = Softmax <axis=0> (x)", {}, "/theirs/Softmax_0 (Softmax) operates across"),
    "a mean over rows": ("m = ReduceMean <keepdims=1> (x, i0)\n velocity = Add(x, m)", {}, "/theirs/ReduceMean_0"),
    "the first row": ("f = Slice(x, i0, i1, i0)\n velocity = Add(x, f)", {}, "/theirs/Slice_0 (Slice) maps [B, "),
    "a row by number": ("f = Gather <axis=0> (x, i0)\n velocity = Add(x, f)", {}, "/theirs/Gather_0 (Gather) operates"),
    "a softmax across rows that are folded into the length": (
        "t = Transpose <perm=[0,2,1]> (x)\n f = Reshape(t, flat)\n g = Softmax <axis=0> (f)\n n = Shape(t)\n"
        "u = Reshape(g, n)\n velocity = Transpose <perm=[0,2,1]> (u)",
        {"flat": np.array([-1, 256])}, "/theirs/Softmax_2 (Softmax) operates across"),
    "an op that nobody follows": ("velocity = CumSum(x, zero)", {"zero": np.array(0)}, "/theirs/CumSum_0 (CumSum)"),
    "a number of rows in a sum": (
        "n = Shape <start=0, end=1> (x)\n f = Cast <to=1> (n)\n velocity = Div(x, f)", {},
        "/theirs/Cast_1 (Cast) computes with the number of rows"),
    "a position by row": (
        "n = Shape <start=0, end=1> (x)\n s = Squeeze(n)\n r = Range(zero, s, one)\n c = Cast <to=1> (r)\n"
        "u = Reshape(c, column)\n velocity = Add(x, u)",
        {"zero": np.array(0), "one": np.array(1), "column": np.array([-1, 1, 1])}, "/theirs/Range_2 (Range) counts"),
    "axes that do not meet": (
        "n = Shape <start=2> (x)\n t = Concat <axis=0> (n, i256, i1)\n r = Reshape(x, t)\n"
        "u = Transpose <perm=[2,1,0]> (r)\n k = Concat <axis=1> (x, u)\n velocity = Slice(k, i0, i256, i1)", {},
        "/theirs/Reshape_2 (Reshape) maps [B, 256, L] to [L, 256, 1]"),
}  # fmt: skip


@pytest.mark.parametrize("case", MIXING)
def test_what_mixes_rows_is_refused_by_name(case: str) -> None:
    body, weights, words = MIXING[case]
    used = {name: array for name, array in INTS.items() if f"{name})" in body or f"{name}," in body}
    with pytest.raises(GraphNotRecognised) as refused:
        run_passes(small(body, **weights, **used), [FreeBatch()])
    assert "the batch axis cannot be made dynamic: " in refused.value.message and words in refused.value.message
    assert refused.value.hint == "export it with a dynamic batch axis, or keep it at one row with --no-free-batch"


SCALE = (
    "n = Shape(x)\n d = Slice(n, from, to)\n f = Cast <to=1> (d)\n r = Sqrt(f)\n i = Div(one, r)\n s = Sqrt(i)\n"
    "l = Slice(n, i2, end)\n whole = Cast <to=1> (l)\n y = Mul(x, s)\n velocity = Div(y, whole)"
)


def test_the_attention_scale_becomes_a_number_and_the_length_stays_computed() -> None:
    model = small(SCALE, **{"from": np.array([1]), "to": np.array([2]), "one": np.float32(1), "i2": np.array([2]),
                            "end": np.array([2**63 - 1])})  # fmt: skip
    x = NOISE.standard_normal((1, 256, 7)).astype(np.float32)
    expected = evaluate(model, x)
    run_passes(model, [FoldShapes()])
    assert [node.op_type for node in model.graph] == ["Shape", "Slice", "Cast", "Mul", "Div"]
    (scale,) = [value for node in model.graph if node.op_type == "Mul" for value in node.inputs[1:]]
    assert scale.is_initializer() and scale.const_value.numpy() == np.float32(0.25)
    assert np.array_equal(evaluate(model, x), expected)


def test_a_constant_is_not_folded() -> None:
    """A frequency rounded to fp16 must stay visible through its Cast."""
    model = small("w = Cast <to=1> (half)\n velocity = Mul(x, w)", half=np.array([0.3], np.float16))
    assert run_passes(model, [FoldShapes()])[0].counts["folded"] == 0
    assert [node.op_type for node in model.graph] == ["Cast", "Mul"]


@given(*[st.integers(-5, 5)] * 4, st.integers(1, 6))
def test_lengths_add_up_as_numbers_do(a: int, b: int, c: int, d: int, factor: int) -> None:
    first, second = L.times(a) + b, L.times(c) + d + B
    assert first + second - second == first and first + second == second + first
    assert first.times(factor).over(factor) == first
    assert (first - first).number == 0 and (first.number is None) == (a != 0)
    whole = first.times(second)
    assert whole == second.times(first) and whole.over(second) == first
    assert whole.at("L", 3).at("B", 2).number == (3 * a + b) * (3 * c + d + 2)


def test_what_is_left_of_a_shape() -> None:
    assert quotient((B, L, Length(256)), (B, Length(4), Length(64))) == L
    assert quotient((B, L), (Length(1),)) == B.times(L) and quotient((B,), (L,)) is None
    assert quotient((B.times(L + 64), Length(128)), (B, Length(64))) == (L + 64).times(2) and quotient(
        (L + 64, Length(2)), (L + 64,)
    ) == Length(2)
    assert broadcast(Length(1), B) == B and broadcast(None, Length(3)) == Length(3) and broadcast(None, B) is None
    with pytest.raises(ValueError, match="axes of B and L"):
        broadcast(B, L)


@pytest.fixture(scope="module")
def published(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return graphs of the published style with a batch of one: fp32, FP16-mixed. Read only."""
    folder = tmp_path_factory.mktemp("published")
    module = published_style.legacy_module(tiny_checkpoint)
    return {
        "single": published_style.write_fp32(module, folder / "single" / "dit.onnx", folder),
        "half": published_half.write_fp16_mixed(module, folder / "half" / "dit_fp16mixed.onnx", folder),
    }


def rows_differ(path: Path, rows: int = 3) -> float:
    """Return the largest relative difference between rows in one run and one by one."""
    feeds = dict(zip(NAMES, torch_to_onnx.example_inputs("dit", batch=rows, frames=21, seed=4), strict=True))
    with OnnxRuntimeEngine(path) as engine:
        together = engine.run(feeds)["velocity"]
        alone = torch.cat(
            [engine.run({n: v[row : row + 1] for n, v in feeds.items()})["velocity"] for row in range(rows)]
        )
    return float(((together - alone).flatten(1).norm(dim=1) / alone.flatten(1).norm(dim=1)).max())


def batch_of(path: Path) -> set[str]:
    proto = onnx.load(path, load_external_data=False)
    shapes = [value.type.tensor_type.shape.dim[0] for value in (*proto.graph.input, *proto.graph.output)]
    return {dim.dim_param or str(dim.dim_value) for dim in shapes}


def test_published_graphs_run_any_number_of_rows(published: dict[str, Path], tiny_calib: Path, tmp_path: Path) -> None:
    """fp32 -> FP16-mixed and FP16-mixed -> FP8: a batch of three gives the same rows as three single runs."""
    half, fp8 = tmp_path / "dit_fp16mixed.onnx", tmp_path / "dit_fp8.onnx"
    run_checked(build_dit_fp16mixed.main, ["--input", published["single"], "--onnx", half])
    argv = ["--input", published["half"], "--calib", tiny_calib, "--onnx", fp8, "--ptq", "direct"]
    run_checked(build_dit_fp8.main, [*argv, "--parity-rows", 4])
    assert {batch_of(path) == {"1"} for path in published.values()} == {True}
    for path, most in ((half, 2e-3), (fp8, 2e-2)):  # in FP8 the last bit of an fp16 sum can move a code
        assert batch_of(path) == {"B"}
        onnx.checker.check_model(str(path), full_check=True)
        assert rows_differ(path) < most


def test_what_was_folded_for_one_row_is_opened_again(published: dict[str, Path], tmp_path: Path) -> None:
    """A graph whose shape arithmetic has been folded for a batch of one gets a dynamic batch."""
    model = graph_io.load(published["single"])
    assert not [
        result for result in canonicalize.canonicalize(model, free_batch=False).results if result.name == "free-batch"
    ]
    assert [node for node in model.graph if node.op_type == "Expand"]
    graph_io.save(model, tmp_path / "folded.onnx")
    assert batch_of(tmp_path / "folded.onnx") == {"1"}
    again = graph_io.load(tmp_path / "folded.onnx")
    (freed,) = [result for result in canonicalize.canonicalize(again).results if result.name == "free-batch"]
    tokens, keys_and_values = 3, 2 * 3  # Shape, Concat, Expand; Slice, Concat for each of k1, k2, v
    assert freed.counts == {"freed": 1, "nodes_added": tokens + keys_and_values}
    graph_io.save(again, tmp_path / "freed.onnx")
    assert rows_differ(tmp_path / "freed.onnx") < 1e-5


def add_to_velocity(source: Path, path: Path, op_type: str, *inputs: str, **attributes: int) -> Path:
    """Write a graph with `op_type(velocity, ...)` added to its velocity; return its path."""
    proto = onnx.load(source)
    maker = next(node for node in proto.graph.node if "velocity" in node.output)
    maker.output[0] = "/theirs/velocity"
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0]), "/theirs/first_axis"))
    more = onnx.helper.make_node(op_type, ["/theirs/velocity", *inputs], ["/theirs/more"], **attributes)
    proto.graph.node.extend([more, onnx.helper.make_node("Add", ["/theirs/velocity", "/theirs/more"], ["velocity"])])
    return published_style.save_graph(proto, path)


def test_the_gates_see_rows_that_mix_and_another_network(tiny_onnx: Path, tmp_path: Path) -> None:
    """Each gate passes on a valid graph and fails on one that violates it."""
    good = onnx_of(tiny_onnx, "sa3-m-fp32")
    assert graph_checks.require_rows_alike(good) < 1e-5 and graph_checks.require_same_network(good, good) > 1 - 1e-9
    mixing = add_to_velocity(good, tmp_path / "a" / "dit.onnx", "ReduceMean", "/theirs/first_axis", keepdims=1)
    with pytest.raises(GateError, match="batched rows differ from single rows"):
        graph_checks.require_rows_alike(mixing)
    other_network = add_to_velocity(good, tmp_path / "b" / "dit.onnx", "Sigmoid")
    with pytest.raises(GateError, match="changed when its precision was converted"):
        graph_checks.require_same_network(good, other_network)


def test_the_batch_stays_where_that_is_asked(published: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "dit_fp16mixed.onnx"
    run_checked(build_dit_fp16mixed.main, ["--input", published["single"], "--onnx", path, "--no-free-batch"])
    assert batch_of(path) == {"1"}
    assert "is current" not in run(build_dit_fp16mixed.main, ["--input", published["single"], "--onnx", path]).out
    assert batch_of(path) == {"B"}


@pytest.mark.parametrize("kind", ["single", "half"])
def test_a_graph_that_mixes_rows_is_refused_and_nothing_written(
    published: dict[str, Path], tiny_calib: Path, tmp_path: Path, kind: str
) -> None:
    """A Slice that takes the first row of the feed-forward's input has no effect with a batch of one."""
    proto = onnx.load(published[kind])
    node = next(node for node in proto.graph.node if "/ff/" in node.name and node.op_type == "Sigmoid")
    for index, bound in enumerate((0, 1)):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([bound]), f"/theirs/{index}"))
    bounds = ["/theirs/0", "/theirs/1", "/theirs/0"]
    proto.graph.node.append(onnx.helper.make_node("Slice", [node.input[0], *bounds], ["/theirs/row"], "/theirs/Slice"))
    node.input[0] = "/theirs/row"
    source = published_style.save_graph(proto, tmp_path / "in" / "dit.onnx")
    before = listing(tmp_path)
    if kind == "single":
        result = run(build_dit_fp16mixed.main, ["--input", source, "--onnx", tmp_path / "out.onnx"])
    else:
        result = run(build_dit_fp8.main, ["--input", source, "--calib", tiny_calib, "--onnx", tmp_path / "out.onnx"])
    assert_user_error(result, str(source), "the batch axis cannot be made dynamic", "node /theirs/Slice (Slice)")
    assert "--no-free-batch" in result.err
    assert listing(tmp_path) == before
