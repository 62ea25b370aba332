"""A DiT written the way the model's own code is, with the weights of a native checkpoint, to be traced.

Each difference from our export is a convention with a switch: the local embedding padded on the left
by a computed amount, the halves of differential attention stacked on an axis of their own, rows of to_qkv in the native
order, frequencies of the duration that hold 2 pi, a padding embedding that is viewed or expanded, casts everywhere.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from sa3_build.export import load_modules
from sa3_build.export.model_config import load_geometry


@dataclass(frozen=True)
class Conventions:
    """Conventions in which exported graphs differ; the defaults are those of the published graphs."""

    padding: str = "view"  # or "expand": Unsqueeze twice, then Expand
    two_pi: bool = True  # the frequencies of the duration hold 2 pi
    gamma_first: bool = True
    stacked: bool = True  # both halves on an axis of their own through norm and rotation
    left_pad: bool = True  # the local embedding padded by the memory tokens; else joined to zeros
    mask: str = "bool"  # or "greater"
    fp32_duration: bool = True  # a Cast behind the clamp, which the 16-bit surgery takes for an island


PUBLISHED = Conventions()
OTHER = Conventions("expand", two_pi=False, gamma_first=False, mask="greater", fp32_duration=False)


class Norm(nn.Module):
    """RMS norm of Pow, ReduceMean, Add, Sqrt, a division and two products; cast to fp32 if `wide`."""

    def __init__(self, norm: nn.Module, conventions: Conventions, wide: bool) -> None:
        super().__init__()
        self.gamma, self.eps = norm.gamma, norm.eps
        self._first, self._wide = conventions.gamma_first, wide

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gamma = self.gamma.float() if self._wide else self.gamma
        wide = x.float() if self._wide else x
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        result = gamma * scaled if self._first else scaled * gamma
        return result.to(x.dtype) if self._wide else result


class Attention(nn.Module):
    """Self- or cross-attention with weight rows in native order (q, k, v, q2, k2)."""

    def __init__(self, attention: nn.Module, conventions: Conventions) -> None:
        super().__init__()
        names = ("to_qkv", "to_q", "to_kv", "to_out")
        for name in (name for name in names if hasattr(attention, name)):
            setattr(self, name, getattr(attention, name))
        self.q_norm, self.k_norm = (Norm(n, conventions, False) for n in (attention.q_norm, attention.k_norm))
        self._heads, self._halves = attention.heads, 2 if attention.use_differential else 1
        self._stacked = conventions.stacked

    def forward(self, x: torch.Tensor, rotary: torch.Tensor | None, context: torch.Tensor | None) -> torch.Tensor:
        queries, keys, value = self._parts(x, context)
        if self._stacked and self._halves == 2:
            q, k = self._prepared(torch.stack(queries, dim=1), torch.stack(keys, dim=1), value, rotary)
            pairs = list(zip(q.unbind(dim=1), k.unbind(dim=1), strict=True))
        else:
            pairs = [self._prepared(q, k, value, rotary) for q, k in zip(queries, keys, strict=True)]
        attended = [functional.scaled_dot_product_attention(q, k, value, is_causal=False) for q, k in pairs]
        out = attended[0] if len(attended) == 1 else attended[0] - attended[1]
        return self.to_out(out.transpose(1, 2).reshape(out.shape[0], out.shape[2], -1))

    def _parts(self, x: torch.Tensor, context: torch.Tensor | None) -> tuple[list, list, torch.Tensor]:
        if context is None:
            parts = self.to_qkv(x).chunk(2 * self._halves + 1, dim=-1)
            q, k, value, *more = [self._split(part) for part in parts]
            return [q, *more[:1]], [k, *more[1:]], value
        queries = [self._split(part) for part in self.to_q(x).chunk(self._halves, dim=-1)]
        *keys, value = [self._split(part) for part in self.to_kv(context).chunk(self._halves + 1, dim=-1)]
        return queries, keys, value

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(x.shape[0], x.shape[1], self._heads, x.shape[2] // self._heads).transpose(1, 2)

    def _prepared(
        self, q: torch.Tensor, k: torch.Tensor, value: torch.Tensor, rotary: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = self.q_norm(q).to(q.dtype), self.k_norm(k).to(k.dtype)
        if rotary is None:
            return q, k
        q, k, rotary = q.to(torch.float32), k.to(torch.float32), rotary.to(torch.float32)
        ratio = q.shape[-2] / k.shape[-2]
        q, k = rotated(q, rotary), rotated(k, ratio * rotary)
        return q.to(value.dtype), k.to(value.dtype)


def rotated(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Return x with the first half of each head's channels rotated by the last angles, the rest unchanged."""
    angles, wide = angles.to(torch.float32), x.to(torch.float32)
    angles = angles[-wide.shape[-2] :, :]
    rotary, rest = wide[..., : angles.shape[-1]], wide[..., angles.shape[-1] :]
    first, second = rotary.unflatten(-1, (2, -1)).unbind(dim=-2)
    rotary = rotary * angles.cos() * 1 + torch.cat((-second, first), dim=-1) * angles.sin() * 1
    return torch.cat((rotary.to(x.dtype), rest.to(x.dtype)), dim=-1)


class Duration(nn.Module):
    """The duration token: clamp, division by the longest duration, Fourier features, a Linear."""

    def __init__(self, embedder: nn.Module, conventions: Conventions) -> None:
        super().__init__()
        linear = embedder.get_submodule("linear")
        ramp = torch.linspace(0.0, 1.0, linear.in_features // 2)
        frequencies = torch.exp(ramp * (math.log(10000.0) - math.log(0.5)) + math.log(0.5))
        self.register_buffer("frequencies", frequencies * (2.0 * math.pi) if conventions.two_pi else frequencies)
        self.register_buffer("weight", linear.weight.detach())
        self.register_buffer("bias", linear.bias.detach())
        self.conventions, self._longest = conventions, embedder.config.max_val

    def forward(self, seconds: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        share = seconds.clamp(0, self._longest)
        share = share.float() if self.conventions.fp32_duration else share
        angles = ((share - 0) / (self._longest - 0)).unsqueeze(-1) * self.frequencies
        if not self.conventions.two_pi:
            angles = angles * 2 * math.pi
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)
        return functional.linear(waves, self.weight.to(dtype), self.bias.to(dtype)).unsqueeze(1)


class Features(nn.Module):
    """Fourier features of the noise level, with the casts of the native code."""

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.register_buffer("freqs", features.freqs)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        angles = t.float() * self.freqs * 2 * math.pi
        return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1).to(t.dtype)


class PublishedDit(nn.Module):
    """The six-input DiT with the end of the conditioner inside; returns velocity (B, 256, L)."""

    def __init__(self, folder: Path, conventions: Conventions = PUBLISHED) -> None:
        super().__init__()
        geometry = load_geometry(folder / "model_config.json")
        stored = load_modules.NativeWeights(folder / "model.safetensors")
        self.dit = load_modules.load_dit(stored, geometry.dit)
        embedder = load_modules.load_duration_embedder(stored, geometry.conditioner)
        self.duration = Duration(embedder, conventions)
        self.register_buffer("padding", self.dit.prompt_padding_embedding.detach().clone())
        self.conventions = conventions
        self.dit.timestep_features = Features(self.dit.timestep_features)
        for block in self.dit.transformer_blocks:
            if geometry.dit.differential:
                rows = load_modules.ungroup_qkv(block.self_attn.to_qkv.weight.data)
                block.self_attn.to_qkv.weight.data = rows
            block.self_attn, block.cross_attn = (Attention(a, conventions) for a in (block.self_attn, block.cross_attn))
            for name in ("pre_norm", "cross_attend_norm", "ff_norm"):
                setattr(block, name, Norm(getattr(block, name), conventions, True))
        self.eval().requires_grad_(False)

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, t5_hidden: torch.Tensor, t5_mask: torch.Tensor,
        seconds_total: torch.Tensor, local_add_cond: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        text = self._text(t5_hidden, t5_mask)
        token = self.duration(seconds_total, text.dtype)
        return self.velocity(x, t, torch.cat([text, token], dim=1), token.squeeze(1), local_add_cond)

    def velocity(
        self, x: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor, seconds: torch.Tensor, local: torch.Tensor
    ) -> torch.Tensor:
        """Return the velocity for cross-attention tokens (B, 257, 768); zeros give the unconditional branch."""
        dit = self.dit
        context, shared = dit.to_cond_embed(tokens), dit.to_global_embed(seconds)
        local = local.transpose(1, 2)
        shared = shared + dit.to_timestep_embed(dit.timestep_features(t.to(x.dtype)[:, None]))
        x = (dit.preprocess_conv(x) + x).transpose(1, 2)
        x = dit.proj_in(x.to(dit.proj_in.weight.dtype))
        x = torch.cat((dit.memory_tokens.expand(x.shape[0], -1, -1), x), dim=1)
        places = torch.arange(x.shape[1], device=x.device).to(torch.float32) / 1.0
        angles = torch.einsum("i , j -> i j", places, dit.rotary_pos_emb.inv_freq)
        angles, shared = torch.cat((angles, angles), dim=-1), dit.global_cond_embedder(shared)
        for block in dit.transformer_blocks:
            x = self._block(block, x, context, shared, local, angles)
        x = dit.proj_out(x[:, dit.memory_tokens.shape[0] :, :]).transpose(1, 2)
        return dit.postprocess_conv(x) + x

    def _text(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        is_text = mask.unsqueeze(-1).to(torch.bool) if self.conventions.mask == "bool" else mask.unsqueeze(-1) > 0.5
        if self.conventions.padding == "view":
            padding = self.padding.view(1, 1, -1).to(hidden.dtype)
        else:
            padding = self.padding.unsqueeze(0).unsqueeze(0).expand_as(hidden)
        return torch.where(is_text, hidden, padding)

    def _block(
        self, block: nn.Module, x: torch.Tensor, context: torch.Tensor, shared: torch.Tensor, local: torch.Tensor,
        angles: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        parts = (block.to_scale_shift_gate + shared).unsqueeze(1).chunk(6, dim=-1)
        inner = block.pre_norm(x) * (1 + parts[0]) + parts[1]
        x = block.self_attn(inner, angles, None) * torch.sigmoid(1 - parts[2]) + x
        x = x + block.cross_attn(block.cross_attend_norm(x), None, context)
        x = x + self._placed(block.to_local_embed(local), x)
        inner = block.ff_norm(x) * (1 + parts[3]) + parts[4]
        return block.ff(inner) * torch.sigmoid(1 - parts[5]) + x

    def _placed(self, local: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the local embedding at the latent's positions and zeros at those of the memory tokens."""
        if self.conventions.left_pad:
            return functional.pad(local, (0, 0, x.shape[-2] - local.shape[-2], 0), value=0.0)
        return torch.cat([torch.zeros_like(x[:, : self.dit.memory_tokens.shape[0]]), local], dim=1)


def plain_checkpoint(folder: Path, out: Path) -> Path:
    """Copy a native checkpoint without differential attention, like the small DiTs; only the first halves are kept."""
    config = json.loads((folder / "model_config.json").read_text())
    config["model"]["diffusion"]["config"]["attn_kwargs"]["differential"] = False
    out.mkdir(parents=True, exist_ok=True)
    (out / "model_config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        width = tensors[name].shape[-1]
        if name.startswith(load_modules.DIT_PREFIX) and name.endswith(("to_qkv.weight", "to_q.weight")):
            tensors[name] = tensors[name][: (3 if "qkv" in name else 1) * width].contiguous()
        elif name.startswith(load_modules.DIT_PREFIX) and name.endswith("to_kv.weight"):
            tensors[name] = torch.cat([tensors[name][:width], tensors[name][2 * width :]]).contiguous()
    save_file(tensors, out / "model.safetensors")
    return out
