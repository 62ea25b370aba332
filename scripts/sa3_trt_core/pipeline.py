"""Requests to sound: text encoder, audio encoder, sampler and decoder, one batch after the other or in a ring."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from sa3_trt_core import text
from sa3_trt_core.audio import autoencoder, reader, tiling
from sa3_trt_core.batch import REMEMBERED, TOGETHER, Batch, Known, blocks
from sa3_trt_core.conditioning import Conditioning
from sa3_trt_core.engines.base import Closing, DiTVelocity
from sa3_trt_core.errors import ToolError, ToolWarning
from sa3_trt_core.model_loader import EngineSet, Plan, make_plan
from sa3_trt_core.paths import ModelSource
from sa3_trt_core.request import Request, batches, ring_groups
from sa3_trt_core.sampling.guidance import Guidance, GuidedVelocity
from sa3_trt_core.sampling.inputs import conditioning, guidance_of, sigmas_of
from sa3_trt_core.sampling.ring import RingRow, ring
from sa3_trt_core.sampling.sampler import Trajectory, ping_pong, row_noise
from sa3_trt_core.shapes import LATENT_CHANNELS, SAMPLES_PER_FRAME
from sa3_trt_core.stage_timer import Meter
from sa3_trt_core.targets import DITS, PRECISIONS

if TYPE_CHECKING:
    from torch import Tensor

    from sa3_trt_core.engines.base import GraphEngine

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """Latents (1, 256, V) fp32 of the valid frames, sigmas (steps + 1,), and audio fp32 (samples, 2).

    The audio may lie beyond full scale (1).

    `timings` are the seconds of each stage, this row's share of its batch's; `memory` the bytes in use on the GPU after
    each stage, empty without one.
    """

    latents: Tensor
    sigmas: Tensor
    audio: Tensor
    timings: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)


NO_NULL_RULE = (
    "this DiT has no rule for the null row of guidance (its zero text becomes padding embeddings): make one that has "
    "with build/build_dit_fp16mixed.py or build/build_dit_fp8.py"
)


class Generator(Closing):
    """One model, held open: call `generate` as often as you like, then close it, or use it in a `with` block.

    Nothing of a request is kept after it is answered. Not for use from several threads at once.
    """

    def __init__(self, engines: EngineSet, free_models: bool = False) -> None:
        self.engines = engines
        self._frees = free_models

    @classmethod
    def load(
        cls, dit: str = DITS[0], precision: str = PRECISIONS[0], *, backend: str = "auto",
        onnx_root: str | Path | None = None, models_dir: str | Path | None = None, audio_input: bool = False,
        revision: str | None = None, offline: bool = False, chunk_frames: int | None = None, free_models: bool = False,
        on_engine: Tell | None = None,
    ) -> Self:  # fmt: skip
        """Find and open a model's engines. Raises ToolError: a file, a package or a GPU that is missing.

        `dit` is medium, sm-music or sm-sfx; `precision` fp16mixed, fp32 or fp8; `backend` auto takes built TensorRT
        engines where this machine can run them, else ONNX Runtime. `onnx_root` is a folder of ONNX files (else
        $SA3_ONNX_DIR, else the hub), `models_dir` one of engines (else $SA3_MODELS_DIR, else models/). `audio_input`
        opens the audio encoder at once and not at the first request that needs it. `revision` is a commit or branch
        of the hub, `offline` asks its cache only. `chunk_frames` is the window in
        which the autoencoder works, in latent frames: 0 for one piece, None for one piece unless the sound is long.
        `free_models` opens nothing now and each engine when its stage begins, and closes it when that ends: the sounds
        are the same, the memory is that of the largest engine, and every call loads them again.
        """
        source = ModelSource.of(onnx_root, models_dir, revision, offline)
        plan = make_plan(dit, precision, backend, source, audio_input, chunk_frames)
        return cls.open(plan, free_models, on_engine)

    @classmethod
    def open(cls, plan: Plan, free_models: bool = False, on_engine: Tell | None = None) -> Self:
        """Find and open the engines of a plan, as `load` does. Raises ToolError."""
        engines = EngineSet(plan)
        try:
            if not free_models:
                engines.load(on_engine)
            return cls(engines, free_models)
        except BaseException:
            engines.close()
            raise

    @property
    def clips(self) -> bool:
        """Whether the decoder cuts its samples to full scale itself, so that there is nothing for a limiter to do."""
        try:
            return autoencoder.is_clipped(self.engines.engine("decoder"))
        finally:
            self._leave("decoder")

    def generate(self, request: Request, on_stage: Tell | None = None) -> Result:
        """The sound of one request. Raises ToolError.

        `on_stage(note)` is called request.count_stages([request], 1) times: text, init audio, every step, decoder.
        """
        ((_, result),) = self.generate_many([request], 1, on_stage)
        return result

    def generate_many(
        self, requests: Sequence[Request], batch: int = 1, on_stage: Tell | None = None
    ) -> Iterator[tuple[int, Result]]:
        """(index of the request, its sound) as they are finished, in batches of at most `batch` rows of equal length.

        A row's sound does not depend on its neighbours. Where models are freed, a stage does all batches of up to
        TOGETHER rows before the next one begins. Raises ToolError.
        """
        tell = on_stage or _silent
        for block in blocks(list(batches(requests, batch)), TOGETHER if self._frees else 1):
            jobs, known = [Batch([requests[row] for row in rows], Meter(len(rows))) for rows in block], Known()
            for job in jobs:
                self._read(job, known, tell)
            self._leave("text")
            for job in jobs:
                self._encode(job, known, tell)
            self._leave("encode")
            for job in jobs:
                self._sample(job, tell)
            self._leave("dit")
            for rows, job in zip(block, jobs, strict=True):
                yield from zip(rows, self._decode(job, tell), strict=True)
            self._leave("decoder")

    def generate_ring(
        self, requests: Sequence[Request], depth: int, on_stage: Tell | None = None
    ) -> Iterator[tuple[int, Result]]:
        """(index of the request, its sound) as they are finished, `depth` of them at different steps in one forward.

        A sound is decoded while the others go on, and its place taken by the next of as many latent frames; requests of
        another length follow when those are done. Everything else may differ from row to row. The sounds are those of
        `generate`. `on_stage` is called count_stages(requests, 1) times, for the decoder from a thread of its own.
        Raises ToolError.
        """
        if self._frees:
            raise ToolError("a ring needs all models at once", "leave --depth away, or --free-models")
        velocity = self._velocity(Meter())
        tell, groups = on_stage or _silent, ring_groups(requests, depth, velocity.max_batch)
        known = Known()
        with ThreadPoolExecutor(max_workers=1) as decoder:
            for group in groups:
                under_way = {index: Batch([requests[index]], Meter()) for index in group}
                rows = ((index, self._ring_row(under_way[index], known, tell)) for index in group)
                waiting: deque[tuple[int, Future[list[Result]]]] = deque()
                for index, latents in ring(velocity, rows, depth, lambda sigma: tell(f"sigma {sigma:.4f}")):
                    job = under_way.pop(index)
                    job.latents = latents
                    waiting.append((index, decoder.submit(self._decode, job, tell)))
                    # Handed over as soon as it is ready, and waited for where the decoder falls behind.
                    while waiting and (waiting[0][1].done() or len(waiting) > depth):
                        done, sound = waiting.popleft()
                        yield done, sound.result()[0]
                while waiting:
                    done, sound = waiting.popleft()
                    yield done, sound.result()[0]

    def close(self) -> None:
        """Close every engine."""
        self.engines.close()

    def _read(self, job: Batch, known: Known, tell: Tell) -> None:
        """The features of every text of a batch, prompts and negative prompts."""
        import torch

        texts = [row.prompt for row in job.rows]
        texts += [row.negative_prompt for row in job.rows if row.negative_prompt is not None]
        encoder = self._engine("text", job.meter)
        with torch.inference_mode(), job.meter.stage("text"):
            for words in dict.fromkeys(texts):
                if words not in known.texts:
                    known.texts[words] = text.encode_text(encoder, self.engines.tokenizer, [words])
        job.features = {words: known.texts[words] for words in texts}
        tell("text")

    def _encode(self, job: Batch, known: Known, tell: Tell) -> None:
        """Latents (1, 256, L) of each row's init audio; rows of the same sound share them."""
        import torch

        job.inits = [None] * len(job.rows)
        if all(row.init_audio is None for row in job.rows):
            return
        found: list[Tensor | None] = []
        encoder = self._engine("encode", job.meter)
        with torch.inference_mode(), job.meter.stage("encode"):
            for row in job.rows:
                if row.init_audio is None:
                    found.append(None)
                    continue
                key = (row.init_audio, row.init_start, row.frames)
                if key not in known.sounds:
                    samples = reader.read_audio(row.init_audio, row.init_start, row.frames * SAMPLES_PER_FRAME)
                    known.sounds[key] = autoencoder.encode(encoder, samples, self._chunk(row.frames))
                found.append(known.sounds[key])
        job.inits = found
        tell("init audio")

    def _engine(self, stage: str, meter: Meter) -> GraphEngine:
        """The engine of a stage; opening it, where it is not open, is time of its own."""
        if stage in self.engines.open_stages:
            return self.engines.engine(stage)
        with meter.stage("load"):
            return self.engines.engine(stage)

    def _velocity(self, meter: Meter) -> DiTVelocity:
        return DiTVelocity(self._engine("dit", meter))

    def _leave(self, stage: str) -> None:
        """A stage has ended for now: its engine goes where models are freed."""
        if self._frees:
            self.engines.release(stage)

    def _chunk(self, frames: int) -> int:
        return tiling.chunk_frames(frames, self.engines.plan.chunk_frames)

    def _sample(self, job: Batch, tell: Tell) -> None:
        """The latents (B, 256, V) of a batch."""
        import torch

        first, velocity = job.rows[0], self._velocity(job.meter)
        with torch.inference_mode():
            cond, start, kept = conditioning(job.rows, job.features, job.inits)
            guidance = self._guidance(job, cond)
            engine = velocity if guidance is None else GuidedVelocity(velocity, guidance)
            noise = row_noise([row.seed for row in job.rows], LATENT_CHANNELS, first.frames, first.valid_frames)
            with job.meter.stage("sample"):
                job.latents = ping_pong(
                    engine, noise, sigmas_of(first), cond, lambda _, sigma: tell(f"sigma {sigma:.4f}"), start, kept
                )

    def _guidance(self, job: Batch, cond: Conditioning) -> Guidance | None:
        """Return the guidance of a batch; warn where its null row would not be the model's own."""
        guidance = guidance_of(job.rows, cond, job.features)
        plain = guidance is not None and any(row.negative_prompt is None for row in job.rows)
        if plain and not self.engines.has_null_rule():
            warnings.warn(NO_NULL_RULE, ToolWarning, stacklevel=2)
        return guidance

    def _ring_row(self, job: Batch, known: Known, tell: Tell) -> RingRow:
        """A request made ready for the ring."""
        import torch

        self._read(job, known, tell)
        self._encode(job, known, tell)
        known.forget(REMEMBERED)
        (row,) = job.rows
        with torch.inference_mode():
            cond, start, kept = conditioning(job.rows, job.features, job.inits)
            noise = row_noise([row.seed], LATENT_CHANNELS, row.frames, row.valid_frames)
            path = Trajectory(noise, sigmas_of(row), start, kept)
            return RingRow(path, cond, self._guidance(job, cond), job.meter)

    def _decode(self, job: Batch, tell: Tell) -> list[Result]:
        """The sounds of a batch, row by row: the decoder takes one at a time."""
        import torch

        assert job.latents is not None
        sounds, decoder = [], self._engine("decoder", job.meter)
        with torch.inference_mode():
            for index, row in enumerate(job.rows):
                with job.meter.stage("decode"):
                    decoded = autoencoder.decode(decoder, job.latents[index : index + 1], self._chunk(row.valid_frames))
                    sounds.append(autoencoder.finish(decoded, row.seconds))
                tell("decoded")
        levels = sigmas_of(job.rows[0])
        return [
            Result(
                job.latents[index : index + 1].clone(), levels, sound, dict(job.meter.timings), dict(job.meter.memory)
            )
            for index, sound in enumerate(sounds)
        ]


def _silent(note: str) -> None:
    pass
