"""Intervals, tests and tails: by hand, against scipy, and by simulation."""

import numpy as np
import pytest
from scipy import stats

from rlhf_jax.analysis.statistics import (
    benjamini_hochberg,
    mean_interval,
    paired_difference,
    sign_flip_p_values,
    tail_p_value,
    trend,
)

DRAWS = {
    "normal": (lambda rng, shape: rng.normal(size=shape), 0.0),
    "exponential": (lambda rng, shape: rng.exponential(size=shape), 1.0),
    "student_t3": (lambda rng, shape: rng.standard_t(3, size=shape), 0.0),
}


def test_interval_of_two_values_by_hand():
    # mean 1, s = √2, s/√N = 1. Resamples are (0, 0) and (2, 2) in half of the cases:
    # |x̄* − x̄| = 1, and their error of 0 counts as ¼, so t = 4; else t = 0
    assert mean_interval([0.0, 2.0]) == (1.0, -3.0, 5.0)


def test_interval_is_that_of_a_loop():
    values = np.random.default_rng(3).gamma(2.0, size=30)
    rng, found = np.random.default_rng(4), []
    for _ in range(4000):
        again = rng.choice(values, 30)
        found.append(abs(again.mean() - values.mean()) / stats.sem(again))
    half = np.quantile(found, 0.9) * stats.sem(values)
    got = mean_interval(values, level=0.9)
    wanted = (values.mean(), values.mean() - half, values.mean() + half)
    np.testing.assert_allclose(got, wanted, atol=0.04 * half)


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize(("N", "off"), [(16, 0.04), (64, 0.02)])
def test_coverage_of_the_mean(name, N, off):
    draw, mean = DRAWS[name]
    got = mean_interval(draw(np.random.default_rng([N, 7]), (4000, N)))
    covered = np.mean((got.low <= mean) & (mean <= got.high))
    assert abs(covered - 0.95) < off


def test_many_means_are_each_alone():
    values = np.random.default_rng(0).normal(size=(2, 3, 20))
    got = mean_interval(values, seed=5)
    assert got.low.shape == (2, 3)
    alone = mean_interval(values[1, 2], seed=5)
    np.testing.assert_allclose([x[1, 2] for x in got], alone, rtol=1e-12)
    assert isinstance(alone.mean, float)
    assert mean_interval(values[0, 0], seed=5) != mean_interval(values[0, 0], seed=6)


def test_constant_data_have_no_width():
    for count in range(2, 40):  # whatever the rounding of their mean
        got = mean_interval(np.full(count, 0.1))
        assert got.low == got.high == pytest.approx(0.1)


def test_a_rare_event_has_a_finite_interval():
    # most resamples without the one have no spread of their own
    got = mean_interval(np.arange(64) == 0)
    assert got.low < 0 < got.mean < got.high < 0.1


def test_paired_difference_by_hand():
    # changes 1, 1, 1, −1 sum to 2; of 16 signs 6 give 0 and the others 2 or more. Their
    # mean is ½, their variance (3 · ¼ + 9/4)/3 = 1
    got = paired_difference([0, 1, 2, 3], [1, 2, 3, 2])
    assert (got.change.mean, got.p_value, got.effect) == (0.5, 10 / 16, 0.5)
    assert got.probability == 0.75


def test_no_change_and_equal_changes():
    got = paired_difference(np.ones(20), np.ones(20))
    assert got == ((0, 0, 0), 1.0, 0.0, 0.5)
    got = paired_difference(np.zeros(20), np.full(20, -0.1))
    assert (got.effect, got.probability) == (-np.inf, 0.0)
    assert got.change.low == got.change.high == pytest.approx(-0.1)
    assert got.p_value < 1e-3


@pytest.mark.parametrize("N", [2, 9, 13])
def test_signs_are_all_tried_for_few_prompts(N):
    changes = np.random.default_rng(N).normal(0.3, size=(N, 3))
    changes[:, 1] = np.round(changes[:, 1], 1)  # equal sums that differ in their bits
    got = sign_flip_p_values(changes)
    for column, p in zip(changes.T, got):
        wanted = stats.permutation_test(
            (column,), np.sum, permutation_type="samples", n_resamples=np.inf
        )
        assert p == pytest.approx(wanted.pvalue, rel=1e-12)


def test_signs_are_drawn_for_many_prompts():
    changes = np.random.default_rng(1).normal(0.25, size=(64, 4))
    got = sign_flip_p_values(changes)
    np.testing.assert_allclose(got, stats.ttest_1samp(changes, 0).pvalue, atol=0.015)
    np.testing.assert_array_equal(got, sign_flip_p_values(changes))
    assert not np.array_equal(got, sign_flip_p_values(changes, seed=1))
    assert sign_flip_p_values(changes + 9)[0] == 1 / 10_000


def test_p_values_are_uniform_where_nothing_changed():
    changes = np.random.default_rng(2).standard_t(3, size=(20, 4000))
    p = sign_flip_p_values(changes, resamples=1000)
    for level in (0.01, 0.05, 0.5):
        assert np.mean(p <= level) == pytest.approx(level, rel=0.25)


def test_trend_by_hand():
    # k − k̄ = −4/3, −1/3, 5/3, squares 42/9; prompt one 0, 0, 7 has (35/3)/(42/9) = 2.5,
    # prompt two 3, 3, 3 has 0
    got = trend([0, 1, 3], [[0, 3], [0, 3], [7, 3]])
    assert got.slope.mean == pytest.approx(1.25)
    assert (got.p_value, got.direction) == (1.0, "none")  # |2.5 ± 0| both ways


def test_slopes_are_those_of_polyfit():
    rng = np.random.default_rng(0)
    phases, values = [0, 5, 7, 20], rng.normal(size=(4, 30))
    wanted = np.polyfit(phases, values, 1)[0]
    assert trend(phases, values).slope.mean == pytest.approx(wanted.mean())
    order = [2, 0, 3, 1]
    again = trend(np.array(phases)[order], values[order])
    np.testing.assert_allclose(again.slope, trend(phases, values).slope, rtol=1e-9)


def test_directions_of_trends():
    noise = np.random.default_rng(0).normal(size=(5, 40))
    levels = 10 * np.random.default_rng(1).normal(size=40)
    steps = np.arange(5)[:, None]
    assert trend(range(5), levels + noise).direction == "none"
    assert trend(range(5), levels + noise + 0.3 * steps).direction == "rising"
    assert trend(range(5), levels + noise - 0.3 * steps).direction == "falling"
    two = trend([2, 4], levels + 0.1 * noise[:2] + steps[:2])
    change = paired_difference(*(0.1 * noise[:2] + steps[:2])).change.mean
    assert two.slope.mean == pytest.approx(change / 2)
    assert two.direction == "rising"


def test_false_discoveries_by_hand():
    # sorted 0.01 · 3/1, 0.03 · 3/2, 0.04 · 3/3, and none above the next
    np.testing.assert_allclose(
        benjamini_hochberg([0.01, 0.04, 0.03]), [0.03, 0.04, 0.04]
    )
    assert benjamini_hochberg([]).shape == (0,)


def test_tail_by_hand():
    # 1..10: the two above 8 exceed it by 1.5 on average, κ = 1/(1/2 + 0.03) = 1.8868;
    # 14 exceeds it by 4 times that: 3/11 · (1 + 4/1.8868)^−1.8868 = 0.03187
    got = tail_p_value(np.arange(1, 11), [14.0, 9.0, 1.0, np.nan], resolution=0.1)
    np.testing.assert_allclose(got, [0.03187, 3 / 11, 1.0, 1.0], rtol=1e-3)


@pytest.mark.parametrize(
    ("draw", "most"),
    [
        (lambda rng, shape: rng.normal(size=shape), 1.0),
        (lambda rng, shape: rng.exponential(size=shape), 1.5),
        (lambda rng, shape: rng.lognormal(0, 0.5, size=shape), 1.5),
        (lambda rng, shape: rng.lognormal(0, 1.0, size=shape), 3.5),
        (lambda rng, shape: rng.standard_t(3, size=shape), 3.5),
    ],
)
@pytest.mark.parametrize("N", [16, 64, 256])
def test_rare_values_are_as_rare_as_said(draw, most, N):
    rng = np.random.default_rng(N)
    p = np.stack(
        [
            tail_p_value(draw(rng, N), draw(rng, 500), resolution=1e-9)
            for _ in range(3000)
        ]
    )
    assert np.mean(p <= 1e-3) / 1e-3 < most
    assert np.mean(p <= 1e-2) / 1e-2 < max(1.0, most / 1.9)
    assert 0.6 < np.mean(p <= 0.25) / 0.25 < 1.2


def test_the_greatest_of_a_baseline_is_not_rare():
    for seed in range(20):
        baseline = np.random.default_rng(seed).standard_t(2, size=64)
        p = tail_p_value(baseline, baseline, resolution=1e-9)
        assert p.min() == pytest.approx(2 / 65)
        p = tail_p_value(baseline, np.linspace(-3, 40, 99), resolution=1e-9)
        assert (np.diff(p) <= 0).all() and p[-1] > 0


def test_a_step_from_a_constant_is_rare_by_its_size():
    x = [0.0, 1e-9, 0.1, 1.0, 10.0]
    p = tail_p_value(np.zeros(64), x, resolution=0.1)
    assert p[0] == 1 and p[1] == 1 / 65 and p[2] > 1 / 100
    assert 1e-3 > p[3] > 1e-5 > p[4]


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda: mean_interval([1.0]), "values must be 2 or more"),
        (lambda: mean_interval([1.0, np.nan]), "values must be finite"),
        (lambda: paired_difference([1, 2], [1, 2, 3]), "same prompts"),
        (lambda: paired_difference([1, 2], [np.inf, 2]), "after must be finite"),
        (lambda: sign_flip_p_values(np.zeros(3)), r"must be \[N, K\]"),
        (lambda: trend([4], [[1.0, 2.0]]), "two different phases, not \\[4\\]"),
        (lambda: trend([4, 4], [[1.0, 2.0]] * 2), "two different phases"),
        (lambda: trend([1, 2], [[1.0, 2.0]] * 3), r"values must be \[K, N\]"),
        (lambda: benjamini_hochberg([1.5]), "between 0 and 1"),
        (lambda: tail_p_value([1, 2], [1], resolution=0), "above 0"),
        (lambda: tail_p_value([1], [1], resolution=1), "baseline must be 2 or more"),
    ],
)
def test_what_cannot_be_measured(call, why):
    with pytest.raises(ValueError, match=why):
        call()
