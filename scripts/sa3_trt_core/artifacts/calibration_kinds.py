"""The kinds of calibration rows: one record a kind, which plan, capture, file format, reports and help iterate over.

A kind is a generation with some of these varied from turn to turn: the parts that in-painting makes anew, the noise
level that it starts from, the scale of guidance. What the DiT is fed follows from them (sa3_build/calibration/capture).
"""

from __future__ import annotations

from dataclasses import dataclass

Spans = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class CalibrationKind:
    """One kind, and what its generations use in turn.

    `spans` are parts of the sound to make anew from the prompt's own latents; `sigma_max` noise levels to start from,
    below 1 with those latents under the noise; `cfg` guidance scales, above 1 with the null rows recorded. `text` is
    the number of prompts to go back for the text.
    """

    name: str
    about: str
    spans: tuple[Spans, ...] = ((),)
    sigma_max: tuple[float, ...] = (1.0,)
    cfg: tuple[float, ...] = (1.0,)
    text: int = 0


# A kind is stored as its place here: append, never reorder. The first one is every prompt's own text.
TABLE = (
    CalibrationKind("text", "text"),
    CalibrationKind(  # the middle, the end (a continuation), two holes, the beginning
        "inpaint", "in-painting",
        spans=(((0.25, 0.75),), ((0.5, 1.0),), ((0.1, 0.3), (0.6, 0.8)), ((0.0, 0.4),)),
    ),
    CalibrationKind("audio", "audio to audio", sigma_max=(0.9, 0.7, 0.5, 0.3), text=1),
    CalibrationKind("null", "null rows of guidance", cfg=(3.0, 7.0)),
)  # fmt: skip
KINDS = tuple(kind.name for kind in TABLE)
TURNS = TABLE[1:]  # what prompts give beside their text
EXTRA = f"{', '.join(kind.about for kind in TURNS[:-1])} or {TURNS[-1].about}"  # for help texts
