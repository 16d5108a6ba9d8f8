"""Figures of scored pairs, by hand and against scipy."""

import numpy as np
import pytest
from scipy import stats

from rlhf_jax.evaluation.pair_analysis import (
    accuracy,
    accuracy_by,
    calibration,
    length_bias,
    margin_quantiles,
    partial_correlation,
    pearson,
    share,
    sign_accuracy,
    worst_pairs,
)

MARGINS = np.array([2.0, -1.0, 0.0, 0.5])


def random_pairs(seed=0, count=200):
    """Scores that lean on quality and on length, and both of these."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 100, (count, 2))
    probability = rng.uniform(0.5, 1.0, count)
    quality = np.stack([probability, 1 - probability], axis=1)
    scores = quality + 0.01 * lengths + 0.3 * rng.normal(size=(count, 2))
    return scores, lengths, probability


def test_accuracy_by_hand():
    # hits 1, 0, ½, 1: 2.5 of 4
    found = accuracy(MARGINS)
    assert (found.value, found.count) == (0.625, 4)


def test_wilson_interval_is_that_of_scipy():
    for hits, count in ((0, 7), (3, 7), (7, 7), (531, 700)):
        values = np.arange(count) < hits
        wanted = stats.binomtest(hits, count).proportion_ci(0.95, method="wilson")
        found = share(values)
        assert found.value == pytest.approx(hits / count)
        assert (found.low, found.high) == pytest.approx(tuple(wanted), abs=1e-12)


def test_a_share_of_nothing():
    found = share(np.zeros(0))
    assert found.count == 0 and np.isnan([found.value, found.low, found.high]).all()


def test_accuracy_by_group():
    found = accuracy_by(MARGINS, ["film", "phone", "phone", "phone"])
    assert list(found) == ["phone", "film"]
    assert (found["phone"].value, found["phone"].count) == (0.5, 3)
    assert (found["film"].value, found["film"].count) == (1.0, 1)


def test_length_bias_by_hand():
    """The scores are the lengths: right where the longer one is chosen, else wrong."""
    lengths = np.array([[9, 2], [3, 8], [4, 4], [7, 1]])
    found = length_bias(lengths, lengths, np.ones(4))
    assert found.longer_chosen[::3] == (1.0, 2)
    assert found.shorter_chosen[::3] == (0.0, 1)
    assert found.raters_prefer_longer.value == pytest.approx(2 / 3)
    assert found.model_prefers_longer[::3] == (1.0, 3)
    assert found.correlation == pytest.approx(1)
    assert found.rank_correlation == pytest.approx(1)
    assert found.within_pairs == pytest.approx(1)
    assert found.at_equal_quality == pytest.approx(1)


def test_correlations_are_those_of_scipy():
    scores, lengths, probability = random_pairs()
    found = length_bias(scores, lengths, probability)
    flat = scores.ravel(), lengths.ravel()
    assert found.correlation == pytest.approx(stats.pearsonr(*flat).statistic)
    assert found.rank_correlation == pytest.approx(stats.spearmanr(*flat).statistic)


def test_partial_correlation_is_that_of_the_residuals():
    rng = np.random.default_rng(1)
    given = rng.normal(size=300)
    x, y = given + rng.normal(size=300), -2 * given + rng.normal(size=300)
    left = [v - np.polyval(np.polyfit(given, v, 1), given) for v in (x, y)]
    wanted = stats.pearsonr(*left).statistic
    assert partial_correlation(x, y, given) == pytest.approx(wanted, abs=1e-12)
    assert abs(wanted) < 0.2 < abs(pearson(x, y))  # all that they share is `given`
    assert partial_correlation(x, y, np.ones(300)) == pytest.approx(pearson(x, y))
    assert np.isnan(partial_correlation(given, y, given))


def test_length_that_only_follows_quality_is_no_bias():
    """Scores are the raters' gap, and so are lengths but for noise."""
    rng = np.random.default_rng(2)
    probability = rng.uniform(0.5, 1.0, 400)
    quality = np.stack([probability, 1 - probability], axis=1)
    lengths = 50 * quality + 3 * rng.normal(size=(400, 2))
    scores = quality + 0.05 * rng.normal(size=(400, 2))
    found = length_bias(scores, lengths, probability)
    assert found.within_pairs > 0.8
    assert abs(found.at_equal_quality) < 0.12


def test_the_order_of_the_sides_does_not_matter():
    scores, lengths, probability = random_pairs(3)
    found = length_bias(scores, lengths, probability)
    turn = np.arange(len(scores)) % 3 == 0  # some pairs, not all
    turned = [np.where(turn[:, None], x[:, ::-1], x) for x in (scores, lengths)]
    swapped = length_bias(*turned, np.where(turn, 1 - probability, probability))
    for name in ("correlation", "within_pairs", "at_equal_quality"):
        assert getattr(found, name) == pytest.approx(getattr(swapped, name))
    costs = length_bias(-scores, lengths, probability, sign=-1)
    assert costs == found


def test_calibration_by_hand():
    # σ(±log 4) = 0.8 and 0.2, σ(log 1.5) = 0.6: confidences 0.8, 0.8 and 0.6
    margins = np.array([np.log(4), -np.log(4), np.log(1.5)])
    found = calibration(margins, np.array([1.0, 0.7, 0.9]), bins=5)
    low, high = found.bins
    assert (low.count, high.count) == (1, 2)
    assert (low.confidence, low.accuracy, low.raters) == pytest.approx((0.6, 1.0, 0.9))
    # raters who agree: 1.0, and 1 − 0.7 with the second, which is told wrong
    assert (high.confidence, high.accuracy) == pytest.approx((0.8, 0.5))
    assert high.raters == pytest.approx((1.0 + 0.3) / 2)
    # 1/3 |1 − 0.6| + 2/3 |0.5 − 0.8| = 1/3
    assert found.expected_error == pytest.approx(1 / 3)
    assert found.raters_error == pytest.approx(0.3 / 3 + 2 * 0.15 / 3)


def test_calibration_of_the_true_probabilities_is_nearly_perfect():
    rng = np.random.default_rng(4)
    margins = 2 * rng.normal(size=20_000)
    right = rng.uniform(size=len(margins)) < 1 / (1 + np.exp(-np.abs(margins)))
    told = np.where(right, np.abs(margins), -np.abs(margins))
    assert calibration(told, np.ones(len(told))).expected_error < 0.02
    sure = calibration(5 * told, np.ones(len(told)))
    assert sure.expected_error > 0.1
    assert sum(b.count for b in sure.bins) == len(told)


def test_extreme_margins_have_a_bin():
    found = calibration(np.array([0.0, 1e4, -1e4]), np.ones(3))
    assert [(b.low, b.count) for b in found.bins] == [(0.5, 1), (0.95, 2)]


def test_quantiles_and_worst_pairs():
    found = margin_quantiles(MARGINS)
    assert found["mean"] == 0.375 and found["50%"] == 0.25
    assert found["std"] == pytest.approx(np.std(MARGINS))
    assert worst_pairs(MARGINS, 2).tolist() == [1, 2]
    assert len(worst_pairs(MARGINS, 30)) == 4


def test_signs_of_costs_by_hand():
    costs = np.array([[-1.0, 2.0], [0.5, -0.5]])
    safe = np.array([[True, False], [True, False]])  # the second pair is all wrong
    found = sign_accuracy(costs, safe)
    assert {name: s[::3] for name, s in found.items()} == {
        "all responses": (0.5, 4),
        "safe ones": (0.5, 2),
        "unsafe ones": (0.5, 2),
    }
    assert sign_accuracy(costs[:1], safe[:1])["unsafe ones"].value == 1
