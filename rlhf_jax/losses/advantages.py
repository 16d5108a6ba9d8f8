"""How much better each token was than expected.

B sequences, T tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.losses import masked
from rlhf_jax.losses._checks import (
    boolean,
    check_range,
    check_rank,
    check_same_shape,
    check_shape,
    float32,
)
from rlhf_jax.losses.group_advantages import group_relative


def gae(
    rewards: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    *,
    gamma: float,
    lam: float,
    bootstrap: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimates, and the returns a critic is fitted to.

    δₜ = rₜ + γ V₍ₜ₊₁₎ − Vₜ
    Aₜ = δₜ + γλ A₍ₜ₊₁₎
    Rₜ = Aₜ + Vₜ

    t + 1 is the next *real* token: what lies between, the output of a tool or an
    observation, and the padding after the end, neither discounts nor is read. After
    the last real token A is 0 and V is the `bootstrap`.

    Nothing stops the gradient here: call it on the rollout's values, outside the loss.

    Args:
      rewards: float [B, T]; integers are made float32.
      values: float [B, T], V of the state before each token.
      mask: bool [B, T], True = a real response token.
      gamma: γ, the discount a token, in [0, 1].
      lam: λ, in [0, 1]; 0 is the one-step error, 1 the Monte Carlo return minus V.
      bootstrap: float [B], V after the last real token, of responses that were cut
        off; None when all have ended, which is 0.

    Returns:
      (advantages, returns), float32 [B, T] in units of the reward; zero in masked
      slots.

    Raises:
      ValueError: a shape does not fit, or γ or λ lies outside [0, 1].

    References:
      Schulman et al. 2016, equations 11 and 16, https://arxiv.org/abs/1506.02438
    """
    check_rank("B T", rewards=rewards)
    check_same_shape(rewards=rewards, values=values, mask=mask)
    check_range("gamma", gamma, 0.0, 1.0)
    check_range("lam", lam, 0.0, 1.0)
    B = np.shape(rewards)[0]
    if bootstrap is None:
        bootstrap = jnp.zeros(B, jnp.float32)
    check_shape("bootstrap", bootstrap, (B,), "the B of rewards")

    mask = boolean("mask", mask)
    rewards = jnp.where(mask, float32(rewards), 0.0)
    values = jnp.where(mask, float32(values), 0.0)

    def step(carry, inputs):
        next_value, next_advantage = carry
        reward, value, real = inputs
        delta = reward + gamma * next_value - value
        advantage = delta + gamma * lam * next_advantage
        kept = (
            jnp.where(real, value, next_value),
            jnp.where(real, advantage, next_advantage),
        )
        return kept, jnp.where(real, advantage, 0.0)

    start = float32(bootstrap), jnp.zeros(B, jnp.float32)
    _, advantages = jax.lax.scan(
        step, start, (rewards.T, values.T, mask.T), reverse=True
    )
    return advantages.T, jnp.where(mask, advantages.T + values, 0.0)


def discounted_returns(
    rewards: jax.Array,
    mask: jax.Array,
    *,
    gamma: float,
    bootstrap: jax.Array | None = None,
) -> jax.Array:
    """What is still to come from each token on: the return-to-go.

    Gₜ = rₜ + γ G₍ₜ₊₁₎

    It is `gae` with V = 0 and λ = 1: t + 1 is the next *real* token, and after the last
    one G is the `bootstrap`.

    Args:
      rewards: float [B, T]; integers are made float32.
      mask: bool [B, T], True = a real response token; gaps are allowed.
      gamma: γ, the discount a token, in [0, 1].
      bootstrap: float [B], the value after the last real token, of responses that were
        cut off; None when all have ended, which is 0.

    Returns:
      float32 [B, T] in units of the reward; zero in masked slots.

    Raises:
      ValueError: a shape does not fit, or γ lies outside [0, 1].

    References:
      Sutton and Barto 2018, equation 3.9, http://incompleteideas.net/book/RLbook2020.pdf
    """
    values = jnp.zeros(np.shape(rewards), jnp.float32)
    returns, _ = gae(rewards, values, mask, gamma=gamma, lam=1.0, bootstrap=bootstrap)
    return returns


def over_tokens(advantages: jax.Array, mask: jax.Array) -> jax.Array:
    """Give each token the advantage of its response.

    Aᵢₜ = Aᵢ

    Args:
      advantages: float [B], of whole responses.
      mask: bool [B, T], True = a real response token.

    Returns:
      float32 [B, T], in units of the advantage; zero in masked slots.

    Raises:
      ValueError: a shape does not fit.

    References:
      Outcome supervision: GRPO, section 4.1.2, https://arxiv.org/abs/2402.03300
    """
    check_rank("B T", mask=mask)
    check_shape("advantages", advantages, np.shape(mask)[:1], "the B of mask")
    return jnp.where(boolean("mask", mask), float32(advantages)[:, None], 0.0)


def reinforce_plus_plus(
    rewards: jax.Array, mask: jax.Array, *, gamma: float, eps: float = 1e-8
) -> jax.Array:
    """REINFORCE++: returns-to-go, whitened over all real tokens of the batch.

    Aₜ = (Gₜ − mean(G)) / √(var(G) + ε)

    The variance is biased, as in the authors' code; verl's is not. Call it on the whole
    batch, before it is cut into micro-batches.

    Args:
      rewards: float [B, T], such as `kl_shaped_rewards`; integers are made float32.
      mask: bool [B, T], True = a real response token; gaps are allowed.
      gamma: γ, the discount a token, in [0, 1].
      eps: ε, above 0, added to the variance.

    Returns:
      float32 [B, T], in standard deviations; zero in masked slots.

    Raises:
      ValueError: a shape does not fit, or γ lies outside [0, 1].

    References:
      REINFORCE++, Hu et al. 2025, https://arxiv.org/abs/2501.03262
    """
    returns = discounted_returns(rewards, mask, gamma=gamma)
    return masked.whiten(returns, mask, shift_mean=True, eps=eps)


def reinforce_plus_plus_baseline(
    rewards: jax.Array, mask: jax.Array, *, group_size: int, eps: float = 1e-8
) -> jax.Array:
    """REINFORCE++ with the group's mean as baseline, whitened over the batch.

    A′ᵢₜ = Rᵢ − mean(R)
    Aᵢₜ = (A′ᵢₜ − mean(A′)) / √(var(A′) + ε)

    The first mean is over the group, the others over all real tokens of the batch, so
    long responses count for more.

    Args:
      rewards: float [B], a group in adjacent rows; integers are made float32.
      mask: bool [B, T], True = a real response token; a response that could not be
        scored has none, and takes no part in its group's mean.
      group_size: G, responses to a prompt, at least 2.
      eps: ε, above 0, added to the variance.

    Returns:
      float32 [B, T], in standard deviations; zero in masked slots.

    Raises:
      ValueError: a shape does not fit, or G is below 2 or does not divide B.

    References:
      REINFORCE++, Hu et al. 2025, https://arxiv.org/abs/2501.03262
    """
    check_rank("B T", mask=mask)
    check_shape("rewards", rewards, np.shape(mask)[:1], "the B of mask")
    mask = boolean("mask", mask)
    advantages = group_relative(
        rewards, mask.any(1), group_size=group_size, scale="none"
    )
    return masked.whiten(over_tokens(advantages, mask), mask, shift_mean=True, eps=eps)


def remax(
    rewards: jax.Array, greedy_rewards: jax.Array, mask: jax.Array, *, gamma: float
) -> jax.Array:
    """ReMax: the return-to-go, less the reward of the greedy response.

    Aₜ = Gₜ − R(x, ȳ),   ȳₜ = argmax π(· | x, ȳ₁…ȳ₍ₜ₋₁₎)

    Args:
      rewards: float [B, T], of the sampled responses; integers are made float32.
      greedy_rewards: float [B], R(x, ȳ), of the greedy response to the same prompt.
      mask: bool [B, T], True = a real response token; gaps are allowed.
      gamma: γ, the discount a token, in [0, 1]; 1 in the paper.

    Returns:
      float32 [B, T] in units of the reward; zero in masked slots.

    Raises:
      ValueError: a shape does not fit, or γ lies outside [0, 1].

    References:
      ReMax, Li et al. 2024, https://arxiv.org/abs/2310.10505
    """
    check_rank("B T", rewards=rewards)
    check_shape(
        "greedy_rewards", greedy_rewards, np.shape(rewards)[:1], "the B of rewards"
    )
    returns = discounted_returns(rewards, mask, gamma=gamma)
    return returns - over_tokens(greedy_rewards, mask)
