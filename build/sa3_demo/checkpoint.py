"""Write a small native-format checkpoint with seeded random weights and the structure of the real one.

Every file and tensor name is that of `stabilityai/stable-audio-3-medium` (build/FACTS.md, Native checkpoint), at a
width and depth that a CPU runs in seconds. No weight is zero: a layer with a zero weight would hide a missing
conversion, and a quantizer cannot scale it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sa3_build.export import load_modules as native, native_weights
from sa3_build.export.model_config import Geometry, load_geometry
from sa3_build.export.wrappers import DecoderContract, DitContract
from sa3_demo import text_encoder
from sa3_demo.text_encoder import DemoSize
from sa3_trt_core import shapes

TEXT_FOLDER = "t5gemma-b-b-ul2"
TEXT_MODEL = f"google/{TEXT_FOLDER}"  # the only text encoder name that the native package accepts
PATCH = shapes.SAMPLES_PER_FRAME // 16  # samples per channel of one token of the autoencoder
_SECONDS = {"min_val": 0, "max_val": 384, "fourier_features_type": "expo"}
_DIFFUSION = {
    "diffusion_objective": "rf_denoiser",
    "cross_attention_cond_ids": ["prompt", "seconds_total"],
    "global_cond_ids": ["seconds_total"],
    "local_add_cond_ids": ["inpaint_mask", "inpaint_masked_input"],
    "distribution_shift_options": {"min_length": 256, "max_length": shapes.MAX_FRAMES},
    "sampling_distribution_shift_options": None,
    "mask_padding_attention": True,
    "use_effective_length_for_schedule": True,
}
MAX_VOCABULARY = 2000  # tokens of a random checkpoint
TARGET_RMS = 0.15  # of decoded noise; above silence and below clipping


# SA3-medium's own sizes, for checks of memory and time at full size; the vocabulary stays small.
MEDIUM = DemoSize(
    embed_dim=1536, depth=24, num_heads=24, autoencoder_channels=256, autoencoder_depth=12, autoencoder_sinusoidal=8,
    text_layers=12,
)  # fmt: skip


def model_config(size: DemoSize) -> dict[str, Any]:
    """Return the model_config.json of a demo checkpoint, in the native layout.

    Contains every key of a native medium config, so that the native package opens it too. `repo_id` is where that
    package searches the text encoder: a folder, here the checkpoint's own, relative to itself.
    """
    shared = {
        "channels": size.autoencoder_channels,
        "c_mults": [6],
        "strides": [16],
        "latent_dim": shapes.LATENT_CHANNELS,
        "transformer_depths": [size.autoencoder_depth],
        "differential": True,
        "dyt": True,
        "dim_heads": 64,
        "variable_stride": True,
        "sliding_window": [1, 1],
    }
    patched = PATCH * shapes.AUDIO_CHANNELS
    decoder = {"out_channels": patched, "sinusoidal_blocks": [size.autoencoder_sinusoidal], "mask_noise": 0.1}
    bottleneck = {"dim": shapes.LATENT_CHANNELS, "auto_scale": True, "freeze": True}
    bottleneck |= {"noise_augment_dim": 0, "noise_regularize": True}
    autoencoder = {
        "encoder": {"type": "same", "config": {"in_channels": patched, "mask_noise": 0.001, **shared}},
        "decoder": {"type": "same", "config": {**decoder, **shared}},
        "bottleneck": {"type": "softnorm", "config": bottleneck},
        "latent_dim": shapes.LATENT_CHANNELS,
        "downsampling_ratio": shapes.SAMPLES_PER_FRAME,
        "io_channels": shapes.AUDIO_CHANNELS,
        "pretransform": {"type": "patched", "config": {"channels": shapes.AUDIO_CHANNELS, "patch_size": PATCH}},
    }
    prompt = {"model_name": TEXT_MODEL, "repo_id": ".", "subfolder": TEXT_FOLDER, "max_length": shapes.TEXT_TOKENS}
    return {
        "model_type": "diffusion_cond_inpaint",
        "sample_size": shapes.MAX_FRAMES * shapes.SAMPLES_PER_FRAME,
        "sample_rate": shapes.SAMPLE_RATE,
        "audio_channels": shapes.AUDIO_CHANNELS,
        "model": {
            "pretransform": {"type": "autoencoder", "iterate_batch": True, "config": autoencoder},
            "conditioning": {
                "configs": [
                    {"id": "prompt", "type": "t5gemma", "config": {**prompt, "padding_mode": "learned"}},
                    {"id": "seconds_total", "type": "number", "config": _SECONDS},
                ],
                "cond_dim": shapes.TEXT_CHANNELS,
            },
            "diffusion": {"type": "dit", **_DIFFUSION, "config": _dit_config(size)},
            "io_channels": shapes.LATENT_CHANNELS,
        },
    }


def _dit_config(size: DemoSize) -> dict[str, Any]:
    return {
        "io_channels": shapes.LATENT_CHANNELS,
        "embed_dim": size.embed_dim,
        "depth": size.depth,
        "num_heads": size.num_heads,
        "cond_token_dim": shapes.TEXT_CHANNELS,
        "global_cond_dim": shapes.TEXT_CHANNELS,
        "local_add_cond_dim": shapes.LOCAL_CHANNELS,
        "global_cond_type": "adaLN",
        "norm_type": "rms_norm",
        "transformer_type": "continuous_transformer",
        "norm_kwargs": {"force_fp32": True},
        "attn_kwargs": {"qk_norm": "rms", "differential": True},
        "ff_kwargs": {"mult": size.ff_mult},
        "num_memory_tokens": 64,
        "timestep_features_type": "expo",
    }


def write_demo_checkpoint(folder: Path, size: DemoSize, seed: int, vocabulary_texts: Sequence[str]) -> None:
    """Write a complete checkpoint into the existing, empty `folder`.

    Equal size, seed and texts give equal bytes. The last layers are scaled so that noise gives a velocity of unit RMS
    and samples at `TARGET_RMS`.
    """
    from safetensors.torch import save_file

    config_file = folder / native.CONFIG_FILE
    config_file.write_text(json.dumps(model_config(size), indent=2) + "\n")
    geometry = load_geometry(config_file)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = _native_state(geometry)
        text_folder = folder / geometry.conditioner.text_folder
        vocabulary = text_encoder.write_tokenizer(text_folder, vocabulary_texts, MAX_VOCABULARY)
        text_encoder.write_text_model(text_folder, text_encoder.random_text_model(size, vocabulary))
    save_file(state, str(folder / native_weights.WEIGHTS_FILE))


def _native_state(geometry: Geometry) -> dict[str, torch.Tensor]:
    dit = native.build_dit(geometry.dit).to_empty(device="cpu")
    dit.timestep_features = native.TimestepFourier(256, 0.5, 10000.0)
    dit.rotary_pos_emb = type(dit.rotary_pos_emb)(geometry.dit.embed_dim // geometry.dit.num_heads // 2)
    duration = native.build_duration_embedder(geometry.conditioner)
    autoencoder = native.build_autoencoder(geometry.autoencoder)
    for module in (dit, duration, autoencoder):
        _randomise(module)
    autoencoder.bottleneck.running_std.fill_(1.0)
    state = dict(native_tensors(dit, duration, autoencoder, geometry))
    _scale_outputs(state, dit, duration, autoencoder)
    return state


def native_tensors(
    dit: nn.Module, duration: nn.Module, autoencoder: Any, geometry: Geometry
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of a native model.safetensors, by its native name, from the diffusers modules."""
    levels = len(geometry.autoencoder.strides)
    for key, tensor in dit.state_dict().items():
        yield native.native_dit_key(key), _native_layout(key, tensor)
    for key, tensor in autoencoder.state_dict().items():
        yield native.native_autoencoder_key(key, levels), _native_layout(key, tensor)
    for key in ("weight", "bias"):
        yield native.DURATION_PREFIX + key, duration.state_dict()[f"linear.{key}"].clone()
    # Tensors that the native file contains and diffusers derives.
    frequencies = autoencoder.encoder.blocks[0].transformers[0].attn.rope.inv_freq
    for side, first in (("encoder", 0), ("decoder", 3)):
        for level, depth in enumerate(geometry.autoencoder.depths):
            for layer in range(depth):
                base = f"{native.AUTOENCODER_PREFIX}{side}.layers.{first + level}.transformers.{layer}"
                yield f"{base}.rope.inv_freq", frequencies.clone()
    yield f"{native.AUTOENCODER_PREFIX}bottleneck.noise_scaling_factor", torch.empty(1, 0, 1)


def _native_layout(key: str, tensor: torch.Tensor) -> torch.Tensor:
    return native.ungroup_qkv(tensor) if key.endswith(".to_qkv.weight") else tensor


@torch.no_grad()
def _randomise(module: nn.Module) -> None:
    """Set every tensor but the rotary frequencies to seeded values: matrices at 1/sqrt(fan in), norms around one."""
    for key, tensor in module.state_dict().items():
        name = key.rsplit(".", 1)[-1]
        if name in ("inv_freq", "freqs"):
            continue
        if name in ("gamma", "scale", "weight_g", "running_std"):
            tensor.normal_(1.0, 0.1)
        elif name == "alpha":
            tensor.normal_(0.7, 0.05)
        elif name in ("bias", "beta"):
            tensor.normal_(0.0, 0.05)
        elif name in ("to_scale_shift_gate", "prompt_padding_embedding", "memory_tokens", "new_tokens"):
            tensor.normal_(0.0, 0.5)
        else:
            tensor.normal_(0.0, tensor[0].numel() ** -0.5)


@torch.no_grad()
def _scale_outputs(state: dict[str, torch.Tensor], dit: Any, duration: nn.Module, autoencoder: Any) -> None:
    """Rescale the last matrix of the DiT and the last gain of the decoder by the output of one forward of noise."""
    frames, width = 32, shapes.TEXT_CHANNELS
    latent = torch.randn(1, shapes.LATENT_CHANNELS, frames)
    text = torch.randn(1, shapes.TEXT_TOKENS, width)
    velocity = DitContract(dit.eval(), duration)(
        latent, torch.tensor([0.5]), text, torch.ones(1, shapes.TEXT_TOKENS), torch.tensor([30.0]),
        torch.zeros(1, shapes.LOCAL_CHANNELS, frames),
    )  # fmt: skip
    state[f"{native.DIT_PREFIX}transformer.project_out.weight"] /= velocity.std()
    gain = f"{native.AUTOENCODER_PREFIX}decoder.layers.3.mapping.weight_g"
    samples = DecoderContract(autoencoder).waveform(latent)
    scale = TARGET_RMS / samples.square().mean().sqrt()
    state[gain] *= scale
    state[gain.replace("weight_g", "bias")] *= scale
