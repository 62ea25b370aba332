"""Plan the generations that a calibration set is captured from, so that its rows cover deployment.

Every prompt is generated from its text. With the deployment plan each prompt has one more generation, whose kind
(sa3_trt_core/artifacts/calibration_kinds) alternates from prompt to prompt. The duration changes after every kind has
been used, so that 9 prompts cover 3 kinds at each of 3 durations. The parameters of a kind change each time it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from sa3_trt_core import shapes
from sa3_trt_core.artifacts.calibration_kinds import KINDS, TURNS, CalibrationKind, Spans
from sa3_trt_core.sampling import inpainting

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
COVERS = ("deployment", "text")
DEFAULT_SECONDS = {"deployment": (54.0, 10.0, 120.0), "text": (54.0,)}
EXTRA_SEEDS = 10_000  # offset above the number of prompts: no two generations share their noise


@dataclass(frozen=True)
class Generation:
    """One ping-pong generation; its text is that of prompt number `prompt`.

    `spans` are fractions of `seconds`; `spans`, `sigma_max` and `cfg` are those of its kind at this turn.
    """

    kind: str
    prompt: int
    seconds: float
    seed: int
    spans: Spans = ()
    sigma_max: float = 1.0
    cfg: float = 1.0

    @property
    def frames(self) -> int:
        """Latent frames of the noise."""
        return shapes.latent_frames(self.seconds)

    @property
    def valid_frames(self) -> int:
        """Latent frames that the DiT runs on."""
        return shapes.valid_frames(self.seconds, self.frames)

    @property
    def ranges(self) -> Spans:
        """The spans in seconds; a span without a latent frame is extended to the next frame."""
        ranges = []
        for share, share_end in self.spans:
            start, end = share * self.seconds, share_end * self.seconds
            first, last = inpainting.regenerated_frames(start, end)
            if first == last:  # use the frame that contains the start
                middle = (first - 1) * shapes.SAMPLES_PER_FRAME / shapes.SAMPLE_RATE
                half = shapes.SAMPLES_PER_FRAME / shapes.SAMPLE_RATE / 2
                start, end = max(0.0, middle - half), middle + half
            ranges.append((start, end))
        return tuple(ranges)


def generations(prompts: int, seconds: Sequence[float], seed: int, cover: str) -> list[tuple[Generation, ...]]:
    """Return the generations of each prompt, in order; the first is its text, with seed + its index."""
    turns = TURNS if cover == "deployment" else ()
    turns_of_prompts = []
    for index in range(prompts):
        turn = index // max(1, len(turns))
        length = seconds[turn % len(seconds)]
        text = Generation(KINDS[0], index, length, seed + index)
        turns_of_prompts.append((text, *(_extra(turns[index % len(turns)], turn, text) for _ in turns[:1])))
    return turns_of_prompts


def started_from(latents: Tensor, sigma_max: float, noise: Iterator[Tensor]) -> Iterator[Tensor]:
    """Yield the noise of a ping-pong run that starts at sigma_max.

    The first item is (1 - sigma_max) latents + sigma_max noise.
    """
    yield (1.0 - sigma_max) * latents + sigma_max * next(noise)
    yield from noise


def _extra(kind: CalibrationKind, turn: int, text: Generation) -> Generation:
    def in_turn(values: Sequence[T]) -> T:
        return values[turn % len(values)]

    return Generation(
        kind.name, text.prompt - kind.text, text.seconds, text.seed + EXTRA_SEEDS,
        in_turn(kind.spans), in_turn(kind.sigma_max), in_turn(kind.cfg),
    )  # fmt: skip
