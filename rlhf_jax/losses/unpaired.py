"""Losses on single responses that are labelled good or bad: no pairs needed.

B responses.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.losses import kl as kl_estimates
from rlhf_jax.losses import masked
from rlhf_jax.losses._checks import (
    INF,
    TINY,
    check_labels,
    check_range,
    check_rank,
    check_same_shape,
    check_scalars,
    float32,
    mask_or_all,
)


def kto(
    logprobs: jax.Array,
    ref_logprobs: jax.Array,
    desirable: jax.Array,
    kl: jax.Array | float,
    mask: jax.Array | None = None,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> jax.Array:
    """A good response should beat the reference point, a bad one should fall below it.

    s = log π(y) − log π_ref(y),   z₀ from `kto_reference_point`
    ℓ = λ_D (1 − σ(β (s − z₀)))   for a good response
    ℓ = λ_U (1 − σ(β (z₀ − s)))   for a bad one

    The reward to log is β s.

    Args:
      logprobs: float [B], log π(y), summed over the response.
      ref_logprobs: float [B], log π_ref(y).
      desirable: bool [B], True = a good response.
      kl: z₀, a scalar in nats; it passes no gradient on.
      mask: bool [B], True = a real response; None when all are real.
      beta: β, above 0.
      desirable_weight: λ_D, at least 0.
      undesirable_weight: λ_U, at least 0. Balance the two when the labels are not: λ_D
        n_D near λ_U n_U, with n the numbers of good and bad responses.

    Returns:
      float32 [B] in [0, λ]; zero in masked slots.

    Raises:
      ValueError: a shape does not fit, a label is not bool, or a number is out of
        range.

    References:
      Ethayarajh et al. 2024, section 4, https://arxiv.org/abs/2402.01306
    """
    check_rank("B", logprobs=logprobs)
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, desirable=desirable)
    mask = mask_or_all(mask, "logprobs", logprobs)
    check_labels(desirable=desirable)
    check_scalars(kl=kl)
    check_range("beta", beta, TINY, INF)
    check_range("desirable_weight", desirable_weight, 0.0, INF)
    check_range("undesirable_weight", undesirable_weight, 0.0, INF)

    s = kl_estimates.k1(logprobs, ref_logprobs, mask)
    z = jax.lax.stop_gradient(float32(kl))
    desirable = jnp.asarray(desirable)
    weight = jnp.where(
        desirable, float32(desirable_weight), float32(undesirable_weight)
    )
    gain = jnp.where(desirable, s - z, z - s)
    return jnp.where(mask, weight * jax.nn.sigmoid(-beta * gain), 0.0)


def kto_reference_point(
    logprobs: jax.Array, ref_logprobs: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """Estimate of KL(π ‖ π_ref) from responses under prompts that are not their own.

    z₀ = max(0, mean over i of (log π(yᵢ₊₁|xᵢ) − log π_ref(yᵢ₊₁|xᵢ)))

    Pair each prompt of the batch with the response of another, by a shift of one, and
    take the log-probabilities of those; a batch of one gives no mismatched pair. On
    several devices take the mean over all of them, as jit on a mesh does.

    Args:
      logprobs: float [B], log π of the mismatched responses, summed over tokens.
      ref_logprobs: float [B], log π_ref of the same.
      mask: bool [B], True = a real mismatched pair; None when all are real.

    Returns:
      float32 scalar in nats, not negative, without gradient; zero if nothing is real.

    Raises:
      ValueError: an array is not [B], or differs in shape.

    References:
      Ethayarajh et al. 2024, section 4, https://arxiv.org/abs/2402.01306
    """
    check_rank("B", logprobs=logprobs)
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    mask = mask_or_all(mask, "logprobs", logprobs)
    s = kl_estimates.k1(logprobs, ref_logprobs, mask)
    return jax.lax.stop_gradient(jnp.maximum(masked.mean(s, mask), 0.0))


def apo_zero_unpaired(
    logprobs: jax.Array,
    ref_logprobs: jax.Array,
    desirable: jax.Array,
    mask: jax.Array | None = None,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> jax.Array:
    """APO-zero without pairs: `kto` with its reference point at zero.

    ℓ = λ_D (1 − σ(β s))   for a good response
    ℓ = λ_U σ(β s)         for a bad one

    Args:
      logprobs: float [B], log π(y), summed over the response.
      ref_logprobs: float [B], log π_ref(y).
      desirable: bool [B], True = a good response.
      mask: bool [B], True = a real response; None when all are real.
      beta: β, above 0.
      desirable_weight: λ_D, at least 0.
      undesirable_weight: λ_U, at least 0.

    Returns:
      float32 [B] in [0, λ]; zero in masked slots.

    Raises:
      ValueError: a shape does not fit, a label is not bool, or a number is out of
        range.

    References:
      D'Oosterlinck et al. 2024, equation 7, https://arxiv.org/abs/2408.06266
    """
    return kto(
        logprobs,
        ref_logprobs,
        desirable,
        0.0,
        mask,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
