"""The losses of PPO, and the rewards that go into it.

B sequences, T tokens.

The entropy bonus has no function here: subtract `coefficient * entropy`, the second
result of `token_logprobs`, from the loss of each token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.losses import kl as kl_estimates
from rlhf_jax.losses._checks import (
    INF,
    TINY,
    boolean,
    check_labels,
    check_range,
    check_rank,
    check_same_shape,
    check_scalars,
    check_shape,
    float32,
    is_number,
)


class PolicyDiagnostics(NamedTuple):
    """What happened to each token in `clipped_surrogate`; without gradient.

    ratio: float32 [B, T], π/π_old; one in masked slots.
    clipped: bool [B, T], True where a clip cut the gradient off; False in masked slots.
    approx_kl: float32 [B, T], ½ (log π − log π_old)² in nats; zero in masked slots.
    """

    ratio: jax.Array
    clipped: jax.Array
    approx_kl: jax.Array


def clipped_surrogate(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[jax.Array, PolicyDiagnostics]:
    """PPO's clipped policy loss of each token.

    rₜ = π(yₜ) / π_old(yₜ)
    ℓₜ = max(−Aₜ rₜ, −Aₜ clip(rₜ, 1 − ε_low, 1 + ε_high))
    with dual clip, where Aₜ < 0:  ℓₜ = min(ℓₜ, −c Aₜ)

    The maximum is right for both signs of A: the loss is the worse of the two, so a
    ratio that has already moved the way A asks for gets no more gradient, and one that
    has moved the wrong way is always pulled back (but for the dual clip's limit c).
    log r is clamped to ±20, and has no gradient beyond.

    Args:
      logprobs: float [B, T], log π of the response tokens, with gradient.
      old_logprobs: float [B, T], of the policy that the update started from.
      advantages: float [B, T].
      mask: bool [B, T], True = a real response token.
      clip_low: ε_low, in [0, 1].
      clip_high: ε_high, at least 0; above ε_low for DAPO's "clip higher".
      dual_clip: c, at least 1; bounds the loss of a bad token that became likely.

    Returns:
      (loss, diagnostics): float32 [B, T] in units of the advantage, zero in masked
      slots, and `PolicyDiagnostics`.

    Raises:
      ValueError: the arrays differ in shape, or a hyper-parameter is out of range.

    References:
      Schulman et al. 2017, equation 7, https://arxiv.org/abs/1707.06347
      Asymmetric clip: DAPO, equation 10, https://arxiv.org/abs/2503.14476
      Dual clip: Ye et al. 2020, equation 5, https://arxiv.org/abs/1912.09729
    """
    check_same_shape(
        logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask
    )
    check_range("clip_low", clip_low, 0.0, 1.0)
    check_range("clip_high", clip_high, 0.0, INF)
    check_range("dual_clip", dual_clip, 1.0, INF)

    mask = boolean("mask", mask)
    log_ratio = kl_estimates.k1(logprobs, old_logprobs, mask)
    A = jnp.where(mask, float32(advantages), 0.0)
    ratio = kl_estimates.ratio(log_ratio)

    unclipped = -A * ratio
    bounded = -A * jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    loss = jnp.maximum(unclipped, bounded)
    clipped = bounded > unclipped
    if dual_clip is not None:
        ceiling = jnp.where(A < 0, -dual_clip * A, jnp.inf)
        clipped = clipped | (loss > ceiling)
        loss = jnp.minimum(loss, ceiling)

    diagnostics = PolicyDiagnostics(ratio, clipped, 0.5 * jnp.square(log_ratio))
    return loss, jax.lax.stop_gradient(diagnostics)


def clipped_value_loss(
    values: jax.Array,
    old_values: jax.Array,
    returns: jax.Array,
    mask: jax.Array,
    *,
    clip_range: float | None,
) -> tuple[jax.Array, jax.Array]:
    """The critic's squared error at each token, with its step bounded.

    Vᶜₜ = clip(Vₜ, V_old,ₜ − ε, V_old,ₜ + ε)
    ℓₜ = ½ max((Vₜ − Rₜ)², (Vᶜₜ − Rₜ)²)

    Args:
      values: float [B, T], the critic's values, with gradient.
      old_values: float [B, T], values at the rollout.
      returns: float [B, T], as `gae` gives them.
      mask: bool [B, T], True = a real response token.
      clip_range: ε, in units of the value; None for the plain squared error.

    Returns:
      (loss, clipped): float32 [B, T], the half in it, zero in masked slots; and bool
      [B, T], True where the clip cut the gradient off.

    Raises:
      ValueError: the arrays differ in shape, or ε is negative.

    References:
      Not in the PPO paper but in its code: Huang et al. 2022, detail 9,
      https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/
    """
    check_same_shape(values=values, old_values=old_values, returns=returns, mask=mask)
    check_range("clip_range", clip_range, 0.0, INF)
    mask = boolean("mask", mask)
    V, V_old, R = (
        jnp.where(mask, float32(x), 0.0) for x in (values, old_values, returns)
    )
    unclipped = jnp.square(V - R)
    if clip_range is None:
        return 0.5 * unclipped, jnp.zeros_like(mask)
    bounded = jnp.square(jnp.clip(V, V_old - clip_range, V_old + clip_range) - R)
    return 0.5 * jnp.maximum(unclipped, bounded), bounded > unclipped


def kl_shaped_rewards(
    scores: jax.Array,
    kl: jax.Array,
    mask: jax.Array,
    *,
    kl_coef: float | jax.Array,
) -> jax.Array:
    """The reward of each token: a KL penalty, and the score on the last real token.

    rₜ = −β KLₜ + s · 1[t is the last real token]

    The last real token is the one that ended the response, the end-of-sequence token
    where there is one. A row without a real token gets no reward.

    Args:
      scores: float [B], of whole responses; integers are made float32.
      kl: float [B, T] in nats, from an estimator of `losses.kl`.
      mask: bool [B, T], True = a real response token; gaps are allowed.
      kl_coef: β, a number or a scalar array when it adapts.

    Returns:
      float32 [B, T] in units of the score; zero in masked slots.

    Raises:
      ValueError: a shape does not fit, or β is not a scalar.

    References:
      Ziegler et al. 2019, equation 2, https://arxiv.org/abs/1909.08593
      Its place in the sequence: Huang et al. 2024, https://arxiv.org/abs/2403.17031
    """
    check_rank("B T", kl=kl)
    check_same_shape(kl=kl, mask=mask)
    B, T = np.shape(kl)
    check_shape("scores", scores, (B,), "the B of kl")
    check_range("kl_coef", kl_coef, -INF, INF)
    mask = boolean("mask", mask)
    penalties = -float32(kl_coef) * jnp.where(mask, float32(kl), 0.0)
    slots = jnp.arange(T)[None, :]
    last = jnp.where(mask, slots, -1).max(1, initial=-1)
    return jnp.where(
        slots == last[:, None], penalties + float32(scores)[:, None], penalties
    )


def missing_eos_penalty(
    scores: jax.Array, finished: jax.Array, *, penalty: float
) -> jax.Array:
    """Take the penalty off the score of each response that was cut off.

    sᵢ − c · 1[response i did not end by itself]

    TRL subtracts, as here. Huang et al. *replace* the score by −1 instead; that is
    `jnp.where(finished, scores, -1.0)`.

    Args:
      scores: float [B].
      finished: bool [B], True = the response ended with its end-of-sequence token.
      penalty: c, in units of the score; above 0 to discourage.

    Returns:
      float32 [B], in units of the score.

    Raises:
      ValueError: the arrays differ in shape, finished is not bool, or the penalty is
        not a scalar.

    References:
      TRL, `missing_eos_penalty`, https://huggingface.co/docs/trl/ppo_trainer
      Replacement: Huang et al. 2024, https://arxiv.org/abs/2403.17031
    """
    check_same_shape(scores=scores, finished=finished)
    check_labels(finished=finished)
    check_range("penalty", penalty, -INF, INF)
    scores = float32(scores)
    return jnp.where(jnp.asarray(finished), scores, scores - float32(penalty))


def adaptive_kl_coef(
    kl_coef: float | jax.Array,
    observed_kl: float | jax.Array,
    *,
    target: float,
    horizon: float,
    num_samples: int,
) -> jax.Array:
    """The next KL coefficient: up when KL is above its target, down when below.

    e = clip(KL / KL_target − 1, −0.2, 0.2)
    β′ = β (1 + e · n / h)

    Args:
      kl_coef: β, a scalar.
      observed_kl: mean over sequences of the KL summed over tokens, in nats, a scalar.
      target: KL_target in nats a sequence, above 0.
      horizon: h, sequences; a large one is a slow controller.
      num_samples: n, sequences seen since the last call, at most 5 h.

    Returns:
      float32 scalar, of the sign of β.

    Raises:
      ValueError: target or horizon is not positive, n exceeds 5 h (β would change
        sign), or an argument is not a scalar.

    References:
      Ziegler et al. 2019, section 2.2, https://arxiv.org/abs/1909.08593
      h and n are of its code, where the paper writes K = n / h = 0.1:
      https://github.com/openai/lm-human-preferences
    """
    check_scalars(kl_coef=kl_coef, observed_kl=observed_kl)
    check_range("target", target, TINY, INF)
    check_range("horizon", horizon, TINY, INF)
    most = 5 * horizon if is_number(horizon) else INF
    check_range("num_samples", num_samples, 0, most)
    error = jnp.clip(float32(observed_kl) / float32(target) - 1.0, -0.2, 0.2)
    return float32(kl_coef) * (1.0 + error * float32(num_samples / horizon))
