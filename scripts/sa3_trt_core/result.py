"""Result of a request: the sound, its latents, and time and memory of each stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from sa3_trt_core.audio import io as audio_io, waveform
from sa3_trt_core.errors import InvalidRequest
from sa3_trt_core.shapes import SAMPLE_RATE

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Result:
    """One generated sound.

    Args:
        latents: fp32 (1, 256, V) of the valid frames.
        sigmas: fp32 (steps + 1,), the noise levels of the sampler.
        samples: (N, 2) as the decoder gave them: int16, or fp32 whose full scale is 1.
        timings: seconds of each stage, this row's share of its batch's.
        memory: bytes in use on the GPU after each stage; empty without a GPU.
        sample_rate: of `samples`, in Hz.
    """

    latents: Tensor
    sigmas: Tensor
    samples: Tensor
    timings: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    sample_rate: int = SAMPLE_RATE

    @cached_property
    def audio(self) -> Tensor:
        """Samples in fp32 (N, 2); full scale is 1, which they may exceed."""
        return waveform.as_float(self.samples)

    @property
    def peak(self) -> float:
        """The largest magnitude of the samples; full scale is 1."""
        return waveform.peak(self.samples)

    @property
    def waveform(self) -> Tensor:
        """The audio as torchaudio and diffusers have it: fp32 (2, samples), contiguous."""
        return self.audio.T.contiguous()

    def save(self, path: str | Path, bits: int | str = audio_io.DEFAULT_BITS, peak: str = audio_io.PEAKS[0]) -> Path:
        """Write the sound to a file, atomically; returns its path.

        Args:
            path: its extension is the format: .wav, .flac, .mp3, .ogg or .opus.
            bits: of a sample: 16 (default), 24, or "32f" for floating point; the lossy formats have none.
            peak: for samples beyond full scale: "clip" (default) cuts them, "normalize" scales the whole sound,
                "limit" turns the peaks down.

        Raises:
            InvalidRequest: an extension, `bits` or `peak` that cannot be written.
            ToolError: the file cannot be written.
        """
        file, width = Path(path), str(bits)
        audio_io.check_output(file, width, "`path`")
        if peak not in audio_io.PEAKS:
            raise InvalidRequest(f"`peak` {peak!r} is unknown", f"known: {', '.join(audio_io.PEAKS)}")
        audio_io.write_audio(file, audio_io.tame(self.samples, peak), width, {}, self.sample_rate)
        return file
