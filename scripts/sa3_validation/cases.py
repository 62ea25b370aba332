"""What is generated to compare two DiTs: prompts or a calibration set's starts, in-painting and guidance of some."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sa3_trt_core import shapes, text
from sa3_trt_core.artifacts import manifest
from sa3_trt_core.artifacts.calibration_kinds import KINDS as CALIBRATED
from sa3_trt_core.artifacts.calibration_set import CalibrationSet, representative, tensors
from sa3_trt_core.conditioning import Conditioning
from sa3_trt_core.engines.base import DiTVelocity
from sa3_trt_core.errors import ToolError
from sa3_trt_core.request import FULL_APG
from sa3_trt_core.sampling.guidance import Guidance, GuidedVelocity, null_conditioning
from sa3_trt_core.sampling.inpainting import keep_mask, local_conditioning
from sa3_trt_core.sampling.sampler import row_noise
from sa3_validation.perturbation import started

if TYPE_CHECKING:
    from torch import Tensor

    from sa3_trt_core.engines.base import GraphEngine, VelocityEngine

TEXT, INPAINT, GUIDED = "text", "inpaint", "guided"
KINDS = (TEXT, INPAINT, GUIDED, *(kind for kind in CALIBRATED if kind not in (TEXT, INPAINT)))  # then those of sets
SCALE = 3.0  # of guided generations
REGENERATED = (0.25, 0.75)  # of the sound: what in-painting makes anew


@dataclass(frozen=True)
class Case:
    """One generation of one row (B = 1). `null` is the conditioning to lead away from, None without guidance.

    `start` is the x at sigma 1 of a calibration row; without one it is the first draw of `seed`.
    """

    name: str
    kind: str
    prompt: str
    seed: int
    seconds: float
    cond: Conditioning
    null: Conditioning | None = None
    start: Tensor | None = None

    @property
    def frames(self) -> int:
        """Latent frames that the DiT runs on."""
        return int(self.cond.local_add_cond.shape[-1])

    def dit(self, engine: GraphEngine) -> VelocityEngine:
        """The DiT as this generation asks it: itself, or guided."""
        return _asked(engine, self.null)

    def noise(self) -> Iterator[Tensor]:
        """The start, then one draw a step; the same for every DiT."""
        whole = shapes.latent_frames(self.seconds)
        padded = shapes.valid_frames(self.seconds, whole) == self.frames
        drawn = row_noise([self.seed], shapes.LATENT_CHANNELS, whole if padded else self.frames, self.frames)
        return drawn if self.start is None else started(self.start, drawn)


@dataclass(frozen=True)
class Row:
    """One single step: what the DiT is fed, and where it comes from (`source`, for people)."""

    source: str
    prompt: str
    kind: str
    x: Tensor
    t: Tensor
    cond: Conditioning
    null: Conditioning | None = None

    @property
    def sigma(self) -> float:
        """The noise level."""
        return float(self.t[0])

    @property
    def frames(self) -> int:
        """Latent frames."""
        return int(self.x.shape[-1])

    def dit(self, engine: GraphEngine) -> VelocityEngine:
        """The DiT as the generation that this step is of asks it."""
        return _asked(engine, self.null)


@dataclass(frozen=True)
class Wanted:
    """What a person asks for: texts, seeds a text, the first seed, and the length."""

    prompts: tuple[str, ...]
    seeds: int
    seed: int
    seconds: float


def text_cases(wanted: Wanted, encoder: GraphEngine, tokenizer: text.Tokenizer) -> list[Case]:
    """One case a prompt and seed, in that order of variation: all prompts with the first seed, then the second."""
    import torch

    frames = shapes.valid_frames(wanted.seconds, shapes.latent_frames(wanted.seconds))
    conds = []
    for prompt in wanted.prompts:
        hidden, mask = text.encode_text(encoder, tokenizer, [prompt])
        local = torch.zeros(1, shapes.LOCAL_CHANNELS, frames)
        conds.append(Conditioning(hidden, mask, torch.tensor([wanted.seconds], dtype=torch.float32), local))
    return [
        Case(f"text {index + 1}" if wanted.seeds == 1 else f"text {index + 1}, seed {turn + 1}", TEXT, prompt,
             wanted.seed + turn * len(conds) + index, wanted.seconds, conds[index])
        for turn in range(wanted.seeds)
        for index, prompt in enumerate(wanted.prompts)
    ]  # fmt: skip


def starts_of(calibration: CalibrationSet) -> list[int]:
    """The rows that generations can start from: of sigma 1, so that x is pure noise; the rest is the conditioning.

    Raises ToolError when the set has no such row.
    """
    starts = [index for index, sigma in enumerate(calibration.sigmas()) if sigma == 1.0]
    if not starts:
        raise ToolError(f"{calibration.path} has no row of sigma 1", "make a set with build/make_calib.py")
    return starts


def calibration_cases(calibration: CalibrationSet, starts: Sequence[int]) -> list[Case]:
    """One case for each of the rows `starts` (of `starts_of`), in their order; its seed is the row's number."""
    prompts = _prompts_of_rows(calibration)
    chosen = calibration.subset(starts)
    found = []
    for index, kind, row in zip(sorted(chosen.indices), chosen.kinds(), chosen, strict=True):
        held = tensors(row)
        seconds = float(held["seconds_total"][0])
        found.append(
            Case(f"row {index}, {kind}", kind, prompts[index], index, seconds, _conditioning(held), None, held["x"])
        )
    return found


def calibration_rows(calibration: CalibrationSet, most: int) -> list[Row]:
    """Single steps of a set: at most `most` rows, one at least of every kind at every sigma."""
    chosen = representative(calibration, most)
    prompts = _prompts_of_rows(calibration)
    found = []
    for index, kind, row in zip(sorted(chosen.indices), chosen.kinds(), chosen, strict=True):
        held = tensors(row)
        found.append(Row(f"row {index} of the set", prompts[index], kind, held["x"], held["t"], _conditioning(held)))
    return found


def in_painted(case: Case, latents: np.ndarray) -> Case:
    """The same text over its own latents (1, 256, L), of which the middle half is made anew, with other noise."""
    import torch

    start, end = (share * case.seconds for share in REGENERATED)
    keep = keep_mask(case.seconds, case.frames, [(start, end)])
    local = local_conditioning(torch.from_numpy(latents), keep)
    cond = replace(case.cond, local_add_cond=local)
    return replace(case, name=_renamed(case, INPAINT), kind=INPAINT, seed=case.seed + 10_000, cond=cond, start=None)


def guided(case: Case) -> Case:
    """The same text and noise, led away from the null row."""
    return replace(case, name=_renamed(case, GUIDED), kind=GUIDED, null=null_conditioning(case.cond))


def _asked(engine: GraphEngine, null: Conditioning | None) -> VelocityEngine:
    plain = DiTVelocity(engine)
    return plain if null is None else GuidedVelocity(plain, Guidance(null, SCALE, FULL_APG))


def _renamed(case: Case, kind: str) -> str:
    return case.name.replace(TEXT, kind)


def _conditioning(held: dict[str, Tensor]) -> Conditioning:
    return Conditioning(held["t5_hidden"], held["t5_mask"], held["seconds_total"], held["local_add_cond"])


def _prompts_of_rows(calibration: CalibrationSet) -> Sequence[str]:
    """The text of every row, from the manifest beside the set; empty where that does not say."""
    found = manifest.read_manifest(calibration.path)
    settings = found.settings if found is not None else {}
    texts, made, steps = (settings.get(key) for key in ("prompts", "generations", "steps"))
    if isinstance(texts, list) and isinstance(made, list) and isinstance(steps, int):
        rows = [texts[one["prompt"]] for one in made for _ in range(steps)]
        if len(rows) == calibration.rows:
            return rows
    return [""] * calibration.rows


def prompts_of(count: int | None, path: Path | None, examples: Sequence[str]) -> tuple[str, ...]:
    """The texts: of a file, or the first of `examples` where none is given. Raises ToolError."""
    if path is not None:
        from sa3_trt_core.cli.prompts import read_prompts

        texts = [row.prompt for row in read_prompts(path)]
        return tuple(texts[:count] if count else texts)
    if count is not None and count > len(examples):
        raise ToolError(f"--prompts {count}: there are {len(examples)}", "give your own with --prompts-file")
    return tuple(examples[:count])
