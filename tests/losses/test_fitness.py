import functools
import pathlib

import jax
import numpy as np
import pytest
import scipy.stats

from rlhf_jax.losses import fitness as raw
from tests.losses import invariants
from tests.losses.population import jit

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures/losses/evolution.npz"

# Compiled, which is quicker here than operation by operation.
z_score = jit(raw.z_score, static_argnames="group_size")
centered_ranks = jit(raw.centered_ranks)


@pytest.fixture(scope="module")
def reference():
    """What HyperscaleES computed."""
    with np.load(FIXTURE) as arrays:
        return dict(arrays)


def random_fitness(rng, N=12):
    return rng.normal(size=N).astype(np.float32), rng.random(N) < 0.7


def test_z_score_worked_by_hand():
    # mean 4, deviations -3, 1, 2 of squares 9 + 1 + 4 = 14, s = √(14/3) = 2.1602469
    fitness, mask = np.array([1.0, np.nan, 5.0, 6.0]), np.array([1, 0, 1, 1], bool)
    got = z_score(fitness, mask)
    np.testing.assert_allclose(got, [-1.3887301, 0.0, 0.4629100, 0.9258201], rtol=1e-6)
    # groups (1, 3) and (5, 7) have the means 2 and 6; all have the mean 4 and the
    # variance (9 + 1 + 1 + 9) / 4 = 5: ±1/√5 = ±0.4472136
    got = z_score(np.array([1.0, 3.0, 5.0, 7.0]), group_size=2)
    np.testing.assert_allclose(got, 0.4472136 * np.array([-1, 1, -1, 1]), rtol=1e-6)


@pytest.mark.parametrize("group_size", [None, 4])
def test_z_score_equals_a_loop(rng, group_size):
    fitness, mask = random_fitness(rng)
    mask[4:8] = False  # a prompt without a score
    real = [float(x) for x in fitness[mask]]
    variance = sum((x - sum(real) / len(real)) ** 2 for x in real) / len(real)
    size, expected = group_size or 12, np.zeros(12)
    for i in np.flatnonzero(mask):
        start = i - i % size
        group = [float(fitness[j]) for j in range(start, start + size) if mask[j]]
        expected[i] = (fitness[i] - sum(group) / len(group)) / np.sqrt(variance + 0.5)
    got = z_score(fitness, mask, group_size=group_size, eps=0.5)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_z_score_equals_hyperscale_es(reference):
    fitness, size = reference["raw"], int(reference["group_size"])
    got = z_score(fitness, eps=1e-5)
    np.testing.assert_allclose(got, reference["plain"], rtol=1e-5, atol=1e-6)
    got = z_score(fitness, group_size=size, eps=1e-5)
    np.testing.assert_allclose(got, reference["grouped"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [0.1, -3e4, 0.0])
def test_equal_fitness_moves_nothing(value):
    """30 times 0.1 has a float32 mean that is not 0.1; over √ε that is a step."""
    fitness = np.full(30, value, np.float32)
    for function in (z_score, functools.partial(z_score, group_size=3), centered_ranks):
        np.testing.assert_array_equal(function(fitness), np.zeros(30))


def test_centered_ranks_worked_by_hand():
    # ranks 3, 0, (1 + 2)/2 twice of four, over 3 and less 1/2
    got = centered_ranks(np.array([9.0, -5.0, 0.1, 0.1]))
    np.testing.assert_allclose(got, [0.5, -0.5, 0.0, 0.0], atol=1e-7)
    # the third was not scored: ranks 1 and 0 of two
    mask = np.array([True, True, False])
    np.testing.assert_array_equal(
        centered_ranks(np.array([9.0, -5.0, np.nan]), mask), [0.5, -0.5, 0.0]
    )
    np.testing.assert_array_equal(centered_ranks(np.array([3.0])), [0.0])


def test_centered_ranks_equal_scipys(rng):
    fitness = rng.integers(0, 6, 20).astype(np.float32)  # many ties
    fitness[:2] = np.inf, -np.inf
    mask = rng.random(20) < 0.8
    mask[:2] = True
    expected = np.zeros(20)
    n = mask.sum()
    ranks = scipy.stats.rankdata(fitness[mask], method="average")
    expected[mask] = (ranks - 1) / (n - 1) - 0.5
    np.testing.assert_allclose(centered_ranks(fitness, mask), expected, atol=1e-6)


def test_centered_ranks_see_the_order_alone_and_no_nan_wins(rng):
    fitness, mask = random_fitness(rng)
    plain = centered_ranks(fitness, mask)
    np.testing.assert_array_equal(centered_ranks(np.exp(fitness) * 9, mask), plain)
    np.testing.assert_array_equal(centered_ranks(-fitness, mask), -plain)
    np.testing.assert_allclose(plain.sum(), 0.0, atol=1e-6)
    fitness[3] = np.nan
    assert np.isnan(centered_ranks(fitness)[3])


@pytest.mark.parametrize(
    "function",
    [raw.z_score, functools.partial(raw.z_score, group_size=3), raw.centered_ranks],
    ids=["z_score", "groups", "ranks"],
)
def test_fitness_of_a_wrong_shape_raises(rng, function):
    fitness, mask = random_fitness(rng)
    invariants.assert_wrong_shapes_raise(function, [fitness, mask], ["fitness", "mask"])
    with pytest.raises(ValueError, match=r"fitness has shape \(3, 4\), expected \[N\]"):
        function(fitness.reshape(3, 4))


def test_z_score_has_no_gradient(rng):
    fitness, mask = random_fitness(rng)
    weights = np.arange(12, dtype=np.float32)
    gradient = jax.grad(lambda x: (weights * raw.z_score(x, mask)).sum())(fitness)
    np.testing.assert_array_equal(gradient, np.zeros(12))


@pytest.mark.parametrize("size", [5, 0, 1, True, 2.0])
def test_group_size_that_does_not_divide_raises(rng, size):
    fitness, _ = random_fitness(rng)
    message = rf"group_size is {size}, expected a whole number .* the 12 members"
    with pytest.raises(ValueError, match=message):
        raw.z_score(fitness, group_size=size)


def test_a_population_of_one_moves_nothing():
    np.testing.assert_array_equal(raw.z_score(np.array([3.0])), [0.0])


@pytest.mark.parametrize("eps", [0.0, -1.0, np.inf, np.nan])
def test_eps_out_of_range_raises(rng, eps):
    """At 0 equal fitness would be 0 · inf."""
    with pytest.raises(ValueError, match=f"eps is {eps}, expected"):
        raw.z_score(random_fitness(rng)[0], eps=eps)
