"""Make a random SAME autoencoder and text encoder in two forms: diffusers' module, and its packed weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sa3_trt_core.torch_models.same.weights import HEAD_CHANNELS, Packed, Sizes, paired, quantized
from sa3_trt_core.torch_models.t5gemma import weights as text_weights

MEDIUM = {"encoder_channels": 256, "encoder_transformer_depths": [12], "decoder_sinusoidal_blocks": [8]}
SMALL = {"encoder_channels": 32, "encoder_transformer_depths": [2], "decoder_sinusoidal_blocks": [2]}
BRANCH_GAIN = 1 / 3  # of the last linear layer of a branch: the residual must not explode over the layers
OUTPUT_GAIN = 0.05  # of the last linear layer: samples stay below full scale


def random_autoencoder(sizes: dict[str, Any], device: torch.device, seed: int = 0) -> Any:
    """Return diffusers' SAME autoencoder in fp32 with random weights of unit gain, weight normalisation removed."""
    import warnings

    from diffusers import AutoencoderSAME

    with warnings.catch_warnings(), torch.device(device):
        warnings.simplefilter("ignore")
        module = AutoencoderSAME(**sizes)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            if hasattr(part, "weight_g"):
                nn.utils.remove_weight_norm(part)
        for name, part in module.named_modules():
            if isinstance(part, nn.Linear | nn.Conv1d):
                gain = BRANCH_GAIN if name.endswith(("to_out", "proj_out")) else 1.0
                gain = OUTPUT_GAIN if name.endswith("mapping") and "decoder" in name else gain
                part.weight.normal_(0.0, gain / math.sqrt(part.weight.shape[1]), generator=generator)
                if part.bias is not None:
                    part.bias.normal_(0.0, 0.02, generator=generator)
        for name, value in module.named_parameters():
            if name.endswith("alpha"):
                value.fill_(0.7)
            elif name.endswith("gamma"):
                value.normal_(1.0, 0.1, generator=generator)
            elif name.endswith(("beta", "new_tokens")):
                value.normal_(0.0, 0.1, generator=generator)
    return module.eval().requires_grad_(False)


def packed_decoder(module: Any, precision: str) -> Packed:
    """Return the packed decoder of a module of `random_autoencoder`; `precision` fp16 or fp8."""
    (block,) = module.decoder.blocks
    width, inner = block.in_channels, block.transformers[0].ff.proj_out.weight.shape[1]
    turn = torch.tensor(paired(), device=block.new_tokens.device)
    tensors: dict[str, Tensor] = {
        "token": block.new_tokens.reshape(-1).half(), "rates": block.transformers[0].attn.rope.inv_freq.float(),
        "input.weight": (module.decoder.proj.weight * module.bottleneck.running_std).half(),
        "input.bias": module.decoder.proj.bias.float(), "output.weight": block.mapping.weight.squeeze(-1).half(),
        "output.bias": block.mapping.bias.float(),
    }  # fmt: skip
    for index, layer in enumerate(block.transformers):
        base = f"layers.{index}"
        norms = {"attention_norm": layer.norm_attn, "feed_forward_norm": layer.norm_ff,
                 "q_norm": layer.attn.q_norm, "k_norm": layer.attn.k_norm}  # fmt: skip
        for name, norm in norms.items():
            order = turn if name in ("q_norm", "k_norm") else slice(None)
            tensors[f"{base}.{name}.alpha"] = norm.alpha.float()
            tensors[f"{base}.{name}.gamma"] = norm.gamma[order].float()
            tensors[f"{base}.{name}.beta"] = norm.beta[order].float()
        parts = layer.attn.to_qkv.weight.reshape(5, -1, HEAD_CHANNELS, width)
        parts = torch.cat([parts[:4][:, :, turn], parts[4:]]).reshape(-1, width)
        products = {"qkv": parts, "attention_out": layer.attn.to_out.weight, "ff_in": layer.ff.proj_in.weight,
                    "ff_out": layer.ff.proj_out.weight}  # fmt: skip
        tensors.update({f"{base}.{name}.weight": weight.half().contiguous() for name, weight in products.items()})
        tensors[f"{base}.ff_in.bias"] = layer.ff.proj_in.bias.float()
        tensors[f"{base}.ff_out.bias"] = layer.ff.proj_out.bias.float()
    sizes = Sizes(
        kind="decoder", width=width, depth=len(block.transformers), heads=width // HEAD_CHANNELS, inner=inner,
        stride=block.stride, reach=block.sliding_window * (block.stride + 1), patch=module.patch_embed.patch_size,
        latent_channels=module.decoder.proj.weight.shape[1], precision="fp16",
        sinusoidal=tuple(index for index, layer in enumerate(block.transformers) if layer.ff.sinusoidal),
    )  # fmt: skip
    return Packed(*quantized(sizes, tensors)) if precision == "fp8" else Packed(sizes, tensors)


def random_text_encoder(depth: int, device: torch.device, vocabulary: int = 256_000) -> text_weights.Packed:
    """Return a packed text encoder of T5Gemma b-b-ul2's sizes at a depth, with random weights."""
    sizes = text_weights.Sizes(
        width=768, depth=depth, heads=12, key_heads=12, head_channels=64, inner=2048, tokens=256, vocabulary=vocabulary,
        epsilon=1e-6, embedding_scale=768**0.5, score_scale=1 / 800, score_cap=50.0,
    )  # fmt: skip
    generator = torch.Generator(device).manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device) / math.sqrt(shape[-1])

    angles = torch.outer(torch.arange(256.0), 10000 ** -(torch.arange(0, 64, 2).float() / 64)).repeat(1, 2).to(device)
    tensors = {"cosine": angles.cos(), "sine": angles.sin(), "norm": torch.ones(768, device=device)}
    shapes = {"qkv": (3 * 768, 768), "out": (768, 768), "gate_up": (2 * 2048, 768), "down": (768, 2048)}
    for index in range(depth):
        tensors.update({f"layers.{index}.{name}.weight": normal(*shape).bfloat16() for name, shape in shapes.items()})
        for name in text_weights.NORMS:
            tensors[f"layers.{index}.{name}.norm"] = torch.ones(768, device=device)
    table = torch.randn((vocabulary, 768), generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    return text_weights.Packed(sizes, tensors, table)
