"""Forward of a packed T5Gemma encoder in fp32: on a GPU one CUDA graph per batch size.

A linear layer's input is (S, M, K): S = 1 for fp32, or S = 2 for a value's two bf16 halves
(`reference_ops.product_input`), which one product multiplies if the weight is exactly bf16. The result is (S, M, N)
fp32, and the operation that reads it adds the halves.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from sa3_trt_core.torch_models.kernels.graphs import Captured
from sa3_trt_core.torch_models.t5gemma.weights import Packed

KEPT_GRAPHS = 4


class TextOps(Protocol):
    """Operations between the linear layers: reference_ops.ReferenceOps, or triton_ops.TritonOps.

    `stored` is a linear layer's result (S, M, N); `split` selects two bf16 halves as the next layer's input.
    """

    def enter(self, embedded: Tensor, following: Tensor, split: bool) -> tuple[Tensor, Tensor]: ...
    def add_norm(self, hidden: Tensor, stored: Tensor, post: Tensor, following: Tensor, split: bool) -> Tensor: ...
    def attention(self, stored: Tensor, mask: Tensor, split: bool) -> Tensor: ...
    def gate(self, stored: Tensor, split: bool) -> Tensor: ...


class Encoder:
    """Packed encoder on one device; `ops` are the operations between its linear layers."""

    def __init__(self, packed: Packed, ops: TextOps, device: torch.device) -> None:
        self._packed, self._ops, self._device, self.sizes = packed, ops, device, packed.sizes
        self._graphs: OrderedDict[int, Captured] = OrderedDict()

    def hidden_states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return features (B, T, width) fp32 on the encoder's device, valid until the next call.

        `ids` and `mask` are (B, T) int64 on the CPU. Only the embedding rows of these ids are read.
        """
        inputs = {"embedded": self._packed.rows(ids), "mask": mask.to(torch.float32).contiguous()}
        if self._device.type != "cuda":
            return self._forward(**inputs)
        rows = ids.shape[0]
        graph = self._graphs.pop(rows, None) or Captured(self._forward, inputs, self._device)
        self._graphs[rows] = graph
        while len(self._graphs) > KEPT_GRAPHS:
            self._graphs.popitem(last=False)
        return graph(inputs)

    def close(self) -> None:
        """Free the graphs."""
        self._graphs.clear()

    def _forward(self, embedded: Tensor, mask: Tensor) -> Tensor:
        """Return features (B, T, width) for embeddings (B, T, width) and a mask (B, T) of 0/1."""
        ops, depth = self._ops, self.sizes.depth
        hidden, normed = ops.enter(
            embedded.flatten(0, 1), self._norm("layers.0.attention_in"), self._split("layers.0.qkv")
        )
        for index in range(depth):
            base, last = f"layers.{index}", index + 1 == depth
            attended = ops.attention(self._product(normed, f"{base}.qkv"), mask, self._split(f"{base}.out"))
            normed = ops.add_norm(
                hidden, self._product(attended, f"{base}.out"), self._norm(f"{base}.attention_out"),
                self._norm(f"{base}.ff_in"), self._split(f"{base}.gate_up"),
            )  # fmt: skip
            inner = ops.gate(self._product(normed, f"{base}.gate_up"), self._split(f"{base}.down"))
            following = self._packed.tensor("norm") if last else self._norm(f"layers.{index + 1}.attention_in")
            normed = ops.add_norm(
                hidden, self._product(inner, f"{base}.down"), self._norm(f"{base}.ff_out"), following,
                not last and self._split(f"layers.{index + 1}.qkv"),
            )  # fmt: skip
        return normed[0].unflatten(0, mask.shape)

    def _norm(self, name: str) -> Tensor:
        return self._packed.tensor(f"{name}.norm")

    def _weight(self, name: str) -> Tensor:
        return self._packed.tensor(f"{name}.weight")

    def _split(self, name: str) -> bool:
        """Return True if the input of a linear layer is split: its weight is stored in bf16."""
        return self._weight(name).dtype == torch.bfloat16

    def _product(self, value: Tensor, name: str) -> Tensor:
        """Return the result (S, M, N) fp32 for an input (S, M, K), with S = 2 if `_split(name)`.

        A bf16 weight is exact. Two bf16 products, added in fp32, take a tenth of the time of one fp32 product.
        """
        weight = self._weight(name)
        if not self._split(name):
            return functional.linear(value, weight)
        both = torch.mm(value.flatten(0, 1), weight.t(), out_dtype=torch.float32)
        return both.unflatten(0, value.shape[:2])
