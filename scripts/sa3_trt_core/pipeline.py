"""Requests to sound: text encoder, audio encoder, sampler and decoder, one batch after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from sa3_trt_core import audio, autoencoder, device, guidance, schedule, text
from sa3_trt_core.engines.base import Closing, DiTVelocity
from sa3_trt_core.loading import EngineSet, make_plan
from sa3_trt_core.request import FULL_APG, Request, batches
from sa3_trt_core.sampler import Conditioning, ping_pong, row_noise
from sa3_trt_core.shapes import LATENT_CHANNELS, SAMPLES_PER_FRAME
from sa3_trt_core.targets import DITS, PRECISIONS

if TYPE_CHECKING:
    from torch import Tensor

    from sa3_trt_core.engines.base import VelocityEngine

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """Latents (1, 256, L) fp32, sigmas (steps + 1,), and audio fp32 (samples, 2), which may lie beyond full scale (1).

    `timings` are the seconds of each stage, this row's share of its batch's; `memory` the bytes in use on the GPU after
    each stage, empty without one.
    """

    latents: Tensor
    sigmas: Tensor
    audio: Tensor
    timings: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)


class Generator(Closing):
    """One model, held open: call `generate` as often as you like, then close it, or use it in a `with` block.

    Nothing of a request is kept after it is answered. Not for use from several threads at once.
    """

    def __init__(self, engines: EngineSet) -> None:
        self.engines = engines
        self._velocity = DiTVelocity(engines.engine("dit"))

    @classmethod
    def load(
        cls, dit: str = DITS[0], precision: str = PRECISIONS[0], *, backend: str = "auto",
        onnx_root: str | Path | None = None, models_dir: str | Path | None = None, audio_input: bool = False,
        revision: str | None = None, offline: bool = False, on_engine: Tell | None = None,
    ) -> Self:  # fmt: skip
        """Find and open a model's engines. Raises ToolError: a file, a package or a GPU that is missing.

        `dit` is medium, sm-music or sm-sfx; `precision` fp16mixed, fp32 or fp8; `backend` auto takes built TensorRT
        engines where this machine can run them, else ONNX Runtime. `onnx_root` is a folder of ONNX files (else
        $SA3_ONNX_DIR, else the hub), `models_dir` one of engines (else $SA3_MODELS_DIR, else models/). `audio_input`
        opens the audio encoder at once and not at the first request that needs it. `revision` is a commit or branch
        of the hub, `offline` asks its cache only.
        """
        engines = EngineSet(make_plan(dit, precision, backend, onnx_root, models_dir, audio_input, revision, offline))
        try:
            engines.load(on_engine)
            return cls(engines)
        except BaseException:
            engines.close()
            raise

    @property
    def clips(self) -> bool:
        """Whether the decoder cuts its samples to full scale itself, so that there is nothing for a limiter to do."""
        return autoencoder.is_clipped(self.engines.engine("decoder"))

    def generate(self, request: Request, on_stage: Tell | None = None) -> Result:
        """The sound of one request. Raises ToolError.

        `on_stage(note)` is called request.count_stages([request], 1) times: text, init audio, every step, decoder.
        """
        return self._run([request], on_stage or _silent)[0]

    def generate_many(
        self, requests: Sequence[Request], batch: int = 1, on_stage: Tell | None = None
    ) -> Iterator[tuple[int, Result]]:
        """(index of the request, its sound) as they are finished, in batches of at most `batch` rows of equal length.

        A row's sound does not depend on its neighbours. Raises ToolError.
        """
        for rows in list(batches(requests, batch)):
            yield from zip(rows, self._run([requests[row] for row in rows], on_stage or _silent), strict=True)

    def close(self) -> None:
        """Close every engine."""
        self.engines.close()

    def _run(self, rows: Sequence[Request], tell: Tell) -> list[Result]:
        """One batch: rows whose batch_key is equal."""
        import torch

        first, meter = rows[0], _Meter(len(rows))
        with torch.inference_mode():
            with meter.stage("text"):
                features = self._features(rows)
            tell("text")
            inits: list[Tensor | None] = [None] * len(rows)
            if any(row.init_audio is not None for row in rows):
                with meter.stage("encode"):
                    inits = self._encoded(rows)
                tell("init audio")
            cond, start, kept = _conditioning(rows, features, inits)
            levels = _sigmas(first)
            noise = row_noise([row.seed for row in rows], LATENT_CHANNELS, first.frames)
            with meter.stage("sample"):
                latents = ping_pong(
                    self._guided(rows, cond, features), noise, levels, cond,
                    lambda _, sigma: tell(f"sigma {sigma:.4f}"), start, kept,
                )  # fmt: skip
            sounds = []
            for index, row in enumerate(rows):
                with meter.stage("decode"):
                    decoded = autoencoder.decode(self.engines.engine("decoder"), latents[index : index + 1])
                    sounds.append(autoencoder.finish(decoded, row.seconds))
                tell("decoded")
        return [
            Result(latents[index : index + 1].clone(), levels, sound, dict(meter.timings), dict(meter.memory))
            for index, sound in enumerate(sounds)
        ]

    def _features(self, rows: Sequence[Request]) -> dict[str, tuple[Tensor, Tensor]]:
        """(t5_hidden (1, 256, 768), t5_mask (1, 256)) of every text of a batch, each encoded once."""
        texts = [row.prompt for row in rows] + [row.negative_prompt for row in rows if row.negative_prompt is not None]
        encoder = self.engines.engine("text")
        return {words: text.encode_text(encoder, self.engines.tokenizer, [words]) for words in dict.fromkeys(texts)}

    def _encoded(self, rows: Sequence[Request]) -> list[Tensor | None]:
        """Latents (1, 256, L) of each row's init audio; rows of the same sound share them."""
        found: dict[tuple[Path, float], Tensor] = {}
        encoder = self.engines.engine("encode")
        for row in rows:
            if row.init_audio is not None and (row.init_audio, row.init_start) not in found:
                samples = audio.read_audio(row.init_audio, row.init_start, row.frames * SAMPLES_PER_FRAME)
                found[row.init_audio, row.init_start] = autoencoder.encode(encoder, samples)
        return [found[row.init_audio, row.init_start] if row.init_audio is not None else None for row in rows]

    def _guided(
        self, rows: Sequence[Request], cond: Conditioning, features: dict[str, tuple[Tensor, Tensor]]
    ) -> VelocityEngine:
        """The DiT itself, or the DiT with each row's null or negative row beside it."""
        import torch

        first = rows[0]
        if first.cfg == 1.0:
            return self._velocity
        null = guidance.null_conditioning(cond)
        led = [features[row.negative_prompt] if row.negative_prompt is not None else None for row in rows]
        hidden = [null.t5_hidden[i : i + 1] if pair is None else pair[0] for i, pair in enumerate(led)]
        mask = [null.t5_mask[i : i + 1] if pair is None else pair[1] for i, pair in enumerate(led)]
        null = guidance.negative_conditioning(cond, torch.cat(hidden), torch.cat(mask))
        return guidance.GuidedVelocity(self._velocity, null, first.cfg, FULL_APG if first.apg is None else first.apg)


class _Meter:
    """Seconds a row of each stage, and the GPU's memory in use after it."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self.timings: dict[str, float] = {}
        self.memory: dict[str, int] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.timings[name] = self.timings.get(name, 0.0) + (time.perf_counter() - started) / self._rows
        used = device.memory_in_use()
        if used is not None:
            self.memory[name] = max(used, self.memory.get(name, 0))


def _sigmas(request: Request) -> Tensor:
    if request.legacy_schedule:
        return schedule.legacy_sigmas(request.steps, request.frames, request.sigma_max)
    return schedule.sigmas(request.steps, request.sigma_max)


def _conditioning(
    rows: Sequence[Request], features: dict[str, tuple[Tensor, Tensor]], inits: Sequence[Tensor | None]
) -> tuple[Conditioning, Tensor | None, tuple[Tensor, Tensor] | None]:
    """What the DiT is told, what audio to audio starts from, and what in-painting puts back after every step.

    local_add_cond is the keep mask (1 keep, 0 regenerate), then the kept latent; zeros where nothing is kept.
    """
    import torch

    frames = rows[0].frames
    latents = torch.cat([torch.zeros(1, LATENT_CHANNELS, frames) if init is None else init for init in inits])
    keep = torch.zeros(len(rows), 1, frames)
    for index, row in enumerate(rows):
        if row.inpaint:
            keep[index] = 1.0
        for start, end in row.regenerated:
            keep[index, :, start:end] = 0.0
    cond = Conditioning(
        t5_hidden=torch.cat([features[row.prompt][0] for row in rows]),
        t5_mask=torch.cat([features[row.prompt][1] for row in rows]),
        seconds_total=torch.tensor([row.seconds for row in rows], dtype=torch.float32),
        local_add_cond=torch.cat([keep, latents * keep], dim=1),
    )
    varied = rows[0].init_noise_level is not None
    return cond, latents if varied else None, (latents, keep) if rows[0].paste_kept else None


def _silent(note: str) -> None:
    pass
