"""Format the two-sample test for people: one table, and its explanation without statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sa3_validation.two_sample import BOOSTING, CLASSIFIERS, LOGISTIC
from sa3_validation.two_sample_study import (
    CONTROL,
    INDEPENDENT,
    INPAINTED,
    JUDGED_FROM,
    PUBLISHED,
    SAME_NOISE,
    SCALED,
)

LABELS = {
    CONTROL: "reference, other noise (control)",
    INDEPENDENT: "candidate, other noise",
    SAME_NOISE: "candidate, same noise",
    INPAINTED: "candidate, in-painting, same noise",
    SCALED: "defective control: one weight scale too large",
    PUBLISHED: "defective control: published recipe, in-painting",
}
REQUIRED = {
    CONTROL: "0.5 inside",
    INDEPENDENT: "inside the control's",
    SAME_NOISE: "upper ends <= 0.60; latent <= 0.70",
    INPAINTED: "kept spans: <= 0.3 dB more error",
    SCALED: "a lower end > 0.60",
    PUBLISHED: "a lower end > 0.60 and above the candidate's upper end",
}
HEADER = (
    "against the reference", "logistic regression", "gradient boosting", "latent channels", "Fréchet, control = 1",
    "largest shift", "required"
)  # fmt: skip
TITLE = "Classifier two-sample test"
NAMES = {LOGISTIC: "logistic regression", BOOSTING: "gradient boosting"}


def rows(document: Mapping[str, Any]) -> list[list[str]]:
    """Return the table's cells: a comparison a row; AUC with its 95 % interval."""
    comparisons = document["comparisons"]
    return [
        [LABELS[name], *(_cell(comparisons[name][classifier]) for classifier in (*CLASSIFIERS, "latent")),
         _ratio(comparisons[name]["frechet_of_control"]),
         _largest_shift(comparisons[name]["shifts"]), REQUIRED[name]]
        for name in LABELS if name in comparisons
    ]  # fmt: skip


def words(document: Mapping[str, Any]) -> list[str]:
    """Return the explanation of the figures, in sentences that need no statistics."""
    comparisons, sounds = document["comparisons"], document["sounds"]
    best = max(CLASSIFIERS, key=lambda classifier: comparisons[SAME_NOISE][classifier]["auc"])
    auc = comparisons[SAME_NOISE][best]["auc"]
    lines = [
        f"{sounds} sounds of {document['prompts']} prompts from each DiT were described by "
        f"{document['features']['sound']} figures of timbre, notes, rhythm, loudness, brightness and stereo.",
        "A classifier trained on other prompts orders pairs of one sound of each DiT: AUC 0.50 is chance, 1.00 is "
        "without error. A further classifier uses the latent's channels, which are inaudible.",
        f"Of 100 such pairs from the same noise, the better classifier ({NAMES[best]}) identifies the candidate "
        f"in {100 * auc:.0f}.",
    ]
    lines += [f"Control: {document['controls'][name]}." for name in (SCALED, PUBLISHED)]
    lines.append(_kept(document["kept_decibels"]))
    agreement = document["agreement"]
    shares = [
        f"{label} {_share(agreement[arm]['tempo'])} tempo, {_share(agreement[arm]['key'])} key"
        for arm, label in (("reference_B", "reference"), ("candidate_B", "candidate"))
        if agreement[arm]["tempo"]["of"] or agreement[arm]["key"]["of"]
    ]
    if shares:
        lines.append(f"Estimated as stated in the prompt: {'; '.join(shares)}.")
    if "judged" not in document:
        lines.append(f"Gates apply from {JUDGED_FROM} sounds on: with fewer the intervals are wider than the limits.")
    return lines


def _kept(decibels: Mapping[str, float]) -> str:
    """Return the sentence on in-painting's error in the kept spans, by arm."""
    arms = {"reference_inpainted": "reference", "candidate_inpainted": "candidate",
            "published_inpainted": "published recipe"}  # fmt: skip
    shares = [f"{label} {decibels[arm]:.2f} dB" for arm, label in arms.items() if arm in decibels]
    return f"Median error of in-painting in the spans to keep, over all mel bands: {', '.join(shares)}."


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _cell(auc: Mapping[str, float]) -> str:
    return f"{auc['auc']:.3f} [{auc['low']:.3f}, {auc['high']:.3f}]"


def _largest_shift(shifts: Mapping[str, float]) -> str:
    """Return the group of features with the largest shift, in deviations over the reference's sounds."""
    if not shifts:
        return "-"
    name = max(shifts, key=lambda group: shifts[group])
    return f"{name}, {shifts[name]:.2f} sd"


def _share(count: Mapping[str, int]) -> str:
    return f"{count['hits']} of {count['of']}"


def section(document: Mapping[str, Any]) -> list[tuple[str, Sequence[str], list[list[str]]]]:
    """Return the table as a section of the report; empty when the test was not run."""
    figures = document.get("two_sample")
    return [(TITLE, HEADER, rows(figures))] if figures else []
