"""Classifier two-sample test: can the sounds of two DiTs be told apart by a classifier that has heard neither before?

Two classifiers are trained to name the DiT that a sound is from and asked about sounds of prompts that they were not
trained on (Lopez-Paz and Oquab 2017, "Revisiting classifier two-sample tests"). The area under the ROC curve (AUC) is
the chance that, of one sound of each, they order the two rightly: 0.5 is guessing.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LOGISTIC, BOOSTING = "logistic_regression", "gradient_boosting"
CLASSIFIERS = (LOGISTIC, BOOSTING)
FOLDS = 5
REPEATS = 3  # splits into folds that are averaged: one split alone moves the AUC by a hundredth or two
RESAMPLES = 2000  # of the bootstrap of scores
REFITS = 40  # of the bootstrap of the whole procedure
LEVEL = 0.95
PENALTY = 1e-3  # scikit-learn's C: hundreds of features, hundreds of sounds


@dataclass(frozen=True)
class Auc:
    """Area under the ROC curve with the ends of its 95 % bootstrap interval over prompts."""

    auc: float
    low: float
    high: float


def compare(
    first: Floats, second: Floats, prompts: Sequence[int], seed: int = 0, names: Sequence[str] = CLASSIFIERS,
    refit: bool = False,
) -> dict[str, Auc]:  # fmt: skip
    """The AUC of each classifier on features (n, D) of two DiTs, row i of both from prompt prompts[i].

    Cross-validated in groups: all sounds of one prompt are in one fold, so that no classifier recognises a prompt.
    With `refit` the interval is of the whole procedure, classifiers trained again on every resample: where the AUC of
    another draw would lie. Else it is of the scores that the classifiers gave. Raises ValueError for other shapes,
    values that are not finite, or fewer than two prompts.
    """
    sides = [np.asarray(side, np.float64) for side in (first, second)]
    groups = np.asarray(prompts)
    if sides[0].shape != sides[1].shape or sides[0].ndim != 2 or len(sides[0]) != len(groups):
        raise ValueError(f"features {sides[0].shape} and {sides[1].shape} of {len(groups)} prompts")
    if len(np.unique(groups)) < 2:
        raise ValueError("two prompts at least: one to learn from and one to be asked about")
    if not all(np.isfinite(side).all() for side in sides):
        raise ValueError("the features are not finite")
    found = {}
    for name in names:
        auc = interval(*scores(name, sides[0], sides[1], groups, seed), groups, seed)
        if refit:
            auc = Auc(auc.auc, *refitted(name, sides[0], sides[1], groups, seed))
        found[name] = auc
    return found


def refitted(name: str, first: Floats, second: Floats, groups: NDArray[Any], seed: int) -> tuple[float, float]:
    """The 95 % interval of the AUC over resamples of prompts, each with classifiers of its own."""
    random, names = np.random.RandomState(seed), np.unique(groups)
    members = {name: np.flatnonzero(groups == name) for name in names}
    aucs = []
    for turn in range(REFITS):
        drawn = random.choice(names, len(names))
        if len(np.unique(drawn)) < 2:
            continue
        rows = np.concatenate([members[one] for one in drawn])
        lower, upper = scores(name, first[rows], second[rows], groups[rows], seed + turn, repeats=1)
        aucs.append(area(lower, upper))
    low, high = np.quantile(aucs, [(1.0 - LEVEL) / 2.0, (1.0 + LEVEL) / 2.0])
    return float(low), float(high)


def area(first: Floats, second: Floats) -> float:
    """The share of pairs, one score of each, that are in order; half of those that are equal."""
    return float((second[:, None] > first[None, :]).mean() + 0.5 * (second[:, None] == first[None, :]).mean())


def scores(
    name: str, first: Floats, second: Floats, groups: NDArray[Any], seed: int, repeats: int = REPEATS
) -> tuple[Floats, Floats]:
    """How much each sound of both DiTs looks like the second one's to a classifier that has not met its prompt.

    Within a fold only the order counts, since other folds have another classifier: scores are ranks in [0, 1], averaged
    over `repeats` splits.
    """
    from scipy.stats import rankdata
    from sklearn.model_selection import GroupKFold

    features = np.concatenate([first, second])
    labels = np.repeat([0, 1], len(first))
    both = np.concatenate([groups, groups])
    found = np.zeros(len(features))
    folds = min(FOLDS, len(np.unique(groups)))
    for repeat in range(repeats):
        split = GroupKFold(folds, shuffle=True, random_state=seed + repeat).split(features, labels, both)
        for train, test in split:
            model = _classifier(name, seed + repeat)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of equal sides, which leave nothing to converge to
                model.fit(features[train], labels[train])
            raw = model.predict_proba(features[test])[:, 1]
            found[test] += (rankdata(raw) - 0.5) / len(test) / repeats
    return found[: len(first)], found[len(first) :]


def interval(first: Floats, second: Floats, groups: NDArray[Any], seed: int) -> Auc:
    """The AUC of scores of two DiTs, and its interval by resampling prompts, not sounds: those of one are alike."""
    names, member = np.unique(groups, return_inverse=True)
    wins = (second[:, None] > first[None, :]) + 0.5 * (second[:, None] == first[None, :])
    drawn = np.random.RandomState(seed).multinomial(len(names), np.full(len(names), 1.0 / len(names)), RESAMPLES)
    weights = drawn[:, member].astype(np.float64)  # (resamples, n): how often each sound is in
    resampled = np.einsum("ri,ij,rj->r", weights, wins, weights, optimize=True) / np.square(weights.sum(axis=1))
    low, high = np.quantile(resampled, [(1.0 - LEVEL) / 2.0, (1.0 + LEVEL) / 2.0])
    return Auc(float(wins.mean()), float(low), float(high))


def shifts(first: Floats, second: Floats, groups: Sequence[str]) -> dict[str, float]:
    """By group of features: the mean move from one DiT to the other, in deviations of the first over its sounds.

    Root mean square over the features of the group; what cannot vary there is left out.
    """
    spread = first.std(axis=0)
    alive = spread > 1e-9
    move = np.where(alive, (second - first).mean(axis=0) / np.where(alive, spread, 1.0), 0.0)
    owners = np.asarray(groups)
    return {
        str(name): float(np.sqrt(np.square(move[members]).mean()))
        for name in dict.fromkeys(groups)
        if (members := (owners == name) & alive).any()
    }


def outside(value: float, interval_of: Mapping[str, float]) -> float:
    """How far a figure lies outside an interval {low, high}; 0 inside."""
    return max(interval_of["low"] - value, value - interval_of["high"], 0.0)


def _classifier(name: str, seed: int) -> Any:
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if name == LOGISTIC:
        return make_pipeline(StandardScaler(), LogisticRegression(C=PENALTY, max_iter=500))
    return HistGradientBoostingClassifier(
        max_iter=60, learning_rate=0.1, max_leaf_nodes=8, min_samples_leaf=10, max_features=0.1, random_state=seed
    )
