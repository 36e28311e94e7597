"""Weighted statistics are the scores of resampled data; intervals hold what they promise."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, v_measure_score

from st_embfilter.evaluation.bootstrap import (
    Outcome,
    Statistic,
    _draws,
    average,
    average_precision_statistic,
    interval,
    max_of,
    mean_of,
    mean_statistic,
    over_runs,
    replicates,
    spearman_statistic,
    v_measure_statistic,
)
from tests.conftest import FLOAT64

N = 60
RNG = np.random.default_rng(0)
X = RNG.standard_normal(N)
TIED = RNG.integers(0, 4, N).astype(float)
POSITIVE = RNG.random(N) < 0.3
CLUSTERS = RNG.integers(0, 5, N)
LABELS = np.where(RNG.random(N) < 0.5, CLUSTERS, RNG.integers(0, 3, N))

Rows = np.ndarray


@pytest.mark.parametrize(
    ("statistic", "direct"),
    [
        (mean_statistic(X), lambda rows: X[rows].mean()),
        (spearman_statistic(X, TIED), lambda rows: spearmanr(X[rows], TIED[rows]).statistic),
        (
            average_precision_statistic(TIED, POSITIVE),
            lambda rows: average_precision_score(POSITIVE[rows], TIED[rows]),
        ),
        (
            v_measure_statistic(LABELS, CLUSTERS),
            lambda rows: v_measure_score(LABELS[rows], CLUSTERS[rows]),
        ),
        (
            mean_of([mean_statistic(X), mean_statistic(TIED)]),
            lambda rows: (X[rows].mean() + TIED[rows].mean()) / 2,
        ),
        (
            max_of([mean_statistic(X), mean_statistic(-X)]),
            lambda rows: abs(X[rows].mean()),
        ),
    ],
    ids=["mean", "spearman", "average precision", "v-measure", "mean of", "max of"],
)
def test_weights_are_repetitions(statistic: Statistic, direct: Callable[[Rows], float]) -> None:
    rows = RNG.integers(0, N, size=(20, N))
    rows[0] = np.arange(N)
    weights = np.array([np.bincount(row, minlength=N) for row in rows], dtype=float)
    expected = [direct(row) for row in rows]
    np.testing.assert_allclose(statistic(weights), expected, rtol=0, atol=FLOAT64)


def test_v_measure_of_units_that_were_drawn_twice_or_never() -> None:
    drawn = RNG.integers(0, N, size=2 * N)
    statistic = v_measure_statistic(LABELS[drawn], CLUSTERS[drawn], drawn, N)
    weights = np.ones((2, N))
    weights[1, :30] = 0
    kept = drawn[drawn >= 30]
    expected = [v_measure_score(LABELS[r], CLUSTERS[r]) for r in (drawn, kept)]
    np.testing.assert_allclose(statistic(weights), expected, atol=FLOAT64)


@pytest.mark.parametrize(
    ("labels", "clusters"), [([0, 0, 0], [0, 1, 1]), ([0, 1, 1], [0, 0, 0]), ([0, 0], [0, 0])]
)
def test_v_measure_of_one_class_or_cluster(labels: list[int], clusters: list[int]) -> None:
    statistic = v_measure_statistic(labels, clusters)
    expected = v_measure_score(labels, clusters)
    assert statistic(np.ones((1, len(labels))))[0] == pytest.approx(expected, abs=FLOAT64)


def paired(
    outcome: Outcome,
    reference: Outcome,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """The interval of a difference, as a sweep takes it: from the same samples of both."""
    mine, theirs = (replicates(side, resamples, seed) for side in (outcome, reference))
    assert mine is not None
    assert theirs is not None
    return interval(mine - theirs, level)


def test_a_difference_of_nothing_has_no_width() -> None:
    outcome = Outcome.of(((N,), spearman_statistic(X, TIED)))
    assert paired(outcome, outcome) == (0.0, 0.0)


def test_pairing_takes_out_what_is_common() -> None:
    hard = RNG.standard_normal(500)
    first, second = (Outcome.of(((500,), mean_statistic(hard + shift))) for shift in (0.0, 0.1))
    bounds = paired(second, first)
    assert bounds == pytest.approx((0.1, 0.1))
    alone = replicates(second, 500)
    assert alone is not None
    assert np.diff(interval(alone))[0] > 0.1


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(300):
        values = rng.standard_normal(80) + 0.3
        reference = rng.standard_normal(80)
        bounds = paired(
            Outcome.of(((80,), mean_statistic(values))),
            Outcome.of(((80,), mean_statistic(reference))),
            resamples=300,
            level=0.9,
            seed=seed,
        )
        covered += bounds[0] <= 0.3 <= bounds[1]
    # 90 % of 300 with a standard deviation of 1.7 points; percentile intervals run a little low.
    assert 0.84 <= covered / 300 <= 0.95


def test_the_samples_are_those_of_the_seed_whatever_the_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outcome = Outcome.of(((N,), mean_statistic(X)))
    whole = replicates(outcome, 100, seed=3)
    monkeypatch.setattr("st_embfilter.evaluation.bootstrap._CHUNK", 7 * N)
    chunked = replicates(outcome, 100, seed=3)
    assert whole is not None
    assert chunked is not None
    np.testing.assert_allclose(whole, chunked, rtol=0, atol=FLOAT64)
    assert not np.array_equal(whole, replicates(outcome, 100, seed=4))


def test_runs_and_parts_are_averaged_as_weighted() -> None:
    runs = [RNG.standard_normal(N) for _ in range(3)]
    sizes, statistic = over_runs(N, [mean_statistic(run) for run in runs])
    assert sizes == (N, 3)
    units, times = RNG.integers(0, 3, N), np.array([2.0, 0.0, 1.0])
    expected = sum(t * np.average(r, weights=units) for t, r in zip(times, runs, strict=True)) / 3
    assert statistic(np.r_[units, times][None])[0] == pytest.approx(expected)
    parts = [((N,), mean_statistic(runs[0])), ((N,), mean_statistic(runs[1]))]
    sizes, statistic = average(parts, drawn=True)
    assert sizes == (N, N, 2)
    assert statistic(np.r_[units, np.ones(N), 0.0, 2.0][None])[0] == pytest.approx(runs[1].mean())
    sizes, statistic = average(parts)
    both = (np.average(runs[0], weights=units) + runs[1].mean()) / 2
    assert statistic(np.r_[units, np.ones(N)][None])[0] == pytest.approx(both)


def test_each_group_is_drawn_for_itself() -> None:
    (weights,) = _draws((N, 3), 50, seed=0)
    assert weights.shape == (50, N + 3)
    assert set(weights[:, :N].sum(axis=1)) == {N}
    assert set(weights[:, N:].sum(axis=1)) == {3}


def test_noise_between_runs_widens_the_interval() -> None:
    """Runs that differ by luck alone do not decide anything."""
    rng = np.random.default_rng(2)
    units = rng.standard_normal(400)
    lucky = [mean_statistic(units + shift) for shift in rng.normal(0, 0.3, size=10)]
    plain = [mean_statistic(units)] * 10
    bounds = paired(Outcome.of(over_runs(400, lucky)), Outcome.of(over_runs(400, plain)))
    assert bounds[0] < 0 < bounds[1]


def test_what_cannot_be_resampled_has_no_interval() -> None:
    known, unknown = Outcome.of(((N,), mean_statistic(X))), Outcome(0.5)
    assert replicates(unknown, 10) is None
    assert Outcome.mean([known, unknown]).statistic is None
