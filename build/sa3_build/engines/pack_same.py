"""Reads the packed weights of a SAME decoder or encoder from its ONNX graph, each tensor located by its role.

The walk goes along the residual stream: its products can only stand in one order. Nothing but the graph is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch

from sa3_build.engines.pack_weights import constant, constant_behind, constants, cores, weight_of
from sa3_build.graph import query
from sa3_build.graph.errors import GraphNotRecognised, described
from sa3_trt_core.shapes import AUDIO_CHANNELS, SAMPLES_PER_FRAME
from sa3_trt_core.torch_models.same.weights import HEAD_CHANNELS, PRODUCTS, ROTATED_PAIRS, Sizes, paired

GROUPED, NATIVE = (0, 1, 2, 3, 4), (0, 3, 1, 4, 2)  # where q1, q2, k1, k2, v stand among the five parts of a to_qkv
ORDERS = (GROUPED, NATIVE)
MOVES = ("Transpose", "Reshape", "Cast", "Identity", "Unsqueeze", "Squeeze", "Flatten")


def pack(model: ir.Model, kind: str, order: Sequence[int] = GROUPED) -> tuple[Sizes, dict[str, torch.Tensor]]:
    """Sizes and tensors, named as torch_models.same.weights names them, of a sorted graph without plug-in ops.

    `kind` is decoder or encoder; `order` the places of q1, q2, k1, k2 and v in to_qkv, which no structure tells apart:
    the comparison with ONNX Runtime does. Raises GraphNotRecognised with the node or the role that is missing.
    """
    return _Reader(model, kind, order).read()


class _Reader:
    """One graph, read by role."""

    def __init__(self, model: ir.Model, kind: str, order: Sequence[int]) -> None:
        self._model, self._kind, self._order = model, kind, order
        behind = query.input_dependencies(model)
        self._free = {node for node in model.graph if not behind[node]}
        self._stream = [node for node in model.graph if node not in self._free and _is_product(node)]
        self._tensors: dict[str, torch.Tensor] = {}

    def read(self) -> tuple[Sizes, dict[str, torch.Tensor]]:
        depth, left = divmod(len(self._stream) - 2, len(PRODUCTS))
        if depth < 1 or left:
            raise GraphNotRecognised(f"{len(self._stream)} products see the data, not 2 and {len(PRODUCTS)} a layer")
        first, *middle, last = self._stream
        layers = [middle[i * len(PRODUCTS) : (i + 1) * len(PRODUCTS)] for i in range(depth)]
        width, inner = self._check_shapes(layers)
        sinusoidal = tuple(index for index, nodes in enumerate(layers) if self._layer(index, nodes))
        self._ends(first, last)
        channels = self._tensors["output.weight" if self._kind == "decoder" else "input.weight"]
        patch, odd = divmod(channels.shape[0 if self._kind == "decoder" else 1], AUDIO_CHANNELS)
        stride, rest = divmod(SAMPLES_PER_FRAME, patch)
        if odd or rest:
            raise GraphNotRecognised(f"patches of {patch} samples, which do not divide a frame of {SAMPLES_PER_FRAME}")
        self._token(layers[0][0], width)
        self._rates()
        sizes = Sizes(
            kind=self._kind, width=width, depth=depth, heads=width // HEAD_CHANNELS, inner=inner, stride=stride,
            reach=self._reach(stride + 1), patch=patch, latent_channels=self._latent_channels(), sinusoidal=sinusoidal,
            precision="fp16",
        )  # fmt: skip
        return sizes, self._tensors

    def _check_shapes(self, layers: list[list[ir.Node]]) -> tuple[int, int]:
        """Width of the stream and of the feed-forward; every layer must have the same."""
        shapes = {tuple(_weight(node).shape for node in nodes) for nodes in layers}
        if len(shapes) != 1:
            raise GraphNotRecognised("layers of different sizes: more than one resampling level is not served here")
        (qkv, out, into, back) = shapes.pop()
        width, inner = qkv[1], back[1]
        wanted = ((5 * width, width), (width, width), (2 * inner, width), (width, inner))
        if (qkv, out, into, back) != wanted or width % HEAD_CHANNELS or inner % 16:
            raise GraphNotRecognised(
                f"layers with products of {qkv}, {out}, {into}, {back}: no differential attention of 64-channel heads"
            )
        return width, inner

    def _layer(self, index: int, nodes: list[ir.Node]) -> bool:
        """Products and norms of one layer; returns True where its gate is sin(pi g)."""
        qkv, out, into, back = nodes
        base, width = f"layers.{index}", _weight(out).shape[0]
        self._norm(f"{base}.attention_norm", qkv.inputs[0], width, qkv)
        self._norm(f"{base}.feed_forward_norm", into.inputs[0], width, into)
        found = cores(qkv)
        if len(found) not in (1, 2):
            raise GraphNotRecognised(f"no attention after {described(qkv)}")
        turn = np.array(paired())
        for name, side in (("q_norm", 0), ("k_norm", 1)):
            self._norm(f"{base}.{name}", found[0].inputs[side], HEAD_CHANNELS, qkv, turn)
        parts = _weight(qkv).reshape(5, -1, HEAD_CHANNELS, width)[list(self._order)]
        parts = np.concatenate([parts[:4][:, :, turn], parts[4:]])
        self._put(f"{base}.qkv.weight", parts.reshape(-1, width), torch.float16)
        self._put(f"{base}.attention_out.weight", _weight(out), torch.float16)
        for name, node in (("ff_in", into), ("ff_out", back)):
            self._put(f"{base}.{name}.weight", _weight(node), torch.float16)
            self._put(f"{base}.{name}.bias", self._bias(node), torch.float32)
        if any(self._maybe_bias(node) is not None for node in (qkv, out)):
            raise GraphNotRecognised(f"attention products with a bias at {described(qkv)}")
        return self._is_sinusoidal(back)

    def _is_sinusoidal(self, back: ir.Node) -> bool:
        above = query.ancestors([back.inputs[0]], stop=_is_product)
        kinds = {node.op_type for node in above}
        if "Sin" in kinds:
            factors = [float(value.reshape(-1)[0]) for node in above if node.op_type == "Mul"
                       for value in constants(node) if value.size == 1]  # fmt: skip
            if not any(math.isclose(factor, math.pi, rel_tol=1e-3) for factor in factors):
                raise GraphNotRecognised(f"the sine before {described(back)} is not of pi times the gate")
            return True
        if not kinds & {"Sigmoid", "Swish"}:
            raise GraphNotRecognised(f"the gate before {described(back)} is neither SiLU nor a sine")
        return False

    def _norm(
        self, name: str, value: ir.Value | None, width: int, reader: ir.Node, turn: np.ndarray | None = None
    ) -> None:
        """The dynamic tanh norm that a value comes from: alpha, and gamma and beta (width,)."""
        above = query.ancestors([value], stop=lambda node: node.op_type == "Tanh" or _is_product(node))
        bends = [node for node in above if node.op_type == "Tanh"]
        alphas = {held for node in bends for held in _scalars_above(node)}
        gammas, betas = (_vectors(above - self._free, op_type, width) for op_type in ("Mul", "Add"))
        if not bends or len(alphas) != 1 or len(gammas) != 1 or len(betas) != 1:
            raise GraphNotRecognised(f"no one dynamic tanh norm before {described(reader)}")
        (gamma,), (beta,) = gammas, betas
        self._put(f"{name}.alpha", np.asarray(alphas.pop()), torch.float32)
        self._put(f"{name}.gamma", gamma if turn is None else gamma[turn], torch.float32)
        self._put(f"{name}.beta", beta if turn is None else beta[turn], torch.float32)

    def _ends(self, first: ir.Node, last: ir.Node) -> None:
        """The products at both ends, with the scale before the first and the affine after the last folded in."""
        weight, bias = _weight(first).astype(np.float64), self._bias(first)
        scale = np.ones(weight.shape[1])
        for node in query.ancestors([first.inputs[0]]):
            if node.op_type == "Mul" and node not in self._free:
                for held in constants(node):
                    scale = scale * _channels(held, weight.shape[1], node)
        self._put("input.weight", weight * scale, torch.float16)
        self._put("input.bias", bias, torch.float32)
        weight, bias = _weight(last).astype(np.float64), self._bias(last).astype(np.float64)
        if self._kind == "encoder":
            factor, addend = self._affine(last)
            weight, bias = weight * factor[:, None], bias * factor + addend
        self._put("output.weight", weight, torch.float16)
        self._put("output.bias", bias, torch.float32)

    def _affine(self, last: ir.Node) -> tuple[np.ndarray, np.ndarray]:
        """Factor and addend (C,) of what follows the encoder's last product and its bias."""
        width = _weight(last).shape[0]
        factor, addend = np.ones(width), np.zeros(width)
        value, own = last.outputs[0], self._bias_node(last)
        while not value.is_graph_output():
            uses = [use for use in value.uses() if not query.gives_sizes(use.node)]
            if len(uses) != 1:
                raise GraphNotRecognised(f"{value.name}, after the last product, is used {len(uses)} times")
            node, held = uses[0].node, constants(uses[0].node)
            if node.op_type in ("Mul", "Div", "Add") and held and node is not own:
                by = _channels(held[0], width, node)
                if node.op_type == "Add":
                    addend = addend + by
                else:
                    by = by if node.op_type == "Mul" else 1.0 / by
                    factor, addend = factor * by, addend * by
            elif node.op_type not in (*MOVES, "Add"):
                raise GraphNotRecognised(f"{described(node)} after the last product")
            value = node.outputs[0]
        return factor, addend

    def _token(self, qkv: ir.Node, width: int) -> None:
        above = query.ancestors([qkv.inputs[0]], stop=_is_product)
        for node in above:
            if node.op_type == "Concat" and node not in self._free:
                for value in node.inputs:
                    held = constant_behind(value)
                    if held is not None and held.size == width:
                        self._put("token", held.reshape(-1), torch.float16)
                        return
        raise GraphNotRecognised(f"no new token of {width} channels before {described(qkv)}")

    def _rates(self) -> None:
        """Radians a token of the 16 rotary pairs: of the graph's frequencies, or of its baked table."""
        for node in self._model.graph:
            if node.op_type == "Cos" and node in self._free:
                held = [value for one in query.ancestors(node.inputs) for value in constants(one)
                        if value.size == ROTATED_PAIRS and value.dtype.kind == "f"]  # fmt: skip
                if len(held) == 1:
                    self._put("rates", held[0].reshape(-1), torch.float32)
                    return
        tables = [held.reshape(-1, held.shape[-1]) for node in self._model.graph for held in constants(node)
                  if held.ndim > 1 and held.shape[-1] in (ROTATED_PAIRS, 2 * ROTATED_PAIRS) and held.shape[-2] > 1
                  and held.dtype.kind == "f"]  # fmt: skip
        cosines = [table for table in tables if np.all(table[0] == 1)]
        sines = [table for table in tables if np.all(table[0] == 0)]
        if not cosines or not sines:
            raise GraphNotRecognised("no rotary frequencies of 16 pairs of channels")
        angles = np.arctan2(sines[0][1].astype(np.float64), cosines[0][1].astype(np.float64))
        self._put("rates", angles[:ROTATED_PAIRS], torch.float32)

    def _reach(self, segment: int) -> int:
        """How many tokens attention reaches to either side: of the graph's band, else one segment."""
        for node in self._model.graph:
            for held in constants(node):
                if held.ndim >= 2 and held.shape[-2] == segment and held.shape[-1] % segment == 0:
                    windows = held.shape[-1] // segment
                    if windows % 2 and windows > 1 and held.size == held.shape[-2] * held.shape[-1]:
                        return windows // 2 * segment
        return segment

    def _latent_channels(self) -> int:
        decoder = self._kind == "decoder"
        return int(self._tensors["input.weight" if decoder else "output.weight"].shape[1 if decoder else 0])

    def _bias(self, node: ir.Node) -> np.ndarray:
        found = self._maybe_bias(node)
        if found is None:
            raise GraphNotRecognised(f"{described(node)} has no bias")
        return found

    def _maybe_bias(self, node: ir.Node) -> np.ndarray | None:
        if node.op_type in ("Gemm", "Conv"):
            held = node.inputs[2] if len(node.inputs) > 2 else None
            return None if held is None else constant(held).reshape(-1)
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


def _is_product(node: ir.Node) -> bool:
    """Does this node multiply the data by a weight?"""
    if node.op_type == "Conv":
        held = query.constant_of(node.inputs[1])
        return held is not None and held.ndim == 3 and held.shape[-1] == 1
    return weight_of(node) is not None


def _weight(node: ir.Node) -> np.ndarray:
    """Return the weight (N, K) of a product or of a 1x1 convolution."""
    if node.op_type == "Conv":
        return constant(node.inputs[1]).squeeze(-1)
    held = weight_of(node)
    assert held is not None
    return held.plain()


def _scalars_above(node: ir.Node) -> set[float]:
    """Return the constant factor of a value that a node reads, seen through casts."""
    value = node.inputs[0]
    while value is not None and (maker := value.producer()) is not None:
        if maker.op_type == "Mul":
            return {float(held.reshape(-1)[0]) for held in constants(maker) if held.size == 1}
        if maker.op_type != "Cast":
            break
        value = maker.inputs[0]
    return set()


def _vectors(nodes: set[ir.Node], op_type: str, width: int) -> list[np.ndarray]:
    """Return the different constants of so many elements that nodes of a type take."""
    found: dict[bytes, np.ndarray] = {}
    for node in nodes:
        if node.op_type == op_type:
            for held in constants(node):
                if held.size == width and held.dtype.kind == "f":
                    found[held.tobytes()] = held.reshape(-1)
    return list(found.values())


def _channels(held: np.ndarray, width: int, node: ir.Node) -> np.ndarray:
    """Return a factor or addend of every channel (width,)."""
    if held.size not in (1, width):
        raise GraphNotRecognised(f"{described(node)} has a constant of {held.size} elements, not 1 or {width}")
    return np.broadcast_to(held.astype(np.float64).reshape(-1), (width,))
