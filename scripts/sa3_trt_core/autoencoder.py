"""From latents to samples: decode, mute what is beyond the valid frames, cut to the length asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sa3_trt_core.errors import ToolError
from sa3_trt_core.shapes import AUDIO_CHANNELS, MIN_CODEC_FRAMES, SAMPLES_PER_FRAME, output_samples, valid_frames

if TYPE_CHECKING:
    from torch import Tensor

    from sa3_trt_core.engines.base import GraphEngine

FULL_SCALE = 32767
LIMITER_CEILING = 1.0  # the value at which that input of some builds changes nothing below full scale


def decode(engine: GraphEngine, latents: Tensor) -> Tensor:
    """int16 samples (L*4096, 2) from latents (1, 256, L), either flavour of decoder.

    `pcm` is int32 (1, L*4096, 2), clipped and scaled already; `audio` is float (1, 2, L*4096) within +-1. Fewer than
    32 frames are padded with zero frames to the decoder's least length and cut again. Raises ToolError.
    """
    import torch
    from torch.nn import functional

    frames = latents.shape[-1]
    padded = functional.pad(latents, (0, max(0, MIN_CODEC_FRAMES - frames)))
    inputs = {"latent": padded}
    if "limiter_ceiling" in engine.input_names:
        inputs["limiter_ceiling"] = torch.tensor(LIMITER_CEILING)
    outputs = engine.run(inputs)
    if "pcm" in outputs:
        samples = outputs["pcm"][0].clamp(-FULL_SCALE, FULL_SCALE)
    elif "audio" in outputs:
        audio = outputs["audio"][0].float()
        if not bool(torch.isfinite(audio).all()):
            raise ToolError("the decoder gave values that are not finite", "build it again, or try --precision fp32")
        samples = (audio.clamp(-1.0, 1.0) * FULL_SCALE).round().T
    else:
        raise ToolError(f"the decoder gives {', '.join(outputs)}, not pcm or audio", "use a SAME decoder")
    wanted = (padded.shape[-1] * SAMPLES_PER_FRAME, AUDIO_CHANNELS)
    if tuple(samples.shape) != wanted:
        raise ToolError(f"the decoder gave samples of shape {tuple(samples.shape)}, not {wanted}", "use a SAME decoder")
    return samples[: frames * SAMPLES_PER_FRAME].to(torch.int16).contiguous()


def finish(samples: Tensor, seconds: float) -> Tensor:
    """The samples (N, 2) that were asked for: silence from the first frame that is not valid, cut to int(sec * 44100).

    Source: the model's own generation (facts.md, section 2).
    """
    valid = valid_frames(seconds, samples.shape[0] // SAMPLES_PER_FRAME) * SAMPLES_PER_FRAME
    muted = samples.clone()
    muted[valid:] = 0
    return muted[: output_samples(seconds)]
