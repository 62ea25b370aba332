"""Forward of a packed SAME decoder or encoder: each layer processes a bounded number of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from sa3_trt_core.torch_models.kernels.linear import Product, linear, scaled_mm
from sa3_trt_core.torch_models.same.weights import DynamicTanh, Layer, Packed

TOKENS_AT_ONCE = 11264  # of all rows together; bounds the size of a layer's widest activations
TOKENS_WITH_LITTLE_MEMORY = 4096  # 5 % slower at 4096 latent frames, with 230 MB less memory (build/NOTES.md)
TOKENS_IN_ONE = 24576  # up to this many tokens run in one piece


class SameOps(Protocol):
    """Operations between the linear layers of a layer: reference_ops.ReferenceOps, or triton_ops.TritonOps."""

    def norm(self, hidden: Tensor, norm: DynamicTanh, scale: float | None, out: Tensor | None = None) -> Tensor: ...
    def add_norm(
        self, hidden: Tensor, stored: Tensor, product: Product, row_scale: Tensor | None, norm: DynamicTanh | None,
        scale: float | None, out: Tensor | None = None,
    ) -> Tensor: ...  # fmt: skip
    def attention(
        self, qkv: Tensor, first: int, begin: int, end: int, tokens: int, reach: int, q_norm: DynamicTanh,
        k_norm: DynamicTanh,
    ) -> Tensor: ...  # fmt: skip
    def gate(self, stored: Tensor, product: Product, sinusoidal: bool, fp8: bool) -> tuple[Tensor, Tensor | None]: ...
    def pcm(self, patches: Tensor, bias: Tensor, stride: int, channels: int) -> Tensor: ...
    def samples(self, patches: Tensor, bias: Tensor, stride: int, channels: int) -> Tensor: ...


class Same:
    """Packed SAME decoder or encoder on one device; `ops` are the operations between its linear layers.

    All rows (sounds, windows) form one list of tokens. A layer processes the list in pieces of `tokens_at_once`: every
    token is computed once, and only the residual and its normed copy are as long as the list. The result does not
    depend on the piece size.
    """

    def __init__(self, packed: Packed, ops: SameOps, tokens_at_once: int | None = None) -> None:
        self.packed, self.sizes = packed, packed.sizes
        self._ops, self._tokens_at_once = ops, tokens_at_once
        self.wide_gates = False  # True: fp32 sums as input of sin(pi g)

    def pcm(self, latents: Tensor) -> Tensor:
        """Return samples (R, L * 4096, 2) int16 for latents (R, C, L) fp32."""
        return self._decoded(latents, self._ops.pcm)

    def samples(self, latents: Tensor) -> Tensor:
        """Return samples (R, L * 4096, 2) fp32, unclipped, for latents (R, C, L) fp32."""
        return self._decoded(latents, self._ops.samples)

    def latents(self, audio: Tensor) -> Tensor:
        """Return latents (R, C, L) fp32 for samples (R, 2, L * 4096) fp32 (encoder only)."""
        sizes, (rows, channels, _) = self.sizes, audio.shape
        patches = audio.to(torch.float16).unflatten(-1, (-1, sizes.patch)).permute(0, 2, 1, 3)
        entered = linear(patches.reshape(-1, channels * sizes.patch), self.packed.input)
        frames = entered.shape[0] // sizes.stride
        hidden = torch.empty((frames, sizes.stride + 1, sizes.width), dtype=torch.float16, device=audio.device)
        hidden[:, : sizes.stride] = entered.unflatten(0, (frames, sizes.stride))
        hidden[:, sizes.stride] = self.packed.token
        self._run(hidden.flatten(0, 1), frames // rows)
        latents = linear(hidden[:, sizes.stride].contiguous(), self.packed.output, wide=True)
        return latents.unflatten(0, (rows, -1)).transpose(1, 2).contiguous()

    def _decoded(self, latents: Tensor, end: Callable[[Tensor, Tensor, int, int], Tensor]) -> Tensor:
        sizes, (rows, _, frames) = self.sizes, latents.shape
        entered = linear(latents.to(torch.float16).transpose(1, 2).flatten(0, 1), self.packed.input)
        hidden = torch.empty((rows * frames, sizes.stride + 1, sizes.width), dtype=torch.float16, device=latents.device)
        hidden[:, 0] = entered
        del entered
        hidden[:, 1:] = self.packed.token
        flat = hidden.flatten(0, 1)
        self._run(flat, frames)
        assert self.packed.output.bias is not None
        channels = self.packed.output.weight.shape[0] // sizes.patch
        # Whole frames at a time, so that the samples of consecutive pieces are contiguous.
        step = max(1, self._limit(flat.shape[0]) // (sizes.stride + 1)) * (sizes.stride + 1)
        parts = [
            end(
                scaled_mm(flat[a : a + step], self.packed.output, wide=True),
                self.packed.output.bias,
                sizes.stride,
                channels,
            )
            for a in range(0, flat.shape[0], step)
        ]
        samples: Tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        return samples.unflatten(0, (rows, -1))

    def _run(self, hidden: Tensor, frames: int) -> None:
        """Run the layers on the residual (M, width) fp16, in place; a row has `frames` latent frames."""
        layers, tokens = self.packed.layers, frames * (self.sizes.stride + 1)
        normed = self._ops.norm(hidden, layers[0].attention_norm, None)
        for index, layer in enumerate(layers):
            following = layers[index + 1].attention_norm if index + 1 < len(layers) else None
            before: Tensor | None = None
            for begin, end in self._pieces(hidden.shape[0]):
                attended, before = self._attended(layer, normed, begin, end, tokens, before)
                self._finish(layer, hidden[begin:end], attended, following, normed[begin:end])

    def _attended(
        self, layer: Layer, normed: Tensor, begin: int, end: int, tokens: int, before: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention of tokens begin..end, and the sums of the last tokens, which the next piece needs.

        `before` are the sums of the tokens before `begin`, where `normed` already holds the next layer's values.
        """
        reach, total = self.sizes.reach, normed.shape[0]
        last = min(end + reach, total)
        head = 0 if before is None else before.shape[0]
        qkv = torch.empty((head + last - begin, layer.qkv.weight.shape[0]), dtype=torch.float16, device=normed.device)
        if before is not None:
            qkv[:head] = before
        scaled_mm(normed[begin:last], layer.qkv, out=qkv[head:])
        kept = None if end == total else qkv[max(0, head + end - begin - reach) : head + end - begin].clone()
        attended = self._ops.attention(
            qkv, begin - head, begin, end, tokens, reach, layer.q_norm, layer.k_norm
        )  # fmt: skip
        return attended, kept

    def _finish(
        self, layer: Layer, hidden: Tensor, attended: Tensor, following: DynamicTanh | None, normed: Tensor
    ) -> None:
        """Add the attention output and the feed-forward to `hidden`; write its norm `following` to `normed`."""
        ops, into, out = self._ops, layer.ff_in, layer.ff_out
        stored = scaled_mm(attended, layer.attention_out)
        inner = ops.add_norm(hidden, stored, layer.attention_out, None, layer.feed_forward_norm, into.activation_scale)
        stored = scaled_mm(inner, into, wide=layer.sinusoidal and self.wide_gates)
        gated, row_scale = ops.gate(stored, into, layer.sinusoidal, out.is_fp8)
        ops.add_norm(hidden, scaled_mm(gated, out), out, row_scale, following, None, normed)

    def _limit(self, total: int) -> int:
        return self._tokens_at_once or (total if total <= TOKENS_IN_ONE else TOKENS_AT_ONCE)

    def _pieces(self, total: int) -> Iterator[tuple[int, int]]:
        """Yield pieces (begin, end) of nearly equal length, each at least as long as the reach of attention."""
        count = -(-total // self._limit(total))
        step = max(-(-total // count), self.sizes.reach)
        for begin in range(0, total, step):
            yield begin, min(begin + step, total)
