"""Waveforms in memory: validation of `init_audio` tensors, and conversion of 16-bit samples to fp32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sa3_trt_core.errors import InvalidRequest
from sa3_trt_core.shapes import AUDIO_CHANNELS, FULL_SCALE

if TYPE_CHECKING:
    from torch import Tensor

MIN_RATE, MAX_RATE = 100, 768_000  # Hz


@dataclass(frozen=True, eq=False)
class Waveform:
    """Samples (channels, N) of a floating type within full scale (1), and their rate in Hz. Equal to itself alone."""

    samples: Tensor
    sample_rate: int


def as_waveform(samples: object, sample_rate: object) -> Waveform:
    """Return the waveform of a tensor (N,), (1, N) or (2, N) and its rate in Hz. Raises InvalidRequest."""
    import torch

    hint = "give a floating tensor (2, N), (1, N) or (N,) and its sample rate"
    if not isinstance(samples, torch.Tensor) or not samples.is_floating_point():
        kind = samples.dtype if isinstance(samples, torch.Tensor) else type(samples).__name__
        raise InvalidRequest(f"`init_audio` holds {kind}, not floating samples", hint)
    shaped = samples.detach()[None] if samples.dim() == 1 else samples.detach()
    if shaped.dim() != 2 or not 1 <= shaped.shape[0] <= AUDIO_CHANNELS or not shaped.shape[1]:
        raise InvalidRequest(f"`init_audio` has the shape {list(samples.shape)}", hint)
    whole = isinstance(sample_rate, int) and not isinstance(sample_rate, bool)
    if not whole or not MIN_RATE <= int(str(sample_rate)) <= MAX_RATE:
        rates = f"{MIN_RATE} to {MAX_RATE} Hz"
        raise InvalidRequest(f"the sample rate of `init_audio` is {sample_rate!r}", f"give a whole number from {rates}")
    return Waveform(shaped, int(str(sample_rate)))


def as_float(samples: Tensor) -> Tensor:
    """Return fp32 samples of full scale 1; 16-bit integers are divided by FULL_SCALE, other dtypes returned as fp32."""
    return samples.float() if samples.is_floating_point() else samples / FULL_SCALE


def peak(samples: Tensor) -> float:
    """Return the largest magnitude of samples (N, channels), where full scale is 1; 0 without samples."""
    if not samples.numel():
        return 0.0
    low, high = (float(value) for value in samples.aminmax())
    return max(-low, high) / (1.0 if samples.is_floating_point() else FULL_SCALE)
