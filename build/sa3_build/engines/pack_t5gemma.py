"""Read the packed weights of a T5Gemma encoder from its ONNX graph; tensors are identified by role."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
import torch

from sa3_build.engines.pack_weights import constants, linear_weight
from sa3_build.graph import query
from sa3_build.graph.errors import GraphNotRecognised, described
from sa3_trt_core.shapes import TEXT_TOKENS
from sa3_trt_core.torch_models.t5gemma.weights import EMBEDDING, NORMS, Sizes

PER_LAYER = 7  # q, k, v, out, gate, up, down
FACTORS = ("Mul", "Div")
FOLDED = ("Cast", "Add", "Transpose", "Concat")  # ops that an exporter may leave between constants


def pack(model: ir.Model) -> tuple[Sizes, dict[str, torch.Tensor]]:
    """Return sizes and tensors of a sorted graph, with the names of torch_models.t5gemma.weights.

    Raises GraphNotRecognised with the node or the role that is missing.
    """
    return _Reader(model).read()


class _Reader:
    """Reader of one graph by the roles of its nodes."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._depends_on = query.input_dependencies(model)
        self._tensors: dict[str, torch.Tensor] = {}

    def read(self) -> tuple[Sizes, dict[str, torch.Tensor]]:
        table, scale = self._embedding()
        width = table.shape[1]
        linears = [node for node in self._model.graph if linear_weight(node) is not None and self._sees_text(node)]
        depth, remainder = divmod(len(linears), PER_LAYER)
        if depth < 1 or remainder:
            raise GraphNotRecognised(f"{len(linears)} linears depend on the text, expected {PER_LAYER} per layer")
        cores = [
            node
            for node in self._model.graph
            if node.op_type == "MatMul" and linear_weight(node) is None and self._sees_text(node)
        ]
        if len(cores) != 2 * depth:
            raise GraphNotRecognised(f"{len(cores)} attention GEMMs in {depth} layers")
        head = self._rotary()
        scores = set()
        for index in range(depth):
            layer = set(linears[index * PER_LAYER : (index + 1) * PER_LAYER])
            scores.add(self._layer(index, layer, cores[2 * index], cores[2 * index + 1]))
        if len(scores) != 1:
            raise GraphNotRecognised("layers with different scales or caps of their scores")
        epsilon = self._norms(depth, width)
        ((score_scale, score_cap, rows, key_rows, inner),) = scores
        sizes = Sizes(
            width=width, depth=depth, heads=rows // head, key_heads=key_rows // head, head_channels=head, inner=inner,
            tokens=TEXT_TOKENS, vocabulary=table.shape[0], epsilon=epsilon, embedding_scale=scale,
            score_scale=score_scale, score_cap=score_cap,
        )  # fmt: skip
        return sizes, self._tensors

    def _sees_text(self, node: ir.Node) -> bool:
        return "input_ids" in self._depends_on[node]

    def _embedding(self) -> tuple[np.ndarray, float]:
        """Return the embedding table and the factor of its rows."""
        nodes = [
            node
            for node in self._model.graph
            if node.op_type == "Gather" and self._depends_on[node] == {"input_ids"}
            and (array := query.constant_of(node.inputs[0])) is not None and array.ndim == 2
        ]  # fmt: skip
        if len(nodes) != 1:
            raise GraphNotRecognised(f"{len(nodes)} embeddings of input_ids")
        table = query.constant_of(nodes[0].inputs[0])
        assert table is not None
        self._tensors[EMBEDDING] = _shortest(table)
        factors = [_scalar(use.node) for use in nodes[0].outputs[0].uses() if use.node.op_type == "Mul"]
        known = [factor for factor in factors if factor is not None]
        return table, known[0] if known else 1.0

    def _layer(
        self, index: int, layer: set[ir.Node], scoring: ir.Node, mixing: ir.Node
    ) -> tuple[float, float, int, int, int]:
        """Store one layer's linears; return scale and cap of its scores, rows of q and of k, and the inner width."""
        base = f"layers.{index}"
        q, k = (_one(self._upstream(scoring.inputs[side]) & layer, f"{side}. side", scoring) for side in (0, 1))
        v = _one(self._upstream(mixing.inputs[1]) & layer, "values", mixing)
        rest = layer - {q, k, v}
        down = _one({node for node in rest if len(self._upstream(node.inputs[0]) & rest) == 2}, "last linear", scoring)
        gate, up = self._gate(down, rest)
        out = _one(rest - {down, gate, up}, "output linear", mixing)
        weights = {"qkv": (q, k, v), "out": (out,), "gate_up": (gate, up), "down": (down,)}
        for name, nodes in weights.items():
            self._tensors[f"{base}.{name}.weight"] = _shortest(np.concatenate([_weight(node) for node in nodes]))
        scale, cap = self._scores(scoring, mixing)
        return scale, cap, _weight(q).shape[0], _weight(k).shape[0], _weight(down).shape[1]

    def _gate(self, down: ir.Node, rest: set[ir.Node]) -> tuple[ir.Node, ir.Node]:
        """Return the linear whose output passes tanh or GELU, and the linear that it multiplies."""
        pair = self._upstream(down.inputs[0]) & rest
        activations = [node for node in self._upstream(down.inputs[0]) if node.op_type in ("Tanh", "Gelu")]
        gated = set().union(*(self._upstream(node.inputs[0]) & pair for node in activations)) if activations else set()
        gate = _one(gated, "gate before", down)
        return gate, _one(pair - {gate}, "gated linear before", down)

    def _scores(self, scoring: ir.Node, mixing: ir.Node) -> tuple[float, float]:
        """Return the factor of q k before the tanh and the factor after it."""
        between = query.ancestors(
            [mixing.inputs[0]], stop=lambda node: node is scoring or node.op_type in query.GEMM_OPS
        )
        tanh_nodes = [node for node in between if node.op_type == "Tanh"]
        if len(tanh_nodes) != 1:
            raise GraphNotRecognised(f"no cap of the scores after {described(scoring)}")
        before = query.ancestors(tanh_nodes[0].inputs, stop=lambda node: node.op_type in query.GEMM_OPS)
        sides = self._upstream(scoring.inputs[0]) | self._upstream(scoring.inputs[1])
        scale, cap = _factor(before | sides), _factor(between - before - {tanh_nodes[0]})
        return scale, cap

    def _rotary(self) -> int:
        """Store cosine and sine (tokens, channels of a head), fp32; return the number of channels."""
        for node in self._model.graph:
            if node.op_type == "Cos" and not self._depends_on[node]:
                angles = _evaluated(node.inputs[0])
                if angles is None:
                    rates = [value for ancestor in query.ancestors(node.inputs) for value in constants(ancestor)
                             if value.size > 1 and value.dtype.kind == "f" and value.size < TEXT_TOKENS]  # fmt: skip
                    if len(rates) != 1:
                        continue
                    angles_of_pairs = np.outer(np.arange(TEXT_TOKENS, dtype=np.float32), rates[0].reshape(-1))
                    angles = np.concatenate([angles_of_pairs, angles_of_pairs], axis=-1)
                rows = np.array(angles, np.float32, order="C").reshape(-1, angles.shape[-1])
                angles_by_position = torch.from_numpy(rows[:TEXT_TOKENS])
                self._tensors["cosine"], self._tensors["sine"] = angles_by_position.cos(), angles_by_position.sin()
                return int(angles_by_position.shape[-1])
        tables = [value.reshape(TEXT_TOKENS, -1) for node in self._model.graph for value in constants(node)
                  if value.ndim > 1 and value.shape[-2] == TEXT_TOKENS and value.dtype.kind == "f"]  # fmt: skip
        cosines, sines = ([table for table in tables if np.all(table[0] == first)] for first in (1, 0))
        if not cosines or not sines:
            raise GraphNotRecognised("no rotary table of the text's positions")
        self._put("cosine", cosines[0])
        self._put("sine", sines[0])
        return int(cosines[0].shape[-1])

    def _norms(self, depth: int, width: int) -> float:
        """Store the weights of every norm along the stream; return their epsilon."""
        means = [node for node in self._model.graph if node.op_type == "ReduceMean" and self._sees_text(node)]
        if len(means) != len(NORMS) * depth + 1:
            raise GraphNotRecognised(f"{len(means)} norms in {depth} layers")
        names = [f"layers.{index}.{name}.norm" for index in range(depth) for name in NORMS] + ["norm"]
        epsilons = set()
        for name, mean in zip(names, means, strict=True):
            gamma, epsilon = self._norm(mean, width)
            self._put(name, gamma)
            epsilons.add(epsilon)
        if len(epsilons) != 1:
            raise GraphNotRecognised(f"norms with different epsilons: {sorted(epsilons)}")
        return epsilons.pop()

    def _norm(self, mean: ir.Node, width: int) -> tuple[np.ndarray, float]:
        epsilon: float | None = None
        queue, seen = [mean], {mean}
        while queue:
            node = queue.pop(0)
            for use in (use for value in node.outputs for use in value.uses()):
                user = use.node
                if user in seen:
                    continue
                seen.add(user)
                if user.op_type == "Add" and epsilon is None and (number := _scalar(user)) is not None:
                    epsilon = number
                if user.op_type == "Mul":
                    for value in user.inputs:
                        gamma = _evaluated(value)
                        if gamma is not None and gamma.size == width and epsilon is not None:
                            return gamma.reshape(-1), epsilon
                queue.append(user)
        raise GraphNotRecognised(f"no norm after {described(mean)}")

    def _upstream(self, value: ir.Value | None) -> set[ir.Node]:
        """Return every node that a value depends on, up to and including the preceding GEMMs."""
        return query.ancestors([value], stop=lambda node: node.op_type in query.GEMM_OPS)

    def _put(self, name: str, value: np.ndarray) -> None:
        self._tensors[name] = torch.from_numpy(np.array(value, dtype=np.float32)).contiguous()


def _shortest(value: np.ndarray) -> torch.Tensor:
    """Return a tensor in bf16 if that is lossless (a bf16 checkpoint), else in fp32."""
    as_fp32 = torch.from_numpy(np.array(value, dtype=np.float32))
    as_bf16 = as_fp32.to(torch.bfloat16)
    return as_bf16 if torch.equal(as_bf16.float(), as_fp32) else as_fp32


def _weight(node: ir.Node) -> np.ndarray:
    weight = linear_weight(node)
    assert weight is not None
    return weight.plain()


def _one(candidates: set[ir.Node], what: str, reference: ir.Node) -> ir.Node:
    if len(candidates) != 1:
        raise GraphNotRecognised(
            f"{len(candidates)} linears are candidates for the {what} of {described(reference)}, expected one"
        )
    return next(iter(candidates))


def _scalar(node: ir.Node) -> float | None:
    """Return the one-element constant that a node reads, or None."""
    scalars = [float(value.reshape(-1)[0]) for value in constants(node) if value.size == 1 and value.dtype.kind == "f"]
    return scalars[0] if scalars else None


def _factor(nodes: Iterable[ir.Node]) -> float:
    """Return the product of the scalar factors of nodes."""
    result = 1.0
    for node in nodes:
        if node.op_type in FACTORS and (number := _scalar(node)) is not None:
            result = result * number if node.op_type == "Mul" else result / number
    return result


def _evaluated(value: ir.Value | None) -> np.ndarray | None:
    """Return a constant, or the result of constant ops that an exporter left in the graph.

    These are sums (1 + weight) and data movement of angle tables.
    """
    stored = query.constant_of(value)
    if stored is not None or value is None or (producer := value.producer()) is None or producer.op_type not in FOLDED:
        return stored
    parts: list[np.ndarray] = []
    for operand in producer.inputs:
        part = _evaluated(operand)
        if part is None:
            return None
        parts.append(part)
    if producer.op_type == "Cast":
        return parts[0]
    if producer.op_type == "Add":
        return np.asarray(parts[0].astype(np.float32) + parts[1].astype(np.float32))
    if producer.op_type == "Transpose":
        return parts[0].transpose(producer.attributes.get_ints("perm", None))
    return np.concatenate(parts, axis=producer.attributes.get_int("axis", 0))
