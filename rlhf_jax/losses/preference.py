"""Pairs of responses: a reward model's loss, and what goes into and out of `dpo`.

B pairs, T tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.losses import kl, masked
from rlhf_jax.losses._checks import (
    INF,
    boolean,
    check_range,
    check_rank,
    check_same_shape,
    check_shape,
    float32,
    is_zero,
    mask_or_all,
)


def bradley_terry(
    chosen: jax.Array,
    rejected: jax.Array,
    mask: jax.Array | None = None,
    *,
    centering: float,
    margin: jax.Array | None = None,
    targets: jax.Array | float | None = None,
) -> jax.Array:
    """Loss of a reward model on each pair: the chosen response should score higher.

    x = r_c − r_r − m
    ℓ = −p log σ(x) − (1 − p) log σ(−x) + κ (r_c + r_r)²

    Args:
      chosen: float [B], r_c, the reward of the preferred response.
      rejected: float [B], r_r, the reward of the other.
      mask: bool [B], True = a real pair; None when all are real.
      centering: κ; above 0 it pulls the mean reward to zero, which the pairs leave
        free. 0.01 is common, 0 turns it off.
      margin: float [B], m, by how much the chosen one is better; None for 0.
      targets: p, the probability that the chosen one is preferred, float [B] of soft
        labels or a number: 1 − ε for label smoothing ε. None for 1.

    Returns:
      float32 [B] in nats; zero in masked slots.

    Raises:
      ValueError: a shape does not fit, or a number is out of range.

    References:
      Ouyang et al. 2022, equation 1, https://arxiv.org/abs/2203.02155
      Margin: Llama 2, equation 2, https://arxiv.org/abs/2307.09288
      Centering: Eisenstein et al. 2023, https://arxiv.org/abs/2312.09244
      Soft labels: Bai et al. 2022 (Constitutional AI), section 4.1,
      https://arxiv.org/abs/2212.08073
    """
    check_rank("B", chosen=chosen)
    check_same_shape(chosen=chosen, rejected=rejected)
    mask = mask_or_all(mask, "chosen", chosen)
    if margin is not None:
        check_same_shape(chosen=chosen, margin=margin)
    check_range("centering", centering, 0.0, INF)
    if np.ndim(targets) == 0:
        check_range("targets", targets, 0.0, 1.0)
    else:
        check_same_shape(chosen=chosen, targets=targets)

    r_c, r_r, m, p = (
        jnp.where(mask, float32(x), 0.0)
        for x in (
            chosen,
            rejected,
            0.0 if margin is None else margin,
            1.0 if targets is None else targets,
        )
    )
    x = r_c - r_r - m
    loss = -p * jax.nn.log_sigmoid(x) - (1.0 - p) * jax.nn.log_sigmoid(-x)
    # Without centering no square is taken: one that overflows is nan when times zero.
    if not is_zero(centering):
        loss = loss + centering * jnp.square(r_c + r_r)
    return jnp.where(mask, loss, 0.0)


def sequence_logprobs(
    logprobs: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each response, and its length.

    log π(y) = Σₜ mₜ log π(yₜ),   |y| = Σₜ mₜ

    The mean over tokens, for `orpo` and `simpo`, is `masked.mean(logprobs, mask,
    axis=1)`.

    Args:
      logprobs: float [B, T], log π of the response tokens.
      mask: bool [B, T], True = a real response token.

    Returns:
      (logprobs, lengths), float32 [B]: nats, and tokens. Both are zero for a row
      without a real token.

    Raises:
      ValueError: the arrays are not [B, T], or differ in shape.

    References:
      Rafailov et al. 2023, section 4, https://arxiv.org/abs/2305.18290
    """
    check_rank("B T", logprobs=logprobs)
    check_same_shape(logprobs=logprobs, mask=mask)
    return masked.sum_and_count(logprobs, mask, axis=1)


def ld_logprobs(
    chosen_logprobs: jax.Array,
    rejected_logprobs: jax.Array,
    chosen_mask: jax.Array,
    rejected_mask: jax.Array,
    *,
    alpha: float,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of a pair in which the longer response counts less (LD-DPO).

    n = min(|y_w|, |y_l|)
    log π̂(y) = Σₖ₌₁ⁿ log π(yₖ) + α Σₖ₌ₙ₊₁ log π(yₖ)

    Take those of the reference the same way, and give both to `dpo` in place of the
    sums. k counts the real tokens, whatever stands between them.

    Args:
      chosen_logprobs: float [B, T], log π of the tokens of the preferred responses.
      rejected_logprobs: float [B, T′], of the others.
      chosen_mask: bool [B, T], True = a real response token.
      rejected_mask: bool [B, T′].
      alpha: α in [0, 1]: 1 for the plain sums, 0 to cut both to the same length.

    Returns:
      (chosen, rejected), float32 [B] in nats.

    Raises:
      ValueError: a shape does not fit, or α is out of range.

    References:
      Liu et al. 2024, https://arxiv.org/abs/2409.06411
    """
    check_rank("B T", chosen_logprobs=chosen_logprobs)
    check_same_shape(chosen_logprobs=chosen_logprobs, chosen_mask=chosen_mask)
    check_rank("B T", rejected_logprobs=rejected_logprobs)
    check_same_shape(rejected_logprobs=rejected_logprobs, rejected_mask=rejected_mask)
    rows = (np.shape(chosen_logprobs)[0], np.shape(rejected_logprobs)[1])
    check_shape(
        "rejected_logprobs", rejected_logprobs, rows, "the B of chosen_logprobs"
    )
    check_range("alpha", alpha, 0.0, 1.0)

    masks = boolean("chosen_mask", chosen_mask), boolean("rejected_mask", rejected_mask)
    n = jnp.minimum(*(mask.sum(1) for mask in masks))
    sums = []
    for logprobs, mask in zip((chosen_logprobs, rejected_logprobs), masks, strict=True):
        shared = jnp.cumsum(mask, axis=1) <= n[:, None]
        kept = jnp.where(mask, float32(logprobs), 0.0)
        sums.append(jnp.where(shared, kept, alpha * kept).sum(1))
    return tuple(sums)


def wpo_weights(
    logprobs: jax.Array,
    mask: jax.Array,
    *,
    log_sum_squares: jax.Array | None = None,
) -> jax.Array:
    """How likely the policy is to write a response, as its weight in training (WPO).

    w(y) = exp(1/|y| Σₜ mₜ (log π(yₜ) − log Σᵥ π(v)²))

    The weight of a pair is w(y_w) w(y_l), the `weights` of `dpo`. The second term puts
    a response that was sampled from the policy near one; without it, w is the
    geometric mean of the tokens' probabilities.

    Args:
      logprobs: float [B, T], log π of the response tokens.
      mask: bool [B, T], True = a real response token.
      log_sum_squares: float [B, T], log Σᵥ π(v)² of the distribution that each token
        was drawn from; None to leave the term out.

    Returns:
      float32 [B], above zero, without gradient; one for a row without a real token.

    Raises:
      ValueError: the arrays are not [B, T], or differ in shape.

    References:
      Zhou et al. 2024, equation 2 and its sampled alignment,
      https://arxiv.org/abs/2406.11827
    """
    check_rank("B T", logprobs=logprobs)
    check_same_shape(logprobs=logprobs, mask=mask)
    aligned = float32(logprobs)
    if log_sum_squares is not None:
        check_same_shape(logprobs=logprobs, log_sum_squares=log_sum_squares)
        aligned = aligned - float32(log_sum_squares)
    aligned = jax.lax.stop_gradient(aligned)
    return jnp.exp(masked.mean(aligned, mask, axis=1))


class PairRewards(NamedTuple):
    """The rewards that a policy implies for B pairs; without gradient.

    chosen, rejected: float32 [B], β (log π − log π_ref); zero in masked slots.
    margin: float32 [B], chosen − rejected; zero in masked slots.
    correct: bool [B], True where the margin is above zero; its mean is the accuracy.
    """

    chosen: jax.Array
    rejected: jax.Array
    margin: jax.Array
    correct: jax.Array


def implicit_rewards(
    chosen_logprobs: jax.Array,
    rejected_logprobs: jax.Array,
    ref_chosen_logprobs: jax.Array,
    ref_rejected_logprobs: jax.Array,
    mask: jax.Array | None = None,
    *,
    beta: float,
) -> PairRewards:
    """The rewards that `dpo` trains, for logs: whatever its loss type, β times s.

    r(y) = β (log π(y) − log π_ref(y))

    Args:
      chosen_logprobs: float [B], log π(y_w), summed over the response.
      rejected_logprobs: float [B], log π(y_l).
      ref_chosen_logprobs: float [B], log π_ref(y_w).
      ref_rejected_logprobs: float [B], log π_ref(y_l).
      mask: bool [B], True = a real pair; None when all are real.
      beta: β.

    Returns:
      `PairRewards`.

    Raises:
      ValueError: an array is not [B] or differs in shape, or β is not a scalar.

    References:
      Rafailov et al. 2023, section 5.1, https://arxiv.org/abs/2305.18290
    """
    check_rank("B", chosen_logprobs=chosen_logprobs)
    check_same_shape(
        chosen_logprobs=chosen_logprobs,
        rejected_logprobs=rejected_logprobs,
        ref_chosen_logprobs=ref_chosen_logprobs,
        ref_rejected_logprobs=ref_rejected_logprobs,
    )
    mask = mask_or_all(mask, "chosen_logprobs", chosen_logprobs)
    check_range("beta", beta, -INF, INF)
    chosen = beta * kl.k1(chosen_logprobs, ref_chosen_logprobs, mask)
    rejected = beta * kl.k1(rejected_logprobs, ref_rejected_logprobs, mask)
    rewards = PairRewards(chosen, rejected, chosen - rejected, chosen > rejected)
    return jax.lax.stop_gradient(rewards)
