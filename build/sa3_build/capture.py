"""Capture the DiT's inputs from the checkpoint's own ping-pong generation, one calibration row a sampler step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sa3_build import checkpoint as native
from sa3_build import text_encoder
from sa3_build.calib import KEYS, CalibrationWriter
from sa3_build.contract import DitContract
from sa3_build.geometry import load_geometry
from sa3_trt_core import schedule, shapes
from sa3_trt_core.console import Progress
from sa3_trt_core.errors import ToolError
from sa3_trt_core.sampler import Conditioning, ping_pong, row_noise


@dataclass(frozen=True)
class CaptureSettings:
    """What the rows depend on besides the checkpoint. Prompt i is generated with seed + i."""

    prompts: tuple[str, ...]
    seconds: float
    steps: int
    seed: int

    @property
    def frames(self) -> int:
        """Latent frames of every row."""
        return shapes.latent_frames(self.seconds, shapes.frame_cap(self.seconds))


class CheckpointModel:
    """A native checkpoint ready to generate: tokenizer, text encoder and DiT on one device, fp32."""

    def __init__(self, config_file: Path, weights_file: Path, device: str) -> None:
        """Raises ToolError when a file is absent or does not fit, or when the device is not there."""
        geometry = load_geometry(config_file)
        weights = native.NativeWeights(weights_file)
        text_folder = config_file.parent / geometry.conditioner.text_folder
        self._tokenizer = text_encoder.load_tokenizer(text_folder)
        self._text_tokens = geometry.conditioner.text_tokens
        self._device = _device(device)
        self._text = text_encoder.load_text_encoder(text_folder).to(self._device)
        dit = native.load_dit(weights, geometry.dit)
        self.module = DitContract(dit, native.load_duration_embedder(weights, geometry.conditioner)).to(self._device)

    @torch.inference_mode()
    def conditioning(self, prompt: str, seconds: float, frames: int) -> Conditioning:
        """Conditioning of one row of text to audio."""
        tokens = self._tokenizer(
            prompt, padding="max_length", truncation=True, max_length=self._text_tokens, return_tensors="pt"
        ).to(self._device)
        hidden = self._text(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return Conditioning(
            t5_hidden=hidden.float(),
            t5_mask=tokens.attention_mask.float(),
            seconds_total=torch.tensor([seconds], dtype=torch.float32, device=self._device),
            local_add_cond=torch.zeros(1, shapes.LOCAL_CHANNELS, frames, device=self._device),
        )

    @torch.inference_mode()
    def velocity(self, x: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        """Velocity (B, 256, L) on the CPU, where the noise is drawn: one seed, one sound on every machine."""
        place = self._device
        velocity: torch.Tensor = self.module(
            x.to(place), t.to(place), cond.t5_hidden, cond.t5_mask, cond.seconds_total, cond.local_add_cond
        )
        return velocity.cpu()

    def close(self) -> None:
        """Nothing is held beyond this object."""

    def generate(self, prompt: str, seconds: float, steps: int, seed: int) -> torch.Tensor:
        """Latents (1, 256, L) of one prompt, as the model itself generates them."""
        frames = shapes.latent_frames(seconds, shapes.frame_cap(seconds))
        cond = self.conditioning(prompt, seconds, frames)
        return ping_pong(self, row_noise([seed], shapes.LATENT_CHANNELS, frames), schedule.sigmas(steps), cond)


def capture(model: CheckpointModel, settings: CaptureSettings, writer: CalibrationWriter) -> None:
    """Generate every prompt and let a hook on the DiT record what it was fed; goes on where `writer` stands.

    One prompt is the unit of resumption: a step cannot be repeated without the noise before it.
    """

    def record(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        writer.append({key: value.detach().cpu().numpy() for key, value in zip(KEYS, inputs, strict=True)})

    handle = model.module.register_forward_pre_hook(record)
    first = writer.done // settings.steps
    try:
        with Progress("calibration", len(settings.prompts) * settings.steps) as progress:
            if first:
                progress.advance(first * settings.steps, "resumed")
            for index in range(first, len(settings.prompts)):
                model.generate(settings.prompts[index], settings.seconds, settings.steps, settings.seed + index)
                writer.commit()
                progress.advance(settings.steps)
    finally:
        handle.remove()
    writer.finish()


def choose_prompts(available: Sequence[str], count: int | None) -> tuple[str, ...]:
    """The first `count` prompts, or all. Raises ToolError when there are not so many."""
    if count is not None and count > len(available):
        raise ToolError(f"--prompts {count}: there are {len(available)}", "add examples to interface/reprompt.py")
    return tuple(available if count is None else available[:count])


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ToolError(
            f"--device {name} cannot be used ({str(error).splitlines()[0]})", "use auto, cpu or cuda"
        ) from None
    return device
