"""Kinds of calibration rows: one record per kind, used by plan, capture, file format, reports and help.

A kind is a mode of generation whose settings vary from prompt to prompt: in-painting ranges, initial sigma and guidance
scale. They determine the DiT's inputs (sa3_build/calibration/capture).
"""

from __future__ import annotations

from dataclasses import dataclass

Spans = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class CalibrationKind:
    """One kind, and the settings that its generations cycle through.

    `spans` are ranges to regenerate (in-painting of the prompt's own latents). `sigma_max` are initial sigmas; below 1
    the prompt's latents are the init latents. `cfg` are guidance scales; above 1 the unconditional rows are recorded.
    `text` is the offset (in prompts, backwards) of the text.
    """

    name: str
    about: str
    spans: tuple[Spans, ...] = ((),)
    sigma_max: tuple[float, ...] = (1.0,)
    cfg: tuple[float, ...] = (1.0,)
    text: int = 0


# Files store the index in this table: append, never reorder. The first kind is every prompt's own text.
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
TURNS = TABLE[1:]  # kinds besides each prompt's text
EXTRA = f"{', '.join(kind.about for kind in TURNS[:-1])} or {TURNS[-1].about}"  # for help texts
