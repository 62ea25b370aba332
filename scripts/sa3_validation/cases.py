"""Generations and single steps on which two DiTs are compared: from prompts or from rows of a calibration set."""

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
from sa3_validation.perturbation import with_start

if TYPE_CHECKING:
    from torch import Tensor

    from sa3_trt_core.engines.base import GraphEngine, VelocityEngine

TEXT, INPAINT, GUIDED = "text", "inpaint", "guided"
KINDS = (TEXT, INPAINT, GUIDED, *(kind for kind in CALIBRATED if kind not in (TEXT, INPAINT)))
GUIDANCE_SCALE = 3.0  # of guided generations
INPAINT_RANGE = (0.25, 0.75)  # shares of the sound between which in-painting regenerates


@dataclass(frozen=True)
class Case:
    """One generation of one row (B = 1). `null` is the unconditional input of guidance, None without guidance.

    `start` is the x at sigma 1 of a calibration row; without it the start is the first draw of `seed`.
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
        """Number of latent frames L."""
        return int(self.cond.local_add_cond.shape[-1])

    def dit(self, engine: GraphEngine) -> VelocityEngine:
        """Return the engine as the velocity function of this generation: plain, or guided."""
        return _velocity_engine(engine, self.null)

    def noise(self) -> Iterator[Tensor]:
        """Return the start, then one draw a step; equal for all DiTs."""
        whole = shapes.latent_frames(self.seconds)
        padded = shapes.valid_frames(self.seconds, whole) == self.frames
        drawn = row_noise([self.seed], shapes.LATENT_CHANNELS, whole if padded else self.frames, self.frames)
        return drawn if self.start is None else with_start(self.start, drawn)


@dataclass(frozen=True)
class StepInput:
    """Inputs of one DiT step; `source` names its origin in reports."""

    source: str
    prompt: str
    kind: str
    x: Tensor
    t: Tensor
    cond: Conditioning
    null: Conditioning | None = None

    @property
    def sigma(self) -> float:
        """Noise level."""
        return float(self.t[0])

    @property
    def frames(self) -> int:
        """Number of latent frames L."""
        return int(self.x.shape[-1])

    def dit(self, engine: GraphEngine) -> VelocityEngine:
        """Return the engine as the velocity function of the generation that the step belongs to."""
        return _velocity_engine(engine, self.null)


@dataclass(frozen=True)
class TextCaseOptions:
    """Prompts, seeds a prompt, first seed and length (seconds) of text cases."""

    prompts: tuple[str, ...]
    seeds: int
    seed: int
    seconds: float


def text_cases(options: TextCaseOptions, encoder: GraphEngine, tokenizer: text.Tokenizer) -> list[Case]:
    """Return one case for each prompt and seed: all prompts with the first seed, then all with the second."""
    import torch

    frames = shapes.valid_frames(options.seconds, shapes.latent_frames(options.seconds))
    conds = []
    for prompt in options.prompts:
        hidden, mask = text.encode_text(encoder, tokenizer, [prompt])
        local = torch.zeros(1, shapes.LOCAL_CHANNELS, frames)
        conds.append(Conditioning(hidden, mask, torch.tensor([options.seconds], dtype=torch.float32), local))
    return [
        Case(f"text {index + 1}" if options.seeds == 1 else f"text {index + 1}, seed {turn + 1}", TEXT, prompt,
             options.seed + turn * len(conds) + index, options.seconds, conds[index])
        for turn in range(options.seeds)
        for index, prompt in enumerate(options.prompts)
    ]  # fmt: skip


def starts_of(calibration: CalibrationSet) -> list[int]:
    """Return the rows of sigma 1, where x is pure noise, so that generations can start from them.

    Raises ToolError when the set has no such row.
    """
    starts = [index for index, sigma in enumerate(calibration.sigmas()) if sigma == 1.0]
    if not starts:
        raise ToolError(f"{calibration.path} has no row of sigma 1", "make a set with build/make_calib.py")
    return starts


def calibration_cases(calibration: CalibrationSet, starts: Sequence[int]) -> list[Case]:
    """Return one case for each of the rows `starts` (of `starts_of`), in their order; its seed is the row's number."""
    prompts = _prompts_of_rows(calibration)
    chosen = calibration.subset(starts)
    cases = []
    for index, kind, row in zip(sorted(chosen.indices), chosen.kinds(), chosen, strict=True):
        row_tensors = tensors(row)
        seconds = float(row_tensors["seconds_total"][0])
        cases.append(
            Case(
                f"row {index}, {kind}",
                kind,
                prompts[index],
                index,
                seconds,
                _conditioning(row_tensors),
                start=row_tensors["x"],
            )
        )
    return cases


def calibration_rows(calibration: CalibrationSet, max_rows: int) -> list[StepInput]:
    """Return at most `max_rows` single steps of a set, with at least one of every kind at every sigma."""
    chosen = representative(calibration, max_rows)
    prompts = _prompts_of_rows(calibration)
    steps = []
    for index, kind, row in zip(sorted(chosen.indices), chosen.kinds(), chosen, strict=True):
        row_tensors = tensors(row)
        steps.append(
            StepInput(
                f"row {index} of the set",
                prompts[index],
                kind,
                row_tensors["x"],
                row_tensors["t"],
                _conditioning(row_tensors),
            )
        )
    return steps


def inpaint_case(case: Case, latents: np.ndarray) -> Case:
    """Return a case with the same text that in-paints the middle half of its own latents (1, 256, L) with other
    noise.
    """
    import torch

    start, end = (share * case.seconds for share in INPAINT_RANGE)
    keep = keep_mask(case.seconds, case.frames, [(start, end)])
    local = local_conditioning(torch.from_numpy(latents), keep)
    cond = replace(case.cond, local_add_cond=local)
    return replace(case, name=_renamed(case, INPAINT), kind=INPAINT, seed=case.seed + 10_000, cond=cond, start=None)


def guided_case(case: Case) -> Case:
    """Return the case with classifier-free guidance: the same text and noise, and null conditioning."""
    return replace(case, name=_renamed(case, GUIDED), kind=GUIDED, null=null_conditioning(case.cond))


def _velocity_engine(engine: GraphEngine, null: Conditioning | None) -> VelocityEngine:
    plain = DiTVelocity(engine)
    return plain if null is None else GuidedVelocity(plain, Guidance(null, GUIDANCE_SCALE, FULL_APG))


def _renamed(case: Case, kind: str) -> str:
    return case.name.replace(TEXT, kind)


def _conditioning(tensors: dict[str, Tensor]) -> Conditioning:
    return Conditioning(tensors["t5_hidden"], tensors["t5_mask"], tensors["seconds_total"], tensors["local_add_cond"])


def _prompts_of_rows(calibration: CalibrationSet) -> Sequence[str]:
    """Return the text of every row from the manifest beside the set; empty texts when the manifest does not have
    them.
    """
    record = manifest.read_manifest(calibration.path)
    settings = record.settings if record is not None else {}
    texts, made, steps = (settings.get(key) for key in ("prompts", "generations", "steps"))
    if isinstance(texts, list) and isinstance(made, list) and isinstance(steps, int):
        rows = [texts[generation["prompt"]] for generation in made for _ in range(steps)]
        if len(rows) == calibration.rows:
            return rows
    return [""] * calibration.rows


def prompts_of(count: int | None, path: Path | None, examples: Sequence[str]) -> tuple[str, ...]:
    """Return the prompts of a file, or the first `count` of `examples`. Raises ToolError."""
    if path is not None:
        from sa3_trt_core.cli.prompts import read_prompts

        texts = [row.prompt for row in read_prompts(path)]
        return tuple(texts[:count] if count else texts)
    if count is not None and count > len(examples):
        raise ToolError(f"--prompts {count}: only {len(examples)} examples exist", "give your own with --prompts-file")
    return tuple(examples[:count])
