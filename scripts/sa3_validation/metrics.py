"""Compute the figures of the validation report, a JSON document (layout: build/docs/validation.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from sa3_validation import fp16_collision
from sa3_validation.audio_metrics import AudioDistance, audio_distance, sound_levels
from sa3_validation.cases import KINDS
from sa3_validation.distances import Distance, distance, spread
from sa3_validation.rollouts import SAMPLERS
from sa3_validation.study import CANDIDATE, COMPARED, StudyResult, batch_distances, step_distances

FORMAT = 1
STEP_FIGURES = ("velocity", "denoised", "euler")
BEST = {"cosine": math.inf, "relative": -math.inf, "gain": 1.0}
BEST_SOUND = {
    "rms": math.inf, "spectral": -math.inf, "chroma": math.inf, "onsets": math.inf, "loudness": 0.0,
    "clipped": -math.inf, "silent": 0.0,
}  # fmt: skip


def document(result: StudyResult, levels: Sequence[float], about: Mapping[str, Any]) -> dict[str, Any]:
    """Return all figures as plain JSON values; NaN and infinity become null. `levels` are the sampler's sigmas."""
    cases = [_case(result, index) for index in range(len(result.cases))]
    steps = step_distances(result, levels)
    figures: dict[str, Any] = {
        "format": FORMAT,
        "kind": "sa3_trt validation",
        **about,
        "identical": _identical(result),
        "single_step": _single_step(result, steps),
        "rollouts": _rollouts(result, cases),
        "audio": _audio(result, cases),
        "batch": _batch(result),
        "resolution": fp16_collision.document(result.fp16_collision, lambda shares: asdict(spread(shares, math.inf))),
        "cases": cases,
    }
    plain: dict[str, Any] = _plain(figures)
    return plain


def _single_step(result: StudyResult, steps: Sequence[Mapping[str, Distance]]) -> dict[str, Any]:
    kinds = [kind for kind in KINDS if any(row.kind == kind for row in result.rows)]
    sigmas = sorted({round(row.sigma, 6) for row in result.rows}, reverse=True)
    by_kind = {kind: [i for i, row in enumerate(result.rows) if row.kind == kind] for kind in kinds}
    by_sigma = {sigma: [i for i, row in enumerate(result.rows) if round(row.sigma, 6) == sigma] for sigma in sigmas}
    return {
        "by_kind": {kind: _spreads([steps[i] for i in members]) for kind, members in by_kind.items()},
        "by_sigma": [{"sigma": s, **_spreads([steps[i] for i in members])} for s, members in by_sigma.items()],
        "worst": {kind: _worst(result, steps, members) for kind, members in by_kind.items()},
    }


def _spreads(steps: Sequence[Mapping[str, Distance]]) -> dict[str, Any]:
    figures = {
        output: {
            f.name: asdict(spread([getattr(step[output], f.name) for step in steps], BEST[f.name]))
            for f in fields(Distance)
        }
        for output in STEP_FIGURES
    }
    return {"rows": len(steps), **figures}


def _worst(result: StudyResult, steps: Sequence[Mapping[str, Distance]], members: Sequence[int]) -> dict[str, Any]:
    """Return the row with the lowest cosine of the denoised latent."""
    worst = min(members, key=lambda i: steps[i]["denoised"].cosine)
    row = result.rows[worst]
    return {"row": row.source, "prompt": row.prompt, "sigma": row.sigma, **asdict(steps[worst]["denoised"])}


def _case(result: StudyResult, index: int) -> dict[str, Any]:
    case = result.cases[index]
    reference = result.latents["reference"]
    distances = {
        sampler: {
            name: asdict(distance(reference[sampler, case.name], result.latents[name][sampler, case.name]))
            for name in COMPARED
            if name in result.latents
        }
        for sampler in SAMPLERS
        if (sampler, case.name) in reference
    }
    sounds = {name: by_case[case.name] for name, by_case in result.sounds.items()}
    return {
        "name": case.name, "kind": case.kind, "prompt": case.prompt, "seed": case.seed, "seconds": case.seconds,
        "frames": case.frames, "rollouts": distances,
        "audio": {n: asdict(audio_distance(sounds["reference"], sounds[n])) for n in COMPARED if n in sounds},
        "levels": {name: asdict(sound_levels(sound)) for name, sound in sounds.items()},
    }  # fmt: skip


def _rollouts(result: StudyResult, cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        sampler: {
            kind: {
                name: {f: asdict(spread([c["rollouts"][sampler][name][f] for c in members], BEST[f])) for f in BEST}
                for name in COMPARED
                if name in result.latents
            }
            for kind, members in _by_kind([case for case in cases if sampler in case["rollouts"]]).items()
        }
        for sampler in SAMPLERS
    }


def _audio(result: StudyResult, cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        kind: {
            name: {
                f.name: asdict(spread([_number(c["audio"][name][f.name]) for c in members], BEST_SOUND[f.name]))
                for f in fields(AudioDistance)
            }
            for name in COMPARED
            if name in result.sounds
        }
        for kind, members in _by_kind(cases).items()
        if result.sounds
    }


def _batch(result: StudyResult) -> dict[str, Any]:
    return {
        name: [
            {"rows": size, "cosine": asdict(spread([row.cosine for row in rows], math.inf)),
             "relative": asdict(spread([row.relative for row in rows], -math.inf))}
            for size, rows in by_size.items()
        ]
        for name, by_size in batch_distances(result).items()
    }  # fmt: skip


def _identical(result: StudyResult) -> bool:
    """Return True when steps, generations and sounds of the candidate equal the reference's bit by bit."""
    steps = zip(result.velocities["reference"], result.velocities[CANDIDATE], strict=True)
    reference, candidate = result.latents["reference"], result.latents[CANDIDATE]
    sounds = result.sounds.get("reference", {})
    return (
        all(np.array_equal(*pair) for pair in steps)
        and all(np.array_equal(reference[key], candidate[key]) for key in reference)
        and all(np.array_equal(sounds[key], result.sounds[CANDIDATE][key]) for key in sounds)
    )


def _by_kind(cases: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    grouped = {kind: [case for case in cases if case["kind"] == kind] for kind in KINDS}
    return {kind: members for kind, members in grouped.items() if members}


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _plain(value: Any) -> Any:
    """Return the value with null for numbers that are not finite, which JSON lacks."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
