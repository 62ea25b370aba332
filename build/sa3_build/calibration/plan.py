"""What a calibration set is captured from: which generation each prompt gives, so that the rows cover deployment.

Every prompt is generated from its text. Covering deployment, it then gives one more generation, and the three kinds
take turns from prompt to prompt: in-painting of the latents just made, audio to audio from them to the text of the
prompt before, and guided generation, of which the null rows are kept. Durations change every three prompts, so that 9
prompts hold every kind at each of 3 durations; mask, start level and guidance scale change with every turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sa3_trt_core import shapes
from sa3_trt_core.sampling import inpainting

if TYPE_CHECKING:
    from torch import Tensor

COVERS = ("deployment", "text")
TURNS = ("inpaint", "audio", "null")
DEFAULT_SECONDS = {"deployment": (54.0, 10.0, 120.0), "text": (54.0,)}
Spans = tuple[tuple[float, float], ...]
# Parts of the sound to make anew: its middle, its end (a continuation), two holes, its beginning.
MASKS: tuple[Spans, ...] = (((0.25, 0.75),), ((0.5, 1.0),), ((0.1, 0.3), (0.6, 0.8)), ((0.0, 0.4),))
START_LEVELS = (0.9, 0.7, 0.5, 0.3)  # sigma_max of audio to audio
GUIDANCE = (3.0, 7.0)
EXTRA_SEEDS = 10_000  # more than there are prompts: no two generations share their noise


@dataclass(frozen=True)
class Generation:
    """One ping-pong generation; its text is that of prompt number `prompt`.

    `spans` (in-painting) are parts of `seconds`, `sigma_max` (audio to audio) the start level, `cfg` (null) the scale.
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
        """Latent frames whose noise is drawn."""
        return shapes.latent_frames(self.seconds)

    @property
    def valid_frames(self) -> int:
        """Latent frames that the DiT runs on."""
        return shapes.valid_frames(self.seconds, self.frames)

    @property
    def ranges(self) -> Spans:
        """The spans in seconds, each lengthened to its next latent frame where it would hold none."""
        found = []
        for share, until in self.spans:
            start, end = share * self.seconds, until * self.seconds
            first, last = inpainting.regenerated_frames(start, end)
            if first == last:  # the frame that holds the start
                middle = (first - 1) * shapes.SAMPLES_PER_FRAME / shapes.SAMPLE_RATE
                half = shapes.SAMPLES_PER_FRAME / shapes.SAMPLE_RATE / 2
                start, end = max(0.0, middle - half), middle + half
            found.append((start, end))
        return tuple(found)


def generations(prompts: int, seconds: Sequence[float], seed: int, cover: str) -> list[tuple[Generation, ...]]:
    """What each prompt gives, in order; the first is its own text, with seed + its number."""
    turns = TURNS if cover == "deployment" else ()
    found = []
    for index in range(prompts):
        turn = index // max(1, len(turns))
        length = seconds[turn % len(seconds)]
        text = Generation("text", index, length, seed + index)
        found.append((text, *(_extra(turns[index % len(turns)], index, turn, text) for _ in turns[:1])))
    return found


def started_from(latents: Tensor, sigma_max: float, noise: Iterator[Tensor]) -> Iterator[Tensor]:
    """Noise for a ping-pong run that starts at sigma_max: (1 - sigma_max) latents + sigma_max noise, then noise."""
    yield (1.0 - sigma_max) * latents + sigma_max * next(noise)
    yield from noise


def _extra(kind: str, index: int, turn: int, text: Generation) -> Generation:
    seed = text.seed + EXTRA_SEEDS
    if kind == "inpaint":
        return Generation(kind, index, text.seconds, seed, spans=MASKS[turn % len(MASKS)])
    if kind == "audio":
        level = START_LEVELS[turn % len(START_LEVELS)]
        return Generation(kind, index - 1, text.seconds, seed, sigma_max=level)
    return Generation(kind, index, text.seconds, seed, cfg=GUIDANCE[turn % len(GUIDANCE)])
