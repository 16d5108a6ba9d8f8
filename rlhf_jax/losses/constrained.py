"""Reward under a limit on cost: the multiplier λ, and what the policy learns.

B sequences, T tokens. max E[R] subject to E[C] ≤ d, as
min_λ max_π E[R] − λ (E[C] − d) with λ ≥ 0. A positive cost is unsafe, so d = 0 asks
for responses that are safe on average.

A critic of the cost learns from a KL-shaped cost of each token, in which the KL *adds*:
`kl_shaped_rewards(costs, kl, mask, kl_coef=-β)`. There is no second function for it.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.losses._checks import (
    INF,
    MAX,
    TINY,
    boolean,
    check_range,
    check_same_shape,
    check_scalars,
    float32,
    is_number,
)

LAGRANGIAN_RULES = ("gradient", "exponential")


def cost_ema(
    ema: float | jax.Array | None, mean_cost: float | jax.Array, *, decay: float
) -> jax.Array:
    """A running mean of the cost over updates, for a λ that follows the trend.

    J′ = β J + (1 − β) C̄,  and C̄ itself the first time

    Args:
      ema: J, a scalar; None before the first update.
      mean_cost: C̄, the mean cost of the current policy's responses, a scalar.
      decay: β, in [0, 1]; 0.9 is common, 0 keeps nothing of the past.

    Returns:
      float32 scalar, in units of the cost.

    Raises:
      ValueError: β lies outside [0, 1], or an argument is not a scalar.

    References:
      Dai et al. 2023, who update λ by a moving average of the cost,
      https://arxiv.org/abs/2310.12773
    """
    check_scalars(mean_cost=mean_cost, decay=decay)
    check_range("decay", decay, 0.0, 1.0)
    if ema is None:
        return float32(mean_cost)
    check_scalars(ema=ema)
    return decay * float32(ema) + (1.0 - decay) * float32(mean_cost)


def lagrangian_update(
    log_multiplier: float | jax.Array,
    mean_cost: float | jax.Array,
    *,
    cost_limit: float,
    lr: float,
    rule: str,
    min_multiplier: float,
    max_multiplier: float,
) -> jax.Array:
    """The next log λ: up while the cost is above its limit, down while below.

    "gradient":     log λ′ = log λ + η λ (C̄ − d)
    "exponential":  log λ′ = log λ + η (C̄ − d),  that is λ′ = λ exp(η (C̄ − d))
    then λ′ = clip(λ′, λ_min, λ_max)

    The first descends −(C̄ − d) e^{log λ} in log λ, so it slows down as λ shrinks. The
    second moves by the same factor whatever λ is, and recovers from a small λ sooner.
    Without a λ_min, a step far down can leave the first at a λ near zero, where it does
    not move again.

    Some code writes the constraint E[C] + d ≤ 0: its d is this one's negative. For a λ
    that never falls, pass max(C̄ − d, 0) as the cost and 0 as the limit.

    Args:
      log_multiplier: log λ, a scalar.
      mean_cost: C̄, a scalar: the mean over recent responses, or `cost_ema`.
      cost_limit: d, in units of the cost.
      lr: η, above 0; 0.1 in safe-rlhf ("gradient").
      rule: "gradient" or "exponential".
      min_multiplier: λ_min, at least 0; 0 for no bound.
      max_multiplier: λ_max, finite, above 0 and at least λ_min.

    Returns:
      float32 scalar, log λ′.

    Raises:
      ValueError: the rule is unknown, a number is out of range, or an argument is not
        a scalar.

    References:
      "gradient": Dai et al. 2023, equation 31, https://arxiv.org/abs/2310.12773
      The bound λ_max is of its code, https://github.com/PKU-Alignment/safe-rlhf
      "exponential": https://github.com/jbejjani2022/es-fine-tuning-paper
    """
    check_scalars(
        log_multiplier=log_multiplier,
        mean_cost=mean_cost,
        cost_limit=cost_limit,
        lr=lr,
        min_multiplier=min_multiplier,
        max_multiplier=max_multiplier,
    )
    check_range("lr", lr, TINY, MAX)
    check_range("min_multiplier", min_multiplier, 0.0, MAX)
    lowest = max(min_multiplier, TINY) if is_number(min_multiplier) else TINY
    check_range("max_multiplier", max_multiplier, lowest, MAX)
    if rule not in LAGRANGIAN_RULES:
        raise ValueError(
            f"rule is {rule!r}, expected one of {', '.join(LAGRANGIAN_RULES)}."
        )
    log_multiplier = float32(log_multiplier)
    violation = float32(mean_cost) - cost_limit
    # λ itself, but where float32 has no number for it: inf times zero is nan.
    lam = jnp.minimum(jnp.exp(log_multiplier), max_multiplier)
    speed = lam if rule == "gradient" else 1.0
    low, high = (jnp.log(float32(x)) for x in (min_multiplier, max_multiplier))
    return jnp.clip(log_multiplier + lr * speed * violation, low, high)


def combined_advantage(
    reward_advantages: jax.Array,
    cost_advantages: jax.Array,
    mask: jax.Array,
    *,
    log_multiplier: float | jax.Array,
) -> jax.Array:
    """The advantage of reward less λ times that of cost, on the scale of either.

    A = (A_R − λ A_C) / (1 + λ) = A_R σ(−ℓ) − A_C σ(ℓ),  ℓ = log λ

    ℓ is what `lagrangian_update` gives. Dividing by 1 + λ keeps the policy's step from
    growing with λ. Shape the rewards by −β KL and the costs by +β KL
    (`kl_shaped_rewards` with kl_coef=β and kl_coef=−β): then the KL weighs β in A,
    whatever λ is.

    Args:
      reward_advantages: float [B, T], A_R, from the critic of the reward.
      cost_advantages: float [B, T], A_C, from the critic of the cost.
      mask: bool [B, T], True = a real response token.
      log_multiplier: log λ, a number or a scalar array; it gets no gradient. −inf is
        λ = 0.

    Returns:
      float32 [B, T]; zero in masked slots.

    Raises:
      ValueError: the arrays differ in shape, or log λ is not a scalar.

    References:
      Dai et al. 2023, https://arxiv.org/abs/2310.12773
      The sign of the KL is of its code, https://github.com/PKU-Alignment/safe-rlhf
    """
    check_same_shape(
        reward_advantages=reward_advantages, cost_advantages=cost_advantages, mask=mask
    )
    log_lambda = _log_multiplier(log_multiplier)
    mask = boolean("mask", mask)
    A_R, A_C = (
        jnp.where(mask, float32(x), 0.0) for x in (reward_advantages, cost_advantages)
    )
    # Each share is at most one, where λ A_C would overflow.
    return A_R * jax.nn.sigmoid(-log_lambda) - A_C * jax.nn.sigmoid(log_lambda)


def combined_reward(
    rewards: jax.Array,
    costs: jax.Array,
    *,
    log_multiplier: float | jax.Array,
    safe_first: float | None = None,
) -> jax.Array:
    """One number for each response, for methods without critics: GRPO and ES.

    R − λ C,  with safe_first:  (min(R, f R) if C > 0 else R) − λ C

    λ is exp of what `lagrangian_update` gives; for a fixed one pass its logarithm.
    The code cited below has f R for a negative R too, which is above R: a reward for
    being unsafe. The minimum keeps such an R as it is.

    Args:
      rewards: float [B], R, of whole responses; any shape.
      costs: float, the shape of rewards, C; positive is unsafe.
      log_multiplier: log λ, a number or a scalar array; it gets no gradient. −inf is
        λ = 0.
      safe_first: f, what an unsafe response keeps of a positive reward, in [0, 1]:
        with 0 an unsafe one earns nothing by being helpful. None leaves the rewards
        alone.

    Returns:
      float32, the shape of rewards, in units of the reward.

    Raises:
      ValueError: the arrays differ in shape, f lies outside [0, 1], or log λ is not a
        scalar.

    References:
      Reward shaping by a fixed λ: Dai et al. 2023, https://arxiv.org/abs/2310.12773
      Safe first: https://github.com/jbejjani2022/es-fine-tuning-paper
    """
    check_same_shape(rewards=rewards, costs=costs)
    check_range("safe_first", safe_first, 0.0, 1.0)
    # At most the largest float32: exp(log λ) is inf from log λ = 89 on.
    lam = jnp.minimum(jnp.exp(_log_multiplier(log_multiplier)), MAX)
    R, C = float32(rewards), float32(costs)
    if safe_first is not None:
        R = jnp.where(C > 0, jnp.minimum(R, safe_first * R), R)
    return R - lam * C


def _log_multiplier(log_multiplier):
    check_scalars(log_multiplier=log_multiplier)
    check_range("log_multiplier", log_multiplier, -INF, INF)
    return jax.lax.stop_gradient(float32(log_multiplier))
