"""Preference losses that need no reference model.

B pairs. y_w is the chosen response and y_l the rejected one.

`orpo` and `simpo` take the mean log-probability of a response's tokens,
`masked.mean(logprobs, mask, axis=1)`; `cpo` takes the sum, from `sequence_logprobs`.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.losses._checks import (
    INF,
    TINY,
    check_range,
    check_rank,
    check_same_shape,
    float32,
    is_zero,
    mask_or_all,
)
from rlhf_jax.losses.direct_preference import alpha_divergence
from rlhf_jax.losses.preference import bradley_terry


def orpo(
    chosen_logprobs: jax.Array,
    rejected_logprobs: jax.Array,
    mask: jax.Array | None = None,
    *,
    beta: float,
) -> jax.Array:
    """Fine-tuning on the chosen response, with a penalty on the odds of the other.

    log p = log π(y) / |y|
    ℓ = −log p_w − β log σ(log odds(p_w) − log odds(p_l))

    TRL's first term is instead the mean over all tokens of the batch, prompts too. For
    another first term take ℓ + log p_w.

    Args:
      chosen_logprobs: float [B], log p_w, the mean over tokens; not above 0.
      rejected_logprobs: float [B], log p_l.
      mask: bool [B], True = a real pair; None when all are real.
      beta: β, at least 0; λ in the paper.

    Returns:
      float32 [B] in nats; zero in masked slots.

    Raises:
      ValueError: an array is not [B] or differs in shape, or β is negative.

    References:
      Hong et al. 2024, equations 6 and 7, https://arxiv.org/abs/2403.07691
    """
    check_range("beta", beta, 0.0, INF)
    log_ratio = log_odds_ratio(chosen_logprobs, rejected_logprobs, mask)
    mask = _mask(chosen_logprobs, mask)
    log_p_w = jnp.where(mask, float32(chosen_logprobs), 0.0)
    return jnp.where(mask, -log_p_w - beta * jax.nn.log_sigmoid(log_ratio), 0.0)


def log_odds_ratio(
    chosen_logprobs: jax.Array,
    rejected_logprobs: jax.Array,
    mask: jax.Array | None = None,
    *,
    eps: float = 1e-7,
) -> jax.Array:
    """Log of the odds of the chosen response over those of the rejected one.

    log odds(p) = log p − log(1 − p)
    log odds(p_w) − log odds(p_l)

    Args:
      chosen_logprobs: float [B], log p_w, the mean over tokens; not above 0.
      rejected_logprobs: float [B], log p_l.
      mask: bool [B], True = a real pair; None when all are real.
      eps: in (0, 1): −log p is at least this, for the odds of a certain response are
        infinite.

    Returns:
      float32 [B] in nats; zero in masked slots.

    Raises:
      ValueError: an array is not [B] or differs in shape, or eps is out of range.

    References:
      Hong et al. 2024, equation 4, https://arxiv.org/abs/2403.07691
    """
    mask = _mask(chosen_logprobs, mask, rejected_logprobs=rejected_logprobs)
    check_range("eps", eps, TINY, 1.0)

    def log_odds(logprobs):
        log_p = jnp.minimum(jnp.where(mask, float32(logprobs), -1.0), -eps)
        return log_p - jnp.log(-jnp.expm1(log_p))

    return log_odds(chosen_logprobs) - log_odds(rejected_logprobs)


def simpo(
    chosen_logprobs: jax.Array,
    rejected_logprobs: jax.Array,
    mask: jax.Array | None = None,
    *,
    beta: float,
    gamma: float,
    label_smoothing: float = 0.0,
    alpha: float | None = None,
) -> jax.Array:
    """The chosen response should be likelier per token, by a margin.

    r(y) = log π(y) / |y|,   or (AlphaPO)  r(y) = (1 − exp(−α log π(y) / |y|)) / α
    z = β (r_w − r_l) − γ
    ℓ = −(1 − ε) log σ(z) − ε log σ(−z)

    Args:
      chosen_logprobs: float [B], log π(y_w) / |y_w|, the mean over tokens.
      rejected_logprobs: float [B], log π(y_l) / |y_l|.
      mask: bool [B], True = a real pair; None when all are real.
      beta: β, above 0; 2 to 10 in the paper.
      gamma: γ, the margin in units of z: the paper's tables give γ/β.
      label_smoothing: ε in [0, ½].
      alpha: α of AlphaPO, a number other than 0; None for SimPO, its limit α → 0.

    Returns:
      float32 [B] in nats; zero in masked slots.

    Raises:
      ValueError: an array is not [B] or differs in shape, or a number is out of range.

    References:
      Meng et al. 2024, equation 6, https://arxiv.org/abs/2405.14734
      α: Gupta et al. 2025 (AlphaPO), https://arxiv.org/abs/2501.03884
    """
    mask = _mask(chosen_logprobs, mask, rejected_logprobs=rejected_logprobs)
    check_range("beta", beta, TINY, INF)
    check_range("label_smoothing", label_smoothing, 0.0, 0.5)
    check_range("gamma", gamma, -INF, INF)
    check_range("alpha", alpha, -INF, INF)
    if is_zero(alpha):
        raise ValueError("alpha is 0, expected another number, or None for SimPO.")

    def reward(logprobs):
        r = jnp.where(mask, float32(logprobs), 0.0)
        return r if alpha is None else alpha_divergence(r, alpha=alpha)

    return bradley_terry(
        beta * reward(chosen_logprobs),
        beta * reward(rejected_logprobs),
        mask,
        centering=0.0,
        margin=jnp.full(mask.shape, gamma, jnp.float32),
        targets=1.0 - label_smoothing,
    )


def cpo(
    chosen_logprobs: jax.Array,
    rejected_logprobs: jax.Array,
    mask: jax.Array | None = None,
    *,
    beta: float,
    nll_coef: float,
    label_smoothing: float = 0.0,
    chosen_lengths: jax.Array | None = None,
) -> jax.Array:
    """DPO with a uniform reference, anchored by the likelihood of the chosen response.

    z = β (log π(y_w) − log π(y_l))
    ℓ = −(1 − ε) log σ(z) − ε log σ(−z) − α log π(y_w) [/ |y_w|]

    The paper's last term is a sum over tokens. With lengths it is their mean, which is
    near TRL's, the mean over the tokens of the batch: for exactly that one take α = 0
    here, and add α times `next_token_loss`. Other loss types are those of `dpo`, with
    zeros for the reference.

    Args:
      chosen_logprobs: float [B], log π(y_w), summed over the response.
      rejected_logprobs: float [B], log π(y_l).
      mask: bool [B], True = a real pair; None when all are real.
      beta: β, above 0.
      nll_coef: α, at least 0; 1 in the paper, and as TRL's `cpo_alpha`.
      label_smoothing: ε in [0, ½].
      chosen_lengths: [B], |y_w| in tokens, for the mean in the last term.

    Returns:
      float32 [B] in nats; zero in masked slots.

    Raises:
      ValueError: an array is not [B] or differs in shape, or a number is out of range.

    References:
      Xu et al. 2024, https://arxiv.org/abs/2401.08417
    """
    lengths = {} if chosen_lengths is None else {"chosen_lengths": chosen_lengths}
    mask = _mask(chosen_logprobs, mask, rejected_logprobs=rejected_logprobs, **lengths)
    check_range("beta", beta, TINY, INF)
    check_range("nll_coef", nll_coef, 0.0, INF)
    check_range("label_smoothing", label_smoothing, 0.0, 0.5)
    logp_w, logp_l = (
        jnp.where(mask, float32(x), 0.0) for x in (chosen_logprobs, rejected_logprobs)
    )
    preference = bradley_terry(
        beta * logp_w,
        beta * logp_l,
        mask,
        centering=0.0,
        targets=1.0 - label_smoothing,
    )
    n = jnp.float32(1.0)
    if chosen_lengths is not None:
        n = jnp.maximum(jnp.where(mask, float32(chosen_lengths), 1.0), 1.0)
    return preference - nll_coef * logp_w / n


def _mask(chosen_logprobs, mask, **others):
    """The mask as bool [B], after the shapes are checked."""
    check_rank("B", chosen_logprobs=chosen_logprobs)
    check_same_shape(chosen_logprobs=chosen_logprobs, **others)
    return mask_or_all(mask, "chosen_logprobs", chosen_logprobs)
