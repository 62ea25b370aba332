"""Triton kernels of a T5Gemma layer: the operations between two linear layers, each fused into one or two passes.

The text encoder computes in fp32, but its linear layers run on bf16 tensor cores. A weight of the checkpoint is exactly
bf16. An activation x is split into high = bf16(x) and low = bf16(x - high), whose sum is x up to a relative error of
2^-17. cuBLAS multiplies the rows of both halves by the weight in one product and adds in fp32. Every kernel therefore
first adds the two halves of a product's result, then does its own operation (norm, residual, rotation, softmax, GELU)
in fp32, and writes the next product's input as two halves. No fp32 activation is written and read again only to be
split.

Attention has fp32 operands on both sides of its two products. There tf32x3 splits each operand into two TF32 numbers
(11 bits each) and adds three of their products, with a relative error of 2^-22; `ieee` uses fp32 multiplications. tanh
and GELU are the exact forms of `kernels.store`: a score is 50 tanh(x), so an error of tanh reaches the softmax 50 times
as large.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sa3_trt_core.torch_models.kernels.store import LOG2_E, tanh

LOWEST = tl.constexpr(-3.4028234663852886e38)  # the most negative fp32, added to the scores of a key with mask 0
GELU_SCALE = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
GELU_CUBE = tl.constexpr(0.044715)


@triton.jit
def _result(stored, at, low, mask, halves: tl.constexpr):
    """Load elements of a linear's result; those of the second half are `low` elements after the first."""
    value = tl.load(stored + at, mask=mask, other=0.0)
    if halves:
        value += tl.load(stored + low + at, mask=mask, other=0.0)
    return value


@triton.jit
def _write(result, at, low, value, mask, split: tl.constexpr):
    """Write the next linear's input: fp32, or two bf16 halves, the second `low` elements after the first."""
    if split:
        high = value.to(tl.bfloat16)
        tl.store(result + at, high, mask=mask)
        tl.store(result + low + at, (value - high.to(tl.float32)).to(tl.bfloat16), mask=mask)
    else:
        tl.store(result + at, value, mask=mask)


@triton.jit
def _normed(value, weight, channel, inside, epsilon, width: tl.constexpr):
    """Return the RMS norm of one token; channels not `inside` are 0."""
    inverse = tl.rsqrt(tl.sum(value * value, axis=0) / width + epsilon)
    return value * inverse * tl.load(weight + channel, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["count"])
def add_norm(
    source, stored, post, following, hidden, result, count, scale, epsilon, width: tl.constexpr, block: tl.constexpr,
    has_branch: tl.constexpr, halves: tl.constexpr, split: tl.constexpr,
):  # fmt: skip
    """Compute for one token hidden = source + norm(branch), or source * scale without one; result = norm(hidden)."""
    channel = tl.arange(0, block)
    inside = channel < width
    at = tl.program_id(0).to(tl.int64) * width + channel
    low = count.to(tl.int64) * width
    value = tl.load(source + at, mask=inside, other=0.0)
    if has_branch:
        value += _normed(_result(stored, at, low, inside, halves), post, channel, inside, epsilon, width)
    else:
        value *= scale
    tl.store(hidden + at, value, mask=inside)
    _write(result, at, low, _normed(value, following, channel, inside, epsilon, width), inside, split)


@triton.jit(do_not_specialize=["count"])
def rotate(
    stored, cosine, sine, result, count, tokens: tl.constexpr, rotated: tl.constexpr, heads: tl.constexpr,
    channels: tl.constexpr, rows: tl.constexpr, block: tl.constexpr, halves: tl.constexpr,
):  # fmt: skip
    """Add the halves of one head's result for `rows` tokens; rotate the head if it is one of the first `rotated`.

    The heads are those of q, k and v. Channel i is paired with channel i + channels / 2. `cosine`, `sine` have the
    shape (tokens, channels).
    """
    token = tl.program_id(0) * rows + tl.arange(0, rows)
    head = tl.program_id(1)
    channel = tl.arange(0, block)
    here = (token < count)[:, None] & (channel < channels)[None, :]
    base = token.to(tl.int64)[:, None] * (heads * channels) + head * channels
    low = count.to(tl.int64) * (heads * channels)
    value = _result(stored, base + channel[None, :], low, here, halves)
    if head < rotated:
        is_first = channel < channels // 2
        partner = tl.where(is_first, channel + channels // 2, channel - channels // 2)
        other = _result(stored, base + partner[None, :], low, here, halves)
        turn = (token % tokens)[:, None] * channels + channel[None, :]
        other = tl.where(is_first[None, :], -other, other)
        value = value * tl.load(cosine + turn, mask=here, other=0.0) + other * tl.load(
            sine + turn, mask=here, other=0.0
        )
    tl.store(result + base + channel[None, :], value, mask=here)


@triton.jit
def attention(
    qkv, mask, result, scale, cap, tokens: tl.constexpr, heads: tl.constexpr, key_heads: tl.constexpr,
    channels: tl.constexpr, block: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, precision: tl.constexpr,
    split: tl.constexpr,
):  # fmt: skip
    """Compute softmax(cap * tanh(scale * q k^T)) v for one head and `rows` queries, `columns` keys at a time.

    `qkv` (B, tokens, heads + 2 key_heads, channels), rotated; `mask` (B, tokens) of 0/1. Uses the running softmax of
    Milakov and Gimelshein (2018). Its maximum starts at LOWEST, so that a fully masked row weights all keys equally.
    """
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    query = tl.program_id(0) * rows + tl.arange(0, rows)
    channel = tl.arange(0, block)
    inside = channel < channels
    stride: tl.constexpr = (heads + 2 * key_heads) * channels
    key_at = qkv + (heads + head // (heads // key_heads)) * channels
    here = (query < tokens)[:, None] & inside[None, :]
    place = row * tokens + query
    q = tl.load(qkv + place[:, None] * stride + head * channels + channel[None, :], mask=here, other=0.0)
    largest = tl.zeros([rows], dtype=tl.float32) + LOWEST
    total = tl.zeros([rows], dtype=tl.float32)
    gathered = tl.zeros([rows, block], dtype=tl.float32)
    for start in range(0, tokens, columns):
        key = start + tl.arange(0, columns)
        valid = key < tokens
        at = (row * tokens + key) * stride
        k = tl.load(key_at + at[None, :] + channel[:, None], mask=inside[:, None] & valid[None, :], other=0.0)
        v = tl.load(
            key_at + key_heads * channels + at[:, None] + channel[None, :], mask=valid[:, None] & inside[None, :],
            other=0.0,
        )  # fmt: skip
        kept = tl.load(mask + row * tokens + key, mask=valid, other=0.0)
        scores = cap * tanh(tl.dot(q, k, input_precision=precision) * scale, False)
        scores = tl.where(valid[None, :], scores + ((1.0 - kept) * LOWEST)[None, :], float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp2((scores - higher[:, None]) * LOG2_E)
        correction = tl.exp2((largest - higher) * LOG2_E)
        total = total * correction + tl.sum(weights, axis=1)
        gathered = tl.dot(weights, v, gathered * correction[:, None], input_precision=precision)
        largest = higher
    low = tl.num_programs(2).to(tl.int64) * tokens * (heads * channels)
    at = place[:, None] * (heads * channels) + head * channels + channel[None, :]
    _write(result, at, low, gathered / total[:, None], here, split)


@triton.jit(do_not_specialize=["count"])
def gate(
    stored, result, count, inner: tl.constexpr, block: tl.constexpr, halves: tl.constexpr, split: tl.constexpr
):  # fmt: skip
    """Compute gelu(g) * a for `block` channels of one token; g and a are the halves of the result's channels.

    0.5 g (1 + tanh(u)) is computed as g / (1 + exp(-2 u)), which has no cancellation where tanh(u) is near -1.
    """
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * block + tl.arange(0, block)
    inside = channel < inner
    low = count.to(tl.int64) * inner
    at = token * (2 * inner) + channel
    g = _result(stored, at, 2 * low, inside, halves)
    a = _result(stored, at + inner, 2 * low, inside, halves)
    u = GELU_SCALE * (g + GELU_CUBE * g * g * g)
    _write(result, token * inner + channel, low, g / (1.0 + tl.exp2(u * (-2.0 * LOG2_E))) * a, inside, split)
