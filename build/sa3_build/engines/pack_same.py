"""Read the packed weights of a SAME decoder or encoder from its ONNX graph; tensors are identified by role.

The reader follows the residual stream, in which the linear layers have a fixed order. The graph is the only input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch

from sa3_build.engines.pack_weights import broadcast_constant, constant, constants, cores, linear_weight
from sa3_build.graph import query
from sa3_build.graph.errors import GraphNotRecognised, described
from sa3_trt_core.shapes import AUDIO_CHANNELS, SAMPLES_PER_FRAME
from sa3_trt_core.torch_models.same.weights import HEAD_CHANNELS, PRODUCTS, ROTATED_PAIRS, Sizes, paired

GROUPED, NATIVE = (0, 1, 2, 3, 4), (0, 3, 1, 4, 2)  # positions of q1, q2, k1, k2, v among the five parts of to_qkv
ORDERS = (GROUPED, NATIVE)
MOVES = ("Transpose", "Reshape", "Cast", "Identity", "Unsqueeze", "Squeeze", "Flatten")


def pack(model: ir.Model, kind: str, order: Sequence[int] = GROUPED) -> tuple[Sizes, dict[str, torch.Tensor]]:
    """Return sizes and tensors of a sorted graph without plug-in ops, with the names of torch_models.same.weights.

    `kind` is decoder or encoder; `order` the positions of q1, q2, k1, k2 and v in to_qkv. The structure does not
    determine them; the comparison with ONNX Runtime does. Raises GraphNotRecognised with the node or the role that is
    missing.
    """
    return _Reader(model, kind, order).read()


class _Reader:
    """Reader of one graph by the roles of its nodes."""

    def __init__(self, model: ir.Model, kind: str, order: Sequence[int]) -> None:
        self._model, self._kind, self._order = model, kind, order
        dependencies = query.input_dependencies(model)
        self._free = {node for node in model.graph if not dependencies[node]}
        self._stream = [node for node in model.graph if node not in self._free and _is_linear(node)]
        self._tensors: dict[str, torch.Tensor] = {}

    def read(self) -> tuple[Sizes, dict[str, torch.Tensor]]:
        depth, remainder = divmod(len(self._stream) - 2, len(PRODUCTS))
        if depth < 1 or remainder:
            raise GraphNotRecognised(
                f"{len(self._stream)} linears use the data, expected 2 + {len(PRODUCTS)} per layer"
            )
        first, *middle, last = self._stream
        layers = [middle[i * len(PRODUCTS) : (i + 1) * len(PRODUCTS)] for i in range(depth)]
        width, inner = self._check_shapes(layers)
        sinusoidal = tuple(index for index, nodes in enumerate(layers) if self._layer(index, nodes))
        self._ends(first, last)
        channels = self._tensors["output.weight" if self._kind == "decoder" else "input.weight"]
        patch, odd = divmod(channels.shape[0 if self._kind == "decoder" else 1], AUDIO_CHANNELS)
        stride, rest = divmod(SAMPLES_PER_FRAME, patch)
        if odd or rest:
            raise GraphNotRecognised(f"patches of {patch} samples do not divide a frame of {SAMPLES_PER_FRAME} samples")
        self._token(layers[0][0], width)
        self._rates()
        sizes = Sizes(
            kind=self._kind, width=width, depth=depth, heads=width // HEAD_CHANNELS, inner=inner, stride=stride,
            reach=self._reach(stride + 1), patch=patch, latent_channels=self._latent_channels(), sinusoidal=sinusoidal,
            precision="fp16",
        )  # fmt: skip
        return sizes, self._tensors

    def _check_shapes(self, layers: list[list[ir.Node]]) -> tuple[int, int]:
        """Return the width of the stream and of the feed-forward, which must be the same in every layer."""
        shapes = {tuple(_weight(node).shape for node in nodes) for nodes in layers}
        if len(shapes) != 1:
            raise GraphNotRecognised("layers of different sizes: only one resampling level is supported")
        (qkv, out, into, back) = shapes.pop()
        width, inner = qkv[1], back[1]
        expected = ((5 * width, width), (width, width), (2 * inner, width), (width, inner))
        if (qkv, out, into, back) != expected or width % HEAD_CHANNELS or inner % 16:
            raise GraphNotRecognised(
                f"layers with linears of {qkv}, {out}, {into}, {back}: not differential attention with 64-channel heads"
            )
        return width, inner

    def _layer(self, index: int, nodes: list[ir.Node]) -> bool:
        """Store linear layers and norms of one layer; return True if its gate is sin(pi g)."""
        qkv, out, into, back = nodes
        base, width = f"layers.{index}", _weight(out).shape[0]
        self._norm(f"{base}.attention_norm", qkv.inputs[0], width, qkv)
        self._norm(f"{base}.feed_forward_norm", into.inputs[0], width, into)
        attention_cores = cores(qkv)
        if len(attention_cores) not in (1, 2):
            raise GraphNotRecognised(f"no attention after {described(qkv)}")
        pair_order = np.array(paired())
        for name, side in (("q_norm", 0), ("k_norm", 1)):
            self._norm(f"{base}.{name}", attention_cores[0].inputs[side], HEAD_CHANNELS, qkv, pair_order)
        parts = _weight(qkv).reshape(5, -1, HEAD_CHANNELS, width)[list(self._order)]
        parts = np.concatenate([parts[:4][:, :, pair_order], parts[4:]])
        self._put(f"{base}.qkv.weight", parts.reshape(-1, width), torch.float16)
        self._put(f"{base}.attention_out.weight", _weight(out), torch.float16)
        for name, node in (("ff_in", into), ("ff_out", back)):
            self._put(f"{base}.{name}.weight", _weight(node), torch.float16)
            self._put(f"{base}.{name}.bias", self._bias(node), torch.float32)
        if any(self._maybe_bias(node) is not None for node in (qkv, out)):
            raise GraphNotRecognised(f"attention linears with a bias at {described(qkv)}")
        return self._is_sinusoidal(back)

    def _is_sinusoidal(self, back: ir.Node) -> bool:
        upstream = query.ancestors([back.inputs[0]], stop=_is_linear)
        kinds = {node.op_type for node in upstream}
        if "Sin" in kinds:
            factors = [float(value.reshape(-1)[0]) for node in upstream if node.op_type == "Mul"
                       for value in constants(node) if value.size == 1]  # fmt: skip
            if not any(math.isclose(factor, math.pi, rel_tol=1e-3) for factor in factors):
                raise GraphNotRecognised(f"the sine before {described(back)} does not have the argument pi * gate")
            return True
        if not kinds & {"Sigmoid", "Swish"}:
            raise GraphNotRecognised(f"the gate before {described(back)} is neither SiLU nor sine")
        return False

    def _norm(
        self, name: str, value: ir.Value | None, width: int, reader: ir.Node, pair_order: np.ndarray | None = None
    ) -> None:
        """Store the dynamic tanh norm before a value: alpha, and gamma and beta (width,)."""
        upstream = query.ancestors([value], stop=lambda node: node.op_type == "Tanh" or _is_linear(node))
        tanh_nodes = [node for node in upstream if node.op_type == "Tanh"]
        alphas = {factor for node in tanh_nodes for factor in _scalars_above(node)}
        gammas, betas = (_vectors(upstream - self._free, op_type, width) for op_type in ("Mul", "Add"))
        if not tanh_nodes or len(alphas) != 1 or len(gammas) != 1 or len(betas) != 1:
            raise GraphNotRecognised(f"no unique dynamic tanh norm before {described(reader)}")
        (gamma,), (beta,) = gammas, betas
        self._put(f"{name}.alpha", np.asarray(alphas.pop()), torch.float32)
        self._put(f"{name}.gamma", gamma if pair_order is None else gamma[pair_order], torch.float32)
        self._put(f"{name}.beta", beta if pair_order is None else beta[pair_order], torch.float32)

    def _ends(self, first: ir.Node, last: ir.Node) -> None:
        """Store the first and last linear layer, with the scale before and the affine map after them folded in."""
        weight, bias = _weight(first).astype(np.float64), self._bias(first)
        scale = np.ones(weight.shape[1])
        for node in query.ancestors([first.inputs[0]]):
            if node.op_type == "Mul" and node not in self._free:
                for factors in constants(node):
                    scale = scale * _channels(factors, weight.shape[1], node)
        self._put("input.weight", weight * scale, torch.float16)
        self._put("input.bias", bias, torch.float32)
        weight, bias = _weight(last).astype(np.float64), self._bias(last).astype(np.float64)
        if self._kind == "encoder":
            factor, addend = self._affine(last)
            weight, bias = weight * factor[:, None], bias * factor + addend
        self._put("output.weight", weight, torch.float16)
        self._put("output.bias", bias, torch.float32)

    def _affine(self, last: ir.Node) -> tuple[np.ndarray, np.ndarray]:
        """Return factor and addend (C,) of the nodes after the encoder's last linear layer and its bias."""
        width = _weight(last).shape[0]
        factor, addend = np.ones(width), np.zeros(width)
        value, bias_node = last.outputs[0], self._bias_node(last)
        while not value.is_graph_output():
            uses = [use for use in value.uses() if not query.gives_sizes(use.node)]
            if len(uses) != 1:
                raise GraphNotRecognised(f"{value.name}, after the last linear, is used {len(uses)} times")
            node, operands = uses[0].node, constants(uses[0].node)
            if node.op_type in ("Mul", "Div", "Add") and operands and node is not bias_node:
                operand = _channels(operands[0], width, node)
                if node.op_type == "Add":
                    addend = addend + operand
                else:
                    operand = operand if node.op_type == "Mul" else 1.0 / operand
                    factor, addend = factor * operand, addend * operand
            elif node.op_type not in (*MOVES, "Add"):
                raise GraphNotRecognised(f"{described(node)} after the last linear")
            value = node.outputs[0]
        return factor, addend

    def _token(self, qkv: ir.Node, width: int) -> None:
        upstream = query.ancestors([qkv.inputs[0]], stop=_is_linear)
        for node in upstream:
            if node.op_type == "Concat" and node not in self._free:
                for value in node.inputs:
                    tokens = broadcast_constant(value)
                    if tokens is not None and tokens.size == width:
                        self._put("token", tokens.reshape(-1), torch.float16)
                        return
        raise GraphNotRecognised(f"no new token of {width} channels before {described(qkv)}")

    def _rates(self) -> None:
        """Store the radians per token of the 16 rotary pairs, from the graph's frequencies or its constant table."""
        for node in self._model.graph:
            if node.op_type == "Cos" and node in self._free:
                array = [value for ancestor in query.ancestors(node.inputs) for value in constants(ancestor)
                        if value.size == ROTATED_PAIRS and value.dtype.kind == "f"]  # fmt: skip
                if len(array) == 1:
                    self._put("rates", array[0].reshape(-1), torch.float32)
                    return
        tables = [array.reshape(-1, array.shape[-1]) for node in self._model.graph for array in constants(node)
                  if array.ndim > 1 and array.shape[-1] in (ROTATED_PAIRS, 2 * ROTATED_PAIRS) and array.shape[-2] > 1
                  and array.dtype.kind == "f"]  # fmt: skip
        cosines = [table for table in tables if np.all(table[0] == 1)]
        sines = [table for table in tables if np.all(table[0] == 0)]
        if not cosines or not sines:
            raise GraphNotRecognised("no rotary frequencies of 16 pairs of channels")
        angles = np.arctan2(sines[0][1].astype(np.float64), cosines[0][1].astype(np.float64))
        self._put("rates", angles[:ROTATED_PAIRS], torch.float32)

    def _reach(self, segment: int) -> int:
        """Return the reach of attention in tokens to either side, from the graph's mask; one segment without a mask."""
        for node in self._model.graph:
            for mask in constants(node):
                if mask.ndim >= 2 and mask.shape[-2] == segment and mask.shape[-1] % segment == 0:
                    windows = mask.shape[-1] // segment
                    if windows % 2 and windows > 1 and mask.size == mask.shape[-2] * mask.shape[-1]:
                        return windows // 2 * segment
        return segment

    def _latent_channels(self) -> int:
        decoder = self._kind == "decoder"
        return int(self._tensors["input.weight" if decoder else "output.weight"].shape[1 if decoder else 0])

    def _bias(self, node: ir.Node) -> np.ndarray:
        bias = self._maybe_bias(node)
        if bias is None:
            raise GraphNotRecognised(f"{described(node)} has no bias")
        return bias

    def _maybe_bias(self, node: ir.Node) -> np.ndarray | None:
        if node.op_type in ("Gemm", "Conv"):
            bias = node.inputs[2] if len(node.inputs) > 2 else None
            return None if bias is None else constant(bias).reshape(-1)
        added = self._bias_node(node)
        return None if added is None else next(value.reshape(-1) for value in constants(added) if value.ndim == 1)

    @staticmethod
    def _bias_node(node: ir.Node) -> ir.Node | None:
        """Return the Add of a MatMul's bias."""
        users = [use.node for use in node.outputs[0].uses()]
        if node.op_type != "MatMul" or len(users) != 1 or users[0].op_type != "Add":
            return None
        return users[0] if any(value.ndim == 1 and value.size > 1 for value in constants(users[0])) else None

    def _put(self, name: str, value: np.ndarray, dtype: torch.dtype) -> None:
        self._tensors[name] = torch.from_numpy(np.array(value, dtype=np.float32)).to(dtype).contiguous()


def _is_linear(node: ir.Node) -> bool:
    """Return True if a node multiplies the data by a weight."""
    if node.op_type == "Conv":
        kernel = query.constant_of(node.inputs[1])
        return kernel is not None and kernel.ndim == 3 and kernel.shape[-1] == 1
    return linear_weight(node) is not None


def _weight(node: ir.Node) -> np.ndarray:
    """Return the weight (N, K) of a linear layer or of a 1x1 convolution."""
    if node.op_type == "Conv":
        return constant(node.inputs[1]).squeeze(-1)
    weight = linear_weight(node)
    assert weight is not None
    return weight.plain()


def _scalars_above(node: ir.Node) -> set[float]:
    """Return the scalar factors of a node's input, skipping casts."""
    value = node.inputs[0]
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type == "Mul":
            return {float(factor.reshape(-1)[0]) for factor in constants(producer) if factor.size == 1}
        if producer.op_type != "Cast":
            break
        value = producer.inputs[0]
    return set()


def _vectors(nodes: set[ir.Node], op_type: str, width: int) -> list[np.ndarray]:
    """Return the distinct constants of `width` elements that nodes of a type read."""
    distinct: dict[bytes, np.ndarray] = {}
    for node in nodes:
        if node.op_type == op_type:
            for vector in constants(node):
                if vector.size == width and vector.dtype.kind == "f":
                    distinct[vector.tobytes()] = vector.reshape(-1)
    return list(distinct.values())


def _channels(factor: np.ndarray, width: int, node: ir.Node) -> np.ndarray:
    """Return a factor or addend per channel (width,)."""
    if factor.size not in (1, width):
        raise GraphNotRecognised(f"{described(node)} has a constant of {factor.size} elements, expected 1 or {width}")
    return np.broadcast_to(factor.astype(np.float64).reshape(-1), (width,))
