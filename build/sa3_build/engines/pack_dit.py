"""Convert a DiT graph to the packed file of the PyTorch engine; tensors are identified by their role in the graph.

The graph is the only input: weights, scales, the set of quantised layers, epsilons and tables are read from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from sa3_build.engines import front_values, row_order
from sa3_build.engines.pack_weights import (
    activation_scale,
    broadcast_constant,
    constant,
    constants,
    cores,
    follows,
    linear_weight,
    one,
    only,
    padded,
)  # fmt: skip
from sa3_build.graph import io as graph_io, query
from sa3_build.graph.errors import GraphNotRecognised, described, naming
from sa3_build.graph.partial_run import PartialRun
from sa3_build.passes import canonicalize
from sa3_build.passes.null_row import has_null_row
from sa3_trt_core.shapes import MAX_FRAMES, TEXT_TOKENS
from sa3_trt_core.torch_models.dit.weights import BLOCK_PRODUCTS, HEAD_CHANNELS, Sizes

STREAM = ("self_qkv", "self_out", "cross_q", "cross_out", "ff_in", "ff_out")  # linear layers that depend on x
PARTS = 5  # parts of a differential attention projection: q, q2, k, k2, v
BIASED = ("ff_in", "ff_out", "local_in", "local_out")


@dataclass(frozen=True)
class Norm:
    """One RMS norm."""

    gamma: np.ndarray
    epsilon: float


def pack(model: ir.Model) -> tuple[Sizes, dict[str, torch.Tensor]]:
    """Return sizes and tensors of a sorted DiT graph, with the names of torch_dit.weights.

    Raises GraphNotRecognised with the node or the role that is missing.
    """
    return _Reader(model).read()


class _Reader:
    """Reader of one graph by the roles of its nodes."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._depends_on = query.input_dependencies(model)
        self._weights = {node: weight for node in model.graph if (weight := linear_weight(node)) is not None}
        self._tensors: dict[str, torch.Tensor] = {}
        self._run = PartialRun(model)

    def read(self) -> tuple[Sizes, dict[str, torch.Tensor]]:
        stream = [node for node in self._weights if "x" in self._depends_on[node]]
        depth, remainder = divmod(len(stream) - 2, len(STREAM))
        if depth < 1 or remainder:
            raise GraphNotRecognised(f"{len(stream)} linears depend on x, expected 2 + {len(STREAM)} per block")
        self._ends(stream[0], stream[-1])
        blocks = [dict(zip(STREAM, stream[1 + i * 6 : 7 + i * 6], strict=True)) for i in range(depth)]
        self._text_and_local(blocks)
        epsilons = [self._block(index, blocks[index]) for index in range(depth)]
        width = self._tensors["input.weight"].shape[0]
        inner = self._tensors["blocks.0.ff_in.weight"].shape[0] // 2
        duration = self._front(width)
        self._modulations(blocks, width)
        self._memory(blocks[0], width)
        self._rotary()
        if len(set(epsilons)) != 1:
            raise GraphNotRecognised(f"norms with different epsilons: {sorted(set(epsilons))}")
        quantised = any(name.endswith("activation_scale") for name in self._tensors)
        sizes = Sizes(
            width=width, depth=depth, heads=width // HEAD_CHANNELS, inner=inner,
            memory=self._tensors["memory"].shape[0], norm_epsilon=epsilons[0][0], head_epsilon=epsilons[0][1],
            seconds_range=duration.longest, null_rows=has_null_row(self._model), angular=duration.angular,
            precision="fp8" if quantised else "fp16mixed",
        )  # fmt: skip
        return sizes, self._tensors

    def _ends(self, first: ir.Node, last: ir.Node) -> None:
        for name, node in (("input", first), ("output", last)):
            self._linear(name, node)
            if f"{name}.activation_scale" in self._tensors:
                raise GraphNotRecognised(f"{described(node)} is quantised; the {name} linear must be 16-bit")
        convolutions = [node for node in self._model.graph if node.op_type == "Conv"]
        if len(convolutions) != 2:
            raise GraphNotRecognised(f"{len(convolutions)} convolutions, expected one at each end")
        for name, node in zip(("preprocess", "postprocess"), convolutions, strict=True):
            self._put(name, constant(node.inputs[1]).squeeze(-1), torch.float32)

    def _text_and_local(self, blocks: list[dict[str, ir.Node]]) -> None:
        """Add each block's cross_kv, local_in and local_out to its linear layers."""
        text = [
            node
            for node in self._weights
            if "x" not in self._depends_on[node] and "t5_hidden" in self._depends_on[node]
        ]
        if len(text) != len(blocks) + 2:
            raise GraphNotRecognised(f"{len(text)} linears depend on the text only, expected 2 + one per block")
        self._linear("context_in", text[0])
        self._linear("context_out", text[1])
        local = [node for node in self._weights if self._depends_on[node] == {"local_add_cond"}]
        seen: set[ir.Node] = set()
        for block in blocks:
            keys = self._upstream(only(cores(block["cross_q"]), "attention of", block["cross_q"]).inputs[1])
            block["cross_kv"] = one(keys & set(text[2:]), "cross-attention keys", block["cross_q"])
            added = (self._upstream(block["ff_in"].inputs[0]) & set(local)) - seen
            block["local_out"] = one(added, "local embedding before", block["ff_in"])
            seen |= added
            upstream_local = self._upstream(block["local_out"].inputs[0]) & set(local)
            block["local_in"] = one(upstream_local, "first local linear before", block["local_out"])

    def _block(self, index: int, nodes: dict[str, ir.Node]) -> tuple[float, float]:
        """Store linear layers and norms of one block; return the epsilons of its token norm and its head norm."""
        for name in BLOCK_PRODUCTS:
            self._linear(f"blocks.{index}.{name}", nodes[name], biased=name in BIASED)
        self._order_rows(index, nodes)
        token_eps, head_eps = set(), set()
        for name, reader in (("self_norm", "self_qkv"), ("cross_norm", "cross_q"), ("ff_norm", "ff_in")):
            norm = self._norm(nodes[reader].inputs[0], nodes[reader])
            self._put(f"blocks.{index}.{name}", norm.gamma, torch.float32)
            token_eps.add(norm.epsilon)
        for kind, reader in (("self", "self_qkv"), ("cross", "cross_q")):
            core = only(cores(nodes[reader]), "attention of", nodes[reader])
            for side, value in (("q", core.inputs[0]), ("k", core.inputs[1])):
                norm = self._norm(value, core)
                self._put(f"blocks.{index}.{kind}_{side}_norm", norm.gamma, torch.float32)
                head_eps.add(norm.epsilon)
        if (
            len(token_eps) != 1
            or len(head_eps) != 1
            or self._tensors[f"blocks.{index}.self_q_norm"].numel() != HEAD_CHANNELS
        ):
            raise GraphNotRecognised(f"block {index}: norms with different epsilons, or heads without 64 channels")
        return token_eps.pop(), head_eps.pop()

    def _order_rows(self, index: int, nodes: dict[str, ir.Node]) -> None:
        """Reorder the rows of the attention projections to the engine's order: q|q2|k|k2|v, q|q2, k|k2|v."""
        own, cross = (row_order.attention_calls(nodes[name]) for name in ("self_qkv", "cross_q"))
        if self._tensors[f"blocks.{index}.self_qkv.weight"].shape[0] != PARTS * self._tensors["input.weight"].shape[0]:
            raise GraphNotRecognised(
                f"{described(nodes['self_qkv'])} is not differential: its attention has no second half",
                "the torch engine runs differential DiTs (sa3-m); --backend onnxruntime or tensorrt runs this one",
            )
        memory = row_order.tokens_of(self._run, nodes["self_qkv"])
        for name, operands, tokens in (
            ("self_qkv", (*own.q, *own.k, own.v), memory),
            ("cross_q", cross.q, memory),
            ("cross_kv", (*cross.k, cross.v), TEXT_TOKENS + 1),
        ):
            rows = torch.from_numpy(row_order.rows_of(self._run, nodes[name], operands, tokens))
            for key in (f"blocks.{index}.{name}.weight", f"blocks.{index}.{name}.weight_scale"):
                if (stored := self._tensors.get(key)) is not None:
                    raw = stored.view(torch.uint8) if stored.dtype == torch.float8_e4m3fn else stored
                    self._tensors[key] = raw[rows].view(stored.dtype).contiguous()

    def _front(self, width: int) -> front_values.Duration:
        """Store the embeddings of t and of the duration; return the duration's Fourier features."""
        for inputs, names in (
            ({"t"}, ("time.0", "time.2")),
            ({"seconds_total"}, ("seconds", "global.0", "global.2")),
            ({"t", "seconds_total"}, ("modulation.0", "modulation.2")),
        ):
            linears = [node for node in self._weights if self._depends_on[node] == inputs]
            if len(linears) != len(names):
                raise GraphNotRecognised(f"{len(linears)} linears depend on {' and '.join(sorted(inputs))} only")
            for name, node in zip(names, linears, strict=True):
                self._put(f"{name}.weight", self._weights[node].plain(), torch.float32)
                bias = self._bias(node)
                if bias is not None:
                    self._put(f"{name}.bias", bias, torch.float32)
        self._put("time.frequencies", front_values.frequencies(self._run, self._model, "t"), torch.float32)
        duration = front_values.duration_features(self._run, self._model)
        self._put("seconds.frequencies", duration.frequencies, torch.float32)
        self._put("padding", front_values.padding(self._run, self._model), torch.float32)
        return duration

    def _modulations(self, kinds: list[dict[str, ir.Node]], width: int) -> None:
        seen: set[ir.Node] = set()
        for index, nodes in enumerate(kinds):
            additions = {
                node
                for node in self._upstream(nodes["self_qkv"].inputs[0])
                if node.op_type == "Add" and "x" not in self._depends_on[node]
                and any(value.size == 6 * width for value in constants(node))
                and not any(value is not None and value.producer() in self._weights for value in node.inputs
                            if self._bias_of_linear(node))
            } - seen  # fmt: skip
            node = one(additions, "modulation of", nodes["self_qkv"])
            seen |= additions
            (table,) = [value for value in constants(node) if value.size == 6 * width]
            self._put(f"blocks.{index}.modulation", table.reshape(-1), torch.float32)

    def _bias_of_linear(self, node: ir.Node) -> bool:
        """Return True if this Add is the bias of a MatMul, which a Gemm would contain."""
        return any(value is not None and (producer := value.producer()) is not None and producer.op_type == "MatMul"
                   for value in node.inputs)  # fmt: skip

    def _memory(self, first: dict[str, ir.Node], width: int) -> None:
        joins = [node for node in self._upstream(first["self_qkv"].inputs[0]) if node.op_type == "Concat"
                 and "x" in self._depends_on[node]]  # fmt: skip
        for node in joins:
            for value in node.inputs:
                tokens = broadcast_constant(value)
                if tokens is not None and tokens.shape[-1] == width:
                    self._put("memory", tokens.reshape(-1, width), torch.float16)
                    return
        raise GraphNotRecognised("no memory tokens before the first block")

    def _rotary(self) -> None:
        """Store the table of cosines and sines (positions, 32): the graph's own, or computed from its frequencies."""
        memory = self._tensors["memory"].shape[0]
        for node in self._model.graph:
            if node.op_type == "Cos" and not self._depends_on[node]:
                rates = [value for ancestor in query.ancestors(node.inputs) for value in constants(ancestor)
                         if value.size == HEAD_CHANNELS // 4 and value.dtype.kind == "f"]  # fmt: skip
                if len(rates) == 1:
                    steps = torch.arange(MAX_FRAMES + memory, dtype=torch.float32)
                    angles_of_pairs = torch.outer(steps, torch.from_numpy(rates[0].reshape(-1).copy()))
                    angles = torch.cat([angles_of_pairs, angles_of_pairs], dim=-1)
                    self._tensors["cosine"], self._tensors["sine"] = angles.cos(), angles.sin()
                    return
        sliced = [value for node in self._model.graph if node.op_type == "Slice" for value in constants(node)[:1]]
        tables = [value.reshape(-1, value.shape[-1]) for value in sliced
                  if value.ndim > 1 and value.shape[-1] == HEAD_CHANNELS // 2]  # fmt: skip
        cosines = [table for table in tables if np.all(table[0] == 1)]
        sines = [table for table in tables if np.all(table[0] == 0)]
        if not cosines or not sines:
            raise GraphNotRecognised("no rotary table over 32 channels")
        self._put("cosine", cosines[0], torch.float32)
        self._put("sine", sines[0], torch.float32)

    def _linear(self, name: str, node: ir.Node, biased: bool = False) -> None:
        weight = self._weights[node]
        activation = activation_scale(node)
        if activation is None:
            self._put(f"{name}.weight", padded(weight.plain()), torch.float16)
        else:
            if weight.scale is None:
                raise GraphNotRecognised(f"{described(node)} is quantised on one side only")
            codes = weight.codes()
            self._tensors[f"{name}.weight"] = torch.from_numpy(codes.view(np.uint8).copy()).view(torch.float8_e4m3fn)
            scale = np.broadcast_to(weight.scale.astype(np.float32).reshape(-1), (codes.shape[0],))
            self._put(f"{name}.weight_scale", scale, torch.float32)
            self._put(f"{name}.activation_scale", np.asarray(activation), torch.float32)
        bias = self._bias(node)
        if (bias is not None) != biased:
            raise GraphNotRecognised(f"{described(node)} has {'a' if bias is not None else 'no'} bias")
        if bias is not None:
            self._put(f"{name}.bias", bias, torch.float32)

    def _bias(self, node: ir.Node) -> np.ndarray | None:
        if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
            return constant(node.inputs[2]).reshape(-1)
        users = [use.node for use in node.outputs[0].uses()]
        if len(users) == 1 and users[0].op_type == "Add":
            vectors = [value for value in constants(users[0]) if value.ndim == 1]
            if vectors and not (self._depends_on[node] == {"t", "seconds_total"} and node.op_type == "Gemm"):
                return vectors[0]
        return None

    def _norm(self, value: ir.Value | None, reader: ir.Node) -> Norm:
        """Return the norm before a value, skipping modulation, rotation and scale."""
        upstream = self._upstream(value)
        gammas = [array for node in upstream if node.op_type == "Mul" and self._depends_on[node] for side in node.inputs
                  if (array := broadcast_constant(side)) is not None and array.size > 1
                  and array.dtype.kind == "f"]  # fmt: skip
        epsilons = {float(array) for node in upstream if node.op_type == "Add" and follows(node, "ReduceMean")
                    for array in constants(node) if array.size == 1}  # fmt: skip
        if not gammas or len(epsilons) != 1 or any(not np.array_equal(gammas[0], gamma) for gamma in gammas):
            raise GraphNotRecognised(f"no unique norm before {described(reader)}")
        return Norm(gammas[0].reshape(-1), epsilons.pop())

    def _upstream(self, value: ir.Value | None) -> set[ir.Node]:
        """Return every node that a value depends on, up to and including the preceding GEMMs."""
        return query.ancestors([value], stop=lambda node: node.op_type in query.GEMM_OPS or query.gives_sizes(node))

    def _put(self, name: str, value: np.ndarray, dtype: torch.dtype) -> None:
        self._tensors[name] = torch.from_numpy(np.array(value, dtype=np.float32)).to(dtype).contiguous()


def read_graph(path: Path) -> ir.Model:
    """Return a graph file in canonical form, with its weights left on disk."""
    model = graph_io.load(path)
    with naming(path):
        canonicalize.canonicalize(model)
    return model
