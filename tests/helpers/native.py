"""Reference implementation of the native network, written from the checkpoint's key names.

Plain functions over the tensors of model.safetensors; independent of diffusers and of our loading code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch.nn.functional import conv1d, silu, softmax

Weights = Mapping[str, torch.Tensor]
DIT, SAME = "model.model.", "pretransform.model."


def rms(x: torch.Tensor, gamma: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gamma


def fourier(value: torch.Tensor) -> torch.Tensor:
    """Return Fourier features (B, 256) of value (B,) in [0, 1]: 128 frequencies from 0.5 to 10000, log-spaced."""
    ramp = torch.linspace(0.0, 1.0, 128)
    frequencies = torch.exp(ramp * (math.log(10000.0) - math.log(0.5)) + math.log(0.5))
    angles = value[:, None] * frequencies * 2.0 * math.pi
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotate(x: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """Return x (B, H, N, D) with its first 2 * len(inv_freq) channels rotated (rotary embedding)."""
    angles = torch.arange(x.shape[2]).float()[:, None] * inv_freq
    cos, sin = (torch.cat([f, f], dim=-1) for f in (angles.cos(), angles.sin()))
    width = cos.shape[-1]
    rotary, rest = x[..., :width], x[..., width:]
    half = width // 2
    swapped = torch.cat([-rotary[..., half:], rotary[..., :half]], dim=-1)
    return torch.cat([rotary * cos + swapped * sin, rest], dim=-1)


def heads(x: torch.Tensor, width: int = 64) -> torch.Tensor:
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | float = 0.0) -> torch.Tensor:
    return softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + mask, dim=-1) @ v


def mlp(x: torch.Tensor, w: Weights, name: str) -> torch.Tensor:
    first = x @ w[f"{name}.0.weight"].T + w.get(f"{name}.0.bias", 0.0)
    return silu(first) @ w[f"{name}.2.weight"].T + w.get(f"{name}.2.bias", 0.0)


def gated(x: torch.Tensor, w: Weights, name: str, sinusoidal: bool = False) -> torch.Tensor:
    value, gate = (x @ w[f"{name}.ff.0.proj.weight"].T + w[f"{name}.ff.0.proj.bias"]).chunk(2, dim=-1)
    opened = torch.sin(math.pi * gate) if sinusoidal else silu(gate)
    return (value * opened) @ w[f"{name}.ff.2.weight"].T + w[f"{name}.ff.2.bias"]


def velocity(w: Weights, x, t, t5_hidden, t5_mask, seconds_total, local_add_cond, valid=None) -> torch.Tensor:
    """Return the DiT's velocity from the six inputs; all text rows are attended, padded ones are the learned padding.

    `valid` is the number of attended latent frames, None for all; the velocity of the other frames is undefined.
    """
    base = "conditioner.conditioners."
    number = fourier(seconds_total.clamp(0.0, 384.0) / 384.0)
    linear = f"{base}seconds_total.embedder.embedding.1."
    seconds = number @ w[f"{linear}weight"].T + w[f"{linear}bias"]
    text = torch.where(t5_mask[..., None] > 0.5, t5_hidden, w[f"{base}prompt.padding_embedding"])
    context = mlp(torch.cat([text, seconds[:, None]], dim=1), w, f"{DIT}to_cond_embed")
    level = mlp(fourier(t), w, f"{DIT}to_timestep_embed") + mlp(seconds, w, f"{DIT}to_global_embed")
    modulation = mlp(level, w, f"{DIT}transformer.global_cond_embedder")
    x = x + conv1d(x, w[f"{DIT}preprocess_conv.weight"])
    h = x.transpose(1, 2) @ w[f"{DIT}transformer.project_in.weight"].T
    memory = w[f"{DIT}transformer.memory_tokens"]
    h = torch.cat([memory.expand(h.shape[0], -1, -1), h], dim=1)
    unseen = torch.arange(h.shape[1]) >= len(memory) + (x.shape[-1] if valid is None else valid)
    mask = torch.zeros(h.shape[1]).masked_fill(unseen, -math.inf)
    layer = 0
    while f"{DIT}transformer.layers.{layer}.pre_norm.gamma" in w:
        h = dit_layer(w, f"{DIT}transformer.layers.{layer}", h, context, modulation, local_add_cond, len(memory), mask)
        layer += 1
    out = (h[:, len(memory) :] @ w[f"{DIT}transformer.project_out.weight"].T).transpose(1, 2)
    return out + conv1d(out, w[f"{DIT}postprocess_conv.weight"])


def dit_layer(w: Weights, name: str, h, context, modulation, local_add_cond, memory: int, mask) -> torch.Tensor:
    """Return h after one layer: self- and cross-attention, local embedding, feed-forward (eps 1e-5; q, k 1e-6)."""
    parts = (w[f"{name}.to_scale_shift_gate"] + modulation)[:, None].chunk(6, dim=-1)
    scale_a, shift_a, gate_a, scale_f, shift_f, gate_f = parts
    inv_freq = w[f"{DIT}transformer.rotary_pos_emb.inv_freq"]

    def normed(value: torch.Tensor, side: str, kind: str) -> torch.Tensor:
        return rms(heads(value), w[f"{name}.{kind}.{side}_norm.gamma"], 1e-6)

    y = rms(h, w[f"{name}.pre_norm.gamma"], 1e-5) * (1 + scale_a) + shift_a
    q, k, v, q2, k2 = (y @ w[f"{name}.self_attn.to_qkv.weight"].T).chunk(5, dim=-1)
    q, q2 = (rotate(normed(value, "q", "self_attn"), inv_freq) for value in (q, q2))
    k, k2 = (rotate(normed(value, "k", "self_attn"), inv_freq) for value in (k, k2))
    out = attend(q, k, heads(v), mask) - attend(q2, k2, heads(v), mask)
    h = h + out.transpose(1, 2).flatten(2) @ w[f"{name}.self_attn.to_out.weight"].T * torch.sigmoid(1 - gate_a)
    y = rms(h, w[f"{name}.cross_attend_norm.gamma"], 1e-5)
    q, q2 = (y @ w[f"{name}.cross_attn.to_q.weight"].T).chunk(2, dim=-1)
    k, k2, v = (context @ w[f"{name}.cross_attn.to_kv.weight"].T).chunk(3, dim=-1)
    q, q2 = (normed(value, "q", "cross_attn") for value in (q, q2))
    k, k2 = (normed(value, "k", "cross_attn") for value in (k, k2))
    out = attend(q, k, heads(v)) - attend(q2, k2, heads(v))
    h = h + out.transpose(1, 2).flatten(2) @ w[f"{name}.cross_attn.to_out.weight"].T
    local = mlp(local_add_cond.transpose(1, 2), w, f"{name}.to_local_embed")
    h = torch.cat([h[:, :memory], h[:, memory:] + local], dim=1)
    y = rms(h, w[f"{name}.ff_norm.gamma"], 1e-5) * (1 + scale_f) + shift_f
    return h + gated(y, w, f"{name}.ff") * torch.sigmoid(1 - gate_f)


def decode(w: Weights, latent: torch.Tensor, sinusoidal: int) -> torch.Tensor:
    """Return samples (1, 2, L * 4096) of the SAME decoder with a dense window mask. `sinusoidal` as in the config."""
    name = f"{SAME}decoder.layers"
    h = (latent * w[f"{SAME}bottleneck.running_std"]).transpose(1, 2)
    h = h @ w[f"{name}.1.weight"].T + w[f"{name}.1.bias"]
    frames, width = h.shape[1], h.shape[2]
    fresh = w[f"{name}.3.new_tokens"].expand(frames, 16, width)
    h = torch.cat([h[0][:, None], fresh], dim=1).reshape(1, frames * 17, width)
    index = torch.arange(frames * 17)
    mask = torch.where((index[:, None] - index).abs() <= 17, 0.0, -math.inf)
    depth = sum(key.startswith(f"{name}.3.") and key.endswith(".pre_norm.alpha") for key in w)
    for layer in range(depth):
        h = same_layer(w, f"{name}.3.transformers.{layer}", h, mask, (depth - layer) < sinusoidal)
    h = h.reshape(frames, 17, width)[:, 1:].reshape(frames * 16, width)
    v, g = w[f"{name}.3.mapping.weight_v"], w[f"{name}.3.mapping.weight_g"]
    kernel = (g * v / v.flatten(1).norm(dim=1)[:, None, None])[..., 0]
    patches = h @ kernel.T + w[f"{name}.3.mapping.bias"]
    return patches.reshape(frames * 16, 2, 256).permute(1, 0, 2).reshape(1, 2, -1)


def same_layer(w: Weights, name: str, h: torch.Tensor, mask: torch.Tensor, sinusoidal: bool) -> torch.Tensor:
    """Return h after one layer: DyT norms, differential attention in the window, gated feed-forward."""

    def dyt(x: torch.Tensor, prefix: str) -> torch.Tensor:
        return w[f"{prefix}.gamma"] * torch.tanh(w[f"{prefix}.alpha"] * x) + w[f"{prefix}.beta"]

    inv_freq = w[f"{name}.rope.inv_freq"]
    q, k, v, q2, k2 = (dyt(h, f"{name}.pre_norm") @ w[f"{name}.self_attn.to_qkv.weight"].T).chunk(5, dim=-1)
    q, q2 = (rotate(dyt(heads(x), f"{name}.self_attn.q_norm"), inv_freq) for x in (q, q2))
    k, k2 = (rotate(dyt(heads(x), f"{name}.self_attn.k_norm"), inv_freq) for x in (k, k2))
    out = attend(q, k, heads(v), mask) - attend(q2, k2, heads(v), mask)
    h = h + out.transpose(1, 2).flatten(2) @ w[f"{name}.self_attn.to_out.weight"].T
    return h + gated(dyt(h, f"{name}.ff_norm"), w, f"{name}.ff", sinusoidal)
