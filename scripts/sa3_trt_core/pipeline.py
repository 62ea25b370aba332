"""Generate sounds from requests: text encoder, audio encoder, sampler and decoder, in batches or in a ring."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from sa3_trt_core.audio import autoencoder
from sa3_trt_core.batch import MAX_BLOCK_ROWS, Batch, EncodeCache, blocks
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

    No data of a request outlives its result. Not thread-safe.
    """

    @classmethod
    def load(
        cls, dit: str = DITS[0], precision: str = PRECISIONS[0], *, backend: str = "auto",
        onnx_root: str | Path | None = None, models_dir: str | Path | None = None, audio_input: bool = False,
        revision: str | None = None, offline: bool = False, chunk_frames: int | None = None, free_models: bool = False,
        on_engine: Progress | None = None, loras: Loras = (), lora_options: LoraOptions | None = None,
        lora_bases: Path | None = None, refit: bool = False,
    ) -> Self:  # fmt: skip
        """Locate and open a model's engines.

        Args:
            dit: medium (default), sm-music or sm-sfx.
            precision: of the DiT: fp16mixed (default), fp32 or fp8.
            backend: auto (default) uses a built engine that this machine can run, else ONNX Runtime.
            onnx_root: folder of ONNX files (default $SA3_ONNX_DIR, else the hub).
            models_dir: folder of engines (default $SA3_MODELS_DIR, else models/).
            audio_input: open the audio encoder now instead of at its first use (default False).
            revision: commit or branch of the hub (default: the pinned one).
            offline: use only the hub's cache, without network requests (default False).
            chunk_frames: window of the autoencoder in latent frames: 0 for one piece, else 64 or more (default None:
                one piece unless the sound is long).
            free_models: open each engine when its stage begins and close it when the stage ends (default False). Sounds
                are identical; memory is that of the largest engine; every call loads the engines again.
            on_engine: called with (engine, index from 1, total) after each engine has been opened.
            loras, lora_options, lora_bases: adapters, as for `set_loras` (default: none).
            refit: write merged weights into a refittable TensorRT engine (default False: one engine per adapter set).

        Raises:
            ToolError: a file, a package or a GPU is missing; InvalidRequest: a wrong argument.
        """
        source = ModelSource.of(onnx_root, models_dir, revision, offline)
        plan = make_plan(dit, precision, backend, source, audio_input, chunk_frames)
        plan = plan_with(plan, read_loras(loras, lora_options), lora_bases, refit)
        return cls.open(plan, free_models, on_engine)

    @classmethod
    def open(cls, plan: Plan, free_models: bool = False, on_engine: Progress | None = None) -> Self:
        """Locate and open the engines of a plan, as `load` does. Raises ToolError."""
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
        """Adapters of every request. Equal `digest` means the same files, strengths, order and rules."""
        return self.engines.plan.loras

    def set_loras(
        self, loras: Loras, lora_options: LoraOptions | None = None, lora_bases: Path | None = None
    ) -> LoraSet:  # fmt: skip
        """Use these adapters, in order, from the next request on; an empty list removes them.

        Args:
            loras: each "FILE:STRENGTH", a path, (path, strength) or a LoraSpec.
            lora_options: strength rule, stacking rule and excluded layers (default: as the native loader).
            lora_bases: native model.safetensors for the SVD of -xs adapters (default: the loaded weights).

        The torch backend merges in place; other backends open the merged graph or engine of the set.

        Raises:
            ToolError: the model is unchanged. A part of a file without effect is a ToolWarning.
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
        """Generate the sound of one request.

        Args:
            request: what to generate.
            on_stage: called with (stage, index from 1, total) after text, init audio, every step and the decoder.

        Raises:
            ToolError: the request failed, for example out of memory.
        """
        ((_, result),) = self.generate_many([request], 1, on_stage)
        return result

    def generate_batch(
        self, requests: Sequence[Request], batch: int = 1, on_stage: Progress | None = None
    ) -> list[Result]:
        """Generate with `generate_many` and return the results in the order of the requests. Raises ToolError."""
        results = dict(self.generate_many(requests, batch, on_stage))
        return [results[index] for index in range(len(requests))]

    def generate_many(
        self, requests: Sequence[Request], batch: int = 1, on_stage: Progress | None = None
    ) -> Iterator[tuple[int, Result]]:
        """Yield (request index, result) as batches finish; a batch has at most `batch` rows of equal length.

        A row's sound does not depend on the other rows. With `free_models` each stage processes all batches of up to
        MAX_BLOCK_ROWS rows before the next stage begins.

        Args:
            requests: any; a batch combines those of equal length, noise levels and guidance.
            batch: rows per forward, 1 to 8 (default 1); a guided request counts as two.
            on_stage: called with (stage, index from 1, total).

        Raises:
            ToolError: a request failed; InvalidRequest: the batch does not fit an engine.
        """
        report_stage = _reporter(on_stage, requests, batch)
        for block in blocks(list(batches(requests, batch)), MAX_BLOCK_ROWS if self._frees else 1):
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
        """Yield (request index, result) by continuous batching: `depth` requests at different steps share a forward.

        A finished row is decoded while the others continue, and the next request of equal latent length takes its
        slot; requests of another length follow afterwards. All other settings may differ between rows. The results
        equal those of `generate`.

        Args:
            requests: any.
            depth: rows per forward, 1 to 8; a guided request counts as two.
            on_stage: called with (stage, index from 1, total), for the decoder from another thread.

        Raises:
            ToolError: a request failed; InvalidRequest: the ring does not fit the DiT.
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
                    # Yield results as soon as they are decoded; wait for the decoder if more than `depth` are queued.
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
    """Return a thread-safe function that calls `on_stage` with each stage, its index and the total."""
    if on_stage is None:
        return _silent
    total, done, lock = count_stages(requests, batch), itertools.count(1), threading.Lock()

    def report_stage(stage: str) -> None:
        with lock:
            on_stage(stage, next(done), total)

    return report_stage
