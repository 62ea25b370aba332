"""Define and compute the two-sample test of a candidate: its arms, comparisons and figures.

Seeds A and B differ in the noise alone, so reference A against reference B shows the difference of two draws of one
model: the control of every other comparison.
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
from sa3_validation.models import ComparedModel, ModelPaths
from sa3_validation.scaled_control import FACTOR, scaled_graph
from sa3_validation.two_sample_arms import Arm, ArmResult, Recording, model_identity, repainted, seeded

JUDGED_FROM = 200  # sounds: with fewer the intervals are wider than the limits, so gates do not apply
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
    """Specification of the test: `count` sounds a DiT; `published` is an FP8 graph of the published recipe, or None."""

    reference: ComparedModel
    candidate: ComparedModel
    published: ComparedModel | None
    model_paths: ModelPaths
    count: int
    seed: int
    recording: Recording

    def run(self, cases: Sequence[Case]) -> dict[str, Any]:
        """Return the figures for the report. `cases` are text generations of different prompts."""
        first = seeded(cases, self.count, self.seed)
        second = seeded(cases, self.count, self.seed + self.count)
        arms = [
            Arm("reference_A", self.reference.open, model_identity(self.reference), first),
            Arm("reference_B", self.reference.open, model_identity(self.reference), second),
            Arm("candidate_B", self.candidate.open, model_identity(self.candidate), second),
        ]
        scaled, scaled_note = self._scaled(second)
        arms += [scaled] if scaled is not None else []
        models = {"reference": self.reference, "candidate": self.candidate, "published": self.published}
        inpainted = [(name, model) for name, model in models.items() if model is not None]
        steps = self.recording.steps + 1
        results: dict[str, ArmResult] = {}
        with Progress("two samples", (len(arms) + len(inpainted)) * self.count * steps, "row steps") as progress:
            for arm in arms:
                results[arm.name] = self.recording.record(arm, progress)
            inpaint_cases = repainted(first, results["reference_A"].latents, self.seed + 2 * self.count)
            for name, model in inpainted:
                arm = Arm(f"{name}_inpainted", model.open, model_identity(model), inpaint_cases)
                results[arm.name] = self.recording.record(arm, progress)
        return {**document(results, first, len(cases), self.seed), "controls": {SCALED: scaled_note, **self._missing()}}

    def _scaled(self, cases: tuple[Case, ...]) -> tuple[Arm | None, str]:
        """Return the candidate with one weight scale too large, run by ONNX Runtime, and a note.

        The arm is None when the candidate has no graph to scale; the note has the reason.
        """
        path = self.candidate.path
        try:
            if self.candidate.backend in engines.BUILT:
                path = engines.source_path(self.candidate.target, engines.DIRECT.name, self.model_paths.source)
            graph, linear = scaled_graph(path)
        except ToolError as error:
            return None, f"not run: {error.message}"
        identity = f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns} {linear} x {FACTOR}"
        arm = Arm("scaled_B", lambda: OnnxRuntimeEngine(path, variant=graph), identity, cases)
        return arm, f"the weight scale of {linear} x {FACTOR:g}"

    def _missing(self) -> dict[str, str]:
        if self.published is not None:
            return {PUBLISHED: f"{self.published.path.name} of the published recipe, in-painting"}
        return {PUBLISHED: "published recipe not run: no --published"}


def document(results: Mapping[str, ArmResult], cases: Sequence[Case], prompts: int, seed: int) -> dict[str, Any]:
    """Return all comparisons of the arms: AUC and interval of each classifier, Fréchet distance, shifts by group.

    Features are in deviations over the two reference arms. The latent's channel statistics, which are inaudible, have a
    figure and a limit of their own. For in-paintings the classifiers also get the distances from the source sound, in
    deviations over the reference's. `judged` holds the figures that gates read, from JUDGED_FROM sounds on.
    """
    both = np.concatenate([results[name].features for name in COMPARISONS[CONTROL]])
    spread, groups = both.std(axis=0), np.asarray(_groups_of(results))
    varying, of_latent = spread > 1e-9, groups == sound_features.LATENT
    parts = {"sound": varying & ~of_latent, "latent": varying & of_latent}
    members = [index % prompts for index in range(len(cases))]
    kept = _kept(results, cases)
    unit = np.where((scale := kept[REFERENCE_INPAINTED].std(axis=0)) > 1e-9, scale, 1.0)
    compared: dict[str, dict[str, Any]] = {}
    for name, pair in COMPARISONS.items():
        if all(arm in results for arm in pair):
            features = [results[arm].features / np.where(varying, spread, 1.0) for arm in pair]
            from_source = [kept[arm] / unit for arm in pair if arm in kept]
            compared[name] = {
                "models": list(pair), **_compared(features, from_source, parts, members, seed, name == CONTROL)
            }  # fmt: skip
            compared[name]["shifts"] = two_sample.shifts(features[0], features[1], groups.tolist())
            if from_source:
                compared[name]["shifts"] |= two_sample.shifts(from_source[0], from_source[1], [KEPT] * COUNT)
    control = compared[CONTROL]["frechet"]
    for comparison in compared.values():
        comparison["frechet_of_control"] = comparison["frechet"] / control if control else float("nan")
    figures: dict[str, Any] = {
        "sounds": len(cases), "prompts": min(prompts, len(cases)),
        "features": {**{name: int(part.sum()) for name, part in parts.items()}, KEPT: COUNT},
        "comparisons": compared, "agreement": _agreement(results, cases),
        "kept_decibels": {name: kept_decibels(values) for name, values in kept.items()},
    }  # fmt: skip
    if len(cases) >= JUDGED_FROM:
        figures["judged"] = _judged(compared, figures["kept_decibels"])
    return figures


def _kept(results: Mapping[str, ArmResult], cases: Sequence[Case]) -> dict[str, np.ndarray]:
    """Return, by arm of in-paintings, distances (N, COUNT) from the sounds of reference A that were in-painted."""
    source, by_arm = results["reference_A"], {}
    for name in (REFERENCE_INPAINTED, CANDIDATE_INPAINTED, PUBLISHED_INPAINTED):
        if name in results:
            arm = results[name]
            rows = zip(source.levels, source.pitches, arm.levels, arm.pitches, cases, strict=True)
            by_arm[name] = np.stack([
                kept_features((levels, pitches), (new_levels, new_pitches), kept_frames(case.seconds, levels.shape[1]))
                for levels, pitches, new_levels, new_pitches, case in rows
            ])  # fmt: skip
    return by_arm


def _compared(
    features: Sequence[np.ndarray], from_source: Sequence[np.ndarray], parts: Mapping[str, np.ndarray],
    members: Sequence[int], seed: int, refit: bool,
) -> dict[str, Any]:  # fmt: skip
    """Return AUCs on features of the sound, the latent's AUC by logistic regression, the sound's Fréchet distance.

    `from_source` are further features of each arm that the classifiers get with the sound's; it may be empty.
    """
    sound, latent = ([array[:, parts[name]] for array in features] for name in ("sound", "latent"))
    joined = [np.concatenate(pair, axis=1) for pair in zip(sound, from_source, strict=True)] if from_source else sound
    aucs = two_sample.compare(joined[0], joined[1], members, seed, refit=refit)
    latent_aucs = two_sample.compare(latent[0], latent[1], members, seed, (two_sample.LOGISTIC,), refit)
    return {
        **{classifier: asdict(auc) for classifier, auc in aucs.items()},
        "latent": asdict(latent_aucs[two_sample.LOGISTIC]),
        "frechet": frechet_distance(*sound),
    }


def _judged(compared: Mapping[str, Any], kept: Mapping[str, float]) -> dict[str, Any]:
    """Return the figures that gates read.

    `outside`: distance of an AUC from the control's interval. `caught`: by how much the lower end of a defective
    control's interval exceeds both the candidate's limit and the candidate's own upper end in the same task.
    `decibels`: by how much more the candidate changes the kept spans than the reference does.
    """
    classifiers = two_sample.CLASSIFIERS
    judged: dict[str, Any] = {
        CONTROL: {name: {"chance": two_sample.outside(0.5, compared[CONTROL][name])} for name in classifiers},
        INDEPENDENT: {
            name: {"outside": two_sample.outside(compared[INDEPENDENT][name]["auc"], compared[CONTROL][name])}
            for name in classifiers
        },
        SAME_NOISE: {name: {"high": compared[SAME_NOISE][name]["high"]} for name in classifiers},
        "latent": {"high": compared[SAME_NOISE]["latent"]["high"]},
        INPAINTED: {"decibels": kept[CANDIDATE_INPAINTED] - kept[REFERENCE_INPAINTED]},
    }
    for control, candidate in BESIDE.items():
        if control in compared:
            judged[control] = {"caught": max(
                compared[control][name]["low"] - max(SOUND_LIMIT, compared[candidate][name]["high"])
                for name in classifiers
            )}  # fmt: skip
    return judged


def _groups_of(results: Mapping[str, ArmResult]) -> tuple[str, ...]:
    """Return the group of every feature, in the order of features_of."""
    width = results["reference_A"].features.shape[1]
    silence = np.zeros((sound_features.WINDOW, 2))
    plain = sound_features.features_of(silence, np.zeros((results["reference_A"].latents.shape[1], 2)))
    return (*plain.groups, *[sound_features.EMBEDDING] * (width - len(plain.groups)))


def _agreement(results: Mapping[str, ArmResult], cases: Sequence[Case]) -> dict[str, Any]:
    """Return, by text arm, counts of sounds whose estimated tempo (within 4 %) and key agree with the prompt."""
    tempos, stated_keys = ([read(case.prompt) for case in cases] for read in (_stated_tempo, _stated_key))
    counts = {}
    for name in ("reference_A", "reference_B", "candidate_B", "scaled_B"):
        if name not in results:
            continue
        tempo = [abs(bpm / stated_value - 1.0) <= listener.TEMPO_TOLERANCE
                 for bpm, stated_value in zip(results[name].bpm, tempos, strict=True) if stated_value]  # fmt: skip
        keys = [int(key) == stated_key for key, stated_key in zip(results[name].key, stated_keys, strict=True)
                if stated_key is not None]  # fmt: skip
        counts[name] = {
            "tempo": {"hits": int(sum(tempo)), "of": len(tempo)},
            "key": {"hits": int(sum(keys)), "of": len(keys)},
        }
    return counts


def _stated_tempo(prompt: str) -> float | None:
    """Return the tempo stated in a prompt when it is in the estimator's range, else None."""
    match = _TEMPO.search(prompt)
    tempo = float(match[1]) if match is not None else 0.0
    return tempo if listener.MIN_TEMPO <= tempo <= listener.MAX_TEMPO else None


def _stated_key(prompt: str) -> int | None:
    """Return the key stated in a prompt, numbered as ArmResult.key, else None."""
    match = _KEY.search(prompt)
    if match is None:
        return None
    letter, rest = match[1][0], match[1][1:].strip(" -")
    tonic = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}[letter]
    tonic += {"": 0, "flat": -1, "b": -1, "sharp": 1, "#": 1}[rest]
    return tonic % 12 + 12 * (match[2] == "minor")
