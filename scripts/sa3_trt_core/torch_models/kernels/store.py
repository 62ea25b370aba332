"""Functions that several Triton kernels share: storing with quantisation, fast elementary functions, rotation.

`store` is the last step of a kernel that feeds a linear layer. For FP8 it writes the layer's input as E4M3 codes: the
value divided by the layer's activation scale, clipped to +-448 (the largest E4M3 value) and rounded. The linear layer
multiplies codes by codes, and the kernel after it multiplies the sums by the scales again (`load_halves`; the method is
in kernels/linear.py). For 16 bits it writes fp16. The scale is a launch argument, so that another calibration needs no
compilation. `approximate` selects one GPU instruction for tanh, sine and 2^x (errors stated with each), else fp32
formulas.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sa3_trt_core import number_formats

E4M3_MAX = tl.constexpr(number_formats.E4M3_MAX)
LOG2_E = tl.constexpr(1.4426950408889634)
PI = tl.constexpr(3.141592653589793)


@triton.jit
def store(pointers, values, inverse_scale, mask, to_fp8: tl.constexpr):
    """Write fp32 values as fp16, or as E4M3 codes of values / scale, saturated."""
    if to_fp8:
        codes = tl.minimum(tl.maximum(values * inverse_scale, -E4M3_MAX), E4M3_MAX)
        tl.store(pointers, codes.to(tl.float8e4nv), mask=mask)
    else:
        tl.store(pointers, values.to(tl.float16), mask=mask)


@triton.jit
def load_halves(stored, ratio, bias, at, channel, mask, inside, inner, has_ratio: tl.constexpr):
    """Load both halves of a gated linear's result (2 * inner channels) in fp32, with channel scales and bias applied.

    `at` are the offsets of the first half's elements, `channel` their channels, `inside` those below `inner`.
    """
    value = tl.load(stored + at, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(stored + at + inner, mask=mask, other=0.0).to(tl.float32)
    if has_ratio:
        value *= tl.load(ratio + channel, mask=inside, other=0.0)[None, :]
        gate *= tl.load(ratio + inner + channel, mask=inside, other=0.0)[None, :]
    value += tl.load(bias + channel, mask=inside, other=0.0)[None, :]
    gate += tl.load(bias + inner + channel, mask=inside, other=0.0)[None, :]
    return value, gate


@triton.jit
def tanh(value, approximate: tl.constexpr):
    """Return tanh in fp32, relative error 3e-7; if `approximate`, by one GPU instruction, 5e-4 (half a step of fp16).

    2 / (1 + exp(-2 x)) - 1 loses a small x to cancellation; below 0.6 use a polynomial fitted to tanh(x) / x.
    """
    if approximate:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [value], tl.float32, True, 1)
    far = 2.0 / (1.0 + tl.exp2(value * (-2.0 * LOG2_E))) - 1.0
    square = value * value
    series = 0.13331924 + square * (-0.05378384 + square * (0.020796 + square * -0.00589519))
    near = value + value * square * (-0.33333298 + square * series)
    return tl.where(tl.abs(value) < 0.6, near, far)


@triton.jit
def sigmoid(value, approximate: tl.constexpr):
    """Return the logistic function in fp32, as exact as `tanh`."""
    return 0.5 * tanh(0.5 * value, approximate) + 0.5


@triton.jit
def sin_pi(value, approximate: tl.constexpr):
    """Return sin(pi x) in fp32, absolute error 5e-7: subtract the nearest even number from x, then take the sine."""
    x = (value - 2.0 * tl.floor(0.5 * value + 0.5)) * PI
    if approximate:
        return tl.inline_asm_elementwise("sin.approx.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return tl.sin(x)


@triton.jit
def exp2(value, approximate: tl.constexpr):
    """Return 2^x in fp32; if `approximate`, subnormal results are 0."""
    if approximate:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [value], tl.float32, True, 1)
    return tl.exp2(value)


@triton.jit
def dynamic_tanh(value, alpha, gamma, beta, approximate: tl.constexpr):
    """Return gamma * tanh(alpha x) + beta in fp16, computed two at a time in fp16 if `approximate`, else in fp32."""
    if approximate:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; mul.rn.f16x2 t, $1, $2; tanh.approx.f16x2 t, t; fma.rn.f16x2 $0, t, $3, $4; }",
            "=r,r,r,r,r", [value, alpha, gamma, beta], tl.float16, True, 2,
        )  # fmt: skip
    bent = tanh(alpha.to(tl.float32) * value.to(tl.float32), False)
    return (gamma.to(tl.float32) * bent + beta.to(tl.float32)).to(tl.float16)


@triton.jit
def rotate(first, second, cosine, sine, approximate: tl.constexpr):
    """Return first * cosine - second * sine in fp16: two at a time if `approximate`, else rounded once from fp32."""
    if approximate:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; mul.rn.f16x2 t, $2, $4; neg.f16x2 t, t; fma.rn.f16x2 $0, $1, $3, t; }",
            "=r,r,r,r,r", [first, second, cosine, sine], tl.float16, True, 2,
        )  # fmt: skip
    rotated = first.to(tl.float32) * cosine.to(tl.float32) - second.to(tl.float32) * sine.to(tl.float32)
    return rotated.to(tl.float16)
