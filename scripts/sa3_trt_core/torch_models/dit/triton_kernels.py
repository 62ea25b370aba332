"""Triton kernels of a DiT step: the operations between two linear layers, each fused into one pass over its rows.

FP8 method: a weight is stored as E4M3 codes with one scale per output channel, an activation as codes with one
calibrated scale per tensor, so that w = code_w * scale_w[channel] and x = code_x * scale_x. The tensor cores multiply
codes and add in fp32. The library stores the sums in fp16, multiplied by a power of two that prevents overflow. The
result of the linear layer is sum * (scale_x * scale_w[channel] / power) + bias.

This last multiplication costs no extra pass, because the kernel after the linear layer reads the sums in any case. It
applies `ratio` (the bracket) and bias in fp32 and does its own operation (norm, modulation, attention, gate) in fp32.
Then it writes the next layer's input, divided by that layer's scale, saturated at 448 and rounded to E4M3. No fp16
activation is written and read again only to be quantised. In 16 bits there is no `ratio`, and the input is fp16.

Lengths are run-time arguments, so that another length needs no compilation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sa3_trt_core.torch_models.kernels.store import LOG2_E, load_halves, store

HEAD = tl.constexpr(64)  # channels of a head
TAIL = tl.constexpr(16)  # block of keys after the last whole block: 257 keys leave 1; memory tokens leave 6


@triton.jit(do_not_specialize=["tokens", "memory", "local_row", "local_token", "branch_row", "norm_row"])
def residual_norm(
    hidden, sums, multiplier, addend, local, gain, shift, hidden_out, normed, inverse_scale, tokens, memory,
    local_row, local_token, branch_row, norm_row, epsilon, width: tl.constexpr, rows: tl.constexpr, block: tl.constexpr,
    has_sums: tl.constexpr, has_multiplier: tl.constexpr, has_addend: tl.constexpr, has_local: tl.constexpr,
    has_norm: tl.constexpr, has_shift: tl.constexpr, to_fp8: tl.constexpr,
):  # fmt: skip
    """Add a branch and the local embedding to the residual of `rows` tokens; normalise, modulate and quantise the sum.

    Vectors are read once for all tokens of the program, because each is as large as a token.
    """
    position = tl.program_id(0) * rows + tl.arange(0, rows)
    row = tl.program_id(1)
    channel = tl.arange(0, block)
    inside = channel < width
    here = (position < tokens)[:, None] & inside[None, :]
    at = (row.to(tl.int64) * tokens + position)[:, None] * width + channel[None, :]
    value = tl.load(hidden + at, mask=here, other=0.0).to(tl.float32)
    if has_sums:
        branch = tl.load(sums + at, mask=here, other=0.0).to(tl.float32)
        if has_multiplier:
            branch *= tl.load(multiplier + row * branch_row + channel, mask=inside, other=0.0)[None, :]
        if has_addend:
            branch += tl.load(addend + row * branch_row + channel, mask=inside, other=0.0)[None, :]
        value += branch
    if has_local:
        place = row.to(tl.int64) * local_row + (position - memory).to(tl.int64) * local_token
        behind_memory = here & (position >= memory)[:, None]
        value += tl.load(local + place[:, None] + channel[None, :], mask=behind_memory, other=0.0).to(tl.float32)
    if has_sums or has_local:
        rounded = value.to(tl.float16)
        tl.store(hidden_out + at, rounded, mask=here)
        value = rounded.to(tl.float32)
    if has_norm:
        inverse = tl.rsqrt(tl.sum(value * value, axis=1) / width + epsilon)
        result = value * inverse[:, None] * tl.load(gain + row * norm_row + channel, mask=inside, other=0.0)[None, :]
        if has_shift:
            result += tl.load(shift + row * norm_row + channel, mask=inside, other=0.0)[None, :]
        store(normed + at, result, inverse_scale, here, to_fp8)


@triton.jit
def _part(sums, ratio, at, channel, mask, has_ratio: tl.constexpr):
    value = tl.load(sums + at + channel, mask=mask, other=0.0).to(tl.float32)
    if has_ratio:
        value *= tl.load(ratio + channel, mask=mask, other=0.0)
    return value


@triton.jit(do_not_specialize=["tokens"])
def norm_rope(
    sums, ratio, q_gamma, k_gamma, cosine, sine, result, tokens, epsilon, heads: tl.constexpr, stride: tl.constexpr,
    block: tl.constexpr, has_ratio: tl.constexpr,
):  # fmt: skip
    """Normalise `block` of the 4 * heads heads of q1, q2, k1, k2 of one token, and rotate their first 32 channels.

    Channel i < 16 is paired with channel i + 16; the last 32 channels are not rotated.
    """
    token = tl.program_id(0)
    head = tl.program_id(1) * block + tl.arange(0, block)
    pair, rest = tl.arange(0, HEAD // 4), tl.arange(0, HEAD // 2)
    mask = (head < 4 * heads)[:, None]
    is_key = (head >= 2 * heads)[:, None]
    at = token.to(tl.int64) * stride
    c1 = head[:, None] * HEAD + pair[None, :]
    c2, c3 = c1 + HEAD // 4, head[:, None] * HEAD + HEAD // 2 + rest[None, :]
    x1 = _part(sums, ratio, at, c1, mask, has_ratio)
    x2 = _part(sums, ratio, at, c2, mask, has_ratio)
    x3 = _part(sums, ratio, at, c3, mask, has_ratio)
    squares = tl.sum(x1 * x1 + x2 * x2, axis=1) + tl.sum(x3 * x3, axis=1)
    inverse = tl.rsqrt(squares / HEAD + epsilon)[:, None]
    x1 *= inverse * tl.where(is_key, tl.load(k_gamma + pair)[None, :], tl.load(q_gamma + pair)[None, :])
    second = pair + HEAD // 4
    x2 *= inverse * tl.where(is_key, tl.load(k_gamma + second)[None, :], tl.load(q_gamma + second)[None, :])
    third = rest + HEAD // 2
    x3 *= inverse * tl.where(is_key, tl.load(k_gamma + third)[None, :], tl.load(q_gamma + third)[None, :])
    turn = (token % tokens) * (HEAD // 2) + pair
    cos, sin = tl.load(cosine + turn)[None, :], tl.load(sine + turn)[None, :]
    out = result + token.to(tl.int64) * (4 * heads * HEAD)
    tl.store(out + c1, (x1 * cos - x2 * sin).to(tl.float16), mask=mask)
    tl.store(out + c2, (x2 * cos + x1 * sin).to(tl.float16), mask=mask)
    tl.store(out + c3, x3.to(tl.float16), mask=mask)


@triton.jit
def _attend(query, key, value, largest, total, gathered, scale, valid, masked: tl.constexpr, bounded: tl.constexpr):
    """Update the running softmax (Milakov and Gimelshein, 2018) of one half with one more block of keys.

    If `bounded`, `largest` is a constant, subtracted instead of the running maximum, so that nothing is rescaled.
    """
    scores = tl.dot(query, key)
    if masked:
        scores = tl.where(valid[None, :], scores, float("-inf"))
    if bounded:
        weights = tl.exp2(scores * scale - largest)
        total += tl.sum(weights, axis=1)
        gathered = tl.dot(weights.to(tl.float16), value, gathered)
    else:
        higher = tl.maximum(largest, tl.max(scores, axis=1) * scale)
        weights = tl.exp2(scores * scale - higher[:, None])
        correction = tl.exp2(largest - higher)
        total = total * correction + tl.sum(weights, axis=1)
        gathered = tl.dot(weights.to(tl.float16), value, gathered * correction[:, None])
        largest = higher
    return largest, total, gathered


@triton.jit
def _query(
    query, at, channel, dim, ratio, gamma, here, epsilon, normed: tl.constexpr, has_ratio: tl.constexpr
):  # fmt: skip
    """Load one half's queries of a head in fp16; apply the RMS norm if `normed`."""
    value = tl.load(query + at + channel[None, :], mask=here, other=0.0)
    if normed:
        wide = value.to(tl.float32)
        if has_ratio:
            wide *= tl.load(ratio + channel)[None, :]
        inverse = tl.rsqrt(tl.sum(wide * wide, axis=1) / HEAD + epsilon)
        value = (wide * inverse[:, None] * tl.load(gamma + dim)[None, :]).to(tl.float16)
    return value


@triton.jit(do_not_specialize=["tokens", "keys"])
def differential_attention(
    query, key, value, query_ratio, query_gamma, value_ratio, result, inverse_scale, tokens, keys, epsilon,
    subtracted, heads: tl.constexpr, query_stride: tl.constexpr, key_stride: tl.constexpr, value_stride: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, norm_query: tl.constexpr, has_query_ratio: tl.constexpr,
    has_value_ratio: tl.constexpr, bounded: tl.constexpr, to_fp8: tl.constexpr,
):  # fmt: skip
    """Compute softmax(q1 k1^T / 8) v - softmax(q2 k2^T / 8) v for one head and `rows` queries; v is read once.

    `query` (B, tokens, 2 heads, 64), `key` (B, keys, 2 heads, 64), `value` (B, keys, heads, 64), rows a stride apart.
    """
    block, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    dim = tl.arange(0, HEAD)
    token = block * rows + tl.arange(0, rows)
    here = (token < tokens)[:, None]
    first, second = head * HEAD + dim, (heads + head) * HEAD + dim
    at = (row * tokens + token)[:, None] * query_stride
    one = _query(query, at, first, dim, query_ratio, query_gamma, here, epsilon, norm_query, has_query_ratio)
    two = _query(query, at, second, dim, query_ratio, query_gamma, here, epsilon, norm_query, has_query_ratio)
    scale = 0.125 * LOG2_E
    zero = tl.zeros([rows], dtype=tl.float32)
    s1, s2 = zero, zero
    if bounded:
        m1, m2 = subtracted, subtracted
    else:
        m1, m2 = zero - float("inf"), zero - float("inf")
    a1 = tl.zeros([rows, HEAD], dtype=tl.float32)
    a2 = tl.zeros([rows, HEAD], dtype=tl.float32)
    column = tl.arange(0, columns)
    keys_at, values_at = key + row * keys * key_stride, value + row * keys * value_stride
    whole = (keys // columns) * columns
    for start in range(0, whole, columns):
        place = start + column
        k1 = tl.load(keys_at + place[None, :] * key_stride + first[:, None])
        k2 = tl.load(keys_at + place[None, :] * key_stride + second[:, None])
        v = tl.load(values_at + place[:, None] * value_stride + first[None, :])
        m1, s1, a1 = _attend(one, k1, v, m1, s1, a1, scale, place < keys, False, bounded)
        m2, s2, a2 = _attend(two, k2, v, m2, s2, a2, scale, place < keys, False, bounded)
    for start in range(whole, keys, TAIL):
        place = start + tl.arange(0, TAIL)
        valid = place < keys
        k1 = tl.load(keys_at + place[None, :] * key_stride + first[:, None], mask=valid[None, :], other=0.0)
        k2 = tl.load(keys_at + place[None, :] * key_stride + second[:, None], mask=valid[None, :], other=0.0)
        v = tl.load(values_at + place[:, None] * value_stride + first[None, :], mask=valid[:, None], other=0.0)
        m1, s1, a1 = _attend(one, k1, v, m1, s1, a1, scale, valid, True, bounded)
        m2, s2, a2 = _attend(two, k2, v, m2, s2, a2, scale, valid, True, bounded)
    out = a1 / s1[:, None] - a2 / s2[:, None]
    if has_value_ratio:
        out *= tl.load(value_ratio + first)[None, :]
    place = (row * tokens + token)[:, None] * (heads * HEAD) + first[None, :]
    store(result + place, out, inverse_scale, here, to_fp8)


@triton.jit(do_not_specialize=["count"])
def gated(
    sums, ratio, bias, result, inverse_scale, count, inner: tl.constexpr, rows: tl.constexpr, block: tl.constexpr,
    has_ratio: tl.constexpr, to_fp8: tl.constexpr,
):  # fmt: skip
    """Compute a * silu(g) for `rows` of `count` tokens, `block` channels; a, g are the halves of a linear's result."""
    token = tl.program_id(0) * rows + tl.arange(0, rows)
    channel = tl.program_id(1) * block + tl.arange(0, block)
    inside = channel < inner
    mask = (token < count)[:, None] & inside[None, :]
    at = token.to(tl.int64)[:, None] * (2 * inner) + channel[None, :]
    value, gate = load_halves(sums, ratio, bias, at, channel, mask, inside, inner, has_ratio)
    place = token.to(tl.int64)[:, None] * inner + channel[None, :]
    store(result + place, value * gate * tl.sigmoid(gate), inverse_scale, mask, to_fp8)
