"""Triton kernels of a SAME layer: the operations between two linear layers, each fused into one pass over its tokens.

Attention is windowed: a query attends to the keys at most `reach` tokens away. One program processes a group of queries
of one head and the band of keys around them. It computes both softmaxes of differential attention over the same values
and subtracts them. The dynamic tanh norm of q and k, gamma * tanh(alpha x) + beta, and the rotation are applied when
the tile is loaded, so that normed heads are never stored. All keys of a band are in one tile, so that the softmax needs
no running maximum.

The gate kernel applies SiLU or sin(pi g) in fp32, because the sine amplifies rounding. Before an FP8 linear layer
(kernels/linear.py) it also quantises its result in the same pass: scale = amax / 448 per token, code = value / scale
rounded to E4M3. The linear layer multiplies codes by codes, and the kernel after it multiplies the token's sums by
its scale. A scale per token needs no calibration.

Lengths are run-time arguments, so that another length needs no compilation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sa3_trt_core import shapes
from sa3_trt_core.torch_models.kernels.store import (
    E4M3_MAX,
    LOG2_E,
    dynamic_tanh,
    exp2,
    load_halves,
    rotate,
    sigmoid,
    sin_pi,
    store,
    tanh,
)

HEAD = tl.constexpr(64)  # channels of a head
HALF = tl.constexpr(32)  # channel i is paired with channel i + 32
FULL_SCALE = tl.constexpr(float(shapes.FULL_SCALE))
ROUNDING = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds an fp32 value to an integer, half to even


@triton.jit(do_not_specialize=["count", "alpha", "inverse_scale"])
def add_norm(
    hidden, stored, ratio, row_scale, bias, gamma, beta, normed, alpha, inverse_scale, count, width: tl.constexpr,
    rows: tl.constexpr, block: tl.constexpr, has_sums: tl.constexpr, has_ratio: tl.constexpr,
    has_row_scale: tl.constexpr, has_bias: tl.constexpr, has_norm: tl.constexpr, to_fp8: tl.constexpr,
):  # fmt: skip
    """Add a linear's result to the residual in place, for `rows` tokens, `block` channels; apply dynamic tanh norm."""
    token = tl.program_id(0) * rows + tl.arange(0, rows)
    channel = tl.program_id(1) * block + tl.arange(0, block)
    mask = (token < count)[:, None] & (channel < width)[None, :]
    at = token.to(tl.int64)[:, None] * width + channel[None, :]
    value = tl.load(hidden + at, mask=mask, other=0.0).to(tl.float32)
    if has_sums:
        branch = tl.load(stored + at, mask=mask, other=0.0).to(tl.float32)
        if has_row_scale:
            branch *= tl.load(row_scale + token, mask=token < count, other=0.0)[:, None]
        if has_ratio:
            branch *= tl.load(ratio + channel, mask=channel < width, other=0.0)[None, :]
        if has_bias:
            branch += tl.load(bias + channel, mask=channel < width, other=0.0)[None, :]
        rounded = (value + branch).to(tl.float16)
        tl.store(hidden + at, rounded, mask=mask)
        value = rounded.to(tl.float32)
    if has_norm:
        result = tanh(alpha * value, False) * tl.load(gamma + channel, mask=channel < width, other=0.0)[None, :]
        result += tl.load(beta + channel, mask=channel < width, other=0.0)[None, :]
        store(normed + at, result, inverse_scale, mask, to_fp8)


@triton.jit
def _table(table, place):
    """Load (size, 32) fp16 from a table (positions, 32) at `place` (size,)."""
    return tl.load(table + place[:, None] * HALF + tl.arange(0, HALF)[None, :])


@triton.jit
def _rotated(source, at, mask, alpha, gamma, beta, cos, sin, size: tl.constexpr, approximate: tl.constexpr):
    """Return the first and last 32 channels (size, 32) fp16 of one head's q or k, normed and rotated."""
    channel = tl.arange(0, HALF)
    first, second = source + at[:, None] + channel[None, :], source + at[:, None] + (channel + HALF)[None, :]
    scale = tl.full([size, HALF], alpha, tl.float16)
    first = dynamic_tanh(
        tl.load(first, mask=mask[:, None], other=0.0), scale,
        tl.broadcast_to(tl.load(gamma + channel).to(tl.float16)[None, :], [size, HALF]),
        tl.broadcast_to(tl.load(beta + channel).to(tl.float16)[None, :], [size, HALF]), approximate,
    )  # fmt: skip
    second = dynamic_tanh(
        tl.load(second, mask=mask[:, None], other=0.0), scale,
        tl.broadcast_to(tl.load(gamma + HALF + channel).to(tl.float16)[None, :], [size, HALF]),
        tl.broadcast_to(tl.load(beta + HALF + channel).to(tl.float16)[None, :], [size, HALF]), approximate,
    )  # fmt: skip
    return rotate(first, second, cos, sin, approximate), rotate(second, first, cos, -sin, approximate)


@triton.jit
def _half(q_first, q_second, k_first, k_second, value, inside, approximate: tl.constexpr):
    """Return softmax(q k^T / 8) v of one half, over all keys of a program at once."""
    scores = tl.dot(q_second, tl.trans(k_second), tl.dot(q_first, tl.trans(k_first)))
    scores = tl.where(inside, scores * (0.125 * LOG2_E), float("-inf"))
    largest = tl.max(scores, axis=1)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    weights = exp2(scores - largest[:, None], approximate)
    total = tl.sum(weights, axis=1)
    return tl.dot(weights.to(tl.float16), value) * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]


@triton.jit(do_not_specialize=["q_alpha", "k_alpha", "first", "begin", "end", "last", "tokens", "reach", "queries"])
def windowed_attention(
    qkv, result, cosine, sine, q_gamma, q_beta, k_gamma, k_beta, q_alpha, k_alpha, first, begin, end, last, tokens,
    reach, queries, heads: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, approximate: tl.constexpr,
):  # fmt: skip
    """Compute differential attention for one head and `queries` tokens over the keys within `reach`; v is read once.

    `qkv` holds q1, q2, k1, k2, v of tokens first..last, numbered through all rows; a row has `tokens` tokens.
    queries <= rows, and queries + 2 reach <= columns. Positions are relative to the program's first key: scores depend
    on position differences only, so that a short table is enough for every length.
    """
    head = tl.program_id(1)
    start = begin + tl.program_id(0) * queries
    width: tl.constexpr = heads * HEAD
    row, column = tl.arange(0, rows), tl.arange(0, columns)
    query, key = start + row, start - reach + column
    asked = (row < queries) & (query < end)
    key_mask = (key >= first) & (key < last) & (column < queries + 2 * reach)
    # The band of a query in columns, clipped to its row; one unsigned comparison per score.
    row_begin = query // tokens * tokens - start + reach
    lowest = tl.maximum(row, row_begin)
    span = tl.minimum(row + 2 * reach, row_begin + tokens - 1) - lowest
    inside = (column[None, :] - lowest[:, None]).to(tl.uint32) <= span[:, None].to(tl.uint32)
    channel = head * HEAD
    q_at = (query - first).to(tl.int64) * (5 * width) + channel
    k_at = (key - first).to(tl.int64) * (5 * width) + channel
    dim = tl.arange(0, HEAD)
    value = tl.load(qkv + k_at[:, None] + (dim + 4 * width)[None, :], mask=key_mask[:, None], other=0.0)
    q_cos, q_sin = _table(cosine, row + reach), _table(sine, row + reach)
    k_cos, k_sin = _table(cosine, column), _table(sine, column)
    q1, q2 = _rotated(qkv, q_at, asked, q_alpha, q_gamma, q_beta, q_cos, q_sin, rows, approximate)
    k1, k2 = _rotated(qkv, k_at + 2 * width, key_mask, k_alpha, k_gamma, k_beta, k_cos, k_sin, columns, approximate)
    out = _half(q1, q2, k1, k2, value, inside, approximate)
    q1, q2 = _rotated(qkv, q_at + width, asked, q_alpha, q_gamma, q_beta, q_cos, q_sin, rows, approximate)
    k1, k2 = _rotated(qkv, k_at + 3 * width, key_mask, k_alpha, k_gamma, k_beta, k_cos, k_sin, columns, approximate)
    out -= _half(q1, q2, k1, k2, value, inside, approximate)
    at = (query - begin).to(tl.int64)[:, None] * width + (dim + channel)[None, :]
    tl.store(result + at, out.to(tl.float16), mask=asked[:, None])


@triton.jit
def _gated(
    stored, ratio, bias, at, channel, mask, inside, inner, sinusoidal: tl.constexpr, has_ratio: tl.constexpr,
    approximate: tl.constexpr,
):  # fmt: skip
    value, gate = load_halves(stored, ratio, bias, at, channel, mask, inside, inner, has_ratio)
    if sinusoidal:
        return value * sin_pi(gate, approximate)
    return value * gate * sigmoid(gate, False)


@triton.jit(do_not_specialize=["count"])
def gate(
    stored, ratio, bias, result, count, inner: tl.constexpr, rows: tl.constexpr, block: tl.constexpr,
    sinusoidal: tl.constexpr, has_ratio: tl.constexpr, approximate: tl.constexpr,
):  # fmt: skip
    """Compute a * silu(g), or a * sin(pi g), in fp16 for `rows` tokens and `block` channels."""
    token = tl.program_id(0) * rows + tl.arange(0, rows)
    channel = tl.program_id(1) * block + tl.arange(0, block)
    inside = channel < inner
    mask = (token < count)[:, None] & inside[None, :]
    at = token.to(tl.int64)[:, None] * (2 * inner) + channel[None, :]
    value = _gated(stored, ratio, bias, at, channel, mask, inside, inner, sinusoidal, has_ratio, approximate)
    place = token.to(tl.int64)[:, None] * inner + channel[None, :]
    tl.store(result + place, value.to(tl.float16), mask=mask)


@triton.jit(do_not_specialize=["count"])
def gate_codes(
    stored, ratio, bias, result, row_scale, count, inner: tl.constexpr, pieces: tl.constexpr, block: tl.constexpr,
    sinusoidal: tl.constexpr, has_ratio: tl.constexpr, approximate: tl.constexpr,
):  # fmt: skip
    """Compute the gate of one token as E4M3 codes with its own scale, which maps the largest magnitude to 448.

    The channels are loaded in `pieces` of `block`; pieces * block >= inner.
    """
    token = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([1, block], dtype=tl.float32)
    values = ()
    for piece in tl.static_range(pieces):
        channel = piece * block + tl.arange(0, block)
        inside = channel < inner
        at = token * (2 * inner) + channel[None, :]
        value = _gated(
            stored, ratio, bias, at, channel, inside[None, :], inside, inner, sinusoidal, has_ratio, approximate
        )  # fmt: skip
        value = tl.where(inside[None, :], value, 0.0)
        largest = tl.maximum(largest, tl.abs(value))
        values = values + (value,)  # type: ignore[assignment]  # noqa: RUF005 - the form that Triton compiles
    scale = tl.maximum(tl.max(largest), 1e-12) / E4M3_MAX
    tl.store(row_scale + token, scale)
    for piece in tl.static_range(pieces):
        channel = piece * block + tl.arange(0, block)
        store(result + token * inner + channel[None, :], values[piece], 1.0 / scale, (channel < inner)[None, :], True)


@triton.jit(do_not_specialize=["count"])
def unpatch(
    patches, bias, result, count, stride: tl.constexpr, patch: tl.constexpr, rows: tl.constexpr, to_pcm: tl.constexpr
):  # fmt: skip
    """Write interleaved stereo samples of `rows` tokens, int16 or unclipped fp32, from `patches` (M, 2 * patch) fp32.

    The first of every stride + 1 tokens has no samples.
    """
    token = tl.program_id(0) * rows + tl.arange(0, rows)
    sample = tl.arange(0, patch)
    mask = (token < count)[:, None]
    source = (token // stride) * (stride + 1) + 1 + token % stride
    at = source.to(tl.int64)[:, None] * (2 * patch) + sample[None, :]
    left = tl.load(patches + at, mask=mask, other=0.0) + tl.load(bias + sample)[None, :]
    right = tl.load(patches + at + patch, mask=mask, other=0.0) + tl.load(bias + patch + sample)[None, :]
    both = tl.join(left, right)  # (rows, patch, 2)
    place = (token.to(tl.int64)[:, None] * patch + sample[None, :])[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]
    if to_pcm:
        both = tl.minimum(tl.maximum(both, -1.0), 1.0) * FULL_SCALE
        both = (both + ROUNDING) - ROUNDING
        tl.store(result + place, both.to(tl.int16), mask=mask[:, :, None])
    else:
        tl.store(result + place, both, mask=mask[:, :, None])
