"""Encode samples to latents and decode latents to samples; mute padding and cut to the requested length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sa3_trt_core.audio.tiling import chunks
from sa3_trt_core.audio.waveform import as_float
from sa3_trt_core.engines.base import require_output
from sa3_trt_core.errors import ToolError
from sa3_trt_core.shapes import (
    AUDIO_CHANNELS,
    LATENT_CHANNELS,
    MIN_CODEC_FRAMES,
    SAMPLES_PER_FRAME,
    frames_before,
    output_samples,
    valid_frames,
)

if TYPE_CHECKING:
    from torch import Tensor

    from sa3_trt_core.engines.base import GraphEngine

LIMITER_CEILING = 1.0  # value of an input of some builds, which at 1 has no effect below full scale


def encode(engine: GraphEngine, audio: Tensor, chunk: int = 0) -> Tensor:
    """Return latents (1, 256, L) fp32 of samples (2, L * 4096), in windows of `chunk` frames (0: in one piece).

    Fewer than 32 frames are padded with silence to the encoder's minimum length and cropped. Raises ToolError.
    """
    import torch

    frames = audio.shape[-1] // SAMPLES_PER_FRAME
    latents = torch.empty(1, LATENT_CHANNELS, frames)
    for part in chunks(frames, 0 if engine.takes_rows else chunk):
        encoded = _encode(engine, audio[:, part.start * SAMPLES_PER_FRAME : part.stop * SAMPLES_PER_FRAME])
        latents[..., part.first : part.last] = encoded[..., part.first - part.start : part.last - part.start]
    return latents


def _encode(engine: GraphEngine, audio: Tensor) -> Tensor:
    import torch
    from torch.nn import functional

    missing = max(0, MIN_CODEC_FRAMES * SAMPLES_PER_FRAME - audio.shape[-1])
    latents = require_output(engine.run({"audio": functional.pad(audio, (0, missing)).unsqueeze(0)}), "latent").float()
    if not bool(torch.isfinite(latents).all()):
        raise ToolError("the audio encoder gave values that are not finite", "build it again, or export it in fp32")
    return latents


def is_clipped(engine: GraphEngine) -> bool:
    """Return True if a decoder clips its samples to full scale itself."""
    return "pcm" in engine.output_names and "limiter_ceiling" not in engine.input_names


def decode(engine: GraphEngine, latents: Tensor, chunk: int = 0) -> Tensor:
    """Return fp32 samples (L*4096, 2) of latents (1, 256, L), in windows of `chunk` frames (0: in one piece).

    Full scale is 1. `pcm` is int32 (1, L*4096, 2) in 16-bit steps, as a rule clipped already; `audio` is float
    (1, 2, L*4096), possibly beyond full scale. Fewer than 32 frames are padded with zeros to the decoder's minimum
    length and cropped.
    Raises ToolError.
    """
    return as_float(decode_rows(engine, latents, chunk)[0])


def decode_rows(engine: GraphEngine, latents: Tensor, chunk: int = 0) -> list[Tensor]:
    """Return the samples (L*4096, 2) of each row of latents (R, 256, L), in one run where the engine takes rows.

    int16 in full scale 32767 where the engine gives that, else fp32 as of `decode`. Raises ToolError.
    """
    if engine.takes_rows:
        return list(_decode(engine, latents)[:, : latents.shape[-1] * SAMPLES_PER_FRAME])
    return [_decode_row(engine, latents[row : row + 1], chunk) for row in range(latents.shape[0])]


def _decode_row(engine: GraphEngine, latents: Tensor, chunk: int) -> Tensor:
    import torch

    frames = latents.shape[-1]
    samples = torch.empty(frames * SAMPLES_PER_FRAME, AUDIO_CHANNELS)
    for part in chunks(frames, chunk):
        decoded = as_float(_decode(engine, latents[..., part.start : part.stop].contiguous())[0])
        kept = slice((part.first - part.start) * SAMPLES_PER_FRAME, (part.last - part.start) * SAMPLES_PER_FRAME)
        samples[part.first * SAMPLES_PER_FRAME : part.last * SAMPLES_PER_FRAME] = decoded[kept]
    return samples


def _decode(engine: GraphEngine, latents: Tensor) -> Tensor:
    """Return samples (R, L' * 4096, 2); L' is at least the decoder's minimum length."""
    import torch
    from torch.nn import functional

    padded = functional.pad(latents, (0, max(0, MIN_CODEC_FRAMES - latents.shape[-1])))
    inputs = {"latent": padded}
    if "limiter_ceiling" in engine.input_names:
        inputs["limiter_ceiling"] = torch.tensor(LIMITER_CEILING)
    outputs = engine.run(inputs)
    if "pcm" in outputs:
        pcm = outputs["pcm"]
        samples = pcm if pcm.dtype == torch.int16 else as_float(pcm)
    elif "audio" in outputs:
        samples = outputs["audio"].float().transpose(1, 2)
        if not bool(torch.isfinite(samples).all()):
            raise ToolError("the decoder gave values that are not finite", "build it again, or try `precision=fp32`")
    else:
        raise ToolError(f"the decoder gives {', '.join(outputs)}, not pcm or audio", "use a SAME decoder")
    wanted = (padded.shape[0], padded.shape[-1] * SAMPLES_PER_FRAME, AUDIO_CHANNELS)
    if tuple(samples.shape) != wanted:
        raise ToolError(f"the decoder gave samples of shape {tuple(samples.shape)}, not {wanted}", "use a SAME decoder")
    return samples


def required_frames(seconds: float, frames: int, reach: int | None) -> int:
    """Return how many of `frames` latent frames the samples of `seconds` depend on, at least MIN_CODEC_FRAMES.

    The decoder looks `reach` frames beyond the last one that is heard (None: not known, all are required). The frames
    after them are padding of the DiT: 52 of the 97 of 3 s.
    """
    if reach is None:
        return frames
    return min(frames, max(frames_before(seconds) + reach, MIN_CODEC_FRAMES))


def decode_windows(engine: GraphEngine, latents: Tensor, seconds: float, chunk: int) -> Iterator[Tensor]:
    """Yield the finished samples (n, 2) of latents (1, 256, L) window by window as they are decoded.

    Joined they are `finish(decode(engine, latents, chunk), seconds)`, equal to the bit. Raises ToolError.
    """
    frames = latents.shape[-1]
    wanted = output_samples(seconds)
    audible = min(wanted, valid_frames(seconds, frames) * SAMPLES_PER_FRAME)
    for part in chunks(frames, chunk):
        first, last = part.first * SAMPLES_PER_FRAME, min(part.last * SAMPLES_PER_FRAME, wanted)
        if first >= last:
            return
        offset = part.start * SAMPLES_PER_FRAME
        samples = decode(engine, latents[..., part.start : part.stop].contiguous())[first - offset : last - offset]
        samples[max(0, audible - first) :] = 0
        yield samples


def finish(samples: Tensor, seconds: float) -> Tensor:
    """Return the finished samples (N, 2): muted after the valid frames and cut to int(seconds * 44100).

    Source: the model's own generation (build/FACTS.md, Generation).
    """
    valid = valid_frames(seconds, samples.shape[0] // SAMPLES_PER_FRAME) * SAMPLES_PER_FRAME
    heard = samples[: output_samples(seconds)]
    if valid < heard.shape[0]:
        heard = heard.clone()
        heard[valid:] = 0
    return heard
