"""How much better each token was than expected.

B sequences, T tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.losses._checks import (
    boolean,
    check_range,
    check_rank,
    check_same_shape,
    check_shape,
    float32,
)


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

    mask = boolean(mask)
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
