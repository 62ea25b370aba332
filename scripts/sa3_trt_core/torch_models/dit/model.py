"""Forward of the packed DiT: conditioning once per generation, modulation once per noise level, blocks every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from sa3_trt_core.shapes import TEXT_TOKENS
from sa3_trt_core.torch_models.dit.embeddings import Front
from sa3_trt_core.torch_models.dit.reference_ops import head_norm
from sa3_trt_core.torch_models.dit.weights import BLOCK_NORMS, BLOCK_PRODUCTS, HEAD_CHANNELS, Packed
from sa3_trt_core.torch_models.kernels.linear import Product, dequantize, linear, quantize_activation, scaled_mm


class BlockOps(Protocol):
    """Operations between the linear layers of a block: reference_ops.PlainOps, or the kernels of triton_ops.FusedOps.

    `stored` are a linear layer's sums, before multiplication by its channel `ratio` (None in 16 bits). The input of a
    linear layer is quantised with that layer's activation scale. Vectors are (B or 1, width) fp32. No attention score
    is larger than `bound`.
    """

    def normed(
        self, hidden: Tensor, gain: Tensor, shift: Tensor | None, epsilon: float, activation_scale: float | None
    ) -> Tensor:
        """Return the RMS norm of the residual (B, T, E) fp16, times gain, plus shift."""
        ...

    def add_normed(
        self, hidden: Tensor, stored: Tensor, multiplier: Tensor | None, addend: Tensor | None, local: Tensor | None,
        memory: int, gain: Tensor | None, shift: Tensor | None, epsilon: float, activation_scale: float | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return the sum hidden + stored * multiplier + addend, and `normed` of the sum (without a gain the sum again).

        `local` (B or 1, L or 1, E) is added after the memory tokens.
        """
        ...

    def self_attention(
        self, stored: Tensor, ratio: Tensor | None, q_gamma: Tensor, k_gamma: Tensor, epsilon: float, bound: float,
        activation_scale: float | None,
    ) -> Tensor:  # fmt: skip
        """Return the differential self-attention (B, T, E) for q1, q2, k1, k2, v (B, T, 5E)."""
        ...

    def cross_attention(
        self, stored: Tensor, ratio: Tensor | None, keys: Tensor, q_gamma: Tensor, epsilon: float, bound: float,
        activation_scale: float | None,
    ) -> Tensor:  # fmt: skip
        """Return the differential attention (B, T, E) of q1, q2 (B, T, 2E) over `keys` (B, S, 3E): normed k1, k2; v."""
        ...

    def gated(self, stored: Tensor, ratio: Tensor | None, bias: Tensor, activation_scale: float | None) -> Tensor:
        """Return a * silu(g) (B, T, F) for a and g (B, T, 2F), after adding their bias (2F,)."""
        ...


TOKEN_NORMS = ("self_norm", "ff_norm")
GATED = ("self_out", "ff_out")  # linear layers whose output is multiplied by a modulation gate


@dataclass
class RowConditioning:
    """Step-independent conditioning of a batch, precomputed per block.

    `keys` (depth, B, 257, 3 width): normed k1 and k2, and v. `local` (depth, B or 1, L or 1, width): one value if
    local_add_cond is all zero, because its embedding is then a constant.
    """

    keys: Tensor
    local: Tensor


class Block:
    """The weights of one block."""

    def __init__(self, packed: Packed, index: int) -> None:
        self.products = {name: packed.product(f"blocks.{index}.{name}") for name in BLOCK_PRODUCTS}
        self.gammas = {name: packed.tensor(f"blocks.{index}.{name}") for name in BLOCK_NORMS}
        # The norm of an RMS-normed head is at most 8 times its largest gamma. Rotation keeps it, so q k / 8 is bounded.
        self.bounds = {
            kind: HEAD_CHANNELS**0.5 * _largest(self.gammas[f"{kind}_q_norm"]) * _largest(self.gammas[f"{kind}_k_norm"])
            for kind in ("self", "cross")
        }
        ratio = self.products["cross_out"].ratio
        self.cross_ratio = None if ratio is None else ratio.unsqueeze(0)

    def scale(self, name: str) -> float | None:
        """Return the activation scale of a linear layer, None in 16 bits."""
        return self.products[name].activation_scale

    def vector(self, name: str) -> Tensor:
        """Return a norm's gamma (1, width)."""
        return self.gammas[name].unsqueeze(0)


class Dit:
    """Packed DiT on one device; `ops` are the operations between its linear layers."""

    def __init__(self, packed: Packed, ops: BlockOps) -> None:
        self.sizes, self.packed = packed.sizes, packed
        self.front = Front(packed)
        self.blocks = [Block(packed, index) for index in range(packed.sizes.depth)]
        self.ops = ops
        self._memory = packed.tensor("memory")
        self._gammas = {name: torch.stack([block.vector(name) for block in self.blocks]) for name in TOKEN_NORMS}
        self._ratios = {name: torch.stack([_ratio(block.products[name]) for block in self.blocks]) for name in GATED}
        self._bias = torch.stack([_vector(block.products["ff_out"].bias) for block in self.blocks])
        self.latent_channels, self.cross_tokens = packed.tensor("preprocess").shape[0], TEXT_TOKENS + 1
        self._first, self._last = self._ends()

    def refresh(self) -> None:
        """Recompute in place the tensors derived from the weights of `packed`; call after replacing weights."""
        products = {
            f"blocks.{i}.{name}": one for i, block in enumerate(self.blocks) for name, one in block.products.items()
        }
        for name, product in (products | self.front.products).items():
            ratio = self.packed.product(name).ratio
            if product.ratio is not None and ratio is not None:
                product.ratio.copy_(ratio)
        for name, ratios in self._ratios.items():
            ratios.copy_(torch.stack([_ratio(block.products[name]) for block in self.blocks]))
        for kept, ends in zip((self._first, self._last), self._ends(), strict=True):
            kept.copy_(ends)

    def _ends(self) -> tuple[Tensor, Tensor]:
        """Return the first and last weights, (width, 256) and (256, width) fp16, with the convolutions merged.

        The residual 1x1 convolution at each end and its adjacent linear layer are both linear: one product each.
        """
        pre, post = (self.packed.tensor(name).double() for name in ("preprocess", "postprocess"))
        one = torch.eye(pre.shape[0], dtype=torch.float64, device=pre.device)
        first, last = (self.packed.product(name).weight.double() for name in ("input", "output"))
        return (first @ (one + pre)).half(), ((one + post) @ last).half()

    def keys(self, t5_hidden: Tensor, t5_mask: Tensor, seconds: Tensor) -> Tensor:
        """Return normed k1 and k2, and v, of every block's cross-attention: (depth, B, 257, 3 width) fp16."""
        context = self.front.context(t5_hidden, t5_mask, seconds)
        return torch.stack([self._keys(block, context) for block in self.blocks])

    def local(self, local_add_cond: Tensor) -> Tensor:
        """Return the local embedding of every block (depth, B, L, width) fp16 for local_add_cond (B, 257, L)."""
        inputs = local_add_cond.transpose(1, 2).to(torch.float16).contiguous()
        embeddings = []
        for block in self.blocks:
            into, out = block.products["local_in"], block.products["local_out"]
            padded = functional.pad(inputs, (0, into.weight.shape[1] - inputs.shape[-1]))
            embeddings.append(linear(functional.silu(linear(padded, into).float()).to(torch.float16), out))
        return torch.stack(embeddings)

    def modulation(self, t: Tensor, seconds: Tensor) -> Tensor:
        """Return the vectors that blocks multiply and add (7, depth, B, width) fp32, for t (B,) and seconds (B,).

        First axis: gain, shift and branch multiplier of the self-attention, then of the feed-forward, then the
        feed-forward's addend. They include norm gammas, gates, channel ratios and biases.
        """
        scale_a, shift_a, gate_a, scale_f, shift_f, gate_f = self.front.modulation(t, seconds).unbind(0)
        return torch.stack(
            [
                self._gammas["self_norm"] * (1.0 + scale_a), shift_a, self._ratios["self_out"] * gate_a,
                self._gammas["ff_norm"] * (1.0 + scale_f), shift_f, self._ratios["ff_out"] * gate_f,
                self._bias * gate_f,
            ]
        )  # fmt: skip

    def step(self, x: Tensor, modulation: Tensor, conditioning: RowConditioning) -> Tensor:
        """Return the velocity (B, 256, L) fp32 for x (B, 256, L) fp32 and its rows' modulation and conditioning."""
        ops, memory, epsilon = self.ops, self.sizes.memory, self.sizes.norm_epsilon
        rows = x.shape[0]
        entered = fp16_linear(x.transpose(1, 2).to(torch.float16), self._first)
        hidden = torch.cat([self._memory.expand(rows, -1, -1), entered], dim=1)
        gain_a, shift_a, gate_a, gain_f, shift_f, gate_f, bias_f = modulation.unbind(0)
        normed = ops.normed(hidden, gain_a[0], shift_a[0], epsilon, self.blocks[0].scale("self_qkv"))
        for index, block in enumerate(self.blocks):
            mixed = self._self_attention(block, normed)
            hidden, normed = ops.add_normed(
                hidden, scaled_mm(mixed, block.products["self_out"]), gate_a[index], None, None, memory,
                block.vector("cross_norm"), None, epsilon, block.scale("cross_q"),
            )  # fmt: skip
            mixed = self._cross_attention(block, normed, conditioning.keys[index])
            hidden, normed = ops.add_normed(
                hidden, scaled_mm(mixed, block.products["cross_out"]), block.cross_ratio, None,
                conditioning.local[index], memory, gain_f[index], shift_f[index], epsilon, block.scale("ff_in"),
            )  # fmt: skip
            into = block.products["ff_in"]
            assert into.bias is not None
            gated = ops.gated(scaled_mm(normed, into), into.ratio, into.bias, block.scale("ff_out"))
            last = index + 1 == len(self.blocks)
            hidden, normed = ops.add_normed(
                hidden, scaled_mm(gated, block.products["ff_out"]), gate_f[index], bias_f[index], None, memory,
                None if last else gain_a[index + 1], None if last else shift_a[index + 1], epsilon,
                None if last else self.blocks[index + 1].scale("self_qkv"),
            )  # fmt: skip
        return fp16_linear(hidden[:, memory:], self._last).transpose(1, 2).float().contiguous()

    def _self_attention(self, block: Block, normed: Tensor) -> Tensor:
        product, norms = block.products["self_qkv"], block.gammas
        return self.ops.self_attention(
            scaled_mm(normed, product), product.ratio, norms["self_q_norm"], norms["self_k_norm"],
            self.sizes.head_epsilon, block.bounds["self"], block.scale("self_out"),
        )  # fmt: skip

    def _cross_attention(self, block: Block, normed: Tensor, keys: Tensor) -> Tensor:
        product = block.products["cross_q"]
        return self.ops.cross_attention(
            scaled_mm(normed, product), product.ratio, keys, block.gammas["cross_q_norm"], self.sizes.head_epsilon,
            block.bounds["cross"], block.scale("cross_out"),
        )  # fmt: skip

    def _keys(self, block: Block, context: Tensor) -> Tensor:
        """Return normed k1 and k2, and v, (B, 257, 3 width) fp16 for the cross tokens (B, 257, width)."""
        product = block.products["cross_kv"]
        keys_and_values = dequantize(
            scaled_mm(quantize_activation(context, product.activation_scale), product), product
        ).to(torch.float16)
        k, v = keys_and_values.split((2 * self.sizes.width, self.sizes.width), dim=-1)
        normed = head_norm(k.unflatten(-1, (-1, HEAD_CHANNELS)), block.gammas["cross_k_norm"], self.sizes.head_epsilon)
        return torch.cat([normed.flatten(2), v], dim=-1)


def fp16_linear(value: Tensor, weight: Tensor) -> Tensor:
    """Return value @ weight^T in fp16, computed in fp32 on a CPU, where 16-bit products are slow."""
    if value.is_cuda:
        return functional.linear(value, weight)
    return functional.linear(value.float(), weight.float()).to(torch.float16)


def _ratio(product: Product) -> Tensor:
    """Return the channel ratios (1, N) of a linear layer; ones in 16 bits."""
    if product.ratio is None:
        return torch.ones((1, product.weight.shape[0]), device=product.weight.device)
    return product.ratio.unsqueeze(0)


def _vector(bias: Tensor | None) -> Tensor:
    assert bias is not None
    return bias.unsqueeze(0)


def _largest(gamma: Tensor) -> float:
    return float(gamma.abs().max())
