"""Policy losses beyond PPO's clip, and how each named algorithm is put together.

B sequences, T tokens. Every loss takes the arguments of `clipped_surrogate` and gives
what it gives: a loss of each token, not averaged, and `PolicyDiagnostics`. What else
makes up an algorithm is the scale of its advantages (`group_relative`) and the way from
tokens to one number (`losses.aggregation`):

    name      loss               scale    aggregation
    grpo      clipped_surrogate  "group"  sequence_mean
    dr_grpo   clipped_surrogate  "none"   constant_norm
    bnpo      clipped_surrogate  "group"  token_mean, divided in each micro-batch
    dapo      clipped_surrogate  "group"  token_mean, with ε_high > ε_low
    gspo      gspo, gspo_token   "group"  sequence_mean
    cispo     cispo              "group"  token_mean
    sapo      sapo               "group"  sequence_mean

bnpo is what TRL calls so; the paper of that name, https://arxiv.org/abs/2506.02864,
scales its advantages by a beta distribution. TRL's `delta` is `dual_clip` here. Other
pairs are as easily written down, but mostly wrong for gspo: its response has one ratio,
so it should have one weight.

`VARIANTS` has the table as values, for a trainer whose config names one.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.losses import kl as kl_estimates
from rlhf_jax.losses import masked
from rlhf_jax.losses._checks import (
    INF,
    TINY,
    boolean,
    check_range,
    check_rank,
    check_same_shape,
    check_shape,
    float32,
)
from rlhf_jax.losses.policy import PolicyDiagnostics, clipped_surrogate


def gspo(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[jax.Array, PolicyDiagnostics]:
    """Group Sequence Policy Optimization: PPO's clip on one ratio for a response.

    sᵢ = (π(yᵢ) / π_old(yᵢ))^(1/nᵢ) = exp((1/nᵢ) Σₜ (log πᵢₜ − log π_old,ᵢₜ))
    ℓᵢₜ = max(−Aᵢ sᵢ, −Aᵢ clip(sᵢ, 1 − ε_low, 1 + ε_high))     at each real token t

    The loss of a response stands at each of its tokens, so that other terms can be
    added and `aggregation.sequence_mean` is the paper's mean over responses, gradient
    included. Any other aggregation weighs a response by its length.
    log sᵢ is clamped to ±20, and has no gradient beyond.

    Args:
      logprobs: float [B, T], log π of the response tokens, with gradient.
      old_logprobs: float [B, T], of the policy that the update started from.
      advantages: float [B], one for a response; `gspo_token` takes one for each token.
      mask: bool [B, T], True = a real response token.
      clip_low: ε_low, in [0, 1]; some 3e-4, for a mean of log-ratios is small.
      clip_high: ε_high, at least 0; some 4e-4.

    Returns:
      (loss, diagnostics): float32 [B, T] in units of the advantage, zero in masked
      slots, and `PolicyDiagnostics`, in which the ratio is sᵢ.

    Raises:
      ValueError: a shape does not fit, or a hyper-parameter is out of range.

    References:
      Zheng et al. 2025, equations 5 and 7, https://arxiv.org/abs/2507.18071
    """
    log_s = _sequence_log_ratio(logprobs, old_logprobs, mask)
    check_shape("advantages", advantages, log_s.shape, "the B of logprobs")
    log_s, A = (
        jnp.broadcast_to(x[:, None], np.shape(mask))
        for x in (log_s, float32(advantages))
    )
    loss, diagnostics = clipped_surrogate(
        log_s, jnp.zeros_like(log_s), A, mask, clip_low=clip_low, clip_high=clip_high
    )
    return loss, _with_kl_of(logprobs, old_logprobs, mask, diagnostics)


def gspo_token(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[jax.Array, PolicyDiagnostics]:
    """`gspo` with an advantage of its own for each token.

    sᵢₜ = sg(sᵢ) · πᵢₜ / sg(πᵢₜ)         sg stops the gradient, so sᵢₜ = sᵢ as a number
    ℓᵢₜ = max(−Aᵢₜ sᵢₜ, −Aᵢₜ clip(sᵢₜ, 1 − ε_low, 1 + ε_high))

    With one advantage for all tokens of a response it has, under
    `aggregation.sequence_mean`, the value and the gradient of `gspo`.
    log sᵢₜ is clamped to ±20, and has no gradient beyond.

    Args:
      logprobs: float [B, T], log π of the response tokens, with gradient.
      old_logprobs: float [B, T], of the policy that the update started from.
      advantages: float [B, T].
      mask: bool [B, T], True = a real response token.
      clip_low: ε_low, in [0, 1]; some 3e-4, for a mean of log-ratios is small.
      clip_high: ε_high, at least 0; some 4e-4.

    Returns:
      (loss, diagnostics): float32 [B, T] in units of the advantage, zero in masked
      slots, and `PolicyDiagnostics`, in which the ratio is sᵢ.

    Raises:
      ValueError: the arrays differ in shape, or a hyper-parameter is out of range.

    References:
      Zheng et al. 2025, equations 13 and 14, https://arxiv.org/abs/2507.18071
    """
    sg = jax.lax.stop_gradient
    log_s = _sequence_log_ratio(logprobs, old_logprobs, mask)
    # zero as a number; as a gradient, that of log π
    gradient_of_token = kl_estimates.k1(logprobs, sg(logprobs), mask)
    log_s = sg(log_s)[:, None] + gradient_of_token
    loss, diagnostics = clipped_surrogate(
        log_s,
        jnp.zeros_like(log_s),
        advantages,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
    )
    return loss, _with_kl_of(logprobs, old_logprobs, mask, diagnostics)


def cispo(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    ratio_max: float,
    ratio_min: float = 0.0,
) -> tuple[jax.Array, PolicyDiagnostics]:
    """REINFORCE with a bounded importance weight: no token loses its gradient.

    rₜ = π(yₜ) / π_old(yₜ)
    ℓₜ = −sg(clip(rₜ, r_min, r_max)) Aₜ log π(yₜ)

    The weight has no gradient; the gradient is −w A ∇log π on either side of the
    bounds. The value of the loss says nothing, not even its sign.

    The bounds are of the ratio itself, not distances from one, for "ε_high" means three
    things: the cap itself in TRL (5.0: ratio_max=5.0), a distance on both sides in verl
    (0.2 and 0.2: ratio_min=0.8, ratio_max=1.2), a distance above alone in the paper
    and in open-instruct (0.272: ratio_max=1.272).

    Args:
      logprobs: float [B, T], log π of the response tokens, with gradient.
      old_logprobs: float [B, T], of the policy that the update started from.
      advantages: float [B, T].
      mask: bool [B, T], True = a real response token.
      ratio_max: r_max, at least 1.
      ratio_min: r_min, in [0, 1]; 0 is no lower bound, as in the paper.

    Returns:
      (loss, diagnostics): float32 [B, T] in units of the advantage times nats, zero in
      masked slots, and `PolicyDiagnostics`, in which clipped marks the tokens whose
      weight was bounded; they have a gradient here.

    Raises:
      ValueError: the arrays differ in shape, or a bound is out of range.

    References:
      MiniMax 2025, equations 4 and 5, https://arxiv.org/abs/2506.13585
    """
    check_range("ratio_max", ratio_max, 1.0, INF)
    check_range("ratio_min", ratio_min, 0.0, 1.0)
    ratio, A, mask, diagnostics = _token_ratio(logprobs, old_logprobs, advantages, mask)
    weight = jax.lax.stop_gradient(jnp.clip(ratio, ratio_min, ratio_max))
    loss = -weight * A * jnp.where(mask, float32(logprobs), 0.0)
    clipped = (ratio < ratio_min) | (ratio > ratio_max)
    return loss, diagnostics._replace(clipped=clipped)


def sapo(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    tau_pos: float,
    tau_neg: float,
) -> tuple[jax.Array, PolicyDiagnostics]:
    """Soft Adaptive Policy Optimization: a smooth gate in place of the clip.

    rₜ = π(yₜ) / π_old(yₜ)
    ℓₜ = −(4/τ) σ(τ (rₜ − 1)) Aₜ,     τ = τ_pos where Aₜ > 0, else τ_neg

    Its gradient is −4 p (1 − p) rₜ Aₜ ∇log π with p = σ(τ (rₜ − 1)): that of the
    policy gradient at rₜ = 1, fading away on both sides, the sooner the larger τ. The
    value at rₜ = 1 is −2 Aₜ / τ, not −Aₜ.
    log r is clamped to ±20, and has no gradient beyond.

    Args:
      logprobs: float [B, T], log π of the response tokens, with gradient.
      old_logprobs: float [B, T], of the policy that the update started from.
      advantages: float [B, T].
      mask: bool [B, T], True = a real response token.
      tau_pos: τ_pos, above 0; 1.0 in the paper.
      tau_neg: τ_neg, above 0; 1.05 in the paper, so that the gradient of bad tokens,
        which pushes all other tokens up, fades the sooner.

    Returns:
      (loss, diagnostics): float32 [B, T] in units of the advantage, zero in masked
      slots, and `PolicyDiagnostics`, in which nothing is clipped.

    Raises:
      ValueError: the arrays differ in shape, or a temperature is not positive.

    References:
      Gao et al. 2025, equations 5 and 6, https://arxiv.org/abs/2511.20347
    """
    check_range("tau_pos", tau_pos, TINY, INF)
    check_range("tau_neg", tau_neg, TINY, INF)
    ratio, A, _, diagnostics = _token_ratio(logprobs, old_logprobs, advantages, mask)
    tau = jnp.where(A > 0, float32(tau_pos), float32(tau_neg))
    return -(4.0 / tau) * jax.nn.sigmoid(tau * (ratio - 1.0)) * A, diagnostics


class Variant(NamedTuple):
    """One row of the table at the head of this file.

    loss: (logprobs, old_logprobs, advantages [B, T], mask, **hyper_parameters)
      -> (loss [B, T], PolicyDiagnostics).
    aggregation: the `mode` of `aggregation.aggregate`.
    scale: the `scale` of `group_relative`, before `over_tokens` makes [B, T] of it.
    """

    loss: Callable[..., tuple[jax.Array, PolicyDiagnostics]]
    aggregation: str
    scale: str


# gspo_token, for all take [B, T]: with equal advantages in a row it is gspo.
VARIANTS = {
    "grpo": Variant(clipped_surrogate, "sequence_mean", "group"),
    "dr_grpo": Variant(clipped_surrogate, "constant_norm", "none"),
    "bnpo": Variant(clipped_surrogate, "token_mean", "group"),
    "dapo": Variant(clipped_surrogate, "token_mean", "group"),
    "gspo": Variant(gspo_token, "sequence_mean", "group"),
    "cispo": Variant(cispo, "token_mean", "group"),
    "sapo": Variant(sapo, "sequence_mean", "group"),
}


def variant(name: str) -> Variant:
    """The algorithm with the given name, for a name that comes from a config.

    Args:
      name: "grpo", "dr_grpo", "bnpo", "dapo", "gspo", "cispo" or "sapo".

    Returns:
      `Variant`.

    Raises:
      ValueError: the name is unknown.
    """
    if name not in VARIANTS:
        raise ValueError(f"name is {name!r}, expected one of {', '.join(VARIANTS)}.")
    return VARIANTS[name]


def _sequence_log_ratio(logprobs, old_logprobs, mask):
    check_rank("B T", logprobs=logprobs)
    check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    log_ratio = kl_estimates.k1(logprobs, old_logprobs, mask)
    return masked.mean(log_ratio, mask, axis=1)


def _with_kl_of(logprobs, old_logprobs, mask, diagnostics):
    approx_kl = kl_estimates.k2(logprobs, old_logprobs, mask)
    return diagnostics._replace(approx_kl=jax.lax.stop_gradient(approx_kl))


def _token_ratio(logprobs, old_logprobs, advantages, mask):
    check_same_shape(
        logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask
    )
    mask = boolean("mask", mask)
    log_ratio = kl_estimates.k1(logprobs, old_logprobs, mask)
    ratio = kl_estimates.ratio(log_ratio)
    diagnostics = PolicyDiagnostics(
        ratio, jnp.zeros_like(mask), 0.5 * jnp.square(log_ratio)
    )
    A = jnp.where(mask, float32(advantages), 0.0)
    return ratio, A, mask, jax.lax.stop_gradient(diagnostics)
