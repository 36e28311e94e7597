"""Scores of embeddings: pure functions on arrays, each in [-1, 1] or [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]
Bools = NDArray[np.bool_]


def ndcg_at_k(similarity: Floats, relevant: Bools, k: int = 10) -> NDArray[np.float64]:
    """Normalised discounted cumulative gain of each query, binary relevance.

    Args:
        similarity: (queries, documents), higher is nearer; -inf excludes a document.
        relevant: (queries, documents).
        k: Cut-off.

    Returns:
        (queries,) in [0, 1]; 0 for a query with nothing relevant.
    """
    k = min(k, similarity.shape[1])
    # Stable sort of the negated scores: ties keep the order of the documents.
    top = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    discount = 1.0 / np.log2(np.arange(2, k + 2))
    gain = (np.take_along_axis(relevant, top, axis=1) * discount).sum(axis=1)
    counts = np.minimum(relevant.sum(axis=1), k)
    ideal = np.concatenate([[0.0], discount.cumsum()])[counts]
    result: NDArray[np.float64] = np.divide(gain, ideal, out=np.zeros_like(gain), where=ideal > 0)
    return result


def ndcg_of_gains(ranked: Sequence[float], judged: Sequence[float], k: int = 10) -> float:
    """Normalised discounted cumulative gain of one ranking, graded relevance, as in trec_eval.

    Args:
        ranked: Gains of the first k documents of the ranking, best first.
        judged: Gains of all judged documents of the query.
        k: Cut-off.

    Returns:
        A value in [0, 1]; 0 if nothing is relevant.
    """
    ideal = sorted(judged, reverse=True)[:k]
    best = sum(gain / math.log2(i + 2) for i, gain in enumerate(ideal))
    found = sum(gain / math.log2(i + 2) for i, gain in enumerate(ranked[:k]))
    return found / best if best > 0 else 0.0


def pair_average_precision(scores: Floats, positive: Bools) -> float:
    """Average precision of pair scores against binary labels, in [0, 1]."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(positive, scores))


def v_measure(embeddings: Floats, labels: Ints, *, seeds: int = 10) -> float:
    """V-measure of k-means clusters against labels, mean over seeds, in [0, 1].

    Args:
        embeddings: (n, d).
        labels: (n,) class of each row; their number is the number of clusters.
        seeds: Number of k-means runs, with seeds 0, 1, ...
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import v_measure_score

    clusters = len(np.unique(labels))
    scores = [
        v_measure_score(
            labels, KMeans(clusters, n_init=1, random_state=seed).fit_predict(embeddings)
        )
        for seed in range(seeds)
    ]
    return float(np.mean(scores))
