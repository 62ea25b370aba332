"""The two-sample test for people: one table, and what it says in a musician's words."""

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

ASKED = {
    CONTROL: "reference, other noise (control)",
    INDEPENDENT: "candidate, other noise",
    SAME_NOISE: "candidate, same noise",
    INPAINTED: "candidate, in-painting, same noise",
    SCALED: "broken on purpose: one weight scale too large",
    PUBLISHED: "the published recipe's choices, in-painting",
}
OWED = {
    CONTROL: "0.5 inside",
    INDEPENDENT: "inside the control's",
    SAME_NOISE: "upper ends at most 0.60; by the latent 0.70",
    INPAINTED: "what is kept: at most 0.3 dB more off",
    SCALED: "a lower end above 0.60",
    PUBLISHED: "a lower end above 0.60 and above the candidate's upper one",
}
HEADER = (
    "against the reference", "logistic regression", "gradient boosting", "by the latent", "Fréchet, control = 1",
    "moves most", "owed"
)  # fmt: skip
TITLE = "Two samples: can a classifier tell the sounds apart?"
NAMES = {LOGISTIC: "logistic regression", BOOSTING: "gradient boosting"}


def rows(document: Mapping[str, Any]) -> list[list[str]]:
    """The table's cells: a comparison a row; AUC with its 95 % interval."""
    found = document["comparisons"]
    return [
        [ASKED[name], *(_cell(found[name][which]) for which in (*CLASSIFIERS, "latent")),
         f"{found[name]['frechet_of_control']:.2f}" if found[name]["frechet_of_control"] is not None else "-",
         _moves(found[name]["shifts"]), OWED[name]]
        for name in ASKED if name in found
    ]  # fmt: skip


def words(document: Mapping[str, Any]) -> list[str]:
    """What the figures mean, a sentence or two each; no statistics needed to read them."""
    found, sounds = document["comparisons"], document["sounds"]
    best = max(CLASSIFIERS, key=lambda which: found[SAME_NOISE][which]["auc"])
    auc = found[SAME_NOISE][best]["auc"]
    lines = [
        f"{sounds} sounds of {document['prompts']} prompts from each DiT were described by "
        f"{document['features']['sound']} figures of timbre, notes, rhythm, loudness, brightness and stereo.",
        "A classifier that had not met a prompt was given one sound of each DiT and asked which is which: 0.50 is "
        "guessing, 1.00 never errs. Another one reads the latent's channels, which nobody hears.",
        f"Of 100 such pairs played from the same noise, the better classifier ({NAMES[best]}) names the candidate "
        f"rightly in {100 * auc:.0f}.",
    ]
    lines += [f"The controls: {document['controls'][name]}." for name in (SCALED, PUBLISHED)]
    lines.append(_kept(document["kept_decibels"]))
    heard = document["agreement"]
    shares = [
        f"{label} {_share(heard[arm]['tempo'])} tempo, {_share(heard[arm]['key'])} key"
        for arm, label in (("reference_B", "reference"), ("candidate_B", "candidate"))
        if heard[arm]["tempo"]["of"] or heard[arm]["key"]["of"]
    ]
    if shares:
        lines.append(f"Heard as the prompt states it: {'; '.join(shares)}.")
    if "judged" not in document:
        lines.append(f"No gate judges fewer than {JUDGED_FROM} sounds: the intervals are wider than the limits.")
    return lines


def _kept(decibels: Mapping[str, float]) -> str:
    """What in-painting does to the parts that were to be kept, by arm."""
    arms = {"reference_inpainted": "reference", "candidate_inpainted": "candidate",
            "published_inpainted": "published recipe's choices"}  # fmt: skip
    shares = [f"{label} {decibels[arm]:.2f} dB" for arm, label in arms.items() if arm in decibels]
    return (
        "In-painting is compared with the sound that it was made from too, where that was to be kept; half of the "
        f"in-paintings are off there, over all mel bands, by less than: {', '.join(shares)}."
    )


def _cell(auc: Mapping[str, float]) -> str:
    return f"{auc['auc']:.3f} [{auc['low']:.3f}, {auc['high']:.3f}]"


def _moves(shifts: Mapping[str, float]) -> str:
    """The group of features that moves most, in deviations over the reference's sounds."""
    if not shifts:
        return "-"
    name = max(shifts, key=lambda group: shifts[group])
    return f"{name}, {shifts[name]:.2f} sd"


def _share(count: Mapping[str, int]) -> str:
    return f"{count['hits']} of {count['of']}"


def section(document: Mapping[str, Any]) -> list[tuple[str, Sequence[str], list[list[str]]]]:
    """The table as a section of the report; none where the test was not run."""
    made = document.get("two_sample")
    return [(TITLE, HEADER, rows(made))] if made else []
