"""Reads the packed weights of a T5Gemma encoder from its ONNX graph, each tensor located by its role."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
import torch

from sa3_build.engines.pack_weights import constants, weight_of
from sa3_build.graph import query
from sa3_build.graph.errors import GraphNotRecognised, described
from sa3_trt_core.shapes import TEXT_TOKENS
from sa3_trt_core.torch_models.t5gemma.weights import EMBEDDING, NORMS, Sizes

PER_LAYER = 7  # q, k, v, out, gate, up, down
FACTORS = ("Mul", "Div")
FOLDED = ("Cast", "Add", "Transpose", "Concat")  # what an exporter may leave between constants


def pack(model: ir.Model) -> tuple[Sizes, dict[str, torch.Tensor]]:
    """Sizes and tensors, named as torch_models.t5gemma.weights names them, of a sorted graph.

    Raises GraphNotRecognised with the node or the role that is missing.
    """
    return _Reader(model).read()


class _Reader:
    """One graph, read by role."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._behind = query.input_dependencies(model)
        self._tensors: dict[str, torch.Tensor] = {}

    def read(self) -> tuple[Sizes, dict[str, torch.Tensor]]:
        table, scale = self._embedding()
        width = table.shape[1]
        products = [node for node in self._model.graph if weight_of(node) is not None and self._sees_text(node)]
        depth, left = divmod(len(products), PER_LAYER)
        if depth < 1 or left:
            raise GraphNotRecognised(f"{len(products)} products see the text, not {PER_LAYER} a layer")
        cores = [
            node
            for node in self._model.graph
            if node.op_type == "MatMul" and weight_of(node) is None and self._sees_text(node)
        ]
        if len(cores) != 2 * depth:
            raise GraphNotRecognised(f"{len(cores)} attention products in {depth} layers")
        head = self._rotary()
        scores = set()
        for index in range(depth):
            layer = set(products[index * PER_LAYER : (index + 1) * PER_LAYER])
            scores.add(self._layer(index, layer, cores[2 * index], cores[2 * index + 1]))
        if len(scores) != 1:
            raise GraphNotRecognised("layers that scale or cap their scores differently")
        epsilon = self._norms(depth, width)
        ((score_scale, score_cap, rows, key_rows, inner),) = scores
        sizes = Sizes(
            width=width, depth=depth, heads=rows // head, key_heads=key_rows // head, head_channels=head, inner=inner,
            tokens=TEXT_TOKENS, vocabulary=table.shape[0], epsilon=epsilon, embedding_scale=scale,
            score_scale=score_scale, score_cap=score_cap,
        )  # fmt: skip
        return sizes, self._tensors

    def _sees_text(self, node: ir.Node) -> bool:
        return "input_ids" in self._behind[node]

    def _embedding(self) -> tuple[np.ndarray, float]:
        """Return the table, and the factor of its rows."""
        found = [node for node in self._model.graph if node.op_type == "Gather" and self._behind[node] == {"input_ids"}
                 and (held := query.constant_of(node.inputs[0])) is not None and held.ndim == 2]  # fmt: skip
        if len(found) != 1:
            raise GraphNotRecognised(f"{len(found)} embeddings of input_ids")
        table = query.constant_of(found[0].inputs[0])
        assert table is not None
        self._tensors[EMBEDDING] = _shortest(table)
        factors = [_scalar(use.node) for use in found[0].outputs[0].uses() if use.node.op_type == "Mul"]
        known = [factor for factor in factors if factor is not None]
        return table, known[0] if known else 1.0

    def _layer(
        self, index: int, layer: set[ir.Node], scoring: ir.Node, mixing: ir.Node
    ) -> tuple[float, float, int, int, int]:
        """Products of one layer; returns the scale and cap of its scores, the rows of q and of k, the inner width."""
        base = f"layers.{index}"
        q, k = (_one(self._above(scoring.inputs[side]) & layer, f"{side}. side", scoring) for side in (0, 1))
        v = _one(self._above(mixing.inputs[1]) & layer, "values", mixing)
        rest = layer - {q, k, v}
        down = _one({node for node in rest if len(self._above(node.inputs[0]) & rest) == 2}, "last product", scoring)
        gate, up = self._gate(down, rest)
        out = _one(rest - {down, gate, up}, "output product", mixing)
        weights = {"qkv": (q, k, v), "out": (out,), "gate_up": (gate, up), "down": (down,)}
        for name, nodes in weights.items():
            self._tensors[f"{base}.{name}.weight"] = _shortest(np.concatenate([_weight(node) for node in nodes]))
        scale, cap = self._scores(scoring, mixing)
        return scale, cap, _weight(q).shape[0], _weight(k).shape[0], _weight(down).shape[1]

    def _gate(self, down: ir.Node, rest: set[ir.Node]) -> tuple[ir.Node, ir.Node]:
        """Return the gate, which goes through tanh, and what it multiplies."""
        pair = self._above(down.inputs[0]) & rest
        bends = [node for node in self._above(down.inputs[0]) if node.op_type in ("Tanh", "Gelu")]
        bent = set().union(*(self._above(node.inputs[0]) & pair for node in bends)) if bends else set()
        gate = _one(bent, "gate before", down)
        return gate, _one(pair - {gate}, "gated product before", down)

    def _scores(self, scoring: ir.Node, mixing: ir.Node) -> tuple[float, float]:
        """Factor of q k before the tanh and factor after it."""
        between = query.ancestors(
            [mixing.inputs[0]], stop=lambda node: node is scoring or node.op_type in query.GEMM_OPS
        )
        bends = [node for node in between if node.op_type == "Tanh"]
        if len(bends) != 1:
            raise GraphNotRecognised(f"no cap of the scores after {described(scoring)}")
        before = query.ancestors(bends[0].inputs, stop=lambda node: node.op_type in query.GEMM_OPS)
        sides = self._above(scoring.inputs[0]) | self._above(scoring.inputs[1])
        scale, cap = _factor(before | sides), _factor(between - before - {bends[0]})
        return scale, cap

    def _rotary(self) -> int:
        """cosine and sine (tokens, channels of a head), in fp32; returns those channels."""
        for node in self._model.graph:
            if node.op_type == "Cos" and not self._behind[node]:
                angles = _evaluated(node.inputs[0])
                if angles is None:
                    rates = [value for one in query.ancestors(node.inputs) for value in constants(one)
                             if value.size > 1 and value.dtype.kind == "f" and value.size < TEXT_TOKENS]  # fmt: skip
                    if len(rates) != 1:
                        continue
                    half = np.outer(np.arange(TEXT_TOKENS, dtype=np.float32), rates[0].reshape(-1))
                    angles = np.concatenate([half, half], axis=-1)
                rows = np.array(angles, np.float32, order="C").reshape(-1, angles.shape[-1])
                held = torch.from_numpy(rows[:TEXT_TOKENS])
                self._tensors["cosine"], self._tensors["sine"] = held.cos(), held.sin()
                return int(held.shape[-1])
        tables = [value.reshape(TEXT_TOKENS, -1) for node in self._model.graph for value in constants(node)
                  if value.ndim > 1 and value.shape[-2] == TEXT_TOKENS and value.dtype.kind == "f"]  # fmt: skip
        cosines, sines = ([table for table in tables if np.all(table[0] == first)] for first in (1, 0))
        if not cosines or not sines:
            raise GraphNotRecognised("no rotary table of the text's positions")
        self._put("cosine", cosines[0])
        self._put("sine", sines[0])
        return int(cosines[0].shape[-1])

    def _norms(self, depth: int, width: int) -> float:
        """Return the weights of every norm along the stream; returns their epsilon."""
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
            raise GraphNotRecognised(f"norms of several epsilons: {sorted(epsilons)}")
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

    def _above(self, value: ir.Value | None) -> set[ir.Node]:
        """Everything that a value is made of, up to the products (included) that come before."""
        return query.ancestors([value], stop=lambda node: node.op_type in query.GEMM_OPS)

    def _put(self, name: str, value: np.ndarray) -> None:
        self._tensors[name] = torch.from_numpy(np.array(value, dtype=np.float32)).contiguous()


def _shortest(value: np.ndarray) -> torch.Tensor:
    """Return a tensor in bf16 where that loses nothing, as of a checkpoint in bf16, else in fp32."""
    wide = torch.from_numpy(np.array(value, dtype=np.float32))
    short = wide.to(torch.bfloat16)
    return short if torch.equal(short.float(), wide) else wide


def _weight(node: ir.Node) -> np.ndarray:
    held = weight_of(node)
    assert held is not None
    return held.plain()


def _one(found: set[ir.Node], what: str, near: ir.Node) -> ir.Node:
    if len(found) != 1:
        raise GraphNotRecognised(f"{len(found)} products are the {what} of {described(near)}")
    return next(iter(found))


def _scalar(node: ir.Node) -> float | None:
    """Return the one-element constant that a node takes."""
    found = [float(value.reshape(-1)[0]) for value in constants(node) if value.size == 1 and value.dtype.kind == "f"]
    return found[0] if found else None


def _factor(nodes: Iterable[ir.Node]) -> float:
    """Return the product of the one-element factors of nodes."""
    result = 1.0
    for node in nodes:
        if node.op_type in FACTORS and (number := _scalar(node)) is not None:
            result = result * number if node.op_type == "Mul" else result / number
    return result


def _evaluated(value: ir.Value | None) -> np.ndarray | None:
    """Return a constant, or what an exporter left of constants in the graph: sums (1 + weight) and moved tables of
    angles.
    """
    held = query.constant_of(value)
    if held is not None or value is None or (maker := value.producer()) is None or maker.op_type not in FOLDED:
        return held
    parts: list[np.ndarray] = []
    for one in maker.inputs:
        part = _evaluated(one)
        if part is None:
            return None
        parts.append(part)
    if maker.op_type == "Cast":
        return parts[0]
    if maker.op_type == "Add":
        return np.asarray(parts[0].astype(np.float32) + parts[1].astype(np.float32))
    if maker.op_type == "Transpose":
        return parts[0].transpose(maker.attributes.get_ints("perm", None))
    return np.concatenate(parts, axis=maker.attributes.get_int("axis", 0))
