"""Distillation: how far a student is from its teacher, over the whole vocabulary.

B sequences, T tokens, D model, V vocabulary. The sequences may be the student's own, as
in on-policy distillation (GKD), the teacher's, or those of a data set. Reduce the loss
with `losses.aggregation`; `token_mean` is that of TRL.

Where a teacher's logits do not fit, keep its likeliest tokens with `top_logprobs`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.losses._checks import check_range
from rlhf_jax.losses._chunks import make_options
from rlhf_jax.losses._divergences import kl_divergence, of_logits, of_states


def generalized_jsd(
    hidden: jax.Array,
    unembedding: jax.Array,
    teacher_hidden: jax.Array,
    teacher_unembedding: jax.Array,
    mask: jax.Array | None = None,
    *,
    beta: float,
    temperature: float,
    chunk_size: int | None,
    logit_softcap: float | None = None,
) -> jax.Array:
    """Generalised Jensen-Shannon divergence of the student from its teacher (GKD).

    zᵥ = cap(h·Wᵥ) / τ,   p the teacher's softmax, q the student's
    β = 0: KL(p ‖ q);   β = 1: KL(q ‖ p);   else, with m = β p + (1 − β) q:
    ℓ = β KL(p ‖ m) + (1 − β) KL(q ‖ m)

    The ends are those of TRL, not the limits of what lies between, which are 0.
    Gradients flow to both models: stop those of a teacher that is not to learn.

    Args:
      hidden: float [B, T, D] of the student, after the final norm.
      unembedding: float [V, D] of the student.
      teacher_hidden: float [B, T, D'] of the teacher.
      teacher_unembedding: float [V, D'] of the teacher.
      mask: bool [B, T], True = a real token; None when all are real.
      beta: β, a Python number in [0, 1].
      temperature: τ, a Python number above 0, of both.
      chunk_size: tokens of each sequence whose logits exist at a time, in the forward
        and in the backward pass; None for all.
      logit_softcap: s, a Python number, of both; None for no cap.

    Returns:
      float32 [B, T] in nats, not below 0 but for round-off; zero in masked slots.

    Raises:
      ValueError: a shape does not fit, an array is not float, or a hyper-parameter is
        out of range.

    References:
      Agarwal et al. 2024 (GKD), equation 1, https://arxiv.org/abs/2306.13649
    """
    states = {
        "hidden": hidden,
        "unembedding": unembedding,
        "teacher_hidden": teacher_hidden,
        "teacher_unembedding": teacher_unembedding,
    }
    options = make_options(temperature, logit_softcap)
    return of_states(_jsd(beta), states, mask, options, chunk_size)


def generalized_jsd_from_logits(
    logits: jax.Array,
    teacher_logits: jax.Array,
    mask: jax.Array | None = None,
    *,
    beta: float,
    temperature: float,
    logit_softcap: float | None = None,
) -> jax.Array:
    """The loss of `generalized_jsd`, from logits.

    β = 0: KL(p ‖ q);   β = 1: KL(q ‖ p);   else, with m = β p + (1 − β) q:
    ℓ = β KL(p ‖ m) + (1 − β) KL(q ‖ m)

    A token that neither draws (logit −inf) adds nothing.

    Args:
      logits: float [B, T, V] of the student, whose softmax is q.
      teacher_logits: float [B, T, V] of the teacher, whose softmax is p.
      mask: bool [B, T], True = a real token; None when all are real.
      beta: β, a Python number in [0, 1].
      temperature: τ, a Python number above 0, of both.
      logit_softcap: s, for logits that are not capped yet; None for no cap.

    Returns:
      float32 [B, T] in nats; zero in masked slots.

    Raises:
      ValueError: a shape does not fit, or a hyper-parameter is out of range.

    References:
      Agarwal et al. 2024 (GKD), equation 1, https://arxiv.org/abs/2306.13649
    """
    both = {"logits": logits, "teacher_logits": teacher_logits}
    options = make_options(temperature, logit_softcap)
    return of_logits(_jsd(beta), both, mask, options)


def _jsd(beta):
    """The divergence as a function of the student's and the teacher's logits."""
    check_range("beta", beta, 0.0, 1.0)
    beta = float(beta)

    def divergence(z, teacher_z):
        logq, logp = jax.nn.log_softmax(z), jax.nn.log_softmax(teacher_z)
        if beta == 0.0:
            return kl_divergence(logp, logq)
        if beta == 1.0:
            return kl_divergence(logq, logp)
        log_beta, log_rest = (jnp.float32(f) for f in (np.log(beta), np.log1p(-beta)))
        # The gradient of logaddexp is nan where neither draws; both KLs leave it out.
        drawn = (logp > -jnp.inf) | (logq > -jnp.inf)
        shares = log_beta + logp, log_rest + logq
        logm = jnp.logaddexp(*(jnp.where(drawn, x, 0.0) for x in shares))
        to_teacher, to_student = kl_divergence(logp, logm), kl_divergence(logq, logm)
        return beta * to_teacher + (1.0 - beta) * to_student

    return divergence
