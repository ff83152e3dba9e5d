"""Dividing groups (patients) into balanced folds: pure arithmetic on a table of counts, without videos or files.

Letters: G groups, C classes, K folds. A group may hold videos of several classes, so no simple stratified shuffle
applies: several seeded greedy tries are made, each improved by moves and exchanges, and the best balanced one wins.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["assign_folds", "imbalance"]

# A class missing from a fold outweighs any unevenness: terms below are squared relative deviations, of order 1.
MISSING_CLASS = 1000.0
# Exchanges look at all pairs of groups; beyond this many the greedy result is even enough without them.
MAX_REFINED_GROUPS = 600


def _features(videos: np.ndarray, folds: int) -> tuple[np.ndarray, int]:
    """Counts of every group in units of the ideal fold: patients per class, videos per class, patients, videos.

    Returns float64 [G, D] and the number of leading patients-per-class columns.
    """
    used = videos[:, videos.sum(0) > 0].astype(np.float64)
    columns = [used > 0, used, np.ones((len(videos), 1)), videos.sum(1, keepdims=True)]
    table = np.concatenate([np.asarray(part, np.float64) for part in columns], axis=1)
    return table * folds / np.maximum(table.sum(0), 1e-12), used.shape[1]


def _cost(sums: np.ndarray, classes: int) -> np.ndarray:
    """Cost of folds with the feature sums [..., D]: float64 [...]."""
    missing = (sums[..., :classes] < 1e-9).sum(-1)
    return ((sums - 1.0) ** 2).sum(-1) + MISSING_CLASS * missing


def imbalance(videos: np.ndarray, fold_of: np.ndarray, folds: int) -> float:
    """How uneven an assignment is: squared relative deviations from the ideal fold, over patients and videos per class
    and in all, summed over folds; 0 is perfect, and every class missing from a fold adds 1000.

    Args:
        videos: int [G, C], labelled videos of every group by class.
        fold_of: int [G], fold of every group.
        folds: K.
    """
    features, classes = _features(videos, folds)
    sums = np.zeros((folds, features.shape[1]))
    np.add.at(sums, fold_of, features)
    return float(_cost(sums, classes).sum())


def _greedy(features: np.ndarray, classes: int, folds: int, rng: np.random.Generator) -> np.ndarray:
    """Groups one after another into the fold where they cost least; carriers of rare classes and large groups first."""
    # A group's share of its rarest class, in ideal folds: high for the few carriers of a rare class.
    share = features[:, : 2 * classes].max(1)
    order = np.lexsort((rng.random(len(features)), -np.round(share * rng.uniform(0.7, 1.3, len(features)), 6)))
    fold_of = np.empty(len(features), np.int64)
    sums = np.zeros((folds, features.shape[1]))
    cost = _cost(sums, classes)
    for group in order:
        grown = _cost(sums + features[group], classes)
        best = int(np.argmin(grown - cost + 1e-9 * rng.random(folds)))
        fold_of[group] = best
        sums[best] += features[group]
        cost[best] = grown[best]
    return fold_of


def _refine(features: np.ndarray, classes: int, folds: int, fold_of: np.ndarray, sweeps: int = 20) -> np.ndarray:
    """Move single groups and exchange pairs while that lowers the cost."""
    fold_of = fold_of.copy()
    sums = np.zeros((folds, features.shape[1]))
    np.add.at(sums, fold_of, features)
    for _ in range(sweeps):
        improved = False
        for group in range(len(features)):
            here = fold_of[group]
            cost = _cost(sums, classes)
            without = sums[here] - features[group]
            move = _cost(without, classes) - cost[here] + _cost(sums + features[group], classes) - cost
            move[here] = 0.0
            there = fold_of
            # Exchange with every other group: this fold loses `group` and gains the other, the other fold the reverse.
            swap = _cost(without + features, classes) - cost[here]
            swap += _cost(sums[there] - features + features[group], classes) - cost[there]
            swap[there == here] = 0.0
            if min(move.min(), swap.min()) > -1e-9:
                continue
            improved = True
            if move.min() <= swap.min():
                target, other = int(move.argmin()), None
            else:
                other = int(swap.argmin())
                target = fold_of[other]
            if other is not None:
                sums[here] += features[other]
                sums[target] -= features[other]
                fold_of[other] = here
            sums[here] -= features[group]
            sums[target] += features[group]
            fold_of[group] = target
        if not improved:
            break
    return fold_of


def assign_folds(videos: np.ndarray, folds: int, seed: int | Sequence[int]) -> np.ndarray:
    """Divide groups into `folds` parts with patients and videos of every class spread as evenly as found.

    Equal arguments give equal results on every machine (ties are broken by the seeded generator).

    Args:
        videos: int [G, C], number of labelled videos of every group by class; no row is all zero.
        folds: K, at most G.
        seed: of the tries.

    Returns:
        int64 [G], the fold of every group. Folds are numbered by the order of their first group, so that the numbers do
        not depend on chance. Every class is in every fold when it has K groups and the search finds such a division;
        the caller checks.
    """
    features, classes = _features(videos, folds)
    rng = np.random.default_rng(seed)
    best, best_cost = None, np.inf
    for _ in range(int(np.clip(4000 // max(len(videos), 1), 2, 24))):
        fold_of = _greedy(features, classes, folds, rng)
        if len(videos) <= MAX_REFINED_GROUPS:
            fold_of = _refine(features, classes, folds, fold_of)
        cost = round(imbalance(videos, fold_of, folds), 9)
        if cost < best_cost:
            best, best_cost = fold_of, cost
    first = {fold: int(np.flatnonzero(best == fold)[0]) for fold in set(best.tolist())}
    number = {fold: position for position, fold in enumerate(sorted(first, key=first.__getitem__))}
    return np.array([number[fold] for fold in best.tolist()], np.int64)
