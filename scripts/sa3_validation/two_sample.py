"""Classifier two-sample test: train a classifier to separate the sounds of two DiTs, and test it on unseen prompts.

Two classifiers are trained to predict the DiT of a sound and are tested on sounds of prompts outside the training set
(Lopez-Paz and Oquab 2017, "Revisiting classifier two-sample tests"). The area under the ROC curve (AUC) is the
probability that they order one sound of each DiT correctly: 0.5 is chance.
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
REPEATS = 3  # splits into folds that are averaged: the AUC of single splits varies by 0.01 to 0.02
RESAMPLES = 2000  # bootstrap of scores
REFITS = 40  # bootstrap of the whole procedure
LEVEL = 0.95
INVERSE_REGULARISATION = 1e-3  # scikit-learn's C, for hundreds of features and hundreds of sounds


@dataclass(frozen=True)
class Auc:
    """Area under the ROC curve with its 95 % bootstrap interval over prompts."""

    auc: float
    low: float
    high: float


def compare(
    first: Floats, second: Floats, prompts: Sequence[int], seed: int = 0, names: Sequence[str] = CLASSIFIERS,
    refit: bool = False,
) -> dict[str, Auc]:  # fmt: skip
    """Return the AUC of each classifier on features (n, D) of two DiTs; row i of both is from prompt prompts[i].

    Cross-validated in groups: all sounds of one prompt are in one fold, so that a classifier cannot recognise prompts.
    With `refit` the classifiers are trained again on every resample, and the interval is where the AUC of another draw
    would lie; otherwise it is the bootstrap interval of fixed scores. Raises ValueError for other shapes, values that
    are not finite, or fewer than two prompts.
    """
    features = [np.asarray(side, np.float64) for side in (first, second)]
    groups = np.asarray(prompts)
    if features[0].shape != features[1].shape or features[0].ndim != 2 or len(features[0]) != len(groups):
        shapes = f"{features[0].shape}, {features[1].shape}, {len(groups)}"
        raise ValueError(f"expected two (n, D) arrays and n prompts, got {shapes}")
    if len(np.unique(groups)) < 2:
        raise ValueError("at least two prompts are required: one to train on and one to test on")
    if not all(np.isfinite(side).all() for side in features):
        raise ValueError("the features are not finite")
    aucs = {}
    for name in names:
        auc = interval(*scores(name, features[0], features[1], groups, seed), groups, seed)
        if refit:
            auc = Auc(auc.auc, *refitted(name, features[0], features[1], groups, seed))
        aucs[name] = auc
    return aucs


def refitted(name: str, first: Floats, second: Floats, groups: NDArray[Any], seed: int) -> tuple[float, float]:
    """Return the 95 % interval of the AUC over resamples of prompts, each with newly trained classifiers."""
    random, all_prompts = np.random.RandomState(seed), np.unique(groups)
    members = {name: np.flatnonzero(groups == name) for name in all_prompts}
    aucs = []
    for resample in range(REFITS):
        drawn = random.choice(all_prompts, len(all_prompts))
        if len(np.unique(drawn)) < 2:
            continue
        rows = np.concatenate([members[prompt] for prompt in drawn])
        lower, upper = scores(name, first[rows], second[rows], groups[rows], seed + resample, repeats=1)
        aucs.append(area(lower, upper))
    low, high = np.quantile(aucs, [(1.0 - LEVEL) / 2.0, (1.0 + LEVEL) / 2.0])
    return float(low), float(high)


def area(first: Floats, second: Floats) -> float:
    """Return the share of pairs (one score of each) in order; ties count half."""
    return float((second[:, None] > first[None, :]).mean() + 0.5 * (second[:, None] == first[None, :]).mean())


def scores(
    name: str, first: Floats, second: Floats, groups: NDArray[Any], seed: int, repeats: int = REPEATS
) -> tuple[Floats, Floats]:
    """Return a score of each sound of both DiTs, higher for the second, by classifiers trained on other prompts.

    Classifiers of different folds are comparable only by order, so scores are ranks in [0, 1], averaged over `repeats`
    splits.
    """
    from scipy.stats import rankdata
    from sklearn.model_selection import GroupKFold

    features = np.concatenate([first, second])
    labels = np.repeat([0, 1], len(first))
    both = np.concatenate([groups, groups])
    ranks = np.zeros(len(features))
    folds = min(FOLDS, len(np.unique(groups)))
    for repeat in range(repeats):
        split = GroupKFold(folds, shuffle=True, random_state=seed + repeat).split(features, labels, both)
        for train, test in split:
            model = _classifier(name, seed + repeat)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # equal features do not converge
                model.fit(features[train], labels[train])
            probabilities = model.predict_proba(features[test])[:, 1]
            ranks[test] += (rankdata(probabilities) - 0.5) / len(test) / repeats
    return ranks[: len(first)], ranks[len(first) :]


def interval(first: Floats, second: Floats, groups: NDArray[Any], seed: int) -> Auc:
    """Return the AUC of scores of two DiTs with its interval by resampling prompts, since sounds of one prompt are
    alike.
    """
    names, member = np.unique(groups, return_inverse=True)
    wins = (second[:, None] > first[None, :]) + 0.5 * (second[:, None] == first[None, :])
    drawn = np.random.RandomState(seed).multinomial(len(names), np.full(len(names), 1.0 / len(names)), RESAMPLES)
    weights = drawn[:, member].astype(np.float64)  # (resamples, n): multiplicity of each sound
    resampled = np.einsum("ri,ij,rj->r", weights, wins, weights, optimize=True) / np.square(weights.sum(axis=1))
    low, high = np.quantile(resampled, [(1.0 - LEVEL) / 2.0, (1.0 + LEVEL) / 2.0])
    return Auc(float(wins.mean()), float(low), float(high))


def shifts(first: Floats, second: Floats, groups: Sequence[str]) -> dict[str, float]:
    """Return, by feature group, the mean shift from the first DiT to the second in standard deviations of the first.

    Root mean square over the features of the group; constant features are left out.
    """
    spread = first.std(axis=0)
    varying = spread > 1e-9
    shift = np.where(varying, (second - first).mean(axis=0) / np.where(varying, spread, 1.0), 0.0)
    owners = np.asarray(groups)
    return {
        str(name): float(np.sqrt(np.square(shift[members]).mean()))
        for name in dict.fromkeys(groups)
        if (members := (owners == name) & varying).any()
    }


def outside(value: float, interval_of: Mapping[str, float]) -> float:
    """Return the distance of a figure from an interval {low, high}; 0 inside."""
    return max(interval_of["low"] - value, value - interval_of["high"], 0.0)


def _classifier(name: str, seed: int) -> Any:
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if name == LOGISTIC:
        return make_pipeline(StandardScaler(), LogisticRegression(C=INVERSE_REGULARISATION, max_iter=500))
    return HistGradientBoostingClassifier(
        max_iter=60, learning_rate=0.1, max_leaf_nodes=8, min_samples_leaf=10, max_features=0.1, random_state=seed
    )
