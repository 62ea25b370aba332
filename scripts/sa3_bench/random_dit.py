"""Make one random DiT in two forms: diffusers' module, and its packed weights for our engine."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sa3_trt_core.number_formats import E4M3_MAX
from sa3_trt_core.shapes import LATENT_CHANNELS, LOCAL_CHANNELS, MAX_FRAMES, TEXT_CHANNELS
from sa3_trt_core.torch_models.dit.weights import HEAD_CHANNELS, Packed, Sizes

WAVES = 128  # frequencies of t and of the duration
ACTIVATION_AMAX = 8.0  # of every quantised activation: enough for weights of unit gain, with headroom
TILE = 16
DIFFUSERS_EPSILON = 1e-6
SECONDS_RANGE = 384.0
QUANTISED = ("self_qkv", "self_out", "cross_q", "cross_kv", "cross_out", "ff_in", "ff_out")
PRODUCTS = {
    "self_qkv": "self_attn.to_qkv", "self_out": "self_attn.to_out", "cross_q": "cross_attn.to_q",
    "cross_kv": "cross_attn.to_kv", "cross_out": "cross_attn.to_out", "ff_in": "ff.proj_in", "ff_out": "ff.proj_out",
    "local_in": "to_local_embed.0", "local_out": "to_local_embed.2",
}  # fmt: skip
NORMS = {
    "self_norm": "pre_norm", "cross_norm": "cross_attend_norm", "ff_norm": "ff_norm",
    "self_q_norm": "self_attn.q_norm", "self_k_norm": "self_attn.k_norm", "cross_q_norm": "cross_attn.q_norm",
    "cross_k_norm": "cross_attn.k_norm",
}  # fmt: skip
MEDIUM = (1536, 24, 24, 4.0)  # width, depth, heads, feed-forward multiple
SMALL = (128, 2, 2, 2.0)  # for a machine without a GPU


def random_module(geometry: tuple[int, int, int, float], device: torch.device, seed: int = 0) -> Any:
    """Return diffusers' DiT in fp32 with weights of unit gain from one seed: a linear keeps about its input's scale.

    The last linear layer of a branch gets a third of that, so that the residual does not explode over 24 blocks.
    """
    from diffusers import StableAudio3DiTModel

    width, depth, heads, multiple = geometry
    with torch.device(device):
        module = StableAudio3DiTModel(embed_dim=width, depth=depth, num_heads=heads, ff_mult=multiple)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, part in module.named_modules():
            if isinstance(part, nn.Linear | nn.Conv1d):
                gain = 1 / 3 if name.endswith(("to_out", "proj_out", "to_local_embed.2", "process_conv")) else 1.0
                part.weight.normal_(0.0, gain / math.sqrt(part.weight.shape[1]), generator=generator)
                if part.bias is not None:
                    part.bias.normal_(0.0, 0.1, generator=generator)
        for name, value in module.named_parameters():
            if name.endswith("gamma"):
                value.normal_(1.0, 0.1, generator=generator)
    return module.eval().requires_grad_(False)


def packed_of(module: Any, precision: str) -> Packed:
    """Return the packed weights of a module of `random_module`, with a random duration embedding (fp8 or fp16mixed)."""
    blocks = module.transformer_blocks
    width = module.proj_in.weight.shape[0]
    sizes = Sizes(
        width=width, depth=len(blocks), heads=width // HEAD_CHANNELS,
        inner=blocks[0].ff.proj_out.weight.shape[1], memory=module.memory_tokens.shape[0],
        norm_epsilon=DIFFUSERS_EPSILON, head_epsilon=DIFFUSERS_EPSILON, seconds_range=SECONDS_RANGE, null_rows=True,
        precision=precision,
    )  # fmt: skip
    tensors = _front(module)
    fp8 = precision == "fp8"
    for name, part in (("input", module.proj_in), ("output", module.proj_out)):
        tensors.update(_product(name, part, False))
    for name, part in (("context_in", module.to_cond_embed[0]), ("context_out", module.to_cond_embed[2])):
        tensors.update(_product(name, part, fp8))
    for index, block in enumerate(blocks):
        for name, path in PRODUCTS.items():
            tensors.update(_product(f"blocks.{index}.{name}", block.get_submodule(path), fp8 and name in QUANTISED))
        for name, path in NORMS.items():
            tensors[f"blocks.{index}.{name}"] = block.get_submodule(path).gamma.float()
        tensors[f"blocks.{index}.modulation"] = block.to_scale_shift_gate.float()
    return Packed(sizes, tensors)


def duration_token(packed: Packed, seconds: Tensor) -> Tensor:
    """Return the duration token (B, 768) of a packed DiT, for a module that takes it as an input."""
    from sa3_trt_core.torch_models.dit.embeddings import Front

    return Front(packed).duration(seconds)


def _front(module: Any) -> dict[str, Tensor]:
    device = module.proj_in.weight.device
    generator = torch.Generator(device).manual_seed(1)
    tensors = {
        "padding": module.prompt_padding_embedding.float(),
        "memory": module.memory_tokens.half(),
        "preprocess": module.preprocess_conv.weight.float().squeeze(-1),
        "postprocess": module.postprocess_conv.weight.float().squeeze(-1),
        "seconds.weight": torch.randn(TEXT_CHANNELS, 2 * WAVES, generator=generator, device=device) / 16,
        "seconds.bias": torch.zeros(TEXT_CHANNELS, device=device),
    }
    for packed_name, module_name in (
        ("time", "to_timestep_embed"),
        ("global", "to_global_embed"),
        ("modulation", "global_cond_embedder"),
    ):
        for layer in (0, 2):
            part = module.get_submodule(f"{module_name}.{layer}")
            tensors[f"{packed_name}.{layer}.weight"] = part.weight.float()
            if part.bias is not None:
                tensors[f"{packed_name}.{layer}.bias"] = part.bias.float()
    ramp = torch.linspace(0.0, 1.0, WAVES, device=device)
    low, high = math.log(0.5), math.log(10000.0)
    tensors["time.frequencies"] = tensors["seconds.frequencies"] = torch.exp(ramp * (high - low) + low)
    angles = module.rotary_pos_emb(MAX_FRAMES + module.memory_tokens.shape[0], device)
    tensors.update(cosine=angles.cos(), sine=angles.sin())
    return tensors


def _product(name: str, part: nn.Linear, quantised: bool) -> dict[str, Tensor]:
    weight = part.weight.float()
    tensors = {} if part.bias is None else {f"{name}.bias": part.bias.float()}
    if not quantised:
        short = -weight.shape[1] % TILE
        tensors[f"{name}.weight"] = nn.functional.pad(weight, (0, short)).half()
        return tensors
    scale = weight.abs().amax(dim=1) / E4M3_MAX
    tensors[f"{name}.weight"] = (weight / scale[:, None]).to(torch.float8_e4m3fn)
    tensors[f"{name}.weight_scale"] = scale
    tensors[f"{name}.activation_scale"] = torch.tensor(ACTIVATION_AMAX / E4M3_MAX)
    return tensors


def random_inputs(rows: int, frames: int, device: torch.device, seed: int, inpaint: bool = False) -> dict[str, Tensor]:
    """Return the six inputs of a batch with a noise level per row; local_add_cond is zero unless in-painting."""
    from sa3_trt_core.sampling import schedule

    generator = torch.Generator("cpu").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    local = torch.zeros(rows, LOCAL_CHANNELS, frames)
    if inpaint:
        local[:, :1] = (torch.arange(frames) % 64 < 32).float()
        local[:, 1:] = normal(rows, LATENT_CHANNELS, frames) * local[:, :1]
    levels = schedule.sigmas(8)[:-1].repeat(1 + rows // 8)[:rows]
    mask = (torch.arange(256)[None, :] < 48).float().expand(rows, -1)
    inputs = {
        "x": normal(rows, LATENT_CHANNELS, frames), "t": levels, "t5_hidden": 0.3 * normal(rows, 256, TEXT_CHANNELS),
        "t5_mask": mask, "seconds_total": torch.full((rows,), 54.0), "local_add_cond": local,
    }  # fmt: skip
    return {name: value.to(device).contiguous() for name, value in inputs.items()}
