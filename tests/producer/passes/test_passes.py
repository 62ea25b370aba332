"""Graph passes on tiny readable graphs: matches, changes and postconditions."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings, strategies as st

from sa3_build.graph import query
from sa3_build.graph.errors import GraphNotRecognised
from sa3_build.graph.fp32_islands import Islands, rms_norms, rotary_rotations
from sa3_build.passes.base import check_sorted, run_passes
from sa3_build.passes.fold_weights import FoldWeights
from sa3_build.passes.fp16_mixed import MixPrecision
from sa3_build.passes.rename_nodes import RenameNodes
from sa3_build.passes.topological_sort import SortTopologically

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def model_of(text: str, **weights: np.ndarray) -> ir.Model:
    """Return an ir.Model parsed from ONNX's text form, types inferred, with initializers by name."""
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 19]>\n{text}')
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def run(model: ir.Model, **feeds: np.ndarray) -> list[np.ndarray]:
    """Return the outputs of a model by ONNX's reference implementation."""
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)


def casts(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "Cast"]


RECIPROCAL = "r = Sqrt(e) \n i = Reciprocal(r) \n n = Mul(x, i)"
DIVIDED = "r = Sqrt(e) \n n = Div(x, r)"
ONE_OVER = "r = Sqrt(e) \n i = Div(one, r) \n n = Mul(i, x)"


@pytest.mark.parametrize("square", ["s = Pow(x, two)", "s = Mul(x, x)"])
@pytest.mark.parametrize("tail", [RECIPROCAL, DIVIDED, ONE_OVER])
def test_every_form_of_rms_norm_is_found(square: str, tail: str) -> None:
    model = model_of(
        f"g (float[2,4] x) => (float[2,4] y) {{ {square}\n m = ReduceMean <keepdims=1> (s, axes)\n"
        f"e = Add(m, eps)\n {tail}\n y = Mul(n, gamma) }}",
        two=np.float32(2), one=np.float32(1), axes=np.array([-1]), eps=np.float32(1e-5),
        gamma=np.ones(4, np.float32),
    )  # fmt: skip
    nodes, count = rms_norms(model)
    assert count == 1
    assert nodes == frozenset(model.graph)


def test_a_norm_is_seen_through_casts() -> None:
    model = model_of(
        "g (float16[2,4] x) => (float16[2,4] y) { w = Cast <to=1> (x)\n s = Mul(w, w)\n"
        "m = ReduceMean <keepdims=1> (s, axes)\n e = Add(m, eps)\n r = Sqrt(e)\n n = Div(w, r)\n"
        "h = Cast <to=10> (n)\n b = Cast <to=1> (h)\n z = Mul(b, gamma)\n y = Cast <to=10> (z) }",
        axes=np.array([-1]), eps=np.float32(1e-5), gamma=np.ones(4, np.float32),
    )  # fmt: skip
    nodes, count = rms_norms(model)
    assert count == 1
    assert {node.op_type for node in nodes} == {"Mul", "ReduceMean", "Add", "Sqrt", "Div"}
    assert len(nodes) == 6


@pytest.mark.parametrize(
    "body",
    [
        "s = Mul(x, z)\n m = ReduceMean <keepdims=1> (s, axes)\n e = Add(m, eps)\n r = Sqrt(e)\n y = Div(x, r)",
        "s = Mul(x, x)\n m = ReduceMean <keepdims=1> (s, axes)\n e = Add(m, eps)\n r = Sqrt(e)\n y = Div(z, r)",
        "s = Mul(x, x)\n m = ReduceMean <keepdims=1> (s, axes)\n y = Add(m, x)",
    ],
    ids=["not a square", "divides another value", "only a mean"],
)
def test_what_is_no_norm_is_left_alone(body: str) -> None:
    model = model_of(
        f"g (float[2,4] x, float[2,4] z) => (float[2,4] y) {{ {body} }}", axes=np.array([-1]), eps=np.float32(1e-5)
    )
    assert rms_norms(model) == (frozenset(), 0)


ROTARY = (
    "g (float[1,L,4] x) => (float[1,L,4] y) { shape = Shape <start=1,end=2> (x)\n length = Squeeze(shape)\n"
    "steps = Range(zero, length, one)\n position = Cast <to=1> (steps)\n column = Unsqueeze(position, last)\n"
    "angle = Mul(column, inv_freq)\n c = Cos(angle)\n s = Sin(angle)\n a = Mul(x, c)\n b = Mul(x, s)\n"
    "t = Add(a, b)\n y = Mul(t, scale) }"
)
ROTARY_WEIGHTS = {
    "zero": np.int64(0), "one": np.int64(1), "last": np.array([1]),
    "inv_freq": np.array([1.0, 0.3, 0.1, 0.03], np.float32), "scale": np.float32(0.5),
}  # fmt: skip


def test_the_rotation_is_an_island_and_what_follows_is_not() -> None:
    model = model_of(ROTARY, **ROTARY_WEIGHTS)
    rotations = rotary_rotations(model, query.input_dependencies(model))
    names = {str(node.outputs[0].name) for node in rotations}
    assert {"angle", "c", "s", "a", "b", "t"} <= names
    assert "y" not in names


def test_mixed_precision_keeps_islands_and_the_interface() -> None:
    """Angles of thousands of radians stay fp32; the trunk is fp16; inputs and outputs are unchanged."""
    model = model_of(ROTARY, **ROTARY_WEIGHTS)
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 4000, 4)).astype(np.float32)}
    expected = run(model, **feeds)[0]

    def find(graph_model: ir.Model) -> Islands:
        return Islands(
            frozenset(), 0, frozenset(), rotary_rotations(graph_model, query.input_dependencies(graph_model))
        )

    (result,) = run_passes(model, [MixPrecision(find)])
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert result.counts["fp16_nodes"] == 1
    assert [value.dtype for value in (*model.graph.inputs, *model.graph.outputs)] == [FLOAT, FLOAT]
    assert [str(value.name) for value in model.graph.outputs] == ["y"]
    output = run(model, **feeds)[0]
    assert output.dtype == np.float32
    assert np.linalg.norm(output - expected) / np.linalg.norm(expected) < 1e-3


def test_a_mover_between_islands_stays_fp32_and_one_cast_serves_all() -> None:
    model = model_of(
        "g (float[2,4] x) => (float[2,4] y, float[2,4] z) { k = Sin(x)\n t = Transpose <perm=[1,0]> (k)\n"
        "b = Transpose <perm=[1,0]> (t)\n c = Cos(b)\n y = Mul(c, w)\n z = Add(c, w) }",
        w=np.full((2, 4), 0.25, np.float32),
    )

    def find(graph_model: ir.Model) -> Islands:
        return Islands(
            frozenset(node for node in graph_model.graph if node.op_type in ("Sin", "Cos")), 0, frozenset(), frozenset()
        )

    run_passes(model, [MixPrecision(find)])
    kinds = {str(node.op_type): node.outputs[0].dtype for node in model.graph if node.op_type != "Cast"}
    assert kinds == {"Sin": FLOAT, "Transpose": FLOAT, "Cos": FLOAT, "Mul": HALF, "Add": HALF}
    assert len([node for node in casts(model) if node.outputs[0].dtype == HALF]) == 1
    assert [name for name in model.graph.initializers] == ["w_half"]


def test_a_weight_that_does_not_fit_is_refused() -> None:
    model = model_of("g (float[2,4] x) => (float[2,4] y) { y = Mul(x, w) }", w=np.full((2, 4), 1e6, np.float32))
    with pytest.raises(GraphNotRecognised, match="w does not fit fp16"):
        run_passes(model, [MixPrecision(lambda _: Islands(frozenset(), 0, frozenset(), frozenset()))])


def test_a_graph_that_is_not_fp32_is_refused() -> None:
    model = model_of("g (float16[2,4] x) => (float16[2,4] y) { y = Sin(x) }")
    with pytest.raises(GraphNotRecognised, match="an fp32 graph is required"):
        run_passes(model, [MixPrecision(lambda _: Islands(frozenset(), 0, frozenset(), frozenset()))])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_order_is_sorted_without_changing_what_is_computed(data) -> None:
    """A random graph of sums, its nodes shuffled, gives the same numbers after the pass."""
    count = data.draw(st.integers(1, 12))
    lines = []
    for index in range(count):
        left, right = (data.draw(st.integers(-1, index - 1)) for _ in range(2))
        lines.append(f"v{index} = Add({'x' if left < 0 else f'v{left}'}, {'x' if right < 0 else f'v{right}'})")
    body = "\n".join([*lines, f"y = Identity(v{count - 1})"])
    model = model_of(f"g (float[2] x) => (float[2] y) {{ {body} }}")
    feeds = {"x": np.array([1.0, -0.5], np.float32)}
    expected = run(model, **feeds)[0]
    proto = ir.to_proto(model)
    shuffled = data.draw(st.permutations(list(proto.graph.node)))
    del proto.graph.node[:]
    proto.graph.node.extend(shuffled)
    unsorted = ir.from_proto(proto)
    run_passes(unsorted, [SortTopologically()])
    check_sorted(unsorted)
    assert np.array_equal(run(unsorted, **feeds)[0], expected)


def test_weights_behind_transpose_and_cast_become_direct() -> None:
    weight = np.random.default_rng(1).standard_normal((3, 4)).astype(np.float16)
    model = model_of(
        "g (float[2,4] x) => (float[2,3] y, float[2,3] z) { w = Cast <to=1> (stored)\n t = Transpose <perm=[1,0]> (w)\n"
        "y = MatMul(x, t)\n z = Gemm <transB=1> (x, w) }",
        stored=weight,
    )
    feeds = {"x": np.random.default_rng(2).standard_normal((2, 4)).astype(np.float32)}
    expected = run(model, **feeds)
    (result,) = run_passes(model, [FoldWeights()])
    assert result.counts == {"folded": 2, "nodes_removed": 2}
    shapes = [tuple(value.shape.numpy()) for _, value in query.linear_nodes(model)]
    assert shapes == [(4, 3), (3, 4)]
    for first, second in zip(run(model, **feeds), expected, strict=True):
        assert np.array_equal(first, second)


def test_names_are_unique_and_none_begins_another() -> None:
    """ModelOpt reads an excluded name as the beginning of a pattern: `linear` would exclude `linear_10` as well."""
    body = "\n".join(f"v{i + 1} = Sin(v{i})" for i in range(120))
    model = model_of(f"g (float[2] v0) => (float[2] v120) {{ {body} }}")
    for index, node in enumerate(model.graph):
        node.name = f"linear.{index}[0]"
    run_passes(model, [RenameNodes()])
    names = [str(node.name) for node in model.graph]
    assert len(set(names)) == 120
    assert not [(a, b) for a in names for b in names if a != b and b.startswith(a)]
    assert all(name.isidentifier() for name in names)


def test_a_product_of_two_activations_has_no_weight() -> None:
    model = model_of("g (float[2,2] x, float[2,2] z) => (float[2,2] y) { y = MatMul(x, z) }")
    assert query.weight_initializer(model.graph[0]) is None


def test_graph_inputs_behind_does_not_look_through_shapes() -> None:
    model = model_of(ROTARY, **ROTARY_WEIGHTS)
    behind = {str(node.outputs[0].name): names for node, names in query.input_dependencies(model).items()}
    assert behind["angle"] == frozenset()
    assert behind["t"] == {"x"}
