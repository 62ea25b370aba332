"""Text to audio: one request through text encoder, sampler and decoder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sa3_trt_core import autoencoder, schedule, text
from sa3_trt_core.engines.base import Closing, DiTVelocity
from sa3_trt_core.sampler import Conditioning, ping_pong, row_noise
from sa3_trt_core.shapes import LATENT_CHANNELS, LOCAL_CHANNELS, frame_cap, latent_frames

if TYPE_CHECKING:
    from torch import Tensor

    from sa3_trt_core.engines.base import GraphEngine


@dataclass(frozen=True)
class Request:
    """One sound: its prompt (may be empty), length in seconds, sampler steps and seed."""

    prompt: str
    seconds: float
    steps: int
    seed: int

    @property
    def frames(self) -> int:
        """Latent frames to generate."""
        return latent_frames(self.seconds, frame_cap(self.seconds))

    @property
    def stages(self) -> int:
        """How often the generator tells of its progress: text, steps, decoder."""
        return self.steps + 2


@dataclass(frozen=True)
class Result:
    """Latents (1, 256, L) fp32, sigmas (steps + 1,), pcm int16 (samples, 2), and the seconds of each stage."""

    latents: Tensor
    sigmas: Tensor
    pcm: Tensor
    timings: dict[str, float]


class Generator(Closing):
    """The three engines and the tokenizer of one model, held open; a context manager that closes them."""

    def __init__(self, tokenizer: text.Tokenizer, encoder: GraphEngine, dit: GraphEngine, decoder: GraphEngine) -> None:
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._velocity = DiTVelocity(dit)
        self._decoder = decoder

    def generate(self, request: Request, on_stage: Callable[[str], None] | None = None) -> Result:
        """The sound of one request. Raises ToolError.

        `on_stage(note)` is called request.stages times: after the text, after every step, after the decoder.
        """
        import torch

        tell = on_stage or (lambda note: None)
        timings: dict[str, float] = {}
        with torch.inference_mode():
            with _timed(timings, "text"):
                hidden, mask = text.encode_text(self._encoder, self._tokenizer, [request.prompt])
            tell("text")
            frames = request.frames
            cond = Conditioning(
                t5_hidden=hidden,
                t5_mask=mask,
                seconds_total=torch.tensor([request.seconds], dtype=torch.float32),
                local_add_cond=torch.zeros(1, LOCAL_CHANNELS, frames),
            )
            levels = schedule.sigmas(request.steps)
            with _timed(timings, "sample"):
                noise = row_noise([request.seed], LATENT_CHANNELS, frames)
                latents = ping_pong(self._velocity, noise, levels, cond, lambda _, sigma: tell(f"sigma {sigma:.4f}"))
            with _timed(timings, "decode"):
                pcm = autoencoder.finish(autoencoder.decode(self._decoder, latents), request.seconds)
            tell("decoded")
        return Result(latents, levels, pcm, timings)

    def close(self) -> None:
        """Close every engine, whatever the others do."""
        with ExitStack() as stack:
            for engine in (self._encoder, self._velocity, self._decoder):
                stack.callback(engine.close)


@contextmanager
def _timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    timings[stage] = time.perf_counter() - started
