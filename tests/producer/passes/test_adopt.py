"""Passes that canonicalize graphs of other exporters, each on a small graph."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from sa3_build.graph import query
from sa3_build.graph.errors import GraphNotRecognised
from sa3_build.graph.fp32_islands import rotary_rotations
from sa3_build.passes.base import run_passes
from sa3_build.passes.convert_opset import ConvertOpset
from sa3_build.passes.infer_types import InferTypes
from sa3_build.passes.lift_constants import LiftConstants
from sa3_build.passes.remove_casts import DropDeadCasts
from sa3_build.passes.topological_sort import SortTopologically
from sa3_build.passes.widen_fp16 import WidenFp16

SINGLE, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
NOISE = np.random.default_rng(0)


def untyped(text: str, opset: int = 17, **weights: np.ndarray) -> ir.Model:
    """Return an ir.Model parsed from ONNX's text form, without types on inner values."""
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]>\n{text}')
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    return ir.from_proto(proto)


def run(model: ir.Model, **feeds: np.ndarray) -> list[np.ndarray]:
    import onnxruntime

    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, feeds)


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_axes_and_parts_that_moved_between_opsets() -> None:
    """At opset 18 ReduceMean takes its axes as an input and Split has `num_outputs`; nothing else changes."""
    model = untyped(
        "g (float[2,6] x) => (float[2,1] m, float[2,3] a, float[2,3] b)"
        "{ m = ReduceMean <axes=[-1], keepdims=1> (x)\n a, b = Split <axis=1> (x) }"
    )
    x = NOISE.standard_normal((2, 6)).astype(np.float32)
    expected = run(model, x=x)
    (result,) = run_passes(model, [ConvertOpset()])
    assert result.counts == {"converted": 2} and model.opset_imports[""] == 19
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    for first, second in zip(run(model, x=x), expected, strict=True):
        assert np.array_equal(first, second)


def test_what_has_another_meaning_by_now_is_refused_by_name() -> None:
    model = untyped(
        "g (float[1,1,2,2] x) => (float[1,1,4,4] y) { y = Resize (x, none, scales) }",
        none=np.array([], np.float32), scales=np.array([1, 1, 2, 2], np.float32),
    )  # fmt: skip
    model.graph[0].name = "/some/Resize"
    with pytest.raises(GraphNotRecognised, match=r"node /some/Resize \(Resize\) differs between opset 17 and opset 19"):
        run_passes(model, [ConvertOpset()])
    assert model.opset_imports[""] == 17


@pytest.mark.parametrize("opset", [19, 21])
def test_a_newer_opset_is_left_alone(opset: int) -> None:
    model = untyped("g (float[2] x) => (float[2] y) { y = Sin(x) }", opset)
    run_passes(model, [ConvertOpset()])
    assert model.opset_imports[""] == opset


def test_constants_and_identities_stand_in_nobodys_way() -> None:
    """A weight given by a Constant node or through an Identity is recognised as a weight."""
    model = untyped(
        "g (float[2,2] x) => (float[2,2] y, float[2,2] z) { k = Constant <value = float[2,2] {1.0, 2.0, 3.0, 4.0}> ()\n"
        "w = Identity(shared)\n y = MatMul(x, k)\n z = MatMul(x, w) }",
        shared=np.eye(2, dtype=np.float32),
    )
    x = NOISE.standard_normal((2, 2)).astype(np.float32)
    expected = run(model, x=x)
    run_passes(model, [LiftConstants()])
    assert ops(model) == ["MatMul", "MatMul"]
    assert [str(weight.name) for _, weight in query.linear_nodes(model)] == ["k", "shared"]
    for first, second in zip(run(model, x=x), expected, strict=True):
        assert np.array_equal(first, second)


CHAIN = (
    "g (float[2,2] x) => (float[2,2] y, float[2,2] z, float[2,2] r) { h = Cast <to=10> (x)\n up = Cast <to=1> (h)\n"
    "again = Cast <to=10> (up)\n s = Add(h, again)\n same = Cast <to=10> (s)\n y = Cast <to=1> (same)\n"
    "other = Cast <to=10> (x)\n t = Mul(other, h)\n z = Cast <to=1> (t)\n r = Neg(up) }"
)


def test_a_cast_that_changes_nothing_goes_and_one_that_rounds_stays() -> None:
    model = untyped(CHAIN)
    x = NOISE.standard_normal((2, 2)).astype(np.float32)
    expected = run(model, x=x)
    run_passes(model, [ConvertOpset(), InferTypes(), DropDeadCasts()])
    # One that rounds x, one that widens it again for r, and those of the two 16-bit outputs.
    assert ops(model).count("Cast") == 4
    for first, second in zip(run(model, x=x), expected, strict=True):
        assert np.array_equal(first, second)


def test_types_that_contradict_each_other_name_the_node() -> None:
    model = untyped("g (float[2] x) => (float[2] y) { h = Cast <to=10> (x)\n y = Add(x, h) }", opset=19)
    model.graph[1].name = "/some/Add"
    with pytest.raises(GraphNotRecognised, match="/some/Add"):
        run_passes(model, [InferTypes()])


def test_a_range_of_16_bits_is_refused_by_name() -> None:
    model = untyped(
        "g (float[2] x) => (float[4] y) { r = Range(start, end, step)\n y = Cast <to=1> (r) }", opset=19,
        start=np.float16(0), end=np.float16(4), step=np.float16(1),
    )  # fmt: skip
    model.graph[0].name = "/rotary/Range"
    with pytest.raises(GraphNotRecognised, match="/rotary/Range"):
        run_passes(model, [InferTypes()])


@pytest.mark.parametrize("text", ["y = If (c) <then_branch = t () => (float[2] a) { a = Identity(x) }, else_branch = "
                                  "e () => (float[2] b) { b = Neg(x) }>"])  # fmt: skip
def test_a_graph_inside_a_graph_is_refused(text: str) -> None:
    model = untyped(f"g (float[2] x, bool c) => (float[2] y) {{ {text} }}", opset=19)
    model.graph[0].name = "/some/If"
    with pytest.raises(GraphNotRecognised, match=r"/some/If \(If\) contains a subgraph"):
        run_passes(model, [LiftConstants()])


LIFTED = (
    "g (float[2,4] x) => (float[2,3] y) { h = Cast <to=10> (x)\n p = MatMul(h, w)\n up = Cast <to=1> (p)\n"
    "s = Softmax <axis=-1> (up)\n down = Cast <to=10> (s)\n q = Mul(down, half)\n y = Cast <to=1> (q) }"
)


def test_lifting_keeps_every_number_and_leaves_no_16_bits() -> None:
    weight = NOISE.standard_normal((4, 3)).astype(np.float16)
    model = untyped(LIFTED, 19, w=weight, half=np.float16(0.5))
    x = NOISE.standard_normal((2, 4)).astype(np.float32)
    before = run(model, x=x)[0]
    results = run_passes(model, [InferTypes(), WidenFp16()])
    assert results[1].counts == {"fp16_nodes": 4, "casts_removed": 4, "initializers": 2}
    assert ops(model) == ["MatMul", "Softmax", "Mul"] and model.graph.outputs[0].name == "y"
    assert np.array_equal(model.graph.initializers["w"].const_value.numpy(), weight.astype(np.float32))
    assert np.allclose(run(model, x=x)[0], before, atol=2e-3)


@pytest.mark.parametrize(("numbers", "refused"), [([0.5, 0.3], True), ([384.0, 2.0], False)])
def test_a_rounded_constant_behind_an_angle_cannot_be_lifted(numbers: list[float], refused: bool) -> None:
    model = untyped(
        "g (float[2] x) => (float[2] y) { h = Cast <to=10> (x)\n a = Mul(h, k)\n w = Cast <to=1> (a)\n y = Sin(w) }",
        19, k=np.array(numbers, np.float16),
    )  # fmt: skip
    model.graph[1].name = "/fourier/Mul"
    if not refused:
        run_passes(model, [InferTypes(), WidenFp16()])
        return
    with pytest.raises(GraphNotRecognised, match=r"/fourier/Mul \(Mul\) computes an angle from k, which was rounded"):
        run_passes(model, [InferTypes(), WidenFp16()])


def test_a_length_read_from_a_rotated_tensor_is_no_rotary_table() -> None:
    """The older exporter computes the attention scale from the shape of a rotated query; that is not a rotation."""
    model = untyped(
        "g (float[1,L,4] x) => (float[1,L,4] y) { shape = Shape(x)\n length = Gather(shape, one)\n"
        "steps = Range(zero, length, one)\n position = Cast <to=1> (steps)\n"
        "angle = Einsum <equation=\"i,j->ij\"> (position, f)\n"
        "c = Cos(angle)\n s = Sin(angle)\n a = Mul(x, c)\n b = Mul(x, s)\n t = Add(a, b)\n"
        "rotated = Shape(t)\n size = Gather(rotated, two)\n float = Cast <to=1> (size)\n"
        "root = Sqrt(float)\n y = Mul(t, root) }",
        19, zero=np.int64(0), one=np.int64(1), two=np.int64(2), f=np.array([1, 0.5, 0.25, 0.125], np.float32),
    )  # fmt: skip
    run_passes(model, [SortTopologically(), InferTypes()])
    rotations = rotary_rotations(model, query.input_dependencies(model))
    names = {str(node.outputs[0].name) for node in rotations}
    assert {"position", "angle", "c", "s", "a", "b", "t"} <= names
    assert not names & {"size", "float", "root", "y"}
