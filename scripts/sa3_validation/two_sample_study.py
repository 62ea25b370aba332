"""The two-sample test of a candidate: which DiTs make sounds of which seeds, what is compared with what, the figures.

Seeds A and B differ in the noise alone, so reference A against reference B is what two honest draws of one model look
like: the control that every other comparison is read beside.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sa3_trt_core import engines
from sa3_trt_core.console import Progress
from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine
from sa3_trt_core.errors import ToolError
from sa3_validation import listener, sound_features, two_sample
from sa3_validation.cases import Case
from sa3_validation.frechet import frechet_distance
from sa3_validation.kept_span import COUNT, KEPT, kept_decibels, kept_features, kept_frames
from sa3_validation.models import Place, Side
from sa3_validation.scaled_control import FACTOR, scaled_graph
from sa3_validation.two_sample_arms import Arm, Heard, Recording, repainted, seeded, side_identity

JUDGED_FROM = 200  # sounds: with fewer the intervals are wider than the limits, so nothing is judged
SOUND_LIMIT = 0.60  # AUC of the sound's features, as in gates.toml
CONTROL, INDEPENDENT, SAME_NOISE, INPAINTED, SCALED, PUBLISHED = (
    "control", "independent", "same_noise", "inpainted", "scaled", "published",
)  # fmt: skip
REFERENCE_INPAINTED, CANDIDATE_INPAINTED, PUBLISHED_INPAINTED = (
    f"{name}_inpainted" for name in ("reference", "candidate", "published")
)
BESIDE = {SCALED: SAME_NOISE, PUBLISHED: INPAINTED}  # a control that must be caught, and the candidate in its task
COMPARISONS: Mapping[str, tuple[str, str]] = {
    CONTROL: ("reference_A", "reference_B"),
    INDEPENDENT: ("reference_A", "candidate_B"),
    SAME_NOISE: ("reference_B", "candidate_B"),
    INPAINTED: (REFERENCE_INPAINTED, CANDIDATE_INPAINTED),
    SCALED: ("reference_B", "scaled_B"),
    PUBLISHED: (REFERENCE_INPAINTED, PUBLISHED_INPAINTED),
}
_TEMPO = re.compile(r"(\d{2,3})\s*BPM", re.IGNORECASE)
_KEY = re.compile(r"\b([A-G](?:[ -](?:flat|sharp)|#|b)?) (major|minor)\b")


@dataclass(frozen=True)
class TwoSample:
    """What is run: `count` sounds a DiT; `published` is an FP8 graph of the published recipe's choices, or None."""

    reference: Side
    candidate: Side
    published: Side | None
    place: Place
    count: int
    seed: int
    recording: Recording

    def run(self, cases: Sequence[Case]) -> dict[str, Any]:
        """The figures, for the report. `cases` are text generations of different prompts."""
        first = seeded(cases, self.count, self.seed)
        second = seeded(cases, self.count, self.seed + self.count)
        arms = [
            Arm("reference_A", self.reference.open, side_identity(self.reference), first),
            Arm("reference_B", self.reference.open, side_identity(self.reference), second),
            Arm("candidate_B", self.candidate.open, side_identity(self.candidate), second),
        ]
        scaled, why = self._scaled(second)
        arms += [scaled] if scaled is not None else []
        sides = {"reference": self.reference, "candidate": self.candidate, "published": self.published}
        asked = [(name, side) for name, side in sides.items() if side is not None]
        steps = self.recording.steps + 1
        heard: dict[str, Heard] = {}
        with Progress("two samples", (len(arms) + len(asked)) * self.count * steps, "row steps") as progress:
            for arm in arms:
                heard[arm.name] = self.recording.record(arm, progress)
            painted = repainted(first, heard["reference_A"].latents, self.seed + 2 * self.count)
            for name, side in asked:
                arm = Arm(f"{name}_inpainted", side.open, side_identity(side), painted)
                heard[arm.name] = self.recording.record(arm, progress)
        return {**document(heard, first, len(cases), self.seed), "controls": {SCALED: why, **self._missing()}}

    def _scaled(self, cases: tuple[Case, ...]) -> tuple[Arm | None, str]:
        """The candidate with one weight scale too large, run by ONNX Runtime, and what it is or why there is none."""
        path = self.candidate.path
        try:
            if self.candidate.backend in engines.BUILT:
                path = engines.source_path(self.candidate.target, engines.DIRECT.name, self.place.source)
            graph, product = scaled_graph(path)
        except ToolError as error:
            return None, f"not run: {error.message}"
        identity = f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns} {product} x {FACTOR}"
        arm = Arm("scaled_B", lambda: OnnxRuntimeEngine(path, variant=graph), identity, cases)
        return arm, f"the weight scale of {product} x {FACTOR:g}"

    def _missing(self) -> dict[str, str]:
        if self.published is not None:
            return {PUBLISHED: f"{self.published.path.name} of the published recipe's choices, in-painting"}
        return {PUBLISHED: "not run: --published gives no graph"}


def document(heard: Mapping[str, Heard], cases: Sequence[Case], prompts: int, seed: int) -> dict[str, Any]:
    """All comparisons of what was heard: AUC and interval of each classifier, Fréchet distance, moves by group.

    Features are in deviations over the two reference arms. The latent's channel statistics, which nobody hears, have
    a figure and a limit of their own. Of in-paintings the classifiers get the distances from the sound that was
    in-painted too, in deviations over the reference's. `judged` holds what gates read; it is there from JUDGED_FROM
    sounds on.
    """
    both = np.concatenate([heard[name].features for name in COMPARISONS[CONTROL]])
    spread, groups = both.std(axis=0), np.asarray(_groups_of(heard))
    alive = spread > 1e-9
    parts = {"sound": alive & (groups != sound_features.LATENT), "latent": alive & (groups == sound_features.LATENT)}
    members = [index % prompts for index in range(len(cases))]
    kept = _kept(heard, cases)
    unit = np.where((scale := kept[REFERENCE_INPAINTED].std(axis=0)) > 1e-9, scale, 1.0)
    compared: dict[str, dict[str, Any]] = {}
    for name, pair in COMPARISONS.items():
        if all(side in heard for side in pair):
            sides = [heard[side].features / np.where(alive, spread, 1.0) for side in pair]
            also = [kept[side] / unit for side in pair if side in kept]
            compared[name] = {"sides": list(pair), **_compared(sides, also, parts, members, seed, name == CONTROL)}
            compared[name]["shifts"] = two_sample.shifts(sides[0], sides[1], groups.tolist())
            if also:
                compared[name]["shifts"] |= two_sample.shifts(also[0], also[1], [KEPT] * COUNT)
    control = compared[CONTROL]["frechet"]
    for one in compared.values():
        one["frechet_of_control"] = one["frechet"] / control if control else float("nan")
    made: dict[str, Any] = {
        "sounds": len(cases), "prompts": min(prompts, len(cases)),
        "features": {**{name: int(part.sum()) for name, part in parts.items()}, KEPT: COUNT},
        "comparisons": compared, "agreement": _agreement(heard, cases),
        "kept_decibels": {name: kept_decibels(values) for name, values in kept.items()},
    }  # fmt: skip
    if len(cases) >= JUDGED_FROM:
        made["judged"] = _judged(compared, made["kept_decibels"])
    return made


def _kept(heard: Mapping[str, Heard], cases: Sequence[Case]) -> dict[str, np.ndarray]:
    """By arm of in-paintings: distances (N, COUNT) from the sounds of reference A that were in-painted."""
    source, found = heard["reference_A"], {}
    for name in (REFERENCE_INPAINTED, CANDIDATE_INPAINTED, PUBLISHED_INPAINTED):
        if name in heard:
            sides = zip(source.levels, source.pitches, heard[name].levels, heard[name].pitches, cases, strict=True)
            found[name] = np.stack([
                kept_features((levels, pitches), (made, made_pitches), kept_frames(case.seconds, levels.shape[1]))
                for levels, pitches, made, made_pitches, case in sides
            ])  # fmt: skip
    return found


def _compared(
    sides: Sequence[np.ndarray], also: Sequence[np.ndarray], parts: Mapping[str, np.ndarray], members: Sequence[int],
    seed: int, refit: bool,
) -> dict[str, Any]:  # fmt: skip
    """AUCs on the sound's features and, by logistic regression alone, on the latent's; the sound's Fréchet distance.

    `also` are further features of each side that the classifiers get with the sound's; empty for none.
    """
    sound, latent = ([side[:, parts[name]] for side in sides] for name in ("sound", "latent"))
    whole = [np.concatenate(pair, axis=1) for pair in zip(sound, also, strict=True)] if also else sound
    aucs = two_sample.compare(whole[0], whole[1], members, seed, refit=refit)
    read = two_sample.compare(latent[0], latent[1], members, seed, (two_sample.LOGISTIC,), refit)
    return {
        **{which: asdict(auc) for which, auc in aucs.items()},
        "latent": asdict(read[two_sample.LOGISTIC]),
        "frechet": frechet_distance(*sound),
    }


def _judged(compared: Mapping[str, Any], kept: Mapping[str, float]) -> dict[str, Any]:
    """What gates read. `outside`: how far an AUC lies outside the control's interval; `caught`: by how much the lower
    end of a broken control's interval lies above the limit that the candidate owes and above the candidate's own upper
    end in the same task; `decibels`: by how much more the candidate changes what was to be kept than the reference.
    """
    names = two_sample.CLASSIFIERS
    judged: dict[str, Any] = {
        CONTROL: {which: {"chance": two_sample.outside(0.5, compared[CONTROL][which])} for which in names},
        INDEPENDENT: {
            which: {"outside": two_sample.outside(compared[INDEPENDENT][which]["auc"], compared[CONTROL][which])}
            for which in names
        },
        SAME_NOISE: {which: {"high": compared[SAME_NOISE][which]["high"]} for which in names},
        "latent": {"high": compared[SAME_NOISE]["latent"]["high"]},
        INPAINTED: {"decibels": kept[CANDIDATE_INPAINTED] - kept[REFERENCE_INPAINTED]},
    }
    for broken, whole in BESIDE.items():
        if broken in compared:
            judged[broken] = {"caught": max(
                compared[broken][which]["low"] - max(SOUND_LIMIT, compared[whole][which]["high"]) for which in names
            )}  # fmt: skip
    return judged


def _groups_of(heard: Mapping[str, Heard]) -> tuple[str, ...]:
    """The group of every feature, in the order of features_of."""
    width = heard["reference_A"].features.shape[1]
    silence = np.zeros((sound_features.WINDOW, 2))
    plain = sound_features.features_of(silence, np.zeros((heard["reference_A"].latents.shape[1], 2)))
    return (*plain.groups, *[sound_features.EMBEDDING] * (width - len(plain.groups)))


def _agreement(heard: Mapping[str, Heard], cases: Sequence[Case]) -> dict[str, Any]:
    """By arm of plain text: how often tempo (within 4 %) and key are heard as the prompt states them."""
    stated = [(_stated_tempo(case.prompt), _stated_key(case.prompt)) for case in cases]
    found = {}
    for name in ("reference_A", "reference_B", "candidate_B", "scaled_B"):
        if name not in heard:
            continue
        tempo = [abs(bpm / want - 1.0) <= listener.TEMPO_TOLERANCE
                 for bpm, (want, _) in zip(heard[name].bpm, stated, strict=True) if want is not None]  # fmt: skip
        keys = [int(key) == want for key, (_, want) in zip(heard[name].key, stated, strict=True) if want is not None]
        found[name] = {
            "tempo": {"hits": int(sum(tempo)), "of": len(tempo)},
            "key": {"hits": int(sum(keys)), "of": len(keys)},
        }
    return found


def _stated_tempo(prompt: str) -> float | None:
    """The tempo that a prompt names, where it is one that the listener can hear."""
    match = _TEMPO.search(prompt)
    tempo = float(match[1]) if match is not None else 0.0
    return tempo if listener.SLOWEST <= tempo <= listener.FASTEST else None


def _stated_key(prompt: str) -> int | None:
    """The key that a prompt names, as Heard.key numbers it."""
    match = _KEY.search(prompt)
    if match is None:
        return None
    letter, rest = match[1][0], match[1][1:].strip(" -")
    tonic = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}[letter]
    tonic += {"": 0, "flat": -1, "b": -1, "sharp": 1, "#": 1}[rest]
    return tonic % 12 + 12 * (match[2] == "minor")
