"""Torch modules with the contract of the published graphs, for export and for generation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from diffusers import AutoencoderSAME, StableAudio3DiTModel

BLOCKED = -1e4  # additive mask; representable in fp16 and exp() of it is exactly zero


class DitContract(nn.Module):
    """DiT with six inputs: velocity (B, C, L) from fp32 inputs.

    x (B, C, L), t (B,), t5_hidden (B, S, D), t5_mask (B, S) of 0/1, seconds_total (B,), local_add_cond (B, 1+C, L).
    Padded text positions are replaced by the learned padding embedding before the projection, the duration token is
    appended, and all S + 1 keys are attended: the model's cross-attention has no mask. A row whose t5_hidden and
    t5_mask are all zero is the unconditional row of classifier-free guidance: all of its cross tokens, including the
    duration's, are zero, as in the native model. A negative prompt, even an empty one, has a mask of ones and is not
    such a row.
    """

    def __init__(self, dit: StableAudio3DiTModel, duration: nn.Module) -> None:
        super().__init__()
        self.dit = dit
        self.duration = duration

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        t5_hidden: torch.Tensor,
        t5_mask: torch.Tensor,
        seconds_total: torch.Tensor,
        local_add_cond: torch.Tensor,
    ) -> torch.Tensor:
        seconds = self.duration(seconds_total)
        text = torch.where(t5_mask.unsqueeze(-1) > 0.5, t5_hidden, self.dit.prompt_padding_embedding)
        magnitude = t5_hidden.abs().amax(dim=(1, 2), keepdim=True) + t5_mask.abs().amax(dim=1)[:, None, None]
        conditioned = (magnitude > 0).to(text.dtype)
        context = torch.cat([text, seconds.unsqueeze(1)], dim=1) * conditioned
        velocity: torch.Tensor = self.dit(
            x, t, encoder_hidden_states=context, global_hidden_states=seconds, local_add_cond=local_add_cond,
            return_dict=False,
        )[0]  # fmt: skip
        return velocity


class TextContract(nn.Module):
    """Text encoder: hidden_states (1, S, D) from input_ids and attention_mask (1, S) int64."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden


class DecoderContract(nn.Module):
    """SAME decoder: pcm (1, L * 4096, 2) int32 in 16-bit range from latent (1, C, L).

    Attention reaches |i - j| <= w over segments of w tokens, so that 17 queries attend only to the 51 keys of the
    previous, the same and the next segment: exact, linear in L, and standard ops (the dense mask needs 11.6 GB per
    score tensor at L = 646).
    """

    def __init__(self, autoencoder: AutoencoderSAME) -> None:
        super().__init__()
        remove_weight_norms(autoencoder.decoder)
        self.autoencoder = autoencoder

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        samples = self.waveform(latent).clamp(-1.0, 1.0)
        return torch.round(samples * 32767.0).to(torch.int32).transpose(1, 2)

    def waveform(self, latent: torch.Tensor) -> torch.Tensor:
        """Return samples (1, 2, L * 4096), unclipped, in the order of diffusers' decode."""
        decoder = self.autoencoder.decoder
        hidden = self.autoencoder.bottleneck.decode(latent)
        hidden = decoder.proj(hidden.transpose(1, 2)).transpose(1, 2)
        for block in decoder.blocks:
            hidden = self._resample(block, hidden)
        samples: torch.Tensor = self.autoencoder.patch_embed.decode(hidden)
        return samples

    def _resample(self, block: Any, hidden: torch.Tensor) -> torch.Tensor:
        """Return the output of one resampling block of the decoder: (1, C, T) -> (1, C', T * stride)."""
        frames = hidden.transpose(1, 2).unsqueeze(2)  # (1, T, 1, C)
        batch, count, _, channels = frames.shape
        fresh = block.new_tokens.unsqueeze(0).expand(batch, count, block.stride, channels)
        tokens = windowed(block, torch.cat([frames, fresh], dim=2))
        tokens = tokens[:, :, 1:].reshape(batch, count * block.stride, channels)
        mapped: torch.Tensor = block.mapping(tokens.transpose(1, 2))
        return mapped


class EncoderContract(nn.Module):
    """SAME encoder: latent (1, C, N / 4096) from audio (1, 2, N), N a multiple of 4096.

    Uses the decoder's exact block form: a segment is `stride` patches and the new token that becomes the latent.
    """

    def __init__(self, autoencoder: AutoencoderSAME) -> None:
        super().__init__()
        remove_weight_norms(autoencoder.encoder)
        self.autoencoder = autoencoder

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        encoder = self.autoencoder.encoder
        # patch_embed is not used: it pads to whole patches, and a graph cannot contain its branch on the length.
        patches = audio.unflatten(-1, (-1, self.autoencoder.patch_embed.patch_size))  # (1, 2, T, P)
        hidden = patches.transpose(2, 3).flatten(1, 2)  # (1, 2 P, T)
        for block in encoder.blocks:
            hidden = self._resample(block, hidden)
        latent: torch.Tensor = self.autoencoder.bottleneck.encode(encoder.proj(hidden.transpose(1, 2)).transpose(1, 2))
        return latent

    def _resample(self, block: Any, hidden: torch.Tensor) -> torch.Tensor:
        """Return the output of one resampling block of the encoder: (1, C, T * stride) -> (1, C', T)."""
        frames = block.mapping(hidden).transpose(1, 2).unflatten(1, (-1, block.stride))  # (1, T, stride, C')
        batch, count, _, channels = frames.shape
        fresh = block.new_tokens.unsqueeze(0).expand(batch, count, 1, channels)
        return windowed(block, torch.cat([frames, fresh], dim=2))[:, :, -1].transpose(1, 2)


def windowed(block: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return the output of a resampling block's transformer layers on its segments (1, T, 1 + stride, C).

    The output has the shape of the input.
    """
    count, segment = tokens.shape[1], tokens.shape[2]
    masks = window_masks(count, segment, block.sliding_window, tokens)
    rotary = block.transformers[0].attn.rope(count * segment, tokens.device)
    table = (rotary.cos(), rotary.sin())
    for layer in block.transformers:
        tokens = tokens + local_attention(layer.attn, layer.norm_attn(tokens), table, masks)
        tokens = tokens + layer.ff(layer.norm_ff(tokens))
    return tokens


def window_masks(count: int, segment: int, window: int, like: torch.Tensor) -> torch.Tensor:
    """Return the additive mask (T, 1, segment, (2 window + 1) segment): the band, without positions outside the
    sequence.

    `window` is the half-width in segments; the band's half-width is window * segment tokens.
    """
    reach = window * segment
    query = torch.arange(segment, device=like.device).unsqueeze(1)
    key = torch.arange(-reach, segment + reach, device=like.device).unsqueeze(0)
    band = torch.where((key - query).abs() <= reach, 0.0, BLOCKED)
    inside = functional.pad(like.new_zeros(count), (window, window), value=BLOCKED)
    parts = [inside[shift : shift + count].unsqueeze(1).expand(-1, segment) for shift in range(2 * window + 1)]
    return band.to(like.dtype) + torch.cat(parts, dim=1).unsqueeze(1).unsqueeze(1)


def local_attention(
    attention: Any, hidden: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor], masks: torch.Tensor
) -> torch.Tensor:
    """Return differential attention inside the window: hidden (1, T, S, C) -> the same shape."""
    batch, count, segment, channels = hidden.shape
    window = (masks.shape[-1] // segment - 1) // 2
    groups = attention.to_qkv(hidden).unflatten(-1, (-1, attention.heads, attention.dim_heads))
    if attention.use_differential:
        queries, keys, value = groups[..., 0:2, :, :], groups[..., 2:4, :, :], groups[..., 4, :, :]
    else:
        queries, keys, value = groups[..., 0:1, :, :], groups[..., 1:2, :, :], groups[..., 2, :, :]
    values = neighbours(value.transpose(2, 3), window)  # (1, T, H, 3S, D)
    outputs = []
    for index in range(queries.shape[3]):
        q = rotate(attention.q_norm(queries[..., index, :, :]), table).transpose(2, 3)
        k = neighbours(rotate(attention.k_norm(keys[..., index, :, :]), table).transpose(2, 3), window)
        scores = torch.matmul(q * attention.dim_heads**-0.5, k.transpose(-1, -2)) + masks
        outputs.append(torch.matmul(torch.softmax(scores, dim=-1), values))
    output = outputs[0] - outputs[1] if len(outputs) == 2 else outputs[0]
    merged: torch.Tensor = attention.to_out(output.transpose(2, 3).reshape(batch, count, segment, channels))
    return merged


def rotate(heads: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return heads (1, T, S, H, D) with rotary embedding of the first R channels; table: cos and sin (T * S, R), R <=
    D.
    """
    _, count, segment, _, _ = heads.shape
    cos, sin = (part.view(1, count, segment, 1, -1) for part in table)
    width = cos.shape[-1]
    rotated, unrotated = heads[..., :width], heads[..., width:]
    first, second = rotated.chunk(2, dim=-1)
    swapped = torch.cat([-second, first], dim=-1)
    return torch.cat([rotated * cos + swapped * sin, unrotated], dim=-1)


def neighbours(heads: torch.Tensor, window: int) -> torch.Tensor:
    """Return each segment with its `window` neighbours a side: (1, T, H, S, D) -> (1, T, H, (2 window + 1) S, D)."""
    count = heads.shape[1]
    padded = functional.pad(heads, (0, 0, 0, 0, 0, 0, window, window))
    return torch.cat([padded[:, shift : shift + count] for shift in range(2 * window + 1)], dim=3)


def remove_weight_norms(module: nn.Module) -> None:
    """Fold every weight normalisation into its weight, so that the graph contains plain weights."""
    for child in module.modules():
        if hasattr(child, "weight_g"):
            nn.utils.remove_weight_norm(child)
