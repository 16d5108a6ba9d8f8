import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.losses import gae
from tests.losses import invariants
from tests.losses.returns import assert_equals_reference, random_arguments

plain_gae = functools.partial(gae, gamma=0.9, lam=0.8)
jitted_gae = jax.jit(gae)
FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "losses" / "advantages.npz"


@pytest.fixture(scope="module")
def reference():
    with np.load(FIXTURE) as file:
        return dict(file)


def loop(rewards, values, mask, gamma, lam, bootstrap):
    """Over the list of real tokens of each row, so gaps are gone, not skipped."""
    advantages, returns = np.zeros(mask.shape), np.zeros(mask.shape)
    for i, row in enumerate(mask):
        next_value, running = float(bootstrap[i]), 0.0
        for t in reversed([t for t in range(len(row)) if row[t]]):
            delta = float(rewards[i, t]) + gamma * next_value - float(values[i, t])
            running = delta + gamma * lam * running
            next_value = float(values[i, t])
            advantages[i, t], returns[i, t] = running, running + next_value
    return advantages, returns


def test_values_worked_by_hand():
    # gamma 1/2, lambda 1/2; the third slot is a tool's output and the last is padding,
    # so the real tokens are (r, V) = (1, 2), (0, 4), (8, 6)
    rewards = np.array([[1.0, 0.0, np.nan, 8.0, np.inf]], np.float32)
    values = np.array([[2.0, 4.0, -7.0, 6.0, np.nan]], np.float32)
    mask = np.array([[True, True, False, True, False]])
    # last:   delta = 8 + 0 - 6 = 2,          A = 2,               R = 2 + 6 = 8
    # second: delta = 0 + 6/2 - 4 = -1,       A = -1 + 2/4 = -1/2, R = -1/2 + 4 = 3.5
    # first:  delta = 1 + 4/2 - 2 = 1,        A = 1 - (1/2)/4 = 7/8, R = 2.875
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    np.testing.assert_array_equal(advantages, [[0.875, -0.5, 0.0, 2.0, 0.0]])
    np.testing.assert_array_equal(returns, [[2.875, 3.5, 0.0, 8.0, 0.0]])
    # a response that was cut off goes on with the value 4: delta = 8 + 4/2 - 6 = 4 at
    # the last, then A = -1 + 4/4 = 0 and A = 1 + 0 = 1
    advantages, _ = gae(
        rewards, values, mask, gamma=0.5, lam=0.5, bootstrap=np.array([4.0])
    )
    np.testing.assert_array_equal(advantages, [[1.0, 0.0, 0.0, 4.0, 0.0]])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(1, 1), (2, 5), (3, 9)]),
    seed=st.integers(0, 2**16),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
    density=st.floats(0.0, 1.0),
)
def test_equals_a_loop(shape, seed, gamma, lam, density):
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(2, *shape)).astype(np.float32)
    mask, bootstrap = rng.random(shape) < density, rng.normal(size=shape[0])
    bootstrap = bootstrap.astype(np.float32)
    expected = loop(rewards, values, mask, gamma, lam, bootstrap)
    rewards, values = (np.where(mask, x, np.nan) for x in (rewards, values))
    got = jitted_gae(rewards, values, mask, gamma=gamma, lam=lam, bootstrap=bootstrap)
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_equals_verl(reference):
    mask, values = reference["gappy"], reference["values"]
    function = lambda x: gae(x, values, mask, gamma=0.9, lam=0.8)[1]
    assert_equals_reference(function, reference, "verl/gae_returns", mask)


def test_lambda_one_is_the_monte_carlo_return_and_lambda_zero_one_step(rng):
    rewards, values = random_arguments(rng)
    mask = np.ones(rewards.shape, bool)
    _, returns = jitted_gae(rewards, values, mask, gamma=1.0, lam=1.0)
    to_go = rewards[:, ::-1].cumsum(1)[:, ::-1]
    np.testing.assert_allclose(returns, to_go, rtol=1e-5, atol=1e-5)
    advantages, _ = jitted_gae(rewards, values, mask, gamma=1.0, lam=0.0)
    following = np.concatenate([values[:, 1:], np.zeros((3, 1))], 1)
    np.testing.assert_allclose(
        advantages, rewards + following - values, rtol=1e-5, atol=1e-5
    )


def test_gaps_and_padding_equal_the_row_without_them(rng):
    rewards, values = random_arguments(rng, B=1, T=4)
    short = plain_gae(rewards, values, np.ones((1, 4), bool))
    slots = np.array([1, 2, 5, 6])
    long_rewards, long_values = np.full((2, 1, 8), np.nan, np.float32)
    long_rewards[0, slots], long_values[0, slots] = rewards, values
    mask = np.zeros((1, 8), bool)
    mask[0, slots] = True
    for x, y in zip(plain_gae(long_rewards, long_values, mask), short, strict=True):
        np.testing.assert_array_equal(np.asarray(x)[:, slots], y)
        assert not np.asarray(x)[~mask].any()


def test_integer_rewards_are_not_the_cause_of_integer_advantages():
    rewards, mask = np.array([[0, 1]]), np.ones((1, 2), bool)
    values = np.array([[0.25, 0.5]], np.float32)
    advantages, returns = jitted_gae(rewards, values, mask, gamma=1.0, lam=1.0)
    assert advantages.dtype == returns.dtype == jnp.float32
    # 1 - 0.5 at the last token; 0 + 1 - 0.25 at the first
    np.testing.assert_array_equal(advantages, [[0.75, 0.5]])


def test_bootstrap_of_a_row_without_tokens_is_irrelevant(rng):
    rewards, values = random_arguments(rng)
    mask = invariants.random_mask(rng, 3, 6)

    def total(values, last):
        bootstrap = jnp.array([0.5, -1.0, 0.0]).at[2].set(last)
        return plain_gae(rewards, values, mask, bootstrap=bootstrap)[0].sum()

    expected = jax.value_and_grad(total)(values, 0.0)
    for x, y in zip(jax.value_and_grad(total)(values, jnp.nan), expected, strict=True):
        np.testing.assert_array_equal(x, y)


def test_wrong_shape_raises(rng):
    arrays, mask = random_arguments(rng), invariants.random_mask(rng, 3, 6)
    invariants.assert_wrong_shapes_raise(
        plain_gae, [*arrays, mask], ["rewards", "values", "mask"]
    )
    with pytest.raises(
        ValueError, match=r"bootstrap has shape \(6,\), expected \(3,\)"
    ):
        plain_gae(*arrays, mask, bootstrap=np.zeros(6))
    with pytest.raises(
        ValueError, match=r"rewards has shape \(6,\), expected \[B, T\]"
    ):
        plain_gae(arrays[0][0], arrays[1][0], mask[0])


@pytest.mark.parametrize("name", ["gamma", "lam"])
def test_discount_outside_the_unit_interval_raises(rng, name):
    arguments = {"gamma": 1.0, "lam": 0.95, name: 1.01}
    with pytest.raises(ValueError, match=f"{name} is 1.01, expected"):
        gae(*random_arguments(rng), np.ones((3, 6), bool), **arguments)
