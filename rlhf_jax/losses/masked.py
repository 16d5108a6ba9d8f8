"""Reductions over the True entries of a mask.

B sequences, T tokens. Masked entries may hold anything, inf and nan included: they
are replaced by zero before any arithmetic, because `nan * 0` is nan, and so is its
gradient. Nothing is divided by the size of the array, so padding changes no result.

Use as a module, for the names are those of numpy: `masked.mean(x, mask)`.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.losses._checks import (
    MAX,
    TINY,
    boolean,
    check_range,
    check_same_shape,
    float32,
)


def sum_and_count(
    x: jax.Array, mask: jax.Array, *, axis: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Sum of the real entries, and how many there are.

    S = Σᵢ mᵢ xᵢ,  n = Σᵢ mᵢ

    Both add up over micro-batches and devices, so (Σ S) / (Σ n) is the same
    however the batch is cut; a mean of means is not.

    Args:
      x: float [B, T] or any other shape.
      mask: bool, the shape of x; True = a real entry.
      axis: the axis to reduce; None reduces all.

    Returns:
      (sum, count), float32, scalars when axis is None. The count is a whole number,
      exact up to 2²⁴.

    Raises:
      ValueError: x and mask differ in shape.

    References:
      Normalisation by the global count of tokens, in place of a mean of means: DAPO,
      equation 8, https://arxiv.org/abs/2503.14476
    """
    check_same_shape(x=x, mask=mask)
    mask = boolean("mask", mask)
    kept = jnp.where(mask, float32(x), 0.0)
    return kept.sum(axis), mask.astype(jnp.float32).sum(axis)


def sum(x: jax.Array, mask: jax.Array, *, axis: int | None = None) -> jax.Array:
    """Sum of the real entries.

    S = Σᵢ mᵢ xᵢ

    Args:
      x: float [B, T] or any other shape.
      mask: bool, the shape of x; True = a real entry.
      axis: the axis to reduce; None reduces all.

    Returns:
      float32, a scalar when axis is None; zero where nothing is real.

    Raises:
      ValueError: x and mask differ in shape.
    """
    return sum_and_count(x, mask, axis=axis)[0]


def mean(x: jax.Array, mask: jax.Array, *, axis: int | None = None) -> jax.Array:
    """Mean of the real entries.

    μ = Σᵢ mᵢ xᵢ / Σᵢ mᵢ

    Args:
      x: float [B, T] or any other shape.
      mask: bool, the shape of x; True = a real entry.
      axis: the axis to reduce; None reduces all.

    Returns:
      float32, a scalar when axis is None; zero, not nan, where nothing is real.

    Raises:
      ValueError: x and mask differ in shape.
    """
    total, count = sum_and_count(x, mask, axis=axis)
    return total / jnp.maximum(count, 1.0)


def var(x: jax.Array, mask: jax.Array, *, axis: int | None = None) -> jax.Array:
    """Variance of the real entries, biased: the divisor is the count.

    σ² = Σᵢ mᵢ (xᵢ − μ)² / Σᵢ mᵢ

    Args:
      x: float [B, T] or any other shape.
      mask: bool, the shape of x; True = a real entry.
      axis: the axis to reduce; None reduces all.

    Returns:
      float32, a scalar when axis is None; zero where nothing is real.

    Raises:
      ValueError: x and mask differ in shape.
    """
    check_same_shape(x=x, mask=mask)
    # The inner `where` keeps masked nan out of the square's gradient.
    kept = jnp.where(boolean("mask", mask), float32(x), 0.0)
    center = mean(x, mask, axis=axis)
    center = center if axis is None else jnp.expand_dims(center, axis)
    return mean(jnp.square(kept - center), mask, axis=axis)


def whiten(
    x: jax.Array, mask: jax.Array, *, shift_mean: bool, eps: float = 1e-8
) -> jax.Array:
    """Scale the real entries to variance one and, with shift_mean, to mean zero.

    wᵢ = (xᵢ − μ) / √(σ² + ε)      (+ μ without shift_mean)

    μ and σ² are over the whole array: whiten before cutting a batch into
    micro-batches. Under `jit` on a mesh they are over all devices.

    Args:
      x: float [B, T] or any other shape: advantages (shift_mean=True) or rewards
        (shift_mean=False, which keeps what the sign of a reward means).
      mask: bool, the shape of x; True = a real entry.
      shift_mean: whether the result has mean zero; if not, x's own mean is kept.
      eps: ε, above 0: added to the variance.

    Returns:
      float32, the shape of x; zero in masked slots.

    Raises:
      ValueError: x and mask differ in shape, or ε is not positive.

    References:
      Huang et al. 2024, details of whitening (biased variance, eps 1e-8),
      https://arxiv.org/abs/2403.17031
    """
    check_same_shape(x=x, mask=mask)
    check_range("eps", eps, TINY, MAX)
    mask = boolean("mask", mask)
    # Seen from the largest, equal entries are exactly zero: the rounding error of their
    # mean would be blown up by 1/√ε.
    top = jax.lax.stop_gradient(
        jnp.where(mask, float32(x), -jnp.inf).max(initial=-jnp.inf)
    )
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    below = jnp.where(mask, float32(x) - top, 0.0)
    center = mean(below, mask)
    whitened = (below - center) * jax.lax.rsqrt(var(below, mask) + eps)
    if not shift_mean:
        whitened = whitened + (center + top)
    return jnp.where(mask, whitened, 0.0)
