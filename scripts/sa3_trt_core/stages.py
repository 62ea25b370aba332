"""The stages of a batch of requests: text encoder, audio encoder, sampler and decoder, with the engines of a plan."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from sa3_trt_core import text
from sa3_trt_core.audio import autoencoder, reader, tiling
from sa3_trt_core.batch import MAX_CACHED, Batch, EncodeCache
from sa3_trt_core.conditioning import Conditioning
from sa3_trt_core.engines.base import Closeable, DiTVelocity
from sa3_trt_core.errors import ToolError, ToolWarning
from sa3_trt_core.model_loader import EngineSet
from sa3_trt_core.request import Request
from sa3_trt_core.result import Result
from sa3_trt_core.sampling.guidance import Guidance, GuidedVelocity
from sa3_trt_core.sampling.inputs import conditioning, guidance_of, sigmas_of
from sa3_trt_core.sampling.ring import RingRow
from sa3_trt_core.sampling.sampler import Trajectory, ping_pong, row_noise
from sa3_trt_core.sampling.upload import UploadedNoise
from sa3_trt_core.shapes import LATENT_CHANNELS, SAMPLES_PER_FRAME
from sa3_trt_core.stage_timer import Meter

if TYPE_CHECKING:
    from torch import Tensor

    from sa3_trt_core.engines.base import GraphEngine

StageReporter = Callable[[str], None]
NO_NULL_RULE = (
    "this DiT graph does not zero the cross tokens of the unconditional row (zero text becomes padding embeddings); "
    "rebuild it with build/build_dit_fp16mixed.py or build/build_dit_fp8.py"
)


class Stages(Closeable):
    """Run the stages of a batch. With `free_models` the engine of a stage is closed when the stage ends."""

    def __init__(self, engines: EngineSet, free_models: bool = False) -> None:
        self.engines = engines
        self._frees = free_models

    def ring_velocity(self) -> DiTVelocity:
        """Return the DiT for a ring. Raises ToolError with `free_models`."""
        if self._frees:
            raise ToolError("a ring needs all models at once", "omit `depth` or `free_models`")
        return self._velocity(Meter())

    def ring_batch(self, request: Request) -> tuple[Batch, RingRow]:
        """Encode the texts and init audio of a request; return its batch and ring row. Raises ToolError."""
        job = Batch([request], Meter())
        return job, self._ring_row(job, EncodeCache(), lambda note: None)

    def decoded(self, job: Batch) -> Result:
        """Decode the latents of a batch of one. Raises ToolError."""
        return self._decode(job, lambda note: None)[0]

    def decoder_rows(self, frames: int) -> int:
        """Return how many sounds of `frames` latent frames the decoder decodes in one forward without tiling."""
        return self.engines.engine("decoder").rows_at_once(frames)

    def decoded_together(self, jobs: Sequence[Batch]) -> list[Result]:
        """Decode several batches of one, of equal latent length, in one forward. Raises ToolError."""
        import torch

        latents = torch.cat([job.latents for job in jobs if job.latents is not None])
        joined = Batch([row for job in jobs for row in job.rows], Meter(len(jobs)), latents=latents)
        return [
            replace(
                sound,
                timings={**job.meter.timings, **sound.timings},
                memory={**job.meter.memory, **sound.memory},
            )
            for job, sound in zip(jobs, self._decode(joined, lambda note: None), strict=True)
        ]

    def audible_latents(self, latents: Tensor, seconds: float) -> Tensor:
        """Return the latents (B, 256, L') of the frames that the samples of `seconds` depend on, of (B, 256, L)."""
        reach = self.engines.plan.decoder_reach
        return latents[..., : autoencoder.required_frames(seconds, latents.shape[-1], reach)].contiguous()

    def _read(self, job: Batch, cache: EncodeCache, report_stage: StageReporter) -> None:
        """Set `job.features`: the text encoder's output of every prompt and negative prompt."""
        import torch

        texts = [row.prompt for row in job.rows]
        texts += [row.negative_prompt for row in job.rows if row.negative_prompt is not None]
        encoder = self._engine("text", job.meter)
        with torch.inference_mode(), job.meter.stage("text"):
            for words in dict.fromkeys(texts):
                if words not in cache.texts:
                    cache.texts[words] = text.encode_text(encoder, self.engines.tokenizer, [words])
        job.features = {words: cache.texts[words] for words in texts}
        report_stage("text")

    def _encode(self, job: Batch, cache: EncodeCache, report_stage: StageReporter) -> None:
        """Set `job.init_latents`: (1, 256, L) of each row's init audio; rows of the same sound share one tensor."""
        import torch

        job.init_latents = [None] * len(job.rows)
        if all(row.sound is None for row in job.rows):
            return
        init_latents: list[Tensor | None] = []
        encoder = self._engine("encode", job.meter)
        with torch.inference_mode(), job.meter.stage("encode"):
            for row in job.rows:
                if row.sound is None:
                    init_latents.append(None)
                    continue
                key = (row.sound, row.init_start, row.frames)
                if key not in cache.sounds:
                    samples = reader.read_audio(row.sound, row.init_start, row.frames * SAMPLES_PER_FRAME)
                    cache.sounds[key] = autoencoder.encode(encoder, samples, self._chunk(row.frames))
                init_latents.append(cache.sounds[key])
        job.init_latents = init_latents
        report_stage("init audio")

    def _engine(self, stage: str, meter: Meter) -> GraphEngine:
        """Return the engine of a stage. Loading it, if it is not open, is recorded as the stage "load"."""
        if stage in self.engines.open_stages:
            return self.engines.engine(stage)
        with meter.stage("load"):
            return self.engines.engine(stage)

    def _velocity(self, meter: Meter) -> DiTVelocity:
        return DiTVelocity(self._engine("dit", meter))

    def _leave(self, stage: str) -> None:
        """Close the engine of a stage if `free_models` is set."""
        if self._frees:
            self.engines.release(stage)

    def _chunk(self, frames: int) -> int:
        return tiling.chunk_frames(frames, self.engines.plan.chunk_frames)

    def _sample(self, job: Batch, report_stage: StageReporter) -> None:
        """Set `job.latents`: the sampled latents (B, 256, V)."""
        import torch

        first, velocity = job.rows[0], self._velocity(job.meter)
        with torch.inference_mode():
            cond, start, kept = conditioning(job.rows, job.features, job.init_latents)
            guidance = self._guidance(job, cond)
            engine = velocity if guidance is None else GuidedVelocity(velocity, guidance)
            drawn = [row.seed for row in job.rows], LATENT_CHANNELS, first.frames, first.valid_frames
            noise = row_noise(*drawn)
            if velocity.device != "cpu":  # sample on the device: the decoder reads the latents without a copy
                noise, start, kept = UploadedNoise(*drawn, velocity.device), *_on(velocity.device, start, kept)
            with job.meter.stage("sample"):
                job.latents = ping_pong(
                    engine,
                    noise,
                    sigmas_of(first),
                    cond,
                    lambda _, sigma: report_stage(f"sigma {sigma:.4f}"),
                    start,
                    kept,
                )

    def _guidance(self, job: Batch, cond: Conditioning) -> Guidance | None:
        """Return the guidance of a batch; warn if the DiT does not zero the unconditional row's cross tokens."""
        guidance = guidance_of(job.rows, cond, job.features)
        plain = guidance is not None and any(row.negative_prompt is None for row in job.rows)
        if plain and not self.engines.has_null_rule():
            warnings.warn(NO_NULL_RULE, ToolWarning, stacklevel=2)
        return guidance

    def _ring_row(self, job: Batch, cache: EncodeCache, report_stage: StageReporter) -> RingRow:
        """Encode a request's inputs, upload them to the DiT's device and return its ring row."""
        import torch

        self._read(job, cache, report_stage)
        self._encode(job, cache, report_stage)
        cache.evict(MAX_CACHED)
        (row,) = job.rows
        with torch.inference_mode():
            cond, start, kept = conditioning(job.rows, job.features, job.init_latents)
            guidance, device = self._guidance(job, cond), self._velocity(job.meter).device
            drawn = [row.seed], LATENT_CHANNELS, row.frames, row.valid_frames
            levels, noise = sigmas_of(row), row_noise(*drawn)
            if device != "cpu":  # upload every input of the steps now: no step then waits for a copy
                noise = UploadedNoise(*drawn, device)
                cond, (start, kept) = cond.on(device), _on(device, start, kept)
                guidance = None if guidance is None else replace(guidance, null=guidance.null.on(device))
            return RingRow(Trajectory(noise, levels, start, kept), cond, guidance, job.meter)

    def _decode(self, job: Batch, report_stage: StageReporter) -> list[Result]:
        """Decode a batch: all rows in one forward if the decoder takes rows, else one by one."""
        import torch

        assert job.latents is not None
        self.engines.note_ranges()
        sounds, decoder = [], self._engine("decoder", job.meter)
        count = len(job.rows) if decoder.takes_rows else 1
        latents = job.latents if decoder.takes_rows else job.latents.cpu()
        with torch.inference_mode():
            for first in range(0, len(job.rows), count):
                with job.meter.stage("decode"):
                    rows = job.rows[first : first + count]
                    part = self.audible_latents(latents[first : first + count], max(row.seconds for row in rows))
                    decoded = autoencoder.decode_rows(decoder, part, self._chunk(part.shape[-1]))
                    sounds += [autoencoder.finish(sound, row.seconds) for sound, row in zip(decoded, rows, strict=True)]
                for _ in decoded:
                    report_stage("decoded")
        job.latents = job.latents.cpu()
        timings, memory = job.meter.timings, job.meter.memory
        return [
            Result(latents.clone(), sigmas_of(row), sound, dict(timings), dict(memory))
            for row, latents, sound in zip(job.rows, job.latents.split(1), sounds, strict=True)
        ]


def _on(
    device: str, start: Tensor | None, kept: tuple[Tensor, Tensor] | None
) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
    """Return the initial latents and the kept latents and mask on a device."""
    moved = None if kept is None else (kept[0].to(device), kept[1].to(device))
    return None if start is None else start.to(device), moved
