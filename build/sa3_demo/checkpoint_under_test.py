"""Run one native checkpoint as text-to-audio model and as autoencoder, in fp32 on one device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sa3_build.calibration.capture import CheckpointModel
from sa3_build.export import load_modules as native, native_weights
from sa3_build.export.model_config import load_geometry
from sa3_build.export.wrappers import DecoderContract
from sa3_trt_core import shapes
from sa3_trt_core.audio import autoencoder
from sa3_trt_core.conditioning import Conditioning
from sa3_trt_core.engines.base import DiTVelocity, VelocityEngine
from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine
from sa3_trt_core.lora.lora_set import LoraSet
from sa3_trt_core.sampling import schedule
from sa3_trt_core.sampling.sampler import ping_pong, row_noise

Pcm = NDArray[np.int16]


@dataclass(frozen=True)
class GenerationRow:
    """One clip to generate: its text, the seed of its noise, and local_add_cond (1, 257, L) or None."""

    caption: str
    seed: int
    local: torch.Tensor | None = None


class CheckpointUnderTest:
    """Checkpoint that generates clips of one length, `batch` rows at a time, in `steps` sampler steps.

    `dit`, an ONNX graph of the same checkpoint, replaces its DiT.
    """

    def __init__(
        self, folder: Path, seconds: int, steps: int, batch: int, dit: Path | None = None,
        loras: LoraSet | None = None, device: str = "cpu",
    ) -> None:  # fmt: skip
        """Load the parts onto `device`, with `loras` merged into the DiT; latents, noise and samples stay on the CPU.

        Raises ToolError when a file is missing or does not fit, or the device is not available.
        """
        config, weights = folder / native.CONFIG_FILE, folder / native_weights.WEIGHTS_FILE
        self.model = CheckpointModel(config, weights, device, loras)
        self._engine: VelocityEngine = DiTVelocity(OnnxRuntimeEngine(dit)) if dit else self.model
        geometry = load_geometry(config).autoencoder
        self.device = self.model.device
        self._autoencoder = native.load_autoencoder(native.NativeWeights(weights), geometry).to(self.device)
        self._decoder = DecoderContract(self._autoencoder)
        self.seconds, self.steps, self.batch = seconds, steps, batch
        self.drawn_frames = shapes.latent_frames(seconds)  # of noise
        self.frames = shapes.valid_frames(seconds, self.drawn_frames)
        self.sounding = shapes.frames_before(seconds)  # frames that are not silence

    @torch.inference_mode()
    def conditioning(self, rows: Sequence[GenerationRow]) -> Conditioning:
        """Return the conditioning of these rows, in their order."""
        each = [self.model.conditioning(row.caption, float(self.seconds), self.frames) for row in rows]
        silent = torch.zeros(1, shapes.LOCAL_CHANNELS, self.frames, device=self.device)
        return Conditioning(
            t5_hidden=torch.cat([entry.t5_hidden for entry in each]),
            t5_mask=torch.cat([entry.t5_mask for entry in each]),
            seconds_total=torch.cat([entry.seconds_total for entry in each]),
            local_add_cond=torch.cat([silent if row.local is None else row.local.to(self.device) for row in rows]),
        )

    @torch.inference_mode()
    def latents(
        self,
        rows: Sequence[GenerationRow],
        engine: VelocityEngine | None = None,
        on_step: Callable[[int], None] = lambda rows: None,
    ) -> torch.Tensor:
        """Return latents (rows, 256, L), by the checkpoint's DiT or by `engine`. Raises ToolError.

        `on_step(n)` is called after every sampler step of n rows.
        """
        parts = [rows[first : first + self.batch] for first in range(0, len(rows), self.batch)]
        return torch.cat([self._batch(part, engine or self._engine, on_step) for part in parts])

    def _batch(
        self, rows: Sequence[GenerationRow], engine: VelocityEngine, on_step: Callable[[int], None]
    ) -> torch.Tensor:
        noise = row_noise([row.seed for row in rows], shapes.LATENT_CHANNELS, self.drawn_frames, self.frames)
        levels = schedule.sigmas(self.steps)
        return ping_pong(engine, noise, levels, self.conditioning(rows), lambda *_: on_step(len(rows)))

    @torch.inference_mode()
    def encode(self, samples: NDArray[np.float32]) -> torch.Tensor:
        """Return latents (1, 256, L) of samples (2, N), padded with the silence of a request of this length."""
        audio = torch.zeros(1, shapes.AUDIO_CHANNELS, self.frames * shapes.SAMPLES_PER_FRAME)
        audio[0, :, : samples.shape[1]] = torch.from_numpy(samples)
        encoded: torch.Tensor = self._autoencoder.encode(audio.to(self.device)).latents
        return encoded.cpu()

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> Pcm:
        """Return the finished samples (N, 2) of latents (1, 256, L)."""
        samples = self._decoder(latents.to(self.device))[0].to("cpu", torch.int16)
        pcm: Pcm = autoencoder.finish(samples, float(self.seconds)).numpy()
        return pcm
