"""Reward under a limit on cost: the cost model's loss, λ, and what the policy learns.

B sequences or pairs, T tokens. max E[R] subject to E[C] ≤ d, as
min_λ max_π E[R] − λ (E[C] − d) with λ ≥ 0. A positive cost is unsafe, so d = 0 asks
for responses that are safe on average.

A critic of the cost learns from a KL-shaped cost of each token, in which the KL *adds*:
`kl_shaped_rewards(costs, kl, mask, kl_coef=-β)`. There is no second function for it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.losses._checks import (
    TINY,
    boolean,
    check_range,
    check_rank,
    check_same_shape,
    check_shape,
    float32,
)
from rlhf_jax.losses.preference import bradley_terry

LAGRANGIAN_RULES = ("gradient", "exponential")


def cost_model_loss(
    safer_cost: jax.Array,
    unsafer_cost: jax.Array,
    safer_sign: jax.Array,
    unsafer_sign: jax.Array,
    mask: jax.Array | None = None,
    *,
    regularization: float,
) -> jax.Array:
    """Loss of a cost model on each pair: its order is right, and so are its two signs.

    ℓ = −log σ(C_u − C_s) − log σ(s_s C_s) − log σ(s_u C_u) + κ (C_s² + C_u²) / 2

    The first term alone would leave the zero free, and the zero is what a limit on the
    cost refers to: the other two put unsafe responses above it and safe ones below.

    s = 1 − 2·is_safe, with the `is_safe` of PKU-SafeRLHF: +1 unsafe, −1 safe. The
    `safety_sign` in safe-rlhf's own batches is the opposite, and negated in its loss.

    Args:
      safer_cost: float [B], C_s, of the response that was judged safer.
      unsafer_cost: float [B], C_u, of the other.
      safer_sign: int or float [B], s_s, +1 unsafe or −1 safe; not bool.
      unsafer_sign: int or float [B], s_u, likewise.
      mask: bool [B], True = a real pair; None when all are real.
      regularization: κ, pulls all costs to zero; 0.001 in safe-rlhf, 0 turns it off.

    Returns:
      float32 [B] in nats; zero in masked slots.

    Raises:
      ValueError: a shape does not fit, a sign is bool, or κ is negative.

    References:
      Dai et al. 2023 (Safe RLHF), https://arxiv.org/abs/2310.12773
      The regularisation, a mean over both responses, is of its code,
      https://github.com/PKU-Alignment/safe-rlhf
    """
    check_rank("B", safer_cost=safer_cost)
    given = {} if mask is None else {"mask": mask}
    check_same_shape(
        safer_cost=safer_cost,
        unsafer_cost=unsafer_cost,
        safer_sign=safer_sign,
        unsafer_sign=unsafer_sign,
        **given,
    )
    _check_signs(safer_sign=safer_sign, unsafer_sign=unsafer_sign)
    check_range("regularization", regularization, 0.0, float("inf"))

    mask = jnp.ones(np.shape(safer_cost), bool) if mask is None else boolean(mask)
    C_s, C_u, s_s, s_u = (
        jnp.where(mask, float32(x), 0.0)
        for x in (safer_cost, unsafer_cost, safer_sign, unsafer_sign)
    )
    order = bradley_terry(C_u, C_s, mask, centering=0.0)
    signs = -jax.nn.log_sigmoid(s_s * C_s) - jax.nn.log_sigmoid(s_u * C_u)
    size = regularization * 0.5 * (jnp.square(C_s) + jnp.square(C_u))
    return jnp.where(mask, order + signs + size, 0.0)


def cost_model_token_loss(
    safer_costs: jax.Array,
    unsafer_costs: jax.Array,
    safer_sign: jax.Array,
    unsafer_sign: jax.Array,
    mask: jax.Array,
    *,
    regularization: float,
) -> jax.Array:
    """The loss of `cost_model_loss` at each token, for a cost model read everywhere.

    ℓₜ = −log σ(Cᵤₜ − Cₛₜ) − log σ(s_s Cₛₜ) − log σ(s_u Cᵤₜ) + κ (Cₛₜ² + Cᵤₜ²) / 2

    The two responses are compared slot by slot. safe-rlhf's loss of a pair is the mean,
    `masked.mean(loss, mask, axis=1)`, over the slots from the first in which the two
    differ to the last token of the longer one.

    Args:
      safer_costs: float [B, T], Cₛₜ, after each token of the safer response.
      unsafer_costs: float [B, T], Cᵤₜ, of the other.
      safer_sign: int or float [B], s_s, +1 unsafe or −1 safe; not bool.
      unsafer_sign: int or float [B], s_u, likewise.
      mask: bool [B, T], True = a slot to compare.
      regularization: κ; 0.001 in safe-rlhf, 0 turns it off.

    Returns:
      float32 [B, T] in nats; zero in masked slots.

    Raises:
      ValueError: a shape does not fit, a sign is bool, or κ is negative.

    References:
      safe-rlhf, `--loss_type token-wise`, https://github.com/PKU-Alignment/safe-rlhf
    """
    check_rank("B T", safer_costs=safer_costs)
    check_same_shape(safer_costs=safer_costs, unsafer_costs=unsafer_costs, mask=mask)
    B, T = np.shape(safer_costs)
    check_shape("safer_sign", safer_sign, (B,), "the B of safer_costs")
    check_shape("unsafer_sign", unsafer_sign, (B,), "the B of safer_costs")
    loss = cost_model_loss(
        jnp.ravel(safer_costs),
        jnp.ravel(unsafer_costs),
        jnp.repeat(jnp.asarray(safer_sign), T),
        jnp.repeat(jnp.asarray(unsafer_sign), T),
        jnp.ravel(mask),
        regularization=regularization,
    )
    return loss.reshape(B, T)


def cost_ema(
    ema: float | jax.Array | None, mean_cost: float | jax.Array, *, beta: float
) -> jax.Array:
    """A running mean of the cost over updates, for a λ that follows the trend.

    J′ = β J + (1 − β) C̄,  and C̄ itself the first time

    Args:
      ema: J, a scalar; None before the first update.
      mean_cost: C̄, the mean cost of the current policy's responses, a scalar.
      beta: β, in [0, 1]; 0.9 is common, 0 keeps nothing of the past.

    Returns:
      float32 scalar, in units of the cost.

    Raises:
      ValueError: β lies outside [0, 1], or an argument is not a scalar.

    References:
      Dai et al. 2023, who update λ by a moving average of the cost,
      https://arxiv.org/abs/2310.12773
    """
    check_shape("mean_cost", mean_cost, (), "a scalar")
    check_range("beta", beta, 0.0, 1.0)
    if ema is None:
        return float32(mean_cost)
    check_shape("ema", ema, (), "a scalar")
    return beta * float32(ema) + (1.0 - beta) * float32(mean_cost)


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

    Some code writes the constraint E[C] + d ≤ 0: its d is this one's negative. For a λ
    that never falls, pass max(C̄ − d, 0) as the cost and 0 as the limit.

    Args:
      log_multiplier: log λ, a scalar.
      mean_cost: C̄, a scalar: the mean over recent responses, or `cost_ema`.
      cost_limit: d, in units of the cost.
      lr: η, above 0; 0.1 in safe-rlhf ("gradient").
      rule: "gradient" or "exponential".
      min_multiplier: λ_min, at least 0; 0 for no bound.
      max_multiplier: λ_max, above 0 and at least λ_min; inf for no bound.

    Returns:
      float32 scalar, log λ′.

    Raises:
      ValueError: the rule is unknown, a number is out of range, or an argument is not
        a scalar.

    References:
      Dai et al. 2023, https://arxiv.org/abs/2310.12773
      "gradient" is the update of its code, https://github.com/PKU-Alignment/safe-rlhf
      "exponential": https://github.com/jbejjani2022/es-fine-tuning-paper
    """
    check_shape("log_multiplier", log_multiplier, (), "a scalar")
    check_shape("mean_cost", mean_cost, (), "a scalar")
    check_range("lr", lr, TINY, float("inf"))
    check_range("min_multiplier", min_multiplier, 0.0, float("inf"))
    if isinstance(min_multiplier, (int, float)):
        lowest = max(min_multiplier, TINY)
        check_range("max_multiplier", max_multiplier, lowest, float("inf"))
    if rule not in LAGRANGIAN_RULES:
        raise ValueError(
            f"rule is {rule!r}, expected one of {', '.join(LAGRANGIAN_RULES)}."
        )
    log_multiplier = float32(log_multiplier)
    violation = float32(mean_cost) - cost_limit
    speed = jnp.exp(log_multiplier) if rule == "gradient" else 1.0
    low, high = (jnp.log(float32(x)) for x in (min_multiplier, max_multiplier))
    return jnp.clip(log_multiplier + lr * speed * violation, low, high)


def combined_advantage(
    reward_advantages: jax.Array,
    cost_advantages: jax.Array,
    mask: jax.Array,
    *,
    multiplier: float | jax.Array,
) -> jax.Array:
    """The advantage of reward less λ times that of cost, on the scale of either.

    A = (A_R − λ A_C) / (1 + λ)

    Dividing by 1 + λ keeps the policy's step from growing with λ. Shape the rewards by
    −β KL and the costs by +β KL (`kl_shaped_rewards` with kl_coef=β and kl_coef=−β):
    then the KL weighs β in A, whatever λ is.

    Args:
      reward_advantages: float [B, T], A_R, from the critic of the reward.
      cost_advantages: float [B, T], A_C, from the critic of the cost.
      mask: bool [B, T], True = a real response token.
      multiplier: λ, at least 0, a number or a scalar array; it gets no gradient.

    Returns:
      float32 [B, T]; zero in masked slots.

    Raises:
      ValueError: the arrays differ in shape, or λ is negative or not a scalar.

    References:
      Dai et al. 2023, https://arxiv.org/abs/2310.12773
      The sign of the KL is of its code, https://github.com/PKU-Alignment/safe-rlhf
    """
    check_same_shape(
        reward_advantages=reward_advantages, cost_advantages=cost_advantages, mask=mask
    )
    lam = _multiplier(multiplier)
    mask = boolean(mask)
    A_R, A_C = (
        jnp.where(mask, float32(x), 0.0) for x in (reward_advantages, cost_advantages)
    )
    return (A_R - lam * A_C) / (1.0 + lam)


def combined_reward(
    rewards: jax.Array,
    costs: jax.Array,
    *,
    multiplier: float | jax.Array,
    safe_first: float | None = None,
) -> jax.Array:
    """One number for each response, for methods without critics: GRPO and ES.

    R − λ C,  with safe_first:  (f R if C > 0 else R) − λ C

    Args:
      rewards: float [B], R, of whole responses; any shape.
      costs: float, the shape of rewards, C; positive is unsafe.
      multiplier: λ, at least 0, a number or a scalar array; it gets no gradient.
      safe_first: f, what an unsafe response keeps of its reward, in [0, 1]: with 0 an
        unsafe one earns nothing by being helpful. None leaves the rewards alone.

    Returns:
      float32, the shape of rewards, in units of the reward.

    Raises:
      ValueError: the arrays differ in shape, f lies outside [0, 1], or λ is negative
        or not a scalar.

    References:
      Reward shaping by a fixed λ: Dai et al. 2023, https://arxiv.org/abs/2310.12773
      Safe first: https://github.com/jbejjani2022/es-fine-tuning-paper
    """
    check_same_shape(rewards=rewards, costs=costs)
    check_range("safe_first", safe_first, 0.0, 1.0)
    lam = _multiplier(multiplier)
    R, C = float32(rewards), float32(costs)
    if safe_first is not None:
        R = jnp.where(C > 0, safe_first * R, R)
    return R - lam * C


def _multiplier(multiplier):
    check_shape("multiplier", multiplier, (), "a scalar")
    check_range("multiplier", multiplier, 0.0, float(np.finfo(np.float32).max))
    return jax.lax.stop_gradient(float32(multiplier))


def _check_signs(**signs):
    for name, sign in signs.items():
        if jnp.asarray(sign).dtype == bool:
            raise ValueError(
                f"{name} is bool, expected +1 (unsafe) or -1 (safe): 1 - 2 * is_safe."
            )
