"""Load a native Stable Audio 3 folder into the diffusers modules, strictly and in fp32.

Native and diffusers names differ; the tables below are the complete mapping (build/FACTS.md, Native checkpoint: 522 +
472 + 3 tensors, in both directions). A tensor that is unexpected, missing or of another shape is a ToolError with its
native key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from sa3_build.export.model_config import AutoencoderGeometry, ConditionerGeometry, DitGeometry, Geometry
from sa3_build.export.native_weights import (
    AUTOENCODER_PREFIX,
    CONDITIONER_PREFIX,
    DIT_PREFIX,
    NativeWeights,
)
from sa3_build.export.text_encoder import quiet_transformers

if TYPE_CHECKING:
    from diffusers import AutoencoderSAME, StableAudio3DiTModel

CONFIG_FILE = "model_config.json"
TRUNK_NORM_EPS = 1e-5  # diffusers uses 1e-6 here (error 7e-5 in the output); q/k norms are 1e-6 in both

PADDING_KEY = "conditioner.conditioners.prompt.padding_embedding"
DURATION_PREFIX = "conditioner.conditioners.seconds_total.embedder.embedding.1."

_BLOCK_NAMES = ((".ff.proj_in.", ".ff.ff.0.proj."), (".ff.proj_out.", ".ff.ff.2."))
_DIT_NAMES = (
    ("transformer_blocks.", "transformer.layers."),
    ("proj_in.", "transformer.project_in."),
    ("proj_out.", "transformer.project_out."),
    ("memory_tokens", "transformer.memory_tokens"),
    ("rotary_pos_emb.", "transformer.rotary_pos_emb."),
    ("global_cond_embedder.", "transformer.global_cond_embedder."),
)
_SAME_NAMES = (
    (".attn.", ".self_attn."),
    (".norm_attn.", ".pre_norm."),
    (".norm_ff.", ".ff_norm."),
    ("bottleneck.scale", "bottleneck.scaling_factor"),
)


def native_dit_key(key: str) -> str:
    """Return the native name of a tensor of `StableAudio3DiTModel`."""
    if key == "prompt_padding_embedding":
        return PADDING_KEY
    for diffusers_name, native in _DIT_NAMES:
        if key.startswith(diffusers_name):
            key = native + key[len(diffusers_name) :]
            break
    return DIT_PREFIX + _replace(key, _BLOCK_NAMES)


def native_autoencoder_key(key: str, levels: int) -> str:
    """Return the native name of a tensor of `AutoencoderSAME` with `levels` resampling blocks per side.

    Natively the encoder is [block] * levels, Transpose, Linear; the decoder is Transpose, Linear, Transpose, [block] *
    levels, all in one list `layers`.
    """
    side, _, rest = key.partition(".")
    if side in ("encoder", "decoder"):
        part, _, rest = rest.partition(".")
        if part == "proj":
            key = f"{side}.layers.{levels + 1 if side == 'encoder' else 1}.{rest}"
        else:
            index, _, rest = rest.partition(".")
            key = f"{side}.layers.{int(index) + (0 if side == 'encoder' else 3)}.{rest}"
    return AUTOENCODER_PREFIX + _replace(key, _BLOCK_NAMES + _SAME_NAMES)


def regroup_qkv(weight: torch.Tensor) -> torch.Tensor:
    """Convert the native row groups q|k|v|q2|k2 of a differential `to_qkv` (5E, E) to diffusers' q|q2|k|k2|v."""
    q, k, v, q2, k2 = weight.chunk(5, dim=0)
    return torch.cat([q, q2, k, k2, v], dim=0)


def ungroup_qkv(weight: torch.Tensor) -> torch.Tensor:
    """Return the inverse of `regroup_qkv`, for writing a native checkpoint."""
    q, q2, k, k2, v = weight.chunk(5, dim=0)
    return torch.cat([q, k, v, q2, k2], dim=0)


class TimestepFourier(nn.Module):
    """Fourier features of the noise level with their frequencies stored in a buffer.

    diffusers computes exp(linspace) in the forward pass. An exporter folds it into a constant with an error of 1e-6,
    which at frequency 10000 causes 2.7e-3 in the velocity. t (B, 1) -> (B, dim), fp32.
    """

    freqs: torch.Tensor

    def __init__(self, dim: int, min_freq: float, max_freq: float) -> None:
        super().__init__()
        ramp = torch.linspace(0.0, 1.0, dim // 2, dtype=torch.float32)
        low, high = math.log(min_freq), math.log(max_freq)
        self.register_buffer("freqs", torch.exp(ramp * (high - low) + low), persistent=False)

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        angles = timestep.reshape(-1, 1).float() * self.freqs * 2.0 * math.pi
        return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def build_dit(geometry: DitGeometry) -> StableAudio3DiTModel:
    """Return an uninitialised DiT (tensors on the meta device) with native norms and exact timestep features."""
    from diffusers import StableAudio3DiTModel

    with torch.device("meta"):
        dit = StableAudio3DiTModel(
            io_channels=geometry.io_channels,
            embed_dim=geometry.embed_dim,
            depth=geometry.depth,
            num_heads=geometry.num_heads,
            cond_token_dim=geometry.cond_token_dim,
            global_cond_dim=geometry.global_cond_dim,
            local_add_cond_dim=geometry.local_add_cond_dim,
            ff_mult=geometry.ff_mult,
            num_memory_tokens=geometry.num_memory_tokens,
            use_differential_attention=geometry.differential,
        )
    use_native_numerics(dit)
    return dit.eval()


def use_native_numerics(dit: StableAudio3DiTModel) -> None:
    """Set the native eps of a DiT's trunk norms and exact timestep frequencies."""
    features = dit.timestep_features
    dit.timestep_features = TimestepFourier(features.dim, features.min_freq, features.max_freq)
    for block in dit.transformer_blocks:
        for norm in (block.pre_norm, block.cross_attend_norm, block.ff_norm):
            norm.eps = TRUNK_NORM_EPS


def build_autoencoder(geometry: AutoencoderGeometry) -> AutoencoderSAME:
    """Return an autoencoder of this geometry with diffusers' initial values."""
    from diffusers import AutoencoderSAME

    with quiet_transformers():  # it uses PyTorch's deprecated weight normalisation
        autoencoder = AutoencoderSAME(
            audio_channels=geometry.audio_channels,
            patch_size=geometry.patch_size,
            encoder_channels=geometry.channels,
            encoder_c_mults=list(geometry.c_mults),
            encoder_strides=list(geometry.strides),
            encoder_transformer_depths=list(geometry.depths),
            latent_dim=geometry.latent_dim,
            use_differential_attention=geometry.differential,
            dim_heads=geometry.dim_heads,
            sliding_window=geometry.sliding_window,
            encoder_sinusoidal_blocks=list(geometry.encoder_sinusoidal),
            decoder_sinusoidal_blocks=list(geometry.decoder_sinusoidal),
            sampling_rate=geometry.sample_rate,
        )
    return autoencoder.eval()


def build_duration_embedder(geometry: ConditionerGeometry) -> nn.Module:
    """Return the module that maps seconds (B,) to the duration token and global vector (B, cond_dim)."""
    from diffusers.pipelines.stable_audio_3.modeling_stable_audio_3 import StableAudio3DurationEmbedder

    embedder: nn.Module = StableAudio3DurationEmbedder(
        output_dim=geometry.cond_dim, min_val=geometry.seconds_min, max_val=geometry.seconds_max
    )
    return embedder.eval()


def check(weights: NativeWeights, geometry: Geometry) -> None:
    """Compare the complete file with its config by names and shapes, before anything is loaded or written.

    Raises ToolError naming the first tensor that is missing, has another shape, or is unexpected.
    """
    with torch.device("meta"):
        autoencoder = build_autoencoder(geometry.autoencoder)
    levels = len(geometry.autoencoder.strides)
    used = {native_autoencoder_key(key, levels): value.shape for key, value in autoencoder.state_dict().items()}
    used |= {native_dit_key(key): value.shape for key, value in build_dit(geometry.dit).state_dict().items()}
    linear = build_duration_embedder(geometry.conditioner).get_submodule("linear")
    used |= {DURATION_PREFIX + key: value.shape for key, value in linear.state_dict().items()}
    for key, shape in used.items():
        weights.require(key, shape)
    weights.refuse_leftovers("", used)


def load_dit(weights: NativeWeights, geometry: DitGeometry) -> StableAudio3DiTModel:
    """Return the DiT with the checkpoint's weights, fp32; strict in both directions."""
    dit = build_dit(geometry)
    fill(dit, weights, native_dit_key, geometry.differential)
    weights.refuse_leftovers(DIT_PREFIX, map(native_dit_key, dit.state_dict()))
    return dit


def load_autoencoder(weights: NativeWeights, geometry: AutoencoderGeometry) -> AutoencoderSAME:
    """Return the SAME autoencoder with the checkpoint's weights, fp32; strict in both directions."""
    autoencoder = build_autoencoder(geometry)
    levels = len(geometry.strides)

    def name(key: str) -> str:
        return native_autoencoder_key(key, levels)

    fill(autoencoder, weights, name, geometry.differential)
    weights.refuse_leftovers(AUTOENCODER_PREFIX, map(name, autoencoder.state_dict()))
    return autoencoder


def load_duration_embedder(weights: NativeWeights, geometry: ConditionerGeometry) -> nn.Module:
    """Return the duration embedder with the checkpoint's weights, fp32; its frequencies are computed, not stored."""
    embedder = build_duration_embedder(geometry)
    linear = embedder.get_submodule("linear")
    fill(linear, weights, lambda key: DURATION_PREFIX + key, differential=False)
    weights.refuse_leftovers(CONDITIONER_PREFIX, [PADDING_KEY, *(DURATION_PREFIX + key for key in linear.state_dict())])
    return embedder


def fill(module: nn.Module, weights: NativeWeights, name: Callable[[str], str], differential: bool) -> None:
    """Set every tensor of `module` to the native tensor called `name(key)`."""
    state = {}
    for key, placeholder in module.state_dict().items():
        regrouped = differential and key.endswith(".to_qkv.weight")
        native, shape = name(key), placeholder.shape
        state[key] = regroup_qkv(weights.copy(native, shape)) if regrouped else weights.take(native, shape)
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False)


def _replace(key: str, names: Iterable[tuple[str, str]]) -> str:
    for diffusers_name, native in names:
        key = key.replace(diffusers_name, native)
    return key
