"""Planted curves, partings and best phases are found again."""

import numpy as np
import pytest
from scipy import optimize

from rlhf_jax.analysis.overoptimization import best_phase, find_parting, fit_curve

D = np.linspace(0.0, 6.0, 13)


def gold(d, alpha, beta):
    """Gao et al. 2023, equation 2, d log d being 0 at 0."""
    return np.array([x * (alpha - beta * np.log(x)) if x else 0.0 for x in d])


def test_a_planted_curve_gives_back_its_coefficients():
    alpha, beta = 1.6, 0.8
    curve = fit_curve(D, 0.3 + gold(D, alpha, beta))
    assert curve[:3] == pytest.approx((alpha, beta, 0.3))
    assert curve.r_squared == pytest.approx(1.0)
    top = optimize.minimize_scalar(
        lambda d: -gold([d], alpha, beta)[0], bounds=(0.1, 6.0), method="bounded"
    )
    assert curve.peak == pytest.approx(top.x, rel=1e-4)
    np.testing.assert_allclose(curve.at(D), 0.3 + gold(D, alpha, beta), atol=1e-9)


def test_a_noisy_curve_is_that_of_scipy():
    rng = np.random.default_rng(0)
    rewards = 0.3 + gold(D, 1.6, 0.8) + rng.normal(0.0, 0.1, len(D))
    curve = fit_curve(D, rewards)
    (alpha, beta), _ = optimize.curve_fit(gold, D, rewards - rewards[0], p0=(1.0, 1.0))
    assert (curve.alpha, curve.beta) == pytest.approx((alpha, beta), rel=1e-5)
    assert (curve.alpha, curve.beta) == pytest.approx((1.6, 0.8), abs=0.15)
    assert curve.start == rewards[0]
    left = rewards - rewards[0] - gold(D, alpha, beta)
    spread = rewards - np.mean(rewards)
    share = 1 - np.dot(left, left) / np.dot(spread, spread)
    assert curve.r_squared == pytest.approx(share, rel=1e-5)


@pytest.mark.parametrize("slope", [2.0, 0.1, 0.0])
def test_a_line_has_no_peak(slope):
    curve = fit_curve(D, 1.0 + slope * D)
    assert (curve.alpha, curve.beta) == pytest.approx((slope, 0.0), abs=1e-9)
    assert curve.peak is None


def test_a_curve_that_goes_on_rising_has_no_peak():
    curve = fit_curve(D, gold(D, 1.0, -0.3))
    assert curve.beta == pytest.approx(-0.3) and curve.peak is None


def test_too_few_phases_have_no_curve():
    assert fit_curve([0, 1, 2], [0, 1, 1]) is None
    assert fit_curve([0, 0, 0, 1, 2], [0, 0, 0, 1, 1]) is None
    # an estimate of KL may be below zero, and is no distance then
    assert fit_curve([0, -1, 1, 2], [0, 0, 1, 1]) is None
    assert fit_curve([0, 1, 2, 3], [0, 1, 1, 0]) is not None


def phases_of(means, *, N=24, spread=0.2, seed=0):
    """[K, N]: each prompt has its level, and noise in each phase."""
    rng = np.random.default_rng(seed)
    levels = rng.normal(size=N)
    noise = rng.normal(0.0, spread, (len(means), N))
    noise -= noise.mean(axis=1, keepdims=True)
    return np.array(means, float)[:, None] + levels - levels.mean() + noise


PHASES = [0, 5, 10, 15, 20]
RISING = phases_of([0.0, 1.0, 2.0, 3.0, 4.0], seed=1)
FALLING = phases_of([0.0, 0.5, 1.0, 0.95, 0.4])


def test_a_parting_is_found_where_the_gold_is_best():
    found = find_parting(PHASES, RISING, FALLING)
    assert (found.phase, found.seen_at) == (10, 20)
    assert found.gold_lost == pytest.approx(0.6)
    assert 0 < found.p_value < 0.05


def test_what_is_lost_is_that_of_the_last_phase():
    falling = phases_of([0.0, 0.5, 1.0, 0.7, 0.4])
    found = find_parting(PHASES, RISING, falling)
    assert (found.phase, found.seen_at) == (10, 15)
    assert found.gold_lost == pytest.approx(0.6)


def test_the_p_value_of_a_parting_is_adjusted():
    """Two later phases were looked at, the other one with p = 0.6 or so."""
    differences = FALLING[4] - FALLING[2]
    flips = np.random.default_rng(5).choice([-1.0, 1.0], (40_000, len(differences)))
    alone = np.mean(np.abs(flips @ differences) >= abs(differences.sum()) - 1e-9)
    # Of both, the least p counts twice, and the best may have been any of the first
    # three; 1/10000 is the least that there is.
    found = find_parting(PHASES, RISING, FALLING)
    assert alone < 1e-3 and found.p_value == pytest.approx(3 * 2e-4)


@pytest.mark.parametrize(
    ("proxy", "gold"),
    [
        (RISING, RISING),  # both rise
        (FALLING, FALLING),  # the proxy falls too
        (RISING, phases_of([0.0, 0.5, 1.0, 0.99, 0.98])),  # not measurably
        (RISING[:1], RISING[:1]),
    ],
)
def test_no_parting(proxy, gold):
    assert find_parting(PHASES[: len(gold)], proxy, gold) is None


def test_noise_alone_seldom_parts():
    """Of 200 runs in which nothing happens; the best phase is chosen by its noise."""
    found = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        proxy, gold = rng.normal(size=(2, 6, 12))
        found += find_parting(range(6), proxy, gold) is not None
    assert found <= 0.1 * 200


def test_a_clearly_best_phase_is_sure():
    best = best_phase(PHASES, phases_of([0.0, 0.5, 2.0, 1.0, 0.4]))
    assert best[:3] == (10, 10, 10) and best.earliest == 10
    assert best.mean == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("means", "earliest"),
    [
        ([0.0, 1.98, 1.99, 2.0, 0.4], 5),
        ([0.0, 1.98, 0.0, 2.0, 0.4], 15),  # not from phase 5 on
        ([1.98, 1.99, 1.99, 2.0, 0.4], 0),
    ],
)
def test_from_the_earliest_on_none_is_worse(means, earliest):
    best = best_phase(PHASES, phases_of(means))
    assert (best.phase, best.earliest) == (15, earliest)


def test_the_interval_of_the_best_is_that_of_a_loop():
    rewards = phases_of([0.0, 1.0, 1.05, 1.08, 0.99], spread=0.5, seed=3)
    best = best_phase(PHASES, rewards)
    rng, chosen = np.random.default_rng(9), []
    for _ in range(4000):
        rows = rng.integers(0, rewards.shape[1], rewards.shape[1])
        means = [one[rows].mean() for one in rewards]
        chosen.append(PHASES[means.index(max(means))])
    chosen = np.array(chosen)
    # 2.5 % may lie on either side; sampling moves a share by some 0.5 %
    assert np.mean(chosen < best.low) < 0.03 and np.mean(chosen <= best.low) > 0.02
    assert np.mean(chosen > best.high) < 0.03 and np.mean(chosen >= best.high) > 0.02
    assert best.low < best.phase <= best.high


def test_seldom_a_parting_where_nothing_happens():
    """The best of eleven phases is one by chance, and the next ones look worse."""
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(100):
        own = rng.normal(size=16)  # of each prompt, in every phase
        gold = own + rng.normal(size=(11, 16))
        proxy = np.arange(11.0)[:, None] + np.zeros((11, 16))
        found += find_parting(range(11), proxy, gold) is not None
    assert found <= 5


def test_a_run_that_is_looked_at_late_has_no_curve():
    """The curve starts at the reference, which is not among these phases."""
    distances = np.array([2.0, 2.5, 3.0, 3.5])
    rewards = distances * (1.2 - 0.6 * np.log(distances))
    assert fit_curve(distances, rewards) is None
    assert fit_curve([0.0, *distances], [0.0, *rewards]).alpha == pytest.approx(1.2)
