"""Capture the DiT's inputs from the checkpoint's own ping-pong generation, one calibration row a sampler step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sa3_build.calibration.plan import Generation, generations, started_from
from sa3_build.calibration.writer import CalibrationWriter
from sa3_build.export import load_modules as native, text_encoder
from sa3_build.export.model_config import load_geometry
from sa3_build.export.wrappers import DitContract
from sa3_trt_core import shapes
from sa3_trt_core.conditioning import Conditioning
from sa3_trt_core.console import Progress
from sa3_trt_core.errors import ToolError
from sa3_trt_core.lora.lora_set import LoraSet
from sa3_trt_core.sampling import schedule
from sa3_trt_core.sampling.guidance import guided, null_conditioning
from sa3_trt_core.sampling.inpainting import keep_mask, local_conditioning
from sa3_trt_core.sampling.sampler import ping_pong, row_noise


@dataclass(frozen=True)
class CaptureSettings:
    """What the rows depend on besides the checkpoint. `seconds` are the durations, in turn; `cover` as in coverage."""

    prompts: tuple[str, ...]
    seconds: tuple[float, ...]
    steps: int
    seed: int
    cover: str

    @property
    def generations(self) -> list[tuple[Generation, ...]]:
        """What each prompt gives."""
        return generations(len(self.prompts), self.seconds, self.seed, self.cover)

    def rows(self) -> list[Generation]:
        """Return the generation of every row, in order."""
        return [one for turn in self.generations for one in turn for _ in range(self.steps)]


class CheckpointModel:
    """A native checkpoint ready to generate: tokenizer, text encoder and DiT on one device, fp32."""

    def __init__(self, config_file: Path, weights_file: Path, device: str, loras: LoraSet | None = None) -> None:
        """`loras` are merged into the DiT. Raises ToolError: a file that is absent or does not fit, no device."""
        geometry = load_geometry(config_file)
        weights = native.NativeWeights(weights_file, loras)
        text_folder = config_file.parent / geometry.conditioner.text_folder
        self._tokenizer = text_encoder.load_tokenizer(text_folder)
        self._text_tokens = geometry.conditioner.text_tokens
        self.device = _device(device)
        self._text = text_encoder.load_text_encoder(text_folder).to(self.device)
        dit = native.load_dit(weights, geometry.dit)
        self.module = DitContract(dit, native.load_duration_embedder(weights, geometry.conditioner)).to(self.device)

    @torch.inference_mode()
    def conditioning(self, prompt: str, seconds: float, frames: int) -> Conditioning:
        """Conditioning of one row of text to audio."""
        tokens = self._tokenizer(
            prompt, padding="max_length", truncation=True, max_length=self._text_tokens, return_tensors="pt"
        ).to(self.device)
        hidden = self._text(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return Conditioning(
            t5_hidden=hidden.float(),
            t5_mask=tokens.attention_mask.float(),
            seconds_total=torch.tensor([seconds], dtype=torch.float32, device=self.device),
            local_add_cond=torch.zeros(1, shapes.LOCAL_CHANNELS, frames, device=self.device),
        )

    @torch.inference_mode()
    def velocity(self, x: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        """Velocity (B, 256, L) on the CPU, where the noise is drawn: one seed, one sound on every machine."""
        place = self.device
        velocity: torch.Tensor = self.module(
            x.to(place), t.to(place), cond.t5_hidden, cond.t5_mask, cond.seconds_total, cond.local_add_cond
        )
        return velocity.cpu()

    def close(self) -> None:
        """Nothing is held beyond this object."""

    def generate(self, prompt: str, seconds: float, steps: int, seed: int) -> torch.Tensor:
        """Return latents (1, 256, V) of one prompt, V valid frames, as the model itself generates them."""
        frames = shapes.latent_frames(seconds)
        valid = shapes.valid_frames(seconds, frames)
        cond = self.conditioning(prompt, seconds, valid)
        noise = row_noise([seed], shapes.LATENT_CHANNELS, frames, valid)
        return ping_pong(self, noise, schedule.sigmas(steps), cond)


class _Recorded:
    """A DiT that writes a calibration row of every velocity it is asked for."""

    def __init__(self, model: CheckpointModel, writer: CalibrationWriter, progress: Progress) -> None:
        self._model, self._writer, self._progress = model, writer, progress

    def velocity(self, x: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        row = {"x": x, "t": t, **vars(cond)}
        self._writer.append({key: value.detach().cpu().numpy() for key, value in row.items()})
        velocity = self._model.velocity(x, t, cond)
        self._progress.advance()
        return velocity

    def close(self) -> None:
        """Nothing is held beyond this object."""


class _Guided:
    """Two forwards a step, of which the null rows are recorded: x is then what guided generation visits."""

    def __init__(self, model: CheckpointModel, recorded: _Recorded, cfg: float) -> None:
        self._model, self._recorded, self._cfg = model, recorded, cfg

    def velocity(self, x: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        without = self._recorded.velocity(x, t, null_conditioning(cond))
        return guided(self._model.velocity(x, t, cond), without, self._cfg)

    def close(self) -> None:
        """Nothing is held beyond this object."""


def capture(model: CheckpointModel, settings: CaptureSettings, writer: CalibrationWriter) -> None:
    """Generate what every prompt gives and record what the DiT is fed; goes on where `writer` stands.

    One prompt is the unit of resumption: a step cannot be repeated without the noise, and what is made of a prompt's
    latents not without them.
    """
    done = 0
    with Progress("calibration", writer.rows) as progress:
        if writer.done:
            progress.advance(writer.done, "resumed")
        recorded = _Recorded(model, writer, progress)
        for turn in settings.generations:
            done += len(turn) * settings.steps
            if done <= writer.done:
                continue
            latents: torch.Tensor | None = None
            for generation in turn:
                latents = _generate(model, recorded, settings, generation, latents)
            writer.commit()
    writer.finish()


def _generate(
    model: CheckpointModel, recorded: _Recorded, settings: CaptureSettings, one: Generation,
    latents: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Latents (1, 256, L) of one generation, its rows recorded; `latents` are the prompt's own, made just before."""
    cond = model.conditioning(settings.prompts[one.prompt], one.seconds, one.valid_frames)
    noise = row_noise([one.seed], shapes.LATENT_CHANNELS, one.frames, one.valid_frames)
    if one.spans and latents is not None:
        local = local_conditioning(latents, keep_mask(one.seconds, one.valid_frames, one.ranges))
        cond = replace(cond, local_add_cond=local.to(cond.local_add_cond.device))
    if one.sigma_max < 1 and latents is not None:
        noise = started_from(latents, one.sigma_max, noise)
    engine = _Guided(model, recorded, one.cfg) if one.cfg > 1 else recorded
    return ping_pong(engine, noise, schedule.sigmas(settings.steps, one.sigma_max), cond)


def choose_prompts(available: Sequence[str], count: int | None) -> tuple[str, ...]:
    """Return the first `count` prompts, or all. Raises ToolError when there are not so many."""
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
