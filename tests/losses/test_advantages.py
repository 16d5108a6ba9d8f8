import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.losses import gae
from rlhf_jax.losses.advantages import (
    discounted_returns,
    over_tokens,
    reinforce_plus_plus,
    remax,
)
from tests.losses import invariants
from tests.losses.returns import assert_equals_reference, random_arguments

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "losses" / "advantages.npz"

plain_returns = functools.partial(discounted_returns, gamma=0.9)
plain_plus_plus = functools.partial(reinforce_plus_plus, gamma=0.9)
plain_remax = functools.partial(remax, gamma=0.9)


@pytest.fixture(scope="module")
def reference():
    with np.load(FIXTURE) as file:
        return dict(file)


# discounted_returns


def test_returns_worked_by_hand():
    rewards = np.array([[1.0, 0.0, np.nan, 8.0, np.inf]], np.float32)
    mask = np.array([[True, True, False, True, False]])
    # 8;  0 + 8/2 = 4, over the gap;  1 + 4/2 = 3
    got = discounted_returns(rewards, mask, gamma=0.5)
    np.testing.assert_array_equal(got, [[3.0, 4.0, 0.0, 8.0, 0.0]])
    # cut off at a state worth 4:  8 + 4/2 = 10;  0 + 10/2 = 5;  1 + 5/2 = 3.5
    got = discounted_returns(rewards, mask, gamma=0.5, bootstrap=np.array([4.0]))
    np.testing.assert_array_equal(got, [[3.5, 5.0, 0.0, 10.0, 0.0]])


def returns_loop(rewards, mask, gamma, bootstrap):
    """Each token's sum, written out: no recursion."""
    returns = np.zeros(mask.shape)
    for i, row in enumerate(mask):
        real = [t for t in range(len(row)) if row[t]]
        for n, t in enumerate(real):
            later = real[n:]
            returns[i, t] = gamma ** len(later) * float(bootstrap[i]) + sum(
                gamma**k * float(rewards[i, s]) for k, s in enumerate(later)
            )
    return returns


def plus_plus_loop(rewards, mask, gamma, eps):
    returns = returns_loop(rewards, mask, gamma, np.zeros(len(mask)))
    real = returns[mask]
    if not real.size:
        return returns
    return np.where(mask, (returns - real.mean()) / np.sqrt(real.var() + eps), 0.0)


def numeric_gradient(function, x, cotangent):
    """Of sum(cotangent * function(x)), by central differences."""
    gradient = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        step = np.zeros(x.shape)
        step[i] = 1e-5
        change = function(x + step) - function(x - step)
        gradient[i] = (cotangent * change).sum() / 2e-5
    return gradient


@jax.jit
def values_and_gradients(rewards, last, mask, cotangent, gamma):
    functions = (
        lambda x: discounted_returns(x, mask, gamma=gamma, bootstrap=last),
        lambda x: remax(x, last, mask, gamma=gamma),
        lambda x: reinforce_plus_plus(x, mask, gamma=gamma, eps=1e-2),
    )
    pairs = [jax.vjp(function, rewards) for function in functions]
    return [(value, *pull(cotangent)) for value, pull in pairs]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(1, 1), (2, 5), (3, 4)]),
    seed=st.integers(0, 2**16),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    density=st.floats(0.0, 1.0),
)
def test_returns_and_their_kin_equal_a_loop(shape, seed, gamma, density):
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < density
    rewards, cotangent = rng.normal(size=(2, *shape)).astype(np.float32)
    last = rng.normal(size=shape[0]).astype(np.float32)
    none = np.zeros(shape[0])
    expected = (
        lambda x: returns_loop(x, mask, gamma, last),
        lambda x: returns_loop(x, mask, gamma, none) - last[:, None] * mask,
        lambda x: plus_plus_loop(x, mask, gamma, 1e-2),
    )
    filled = np.where(mask, rewards, np.nan)
    got = values_and_gradients(filled, last, mask, cotangent, gamma)
    for oracle, (value, gradient) in zip(expected, got, strict=True):
        np.testing.assert_allclose(value, oracle(rewards), rtol=1e-5, atol=1e-5)
        slope = numeric_gradient(oracle, rewards.astype(np.float64), cotangent)
        np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-5)


def test_returns_equal_verl(reference):
    mask = reference["mask"]
    function = lambda x: plain_returns(x, mask)
    assert_equals_reference(function, reference, "verl/discounted_returns", mask)


def test_returns_are_gae_without_values(rng):
    rewards, mask = random_arguments(rng)[0], invariants.random_mask(rng, 3, 6)
    advantages, _ = gae(rewards, np.zeros((3, 6)), mask, gamma=0.9, lam=1.0)
    np.testing.assert_array_equal(plain_returns(rewards, mask), advantages)


def test_without_discount_all_tokens_have_the_final_score(rng):
    mask = np.array([[True, False, True, True], [True, False, False, False]])
    rewards = np.array([[0.0, 9.0, 0.0, 3.0], [2.0, 9.0, 9.0, 9.0]])
    expected = over_tokens(np.array([3.0, 2.0]), mask)
    np.testing.assert_array_equal(
        discounted_returns(rewards, mask, gamma=1.0), expected
    )


# over_tokens


def test_over_tokens_worked_by_hand():
    mask = np.array([[True, False, True], [False, True, False], [False] * 3])
    got = over_tokens(np.array([2.0, -1.0, np.nan]), mask)
    np.testing.assert_array_equal(got, [[2, 0, 2], [0, -1, 0], [0, 0, 0]])
    assert over_tokens(np.arange(3), mask).dtype == jnp.float32
    # the gradient is the number of real tokens
    got = jax.grad(lambda x: over_tokens(x, mask).sum())(jnp.array([2.0, -1.0, np.nan]))
    np.testing.assert_array_equal(got, [2.0, 1.0, 0.0])


def test_over_tokens_of_a_wrong_shape_raises():
    mask = np.ones((3, 2), bool)
    with pytest.raises(
        ValueError, match=r"advantages has shape \(2,\), expected \(3,\)"
    ):
        over_tokens(np.zeros(2), mask)
    with pytest.raises(ValueError, match=r"mask has shape \(3,\), expected \[B, T\]"):
        over_tokens(np.zeros(3), mask[:, 0])


# reinforce_plus_plus


def test_plus_plus_worked_by_hand():
    rewards = np.array([[0.0, np.nan, 3.0], [0.0, -1.0, np.inf]])
    mask = np.array([[True, False, True], [True, True, False]])
    # returns 3, 3 and -1, -1: mean 1, variance 4, so +-2 / sqrt(4 + 12)
    got = reinforce_plus_plus(rewards, mask, gamma=1.0, eps=12.0)
    np.testing.assert_array_equal(got, [[0.5, 0.0, 0.5], [-0.5, -0.5, 0.0]])


def test_plus_plus_equals_openrlhf(reference):
    """OpenRLHF puts the score on the last token, and its γ is 0.9."""
    mask = reference["mask"]
    last = mask & (np.arange(mask.shape[1]) == mask.sum(1, keepdims=True) - 1)
    function = lambda x: plain_plus_plus(over_tokens(x, last), mask)
    got, pull = jax.vjp(function, jnp.asarray(reference["rewards"]))
    expected = reference["openrlhf/reinforce"]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    (got,) = pull(jnp.asarray(reference["cotangent"] * mask))
    expected = reference["openrlhf/reinforce/gradient"]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_plus_plus_equals_verl_but_for_the_divisor(reference):
    # verl divides the squares by n - 1
    mask = reference["mask"]
    factor = np.float32((mask.sum() / (mask.sum() - 1)) ** 0.5)
    function = lambda x: plain_plus_plus(x, mask)
    name = "verl/reinforce_plus_plus"
    assert_equals_reference(function, reference, name, mask, factor)


# remax


def test_remax_worked_by_hand():
    rewards = np.array([[1.0, np.nan, 4.0], [np.nan] * 3])
    mask = np.array([[True, False, True], [False] * 3])
    # 4 - 2 at the last token, 1 + 4/2 - 2 at the first
    got = remax(rewards, np.array([2.0, np.nan]), mask, gamma=0.5)
    np.testing.assert_array_equal(got, [[1.0, 0.0, 2.0], [0.0] * 3])


def test_remax_equals_verl(reference):
    mask, greedy = reference["gappy"], reference["greedy_rewards"]
    function = lambda x: remax(x, greedy, mask, gamma=1.0)
    assert_equals_reference(function, reference, "verl/remax", mask)


def test_remax_of_a_response_as_good_as_the_greedy_is_zero():
    mask = np.array([[True, False, True]])
    got = remax(np.array([[0.0, 5.0, 0.3]]), np.array([0.3]), mask, gamma=1.0)
    assert not np.asarray(got).any()


# What holds for all that add up rewards over tokens


def with_greedy(rewards, mask):
    return plain_remax(rewards, jnp.arange(len(mask), dtype=jnp.float32), mask)


BY_TOKEN = {
    "discounted_returns": plain_returns,
    "reinforce_plus_plus": plain_plus_plus,
    "remax": with_greedy,
}
by_token = pytest.mark.parametrize("function", BY_TOKEN.values(), ids=BY_TOKEN)


def test_greedy_rewards_of_a_row_without_tokens_are_irrelevant(rng):
    rewards, mask = random_arguments(rng)[0], invariants.random_mask(rng, 3, 6)

    def total(greedy):
        return plain_remax(rewards, greedy, mask).sum()

    got = jax.value_and_grad(total)(jnp.array([0.5, -1.0, jnp.nan]))
    expected = jax.value_and_grad(total)(jnp.array([0.5, -1.0, 0.0]))
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_array_equal(x, y)


@by_token
def test_integer_rewards_give_float32(rng, function):
    mask = invariants.random_mask(rng, 3, 6)
    assert function(np.ones((3, 6), int), mask).dtype == jnp.float32


def test_wrong_shape_of_returns_raises(rng):
    rewards, mask = random_arguments(rng)[0], invariants.random_mask(rng, 3, 6)
    for function in (plain_returns, plain_plus_plus):
        with pytest.raises(ValueError, match=r"mask has shape \(3, 5\), .* \(3, 6\)"):
            function(rewards, mask[:, :5])
        with pytest.raises(ValueError, match=r"rewards has shape \(6,\), .* \[B, T\]"):
            function(rewards[0], mask[0])
    with pytest.raises(
        ValueError, match=r"bootstrap has shape \(2,\), expected \(3,\)"
    ):
        plain_returns(rewards, mask, bootstrap=np.zeros(2))
    with pytest.raises(
        ValueError, match=r"greedy_rewards has shape \(2,\), expected \(3,\)"
    ):
        plain_remax(rewards, np.zeros(2), mask)
    with pytest.raises(ValueError, match=r"mask has shape \(3, 5\), .* \(3, 6\)"):
        plain_remax(rewards, np.zeros(3), mask[:, :5])
    with pytest.raises(ValueError, match=r"gamma is 1.5, expected"):
        remax(rewards, np.zeros(3), mask, gamma=1.5)
