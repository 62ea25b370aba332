"""Requests to sound: text encoder, audio encoder, sampler and decoder, one batch after the other or in a ring."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from sa3_trt_core.audio import autoencoder
from sa3_trt_core.batch import TOGETHER, Batch, EncodeCache, blocks
from sa3_trt_core.lora.lora_set import LoraOptions, Loras, LoraSet, read_loras
from sa3_trt_core.model_loader import EngineSet, Plan, make_plan, plan_with
from sa3_trt_core.paths import ModelSource
from sa3_trt_core.request import Request, batches, count_stages, ring_groups
from sa3_trt_core.result import Result
from sa3_trt_core.sampling.ring import ring
from sa3_trt_core.stage_timer import Meter
from sa3_trt_core.stages import StageReporter, Stages
from sa3_trt_core.targets import DITS, PRECISIONS

Progress = Callable[[str, int, int], None]  # (stage, index from 1, total)


class Generator(Stages):
    """The engines of one model. Call `generate` repeatedly, then `close`; or use it as a context manager.

    Nothing of a request is kept after it is answered. Not for use from several threads at once.
    """

    @classmethod
    def load(
        cls, dit: str = DITS[0], precision: str = PRECISIONS[0], *, backend: str = "auto",
        onnx_root: str | Path | None = None, models_dir: str | Path | None = None, audio_input: bool = False,
        revision: str | None = None, offline: bool = False, chunk_frames: int | None = None, free_models: bool = False,
        on_engine: Progress | None = None, loras: Loras = (), lora_options: LoraOptions | None = None,
        lora_bases: Path | None = None, refit: bool = False,
    ) -> Self:  # fmt: skip
        """Find and open a model's engines.

        Args:
            dit: medium (default), sm-music or sm-sfx.
            precision: of the DiT: fp16mixed (default), fp32 or fp8.
            backend: auto (default) takes a built engine where this machine can run it, else ONNX Runtime.
            onnx_root: folder of ONNX files (default $SA3_ONNX_DIR, else the hub).
            models_dir: folder of engines (default $SA3_MODELS_DIR, else models/).
            audio_input: open the audio encoder now and not at the first request that needs it (default False).
            revision: commit or branch of the hub (default: the pinned one).
            offline: take the hub's files from its cache only (default False).
            chunk_frames: window of the autoencoder in latent frames: 0 for one piece, else 64 or more (default None:
                one piece unless the sound is long).
            free_models: open each engine when its stage begins and close it when that ends (default False): the sounds
                are the same, the memory is that of the largest engine, and every call loads them again.
            on_engine: called with (engine, index from 1, total) after each engine that is opened.
            loras, lora_options, lora_bases: adapters, as for `set_loras` (default: none).
            refit: put merged weights into a TensorRT engine that was built for it (default False: an engine a set).

        Raises:
            ToolError: a file, a package or a GPU is missing; InvalidRequest: a wrong argument.
        """
        source = ModelSource.of(onnx_root, models_dir, revision, offline)
        plan = make_plan(dit, precision, backend, source, audio_input, chunk_frames)
        plan = plan_with(plan, read_loras(loras, lora_options), lora_bases, refit)
        return cls.open(plan, free_models, on_engine)

    @classmethod
    def open(cls, plan: Plan, free_models: bool = False, on_engine: Progress | None = None) -> Self:
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
    def loras(self) -> LoraSet:
        """The adapters of every request; equal `digest` means the same files, strengths, order and rules."""
        return self.engines.plan.loras

    def set_loras(
        self, loras: Loras, lora_options: LoraOptions | None = None, lora_bases: Path | None = None
    ) -> LoraSet:  # fmt: skip
        """Run with these adapters, in order, from the next request on; an empty list runs without any.

        Args:
            loras: each "FILE:STRENGTH", a path, (path, strength) or a LoraSpec.
            lora_options: the strength rule, the stacking rule and what is left out (default: as the native loader).
            lora_bases: native model.safetensors for the SVD of -xs adapters (default: the weights at hand).

        The torch backend merges in place; the others open the merged graph or engine of the set.

        Raises:
            ToolError: with the model as it was; a part of a file that has no effect is a ToolWarning.
        """
        chosen = read_loras(loras, lora_options)
        self.engines.set_loras(chosen, lora_bases)
        return chosen

    @property
    def clips(self) -> bool:
        """True if the decoder clips its samples to full scale itself, so that a limiter has no effect."""
        try:
            return autoencoder.is_clipped(self.engines.engine("decoder"))
        finally:
            self._leave("decoder")

    def generate(self, request: Request, on_stage: Progress | None = None) -> Result:
        """Return the sound of one request.

        Args:
            request: what to generate.
            on_stage: called with (stage, index from 1, total) after text, init audio, every step and the decoder.

        Raises:
            ToolError: the request cannot be met, for example for lack of memory.
        """
        ((_, result),) = self.generate_many([request], 1, on_stage)
        return result

    def generate_batch(
        self, requests: Sequence[Request], batch: int = 1, on_stage: Progress | None = None
    ) -> list[Result]:
        """Return the sounds of requests in their order, as `generate_many` makes them. Raises ToolError."""
        results = dict(self.generate_many(requests, batch, on_stage))
        return [results[index] for index in range(len(requests))]

    def generate_many(
        self, requests: Sequence[Request], batch: int = 1, on_stage: Progress | None = None
    ) -> Iterator[tuple[int, Result]]:
        """(index of the request, its sound) as they are finished, in batches of at most `batch` rows of equal length.

        A row's sound does not depend on its neighbours. Where models are freed, a stage does all batches of up to
        TOGETHER rows before the next one begins.

        Args:
            requests: any; rows of one batch have equal length, noise levels and guidance.
            batch: rows a forward, 1 to 8; a guided request takes two of them (default 1).
            on_stage: called with (stage, index from 1, total).

        Raises:
            ToolError: a request cannot be met; InvalidRequest: the batch does not fit an engine.
        """
        report_stage = _reporter(on_stage, requests, batch)
        for block in blocks(list(batches(requests, batch)), TOGETHER if self._frees else 1):
            jobs, cache = [Batch([requests[row] for row in rows], Meter(len(rows))) for rows in block], EncodeCache()
            for job in jobs:
                self._read(job, cache, report_stage)
            self._leave("text")
            for job in jobs:
                self._encode(job, cache, report_stage)
            self._leave("encode")
            for job in jobs:
                self._sample(job, report_stage)
            self._leave("dit")
            for rows, job in zip(block, jobs, strict=True):
                yield from zip(rows, self._decode(job, report_stage), strict=True)
            self._leave("decoder")

    def generate_ring(
        self, requests: Sequence[Request], depth: int, on_stage: Progress | None = None
    ) -> Iterator[tuple[int, Result]]:
        """(index of the request, its sound) as they are finished, `depth` of them at different steps in one forward.

        A sound is decoded while the others go on, and its place taken by the next of as many latent frames; requests of
        another length follow when those are done. Everything else may differ from row to row. The sounds are those of
        `generate`.

        Args:
            requests: any.
            depth: rows a forward, 1 to 8; a guided request takes two of them.
            on_stage: called with (stage, index from 1, total), for the decoder from a thread of its own.

        Raises:
            ToolError: a request cannot be met; InvalidRequest: the ring does not fit the DiT.
        """
        velocity = self.ring_velocity()
        report_stage, groups = _reporter(on_stage, requests, 1), ring_groups(requests, depth, velocity.max_batch)
        cache = EncodeCache()
        with ThreadPoolExecutor(max_workers=1) as decoder:
            for group in groups:
                under_way = {index: Batch([requests[index]], Meter()) for index in group}
                rows = ((index, self._ring_row(under_way[index], cache, report_stage)) for index in group)
                waiting: deque[tuple[int, Future[list[Result]]]] = deque()
                for index, latents in ring(velocity, rows, depth, lambda sigma: report_stage(f"sigma {sigma:.4f}")):
                    job = under_way.pop(index)
                    job.latents = latents
                    waiting.append((index, decoder.submit(self._decode, job, report_stage)))
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


def _silent(note: str) -> None:
    pass


def _reporter(on_stage: Progress | None, requests: Sequence[Request], batch: int) -> StageReporter:
    """Return a function that counts the stages it is called with, from any thread, and reports each to `on_stage`."""
    if on_stage is None:
        return _silent
    total, done, lock = count_stages(requests, batch), itertools.count(1), threading.Lock()

    def report_stage(stage: str) -> None:
        with lock:
            on_stage(stage, next(done), total)

    return report_stage
