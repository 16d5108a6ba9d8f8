"""Weights for samples that another policy drew than the one they are learned with.

B sequences, T tokens.

The program that generates is not the program that learns: other kernels, another
precision, weights some updates older. The log-probabilities of a response at its
sampling (`rollout_logprobs`) then differ from those that the learner computes for the
same weights (`old_logprobs`), and the gradient is biased. Multiply the loss of each
token by its weight here; the clip of the policy loss, which compares π with π_old, is a
thing of its own and stays.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.losses import kl as kl_estimates
from rlhf_jax.losses import masked
from rlhf_jax.losses._checks import (
    INF,
    boolean,
    check_range,
    check_rank,
    check_same_shape,
)

LEVELS = ("token", "sequence")
MODES = ("truncate", "mask")


def importance_weights(
    old_logprobs: jax.Array,
    rollout_logprobs: jax.Array,
    mask: jax.Array,
    *,
    level: str,
    mode: str,
    low: float,
    high: float,
) -> jax.Array:
    """How much likelier the learner's policy is than the sampler's to have said this.

    ρₜ = π_old(yₜ) / π_rollout(yₜ)               level "token"
    ρₜ = Πₛ π_old(yₛ) / π_rollout(yₛ)            level "sequence", the same for each t
    wₜ = clip(ρₜ, low, high)                     mode "truncate"
    wₜ = ρₜ · 1[low ≤ ρₜ ≤ high]                 mode "mask"

    Weights of tokens have low variance and a bias, for they leave out the prefix;
    the weight of a sequence is unbiased but for its bounds, and its variance grows with
    the length. The names in use: TIS is "truncate" with low 0; IcePop is "token" and
    "mask"; masked importance sampling, MIS, is "sequence" and "mask".

    log ρ is clamped to ±20. A token whose weight is 0 still counts in the mean: the
    mask is the response's, so the aggregation divides by the same number as before.

    Args:
      old_logprobs: float [B, T], of the sampled tokens by the learner, before its
        update.
      rollout_logprobs: float [B, T], as the sampler had them, at its temperature.
      mask: bool [B, T], True = a real response token.
      level: "token" or "sequence".
      mode: "truncate" or "mask".
      low: lower bound of the weight, in [0, 1]; 0 for none.
      high: upper bound of the weight, at least 1; infinity for none.

    Returns:
      float32 [B, T], one where both agree; zero in masked slots; without gradient.

    Raises:
      ValueError: the arrays differ in shape, the level or the mode is unknown, or a
        bound is out of range.

    References:
      TIS: Yao et al. 2025, https://fengyao.notion.site/off-policy-rl
      Bounds on the weight: Ionides 2008,
      https://doi.org/10.1198/106186008X320456
      IcePop: Ring-1T 2025, https://arxiv.org/abs/2510.18855
    """
    check_rank("B T", old_logprobs=old_logprobs)
    check_same_shape(
        old_logprobs=old_logprobs, rollout_logprobs=rollout_logprobs, mask=mask
    )
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}, expected one of {', '.join(LEVELS)}.")
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, expected one of {', '.join(MODES)}.")
    check_range("low", low, 0.0, 1.0)
    check_range("high", high, 1.0, INF)

    log_ratio = kl_estimates.k1(old_logprobs, rollout_logprobs, mask)
    mask = boolean("mask", mask)
    if level == "sequence":
        total = masked.sum(log_ratio, mask, axis=1)
        log_ratio = jnp.broadcast_to(total[:, None], mask.shape)
    ratio = kl_estimates.ratio(log_ratio)
    if mode == "truncate":
        weights = jnp.clip(ratio, low, high)
    else:
        weights = jnp.where((ratio >= low) & (ratio <= high), ratio, 0.0)
    return jax.lax.stop_gradient(jnp.where(mask, weights, 0.0))
