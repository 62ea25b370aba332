"""The report's figures, made of what the runs left: a JSON document whose layout build/docs/validation.md describes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from sa3_validation import fp16_collision
from sa3_validation.audio_metrics import SoundApart, hear, sound_apart
from sa3_validation.cases import KINDS
from sa3_validation.distances import Apart, apart, spread
from sa3_validation.rollouts import SAMPLERS
from sa3_validation.study import CANDIDATE, COMPARED, Found, batches_apart, steps_apart

FORMAT = 1
STEP_FIGURES = ("velocity", "denoised", "euler")
BEST = {"cosine": math.inf, "relative": -math.inf, "gain": 1.0}
BEST_SOUND = {
    "rms": math.inf, "spectral": -math.inf, "chroma": math.inf, "onsets": math.inf, "loudness": 0.0,
    "clipped": -math.inf, "silent": 0.0,
}  # fmt: skip


def document(found: Found, levels: Sequence[float], about: Mapping[str, Any]) -> dict[str, Any]:
    """Everything measured; what is no number (silence has no loudness) is null. `levels` are the sampler's sigmas."""
    cases = [_case(found, index) for index in range(len(found.cases))]
    steps = steps_apart(found, levels)
    made: dict[str, Any] = {
        "format": FORMAT,
        "kind": "sa3_trt validation",
        **about,
        "identical": _identical(found),
        "single_step": _single_step(found, steps),
        "rollouts": _rollouts(found, cases),
        "audio": _audio(found, cases),
        "batch": _batch(found),
        "resolution": fp16_collision.document(found.resolution, lambda shares: asdict(spread(shares, math.inf))),
        "cases": cases,
    }
    plain: dict[str, Any] = _plain(made)
    return plain


def _single_step(found: Found, steps: Sequence[Mapping[str, Apart]]) -> dict[str, Any]:
    kinds = [kind for kind in KINDS if any(row.kind == kind for row in found.rows)]
    sigmas = sorted({round(row.sigma, 6) for row in found.rows}, reverse=True)
    by_kind = {kind: [i for i, row in enumerate(found.rows) if row.kind == kind] for kind in kinds}
    by_sigma = {sigma: [i for i, row in enumerate(found.rows) if round(row.sigma, 6) == sigma] for sigma in sigmas}
    return {
        "by_kind": {kind: _spreads([steps[i] for i in members]) for kind, members in by_kind.items()},
        "by_sigma": [{"sigma": s, **_spreads([steps[i] for i in members])} for s, members in by_sigma.items()],
        "worst": {kind: _worst(found, steps, members) for kind, members in by_kind.items()},
    }


def _spreads(steps: Sequence[Mapping[str, Apart]]) -> dict[str, Any]:
    figures = {
        what: {
            f.name: asdict(spread([getattr(one[what], f.name) for one in steps], BEST[f.name])) for f in fields(Apart)
        }
        for what in STEP_FIGURES
    }
    return {"rows": len(steps), **figures}


def _worst(found: Found, steps: Sequence[Mapping[str, Apart]], members: Sequence[int]) -> dict[str, Any]:
    """The row whose denoised latent is worst."""
    at = min(members, key=lambda i: steps[i]["denoised"].cosine)
    row = found.rows[at]
    return {"row": row.source, "prompt": row.prompt, "sigma": row.sigma, **asdict(steps[at]["denoised"])}


def _case(found: Found, index: int) -> dict[str, Any]:
    case = found.cases[index]
    truth = found.latents["reference"]
    rolled = {
        sampler: {
            name: asdict(apart(truth[sampler, case.name], found.latents[name][sampler, case.name]))
            for name in COMPARED
            if name in found.latents
        }
        for sampler in SAMPLERS
        if (sampler, case.name) in truth
    }
    sounds = {name: made[case.name] for name, made in found.sounds.items()}
    return {
        "name": case.name, "kind": case.kind, "prompt": case.prompt, "seed": case.seed, "seconds": case.seconds,
        "frames": case.frames, "rollouts": rolled,
        "audio": {n: asdict(sound_apart(sounds["reference"], sounds[n])) for n in COMPARED if n in sounds},
        "heard": {name: asdict(hear(sound)) for name, sound in sounds.items()},
    }  # fmt: skip


def _rollouts(found: Found, cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        sampler: {
            kind: {
                name: {f: asdict(spread([c["rollouts"][sampler][name][f] for c in members], BEST[f])) for f in BEST}
                for name in COMPARED
                if name in found.latents
            }
            for kind, members in _by_kind([case for case in cases if sampler in case["rollouts"]]).items()
        }
        for sampler in SAMPLERS
    }


def _audio(found: Found, cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        kind: {
            name: {
                f.name: asdict(spread([_number(c["audio"][name][f.name]) for c in members], BEST_SOUND[f.name]))
                for f in fields(SoundApart)
            }
            for name in COMPARED
            if name in found.sounds
        }
        for kind, members in _by_kind(cases).items()
        if found.sounds
    }


def _batch(found: Found) -> dict[str, Any]:
    return {
        name: [
            {"rows": size, "cosine": asdict(spread([one.cosine for one in rows], math.inf)),
             "relative": asdict(spread([one.relative for one in rows], -math.inf))}
            for size, rows in by_size.items()
        ]
        for name, by_size in batches_apart(found).items()
    }  # fmt: skip


def _identical(found: Found) -> bool:
    """Whether the candidate gave the reference's own bits everywhere: steps, generations, sounds."""
    steps = zip(found.velocities["reference"], found.velocities[CANDIDATE], strict=True)
    truth, other = found.latents["reference"], found.latents[CANDIDATE]
    sounds = found.sounds.get("reference", {})
    return (
        all(np.array_equal(*pair) for pair in steps)
        and all(np.array_equal(truth[key], other[key]) for key in truth)
        and all(np.array_equal(sounds[key], found.sounds[CANDIDATE][key]) for key in sounds)
    )


def _by_kind(cases: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    grouped = {kind: [case for case in cases if case["kind"] == kind] for kind in KINDS}
    return {kind: members for kind, members in grouped.items() if members}


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _plain(value: Any) -> Any:
    """The same with null for what is not finite: JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
