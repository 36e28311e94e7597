"""Scores that can be resampled, and paired bootstrap intervals from them.

A score is a statistic of weighted units (pairs, queries, texts): every unit weighs 1 in the score
itself, and as often as it was drawn in a bootstrap sample. Where a score is a mean over runs (draws
of training texts, starts of k-means), the runs are drawn too. Two configurations are compared on
the same draws, so what makes a unit hard for both cancels out of their difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

#: Weights (b, n) to statistics (b,).
Statistic = Callable[[Floats], Floats]

#: A statistic, and the sizes of the groups of units that its weights belong to; each group is drawn
#: for itself.
Part = tuple[tuple[int, ...], Statistic]

#: Weights that are held in memory at a time.
_CHUNK = 2_000_000


@dataclass(frozen=True)
class Outcome:
    """How one configuration did on one task.

    Attributes:
        score: The task's main score.
        units: Number of pairs, queries or texts that are drawn; 0 where none can be.
        sizes: Sizes of the groups that are drawn one by one.
        statistic: The score as a function of all weights, or None.
    """

    score: float
    units: int = 0
    sizes: tuple[int, ...] = ()
    statistic: Statistic | None = None

    @classmethod
    def of(cls, part: Part, units: int | None = None) -> Outcome:
        """The outcome whose score is the statistic with every weight 1.

        Args:
            part: The statistic.
            units: Number to report; None for the first group's size.
        """
        sizes, statistic = part
        score = float(statistic(np.ones((1, sum(sizes))))[0])
        return cls(score, sizes[0] if units is None else units, sizes, statistic)

    @classmethod
    def mean(cls, outcomes: Sequence[Outcome]) -> Outcome:
        """The mean over repetitions (e.g. seeds) on the same units."""
        first = outcomes[0]
        score = float(np.mean([outcome.score for outcome in outcomes]))
        statistics = [outcome.statistic for outcome in outcomes if outcome.statistic is not None]
        if len(statistics) < len(outcomes) or any(o.sizes != first.sizes for o in outcomes):
            return cls(score)
        return cls(score, first.units, first.sizes, mean_of(statistics))


def replicates(outcome: Outcome, resamples: int, seed: int = 0) -> Floats | None:
    """The score on bootstrap samples of the units; the same samples for the same seed.

    Returns:
        (resamples,), or None where the score cannot be resampled.
    """
    if outcome.statistic is None:
        return None
    parts = [outcome.statistic(weights) for weights in _draws(outcome.sizes, resamples, seed)]
    return np.concatenate(parts)


def interval(values: Floats, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of bootstrap replicates; samples without a score are left out."""
    tail = (1.0 - level) / 2.0
    low, high = np.nanquantile(values, [tail, 1.0 - tail])
    return float(low), float(high)


def _draws(sizes: Sequence[int], resamples: int, seed: int) -> Iterator[Floats]:
    # A generator for each group, so that draws do not depend on the chunks.
    generators = [np.random.default_rng([seed, i]) for i in range(len(sizes))]
    chunk = max(1, _CHUNK // sum(sizes))
    for first in range(0, resamples, chunk):
        rows = min(chunk, resamples - first)
        counts = []
        for rng, size in zip(generators, sizes, strict=True):
            drawn = rng.integers(0, size, size=(rows, size))
            drawn += np.arange(rows)[:, None] * size
            flat = np.bincount(drawn.ravel(), minlength=rows * size)
            counts.append(flat.reshape(rows, size))
        yield np.concatenate(counts, axis=1).astype(np.float64)


# Statistics --------------------------------------------------------------------------------------


def mean_of(statistics: Sequence[Statistic]) -> Statistic:
    """The mean of several statistics of the same units."""
    return lambda weights: np.mean([statistic(weights) for statistic in statistics], axis=0)


def max_of(statistics: Sequence[Statistic]) -> Statistic:
    """The largest of several statistics of the same units."""
    return lambda weights: np.max([statistic(weights) for statistic in statistics], axis=0)


def over_runs(n: int, statistics: Sequence[Statistic]) -> Part:
    """The mean over runs on the same units; runs are drawn as well as units.

    Args:
        n: Number of units.
        statistics: One for each run.
    """

    def statistic(weights: Floats) -> Floats:
        values = np.stack([run(weights[:, :n]) for run in statistics], axis=1)
        result: Floats = np.average(values, axis=1, weights=weights[:, n:])
        return result

    return (n, len(statistics)), statistic


def average(parts: Sequence[Part], *, drawn: bool = False) -> Part:
    """The mean over parts with units of their own, e.g. subsets of a task.

    Args:
        parts: At least one.
        drawn: Whether the parts themselves are drawn, because they are a sample of what could have
            been.
    """
    ends = np.cumsum([sum(sizes) for sizes, _ in parts])
    spans = [slice(end - sum(sizes), end) for end, (sizes, _) in zip(ends, parts, strict=True)]
    total = int(ends[-1])

    def statistic(weights: Floats) -> Floats:
        values = [part(weights[:, span]) for span, (_, part) in zip(spans, parts, strict=True)]
        result: Floats = np.average(
            np.stack(values, axis=1), axis=1, weights=weights[:, total:] if drawn else None
        )
        return result

    sizes = tuple(size for part, _ in parts for size in part)
    return (*sizes, len(parts)) if drawn else sizes, statistic


def mean_statistic(values: ArrayLike) -> Statistic:
    """The weighted mean of one value per unit, e.g. nDCG of each query.

    Args:
        values: (n,).
    """
    per_unit = np.asarray(values, dtype=np.float64)
    return lambda weights: weights @ per_unit / weights.sum(axis=1)


def spearman_statistic(x: ArrayLike, y: ArrayLike) -> Statistic:
    """Spearman's rank correlation; ties, drawn twice or equal, get their mean rank.

    Args:
        x: (n,).
        y: (n,).
    """
    ranks = [_ranker(x), _ranker(y)]

    def statistic(weights: Floats) -> Floats:
        total = weights.sum(axis=1, keepdims=True)
        a, b = (rank(weights) for rank in ranks)
        a -= (weights * a).sum(axis=1, keepdims=True) / total
        b -= (weights * b).sum(axis=1, keepdims=True) / total
        products = [
            (weights * left * right).sum(axis=1) for left, right in ((a, b), (a, a), (b, b))
        ]
        scale = np.sqrt(products[1] * products[2])
        result: Floats = np.divide(
            products[0], scale, out=np.full_like(scale, np.nan), where=scale > 0
        )
        return result

    return statistic


def average_precision_statistic(scores: ArrayLike, positive: ArrayLike) -> Statistic:
    """Average precision of scores against binary labels.

    Args:
        scores: (n,), higher is more likely positive.
        positive: (n,) bool.
    """
    groups = _Groups(-np.asarray(scores, dtype=np.float64))
    is_positive = np.asarray(positive, dtype=np.float64)

    def statistic(weights: Floats) -> Floats:
        found = groups.sums(weights * is_positive)
        seen = groups.sums(weights).cumsum(axis=1)
        precision = found.cumsum(axis=1) / np.maximum(seen, 1.0)
        total = found.sum(axis=1)
        result: Floats = np.divide(
            (precision * found).sum(axis=1), total, out=np.full_like(total, np.nan), where=total > 0
        )
        return result

    return statistic


def v_measure_statistic(
    labels: ArrayLike, clusters: ArrayLike, units: ArrayLike | None = None, n: int | None = None
) -> Statistic:
    """V-measure of clusters against labels.

    Args:
        labels: (m,) class of each clustered text.
        clusters: (m,) its cluster.
        units: (m,) which unit it is; a unit may be clustered several times or not at all. None for
            unit i being text i.
        n: Number of units.
    """
    from scipy.sparse import csr_array

    label_ids = np.unique(np.asarray(labels), return_inverse=True)[1]
    cluster_ids = np.unique(np.asarray(clusters), return_inverse=True)[1]
    cells, cell_of = np.unique(
        label_ids * (int(cluster_ids.max()) + 1) + cluster_ids, return_inverse=True
    )
    rows = np.arange(len(label_ids)) if units is None else np.asarray(units)
    shape = (len(rows) if n is None else n, len(cells))
    counts = csr_array((np.ones(len(rows)), (rows, cell_of)), shape=shape)
    margins = [
        csr_array((np.ones(len(cells)), (np.arange(len(cells)), side)))
        for side in np.divmod(cells, int(cluster_ids.max()) + 1)
    ]

    def statistic(weights: Floats) -> Floats:
        joint = weights @ counts
        classes, groups = (_entropy(joint @ margin) for margin in margins)
        information = np.maximum(classes + groups - _entropy(joint), 0.0)
        # One class, or one cluster, is by definition homogeneous, or complete.
        homogeneity, completeness = (
            np.divide(information, side, out=np.ones_like(side), where=side > 0)
            for side in (classes, groups)
        )
        both = homogeneity + completeness
        result: Floats = np.divide(
            2 * homogeneity * completeness, both, out=np.zeros_like(both), where=both > 0
        )
        return result

    return statistic


class _Groups:
    """Sums over units with equal values, groups in ascending order of the value."""

    def __init__(self, values: Floats) -> None:
        self.order = np.argsort(values, kind="stable")
        ordered = values[self.order]
        self.starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        group = np.cumsum(np.r_[False, ordered[1:] != ordered[:-1]])
        self.of_unit = np.empty(len(values), dtype=np.int64)
        self.of_unit[self.order] = group

    def sums(self, weights: Floats) -> Floats:
        result: Floats = np.add.reduceat(weights[:, self.order], self.starts, axis=1)
        return result


def _ranker(values: ArrayLike) -> Callable[[Floats], Floats]:
    groups = _Groups(np.asarray(values, dtype=np.float64))

    def ranks(weights: Floats) -> Floats:
        sums = groups.sums(weights)
        middle = sums.cumsum(axis=1) - sums / 2
        result: Floats = middle[:, groups.of_unit]
        return result

    return ranks


def _entropy(counts: Floats) -> Floats:
    total = counts.sum(axis=1, keepdims=True)
    shares = counts / total
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    result: Floats = -(shares * logs).sum(axis=1)
    return result
