"""How the rewards of whole responses compare, before they are spread over tokens.

B responses, in groups of G to the same prompt: rows 0 to G−1 are the first group. A
response that could not be scored has mask False: it takes no part in the statistics of
its group, and its advantage is zero. So is that of a response alone in its group, which
has nothing to be compared with (verl gives it the bare reward).

`advantages.over_tokens` gives each token the advantage of its response.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.losses._checks import (
    INF,
    TINY,
    boolean,
    check_range,
    check_rank,
    check_shape,
    check_whole,
    float32,
    is_number,
    mask_or_all,
)

SCALES = ("group", "batch", "none")


def group_relative(
    rewards: jax.Array,
    mask: jax.Array | None = None,
    *,
    group_size: int,
    scale: str,
    eps: float = 1e-4,
) -> jax.Array:
    """GRPO's advantage: better than the group's mean, in standard deviations.

    Aᵢ = (Rᵢ − mean(R)) / (std(R) + ε)      or, without scale, Rᵢ − mean(R)

    The mean is over the group, the divisor of the variance is the count less one.

    Args:
      rewards: float [B], a group in adjacent rows; integers are made float32.
      mask: bool [B], True = the response was scored; None when all were.
      group_size: G, responses to a prompt, at least 2.
      scale: whose std divides: "group", as in the paper; "batch", that of all rewards,
        so an easy or a hard prompt weighs no more than others; "none", as in Dr. GRPO.
      eps: ε, in units of the reward, above 0. 1e-4 in TRL, 1e-6 in verl.

    Returns:
      float32 [B], in standard deviations, or in units of the reward without scale;
      zero in masked slots and where a group's rewards are all equal.

    Raises:
      ValueError: the shapes differ, G is below 2 or does not divide B, the scale is
        unknown, or ε is not positive.

    References:
      GRPO, Shao et al. 2024, section 4.1.2, https://arxiv.org/abs/2402.03300
      Without scale: Dr. GRPO, Liu et al. 2025, https://arxiv.org/abs/2503.20783
    """
    if scale not in SCALES:
        raise ValueError(f"scale is {scale!r}, expected one of {', '.join(SCALES)}.")
    check_range("eps", eps, TINY, INF)
    rewards, mask = _in_groups(rewards, mask, group_size)
    deviations = _deviations(rewards, float32(mask))
    if scale == "group":
        deviations = deviations / (_std(deviations, mask) + eps)
    if scale == "batch":
        rewards, mask = rewards.reshape(1, -1), mask.reshape(1, -1)
        deviations = deviations / (
            _std(_deviations(rewards, float32(mask)), mask) + eps
        )
    return deviations.reshape(-1)


def leave_one_out(
    rewards: jax.Array, mask: jax.Array | None = None, *, group_size: int
) -> jax.Array:
    """RLOO's advantage: better than the mean of the others of the group.

    Aᵢ = Rᵢ − 1/(n−1) Σ₍ⱼ≠ᵢ₎ Rⱼ = n/(n−1) (Rᵢ − mean(R))

    n is the number of scored responses of the group. The baseline does not depend on
    the response, so the policy gradient is unbiased.

    Args:
      rewards: float [B], a group in adjacent rows; integers are made float32.
      mask: bool [B], True = the response was scored; None when all were.
      group_size: G, responses to a prompt, at least 2.

    Returns:
      float32 [B], in units of the reward; zero in masked slots.

    Raises:
      ValueError: the shapes differ, or G is below 2 or does not divide B.

    References:
      RLOO, Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740
    """
    rewards, mask = _in_groups(rewards, mask, group_size)
    n = float32(mask).sum(1, keepdims=True)
    advantages = n / jnp.maximum(n - 1.0, 1.0) * _deviations(rewards, float32(mask))
    return advantages.reshape(-1)


def opo(rewards: jax.Array, mask: jax.Array, *, group_size: int) -> jax.Array:
    """OPO's advantage: better than the group's mean weighted by length.

    Aᵢ = Rᵢ − Σⱼ ℓⱼ Rⱼ / Σⱼ ℓⱼ

    ℓ is the number of real tokens. The weight is that of the baseline with the least
    variance, when the squared gradient of log π grows with the length.

    Args:
      rewards: float [B], a group in adjacent rows; integers are made float32.
      mask: bool [B, T], True = a real response token; a response that could not be
        scored has none.
      group_size: G, responses to a prompt, at least 2.

    Returns:
      float32 [B], in units of the reward; zero in rows without a real token.

    Raises:
      ValueError: a shape does not fit, or G is below 2 or does not divide B.

    References:
      OPO, Hao et al. 2025, https://arxiv.org/abs/2505.23585
    """
    check_rank("B T", mask=mask)
    check_shape("rewards", rewards, np.shape(mask)[:1], "the B of mask")
    mask = boolean("mask", mask)
    rewards, _ = _in_groups(rewards, mask.any(1), group_size)
    lengths = float32(mask).sum(1).reshape(rewards.shape)
    return _deviations(rewards, lengths).reshape(-1)


def overlong_penalty(
    lengths: jax.Array, *, max_length: int, buffer: int, factor: float
) -> jax.Array:
    """DAPO's soft punishment of length, to be added to the score.

    P = c · clip(((L_max − L_buffer) − |y|) / L_buffer, −1, 0)

    Nothing up to L_max − L_buffer, then down a straight line to −c at L_max.

    Args:
      lengths: int [B], |y|, the tokens of each response: `mask.sum(1)`.
      max_length: L_max in tokens, where generation stops.
      buffer: L_buffer in tokens, above 0 and at most L_max.
      factor: c, in units of the score, at least 0; the paper has 1.

    Returns:
      float32 [B], in units of the score, from −c to 0.

    Raises:
      ValueError: lengths is not [B], or a hyper-parameter is out of its range.

    References:
      DAPO, Yu et al. 2025, equation 13, https://arxiv.org/abs/2503.14476
    """
    check_rank("B", lengths=lengths)
    check_range("buffer", buffer, TINY, INF)
    check_range("max_length", max_length, buffer if is_number(buffer) else TINY, INF)
    check_range("factor", factor, 0.0, INF)
    left = float32(max_length - buffer) - float32(lengths)
    return float32(factor) * jnp.clip(left / float32(buffer), -1.0, 0.0)


def _in_groups(rewards, mask, group_size):
    """Rewards and mask as float32 and bool [B/G, G]."""
    check_rank("B", rewards=rewards)
    mask = mask_or_all(mask, "rewards", rewards)
    B = np.shape(rewards)[0]
    divides = f" that divides the {B} rows of rewards"
    check_whole("group_size", group_size, 2, divides, multiple=B)
    shape = (B // group_size, group_size)
    return float32(rewards).reshape(shape), mask.reshape(shape)


def _deviations(rewards, weights):
    """Less the weighted mean of the row; zero where the weight is zero."""
    real = weights > 0.0
    # Seen from the largest, equal rewards are exactly zero, and so is what they differ
    # from their mean. Else a rounding error is left, which a small std + ε blows up.
    top = jnp.where(real, rewards, -jnp.inf).max(1, keepdims=True)
    below = jnp.where(real, rewards - jax.lax.stop_gradient(top), 0.0)
    total = jnp.maximum(weights.sum(1, keepdims=True), 1.0)
    mean = (weights * below).sum(1, keepdims=True) / total
    return jnp.where(real, below - mean, 0.0)


def _std(deviations, mask):
    """Unbiased, of each row; zero where fewer than two are real."""
    n = float32(mask).sum(1, keepdims=True)
    squares = jnp.square(deviations).sum(1, keepdims=True)
    variance = squares / jnp.maximum(n - 1.0, 1.0)
    # The slope of √ at zero is infinite: a group of equal rewards has gradient zero.
    return jnp.where(
        variance > 0.0, jnp.sqrt(jnp.where(variance > 0.0, variance, 1.0)), 0.0
    )
