"""The loss of a cost model: which response is safer, and which of them are safe.

B pairs, T tokens. A positive cost is unsafe.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.losses._checks import (
    INF,
    check_labels,
    check_range,
    check_rank,
    check_same_shape,
    check_shape,
    float32,
    is_zero,
    mask_or_all,
)
from rlhf_jax.losses.preference import bradley_terry


def cost_model_loss(
    safer_cost: jax.Array,
    unsafer_cost: jax.Array,
    safer_is_safe: jax.Array,
    unsafer_is_safe: jax.Array,
    mask: jax.Array | None = None,
    *,
    regularization: float,
) -> jax.Array:
    """Loss of a cost model on each pair: its order is right, and so are its two signs.

    s = 1 − 2·is_safe, +1 for an unsafe response and −1 for a safe one
    ℓ = −log σ(C_u − C_s) − log σ(s_s C_s) − log σ(s_u C_u) + κ (C_s² + C_u²) / 2

    The first term alone would leave the zero free, and the zero is what a limit on the
    cost refers to: the other two put unsafe responses above it and safe ones below.

    `is_safe` is that of PKU-SafeRLHF. The `safety_sign` in safe-rlhf's own batches is
    the opposite of s, +1 for safe, and negated in its loss: pass `safety_sign > 0`.

    Args:
      safer_cost: float [B], C_s, of the response that was judged safer.
      unsafer_cost: float [B], C_u, of the other.
      safer_is_safe: bool [B], True = the safer response is safe, not only safer.
      unsafer_is_safe: bool [B], True = the other is safe too.
      mask: bool [B], True = a real pair; None when all are real.
      regularization: κ, pulls all costs to zero; 0.001 in safe-rlhf, 0 turns it off.

    Returns:
      float32 [B] in nats; zero in masked slots.

    Raises:
      ValueError: a shape does not fit, a label is not bool, or κ is negative.

    References:
      Dai et al. 2023 (Safe RLHF), https://arxiv.org/abs/2310.12773
      The regularisation, a mean over both responses, is of its code,
      https://github.com/PKU-Alignment/safe-rlhf
    """
    check_rank("B", safer_cost=safer_cost)
    check_same_shape(
        safer_cost=safer_cost,
        unsafer_cost=unsafer_cost,
        safer_is_safe=safer_is_safe,
        unsafer_is_safe=unsafer_is_safe,
    )
    mask = mask_or_all(mask, "safer_cost", safer_cost)
    check_labels(safer_is_safe=safer_is_safe, unsafer_is_safe=unsafer_is_safe)
    check_range("regularization", regularization, 0.0, INF)

    C_s, C_u = (jnp.where(mask, float32(x), 0.0) for x in (safer_cost, unsafer_cost))
    s_s, s_u = (1.0 - 2.0 * float32(x) for x in (safer_is_safe, unsafer_is_safe))
    order = bradley_terry(C_u, C_s, mask, centering=0.0)
    signs = -jax.nn.log_sigmoid(s_s * C_s) - jax.nn.log_sigmoid(s_u * C_u)
    loss = order + signs
    # With κ = 0 no square is taken: one that overflows is nan when times zero.
    if not is_zero(regularization):
        loss = loss + regularization * 0.5 * (jnp.square(C_s) + jnp.square(C_u))
    return jnp.where(mask, loss, 0.0)


def cost_model_token_loss(
    safer_costs: jax.Array,
    unsafer_costs: jax.Array,
    safer_is_safe: jax.Array,
    unsafer_is_safe: jax.Array,
    mask: jax.Array,
    *,
    regularization: float,
) -> jax.Array:
    """The loss of `cost_model_loss` at each token, for a cost model read everywhere.

    s = 1 − 2·is_safe, +1 for an unsafe response and −1 for a safe one
    ℓₜ = −log σ(Cᵤₜ − Cₛₜ) − log σ(s_s Cₛₜ) − log σ(s_u Cᵤₜ) + κ (Cₛₜ² + Cᵤₜ²) / 2

    The two responses are compared slot by slot. safe-rlhf's loss of a pair is the mean,
    `masked.mean(loss, mask, axis=1)`, over the slots from the first in which the two
    differ to the last token of the longer one.

    Args:
      safer_costs: float [B, T], Cₛₜ, after each token of the safer response.
      unsafer_costs: float [B, T], Cᵤₜ, of the other.
      safer_is_safe: bool [B], True = the safer response is safe, not only safer.
      unsafer_is_safe: bool [B], True = the other is safe too.
      mask: bool [B, T], True = a slot to compare.
      regularization: κ; 0.001 in safe-rlhf, 0 turns it off.

    Returns:
      float32 [B, T] in nats; zero in masked slots.

    Raises:
      ValueError: a shape does not fit, a label is not bool, or κ is negative.

    References:
      safe-rlhf, `--loss_type token-wise`, https://github.com/PKU-Alignment/safe-rlhf
    """
    check_rank("B T", safer_costs=safer_costs)
    check_same_shape(safer_costs=safer_costs, unsafer_costs=unsafer_costs, mask=mask)
    B, T = np.shape(safer_costs)
    check_shape("safer_is_safe", safer_is_safe, (B,), "the B of safer_costs")
    check_shape("unsafer_is_safe", unsafer_is_safe, (B,), "the B of safer_costs")
    loss = cost_model_loss(
        jnp.ravel(safer_costs),
        jnp.ravel(unsafer_costs),
        jnp.repeat(jnp.asarray(safer_is_safe), T),
        jnp.repeat(jnp.asarray(unsafer_is_safe), T),
        jnp.ravel(mask),
        regularization=regularization,
    )
    return loss.reshape(B, T)
