"""Loops over groups of responses, and how a kernel is compared with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.losses.advantages import over_tokens

# The oracles: loops over the scored rows of each group, in double precision.


def mean_and_std(rewards):
    mean = sum(rewards) / len(rewards)
    if len(rewards) == 1:
        return mean, 0.0
    return mean, (sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)) ** 0.5


def by_group(rewards, mask, group_size, function):
    """`function(rewards of the scored rows, their indices)` at the scored rows."""
    result = np.zeros(len(rewards))
    for start in range(0, len(rewards), group_size):
        rows = [i for i in range(start, start + group_size) if mask[i]]
        if rows:
            result[rows] = function([float(rewards[i]) for i in rows], rows)
    return result


def group_loop(rewards, mask, group_size, scale, eps):
    scored = [float(r) for r, real in zip(rewards, mask, strict=True) if real]

    def advantages(group, rows):
        mean, std = mean_and_std(group)
        if scale == "batch":
            std = mean_and_std(scored)[1]
        return [(r - mean) / (1.0 if scale == "none" else std + eps) for r in group]

    return by_group(rewards, mask, group_size, advantages)


def leave_one_out_loop(rewards, mask, group_size):
    def advantages(group, rows):
        if len(group) == 1:
            return [0.0]
        others = [group[:i] + group[i + 1 :] for i in range(len(group))]
        return [r - sum(x) / len(x) for r, x in zip(group, others, strict=True)]

    return by_group(rewards, mask, group_size, advantages)


def opo_loop(rewards, mask, group_size):
    def advantages(group, rows):
        lengths = [int(mask[i].sum()) for i in rows]
        baseline = sum(n * r for n, r in zip(lengths, group, strict=True))
        return [r - baseline / sum(lengths) for r in group]

    return by_group(rewards, mask.any(1), group_size, advantages)


def baseline_loop(rewards, mask, group_size, eps):
    centred = group_loop(rewards, mask.any(1), group_size, "none", 0.0)
    tokens = np.array([centred[i] for i, t in np.argwhere(mask)])
    if not len(tokens):
        return np.zeros(mask.shape)
    scaled = (centred - tokens.mean()) / np.sqrt(tokens.var() + eps)
    return np.where(mask, scaled[:, None], 0.0)


def numeric_gradient(function, rewards, cotangent):
    """Of sum(cotangent * function(rewards)), by central differences."""
    gradient = np.zeros(len(rewards))
    for i in range(len(rewards)):
        step = np.zeros(len(rewards))
        step[i] = 1e-5
        change = function(rewards + step) - function(rewards - step)
        gradient[i] = (cotangent * change).sum() / 2e-5
    return gradient


@functools.partial(jax.jit, static_argnames=("function", "group_size", "scale"))
def value_and_gradient(rewards, mask, cotangent, *, function, **settings):
    got, pull = jax.vjp(lambda x: function(x, mask, **settings), rewards)
    return got, *pull(cotangent)


def assert_equals_oracle(function, oracle, rewards, mask, rng, **settings):
    """Value and gradient, with nan in the rewards of unscored rows."""
    result = oracle(rewards, mask, **settings)
    cotangent = rng.normal(size=result.shape).astype(np.float32)
    gradient = numeric_gradient(
        lambda x: oracle(x, mask, **settings), rewards.astype(np.float64), cotangent
    )
    scored = mask if mask.ndim == 1 else mask.any(1)
    rewards = np.where(scored, rewards, np.nan)
    got = value_and_gradient(rewards, mask, cotangent, function=function, **settings)
    for x, y in zip(got, (result, gradient), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def assert_equals_reference(function, reference, name, factor=1.0):
    """Value and gradient by rewards [B], spread over the tokens of the mask."""
    mask = reference["mask"]

    def tokens(rewards):
        result = function(rewards)
        return result if result.ndim == 2 else over_tokens(result, mask)

    got, pull = jax.vjp(tokens, jnp.asarray(reference["rewards"]))
    (gradient,) = pull(jnp.asarray(reference["cotangent"] * mask))
    for x, y in ((got, name), (gradient, f"{name}/gradient")):
        np.testing.assert_allclose(x, reference[y] * factor, rtol=1e-5, atol=1e-6)


random_groups = given(
    sizes=st.sampled_from([(2, 2), (6, 3), (8, 4)]),
    seed=st.integers(0, 2**16),
    density=st.floats(0.2, 1.0),
)
few_examples = settings(max_examples=25, deadline=None, derandomize=True)
