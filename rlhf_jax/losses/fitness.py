"""Fitness of a population, shaped for `evolution`: what a member weighs in the step.

N members of a population, G of a group.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.losses import masked
from rlhf_jax.losses._checks import (
    MAX,
    TINY,
    check_range,
    check_rank,
    check_whole,
    float32,
    mask_or_all,
)


def z_score(
    fitness: jax.Array,
    mask: jax.Array | None = None,
    *,
    group_size: int | None = None,
    eps: float = 1e-16,
) -> jax.Array:
    """Fitness on the scale of its population.

    Zᵢ = (Fᵢ − μ) / √(s² + ε),  s² the variance of all, biased

    μ is the mean of all, or with group_size of the G members with the same prompt.
    Equal fitness gives exactly zero, not the rounding of its mean by √ε.

    Args:
      fitness: float [N], of the population on all devices. Mask a nan or infinite
        score, it would spoil the others.
      mask: bool [N], True = a member that was scored; None when all were.
      group_size: G, at least 2, divides N: the first G members are a group, then the
        next. None for one group.
      eps: ε, above 0; 1e-5 in EGGROLL.

    Returns:
      float32 [N] without gradient; zero in masked slots.

    Raises:
      ValueError: a shape does not fit, G is not a whole number of at least 2 that
        divides N, or ε is out of range.

    References:
      Qiu et al. 2025 ("ES at scale"), https://arxiv.org/abs/2509.24372
      Groups: Sarkar et al. 2025 (EGGROLL), https://arxiv.org/abs/2511.16652
    """
    fitness, mask = _real(fitness, mask)
    check_range("eps", eps, TINY, MAX)
    N = len(fitness)
    if group_size is not None:
        divides = f" that divides the {N} members"
        check_whole("group_size", group_size, 2, divides, multiple=N)
    G = N if group_size is None else group_size
    variance = masked.mean(jnp.square(_center(fitness, mask)), mask)
    centered = _center(fitness.reshape(-1, G), mask.reshape(-1, G)).reshape(N)
    return centered * jax.lax.rsqrt(variance + eps)


def centered_ranks(fitness: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Fitness by its rank alone, from −½ for the worst to ½ for the best.

    Zᵢ = rankᵢ / (N − 1) − ½,  rank = 0 … N − 1, and of ties their mean

    Args:
      fitness: float [N], of the population on all devices. Mask a nan score: it stays
        nan, and takes the highest rank from the others. An infinite one has a rank
        like any other; mask it too if it stands for a failure.
      mask: bool [N], True = a member that was scored; None when all were.

    Returns:
      float32 [N] without gradient, of mean zero; zero in masked slots.

    Raises:
      ValueError: a shape does not fit.

    References:
      Salimans et al. 2017, section 2.1, https://arxiv.org/abs/1703.03864
    """
    fitness, mask = _real(fitness, mask)
    count = mask.sum()
    ordered = jnp.sort(jnp.where(mask, fitness, jnp.inf))
    below = jnp.searchsorted(ordered, fitness, side="left")
    up_to = jnp.minimum(jnp.searchsorted(ordered, fitness, side="right"), count)
    # A tie has the ranks below ... up_to - 1. Their mean, less (N - 1) / 2:
    ranks = 0.5 * float32(below + up_to - count) / float32(jnp.maximum(count - 1, 1))
    return jnp.where(mask, jnp.where(jnp.isnan(fitness), jnp.nan, ranks), 0.0)


def _real(fitness, mask):
    """Both as float32 and bool, checked, with zero where masked and no gradient."""
    check_rank("N", fitness=fitness)
    mask = mask_or_all(mask, "fitness", fitness)
    return jax.lax.stop_gradient(jnp.where(mask, float32(fitness), 0.0)), mask


def _center(x, mask):
    """Less the mean over the last axis, and exactly zero where all are equal."""
    low = jnp.where(mask, x, jnp.inf).min(-1, keepdims=True)
    x = jnp.where(mask, x - low, 0.0)
    return jnp.where(mask, x - masked.mean(x, mask, axis=-1)[..., None], 0.0)
