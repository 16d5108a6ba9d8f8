"""Estimates of KL(π ‖ π_ref) from the log-probabilities of sampled tokens.

B sequences, T tokens, D model, V vocabulary. d = log π(y) − log π_ref(y), with y drawn
from π. Every estimate is a positive number where π has drifted from π_ref, whichever
estimator is chosen.

As a *reward* (no gradient) k1 and k3 are unbiased. As a *loss* the value and the
gradient are two questions: the gradient of k1 has mean zero, that of k3 leads to the
other KL, KL(π_ref ‖ π), and that of k2 is the right one on fresh samples.
`straight_through` joins the value of any estimate with the gradient of k2.

`exact` needs no samples of its own: it sums over the vocabulary at each position of the
sequences at hand, from hidden states.

Use as a module: `kl.k3(logprobs, ref_logprobs, mask)`.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.losses._checks import boolean, check_same_shape, float32
from rlhf_jax.losses._chunks import make_options
from rlhf_jax.losses._divergences import kl_divergence, of_logits, of_states

# exp(20) is 4.9e8. A larger log-ratio comes from a broken sample, not from learning,
# and overflows float32 from 88 on. The same bound as in OpenRLHF and verl.
MAX_LOG_RATIO = 20.0
ESTIMATORS = ("k1", "k2", "k3", "abs", "k1+", "k3+", "abs+")


def k1(logprobs: jax.Array, ref_logprobs: jax.Array, mask: jax.Array) -> jax.Array:
    """The log-ratio: unbiased, may be negative, of high variance.

    k₁ = log π − log π_ref

    Args:
      logprobs: float [B, T], log π of the sampled tokens.
      ref_logprobs: float [B, T], log π_ref of the same tokens.
      mask: bool [B, T], True = a real response token.

    Returns:
      float32 [B, T] in nats; zero in masked slots.

    Raises:
      ValueError: the arrays differ in shape.

    References:
      Schulman 2020, http://joschu.net/blog/kl-approx.html
    """
    return _log_ratio(logprobs, ref_logprobs, mask)


def k2(logprobs: jax.Array, ref_logprobs: jax.Array, mask: jax.Array) -> jax.Array:
    """Half the squared log-ratio: biased, of low variance, right as a loss.

    k₂ = ½ (log π − log π_ref)²

    Its gradient d·∇log π has the mean ∇KL(π ‖ π_ref) on samples of π.

    Args:
      logprobs: float [B, T], log π of the sampled tokens.
      ref_logprobs: float [B, T], log π_ref of the same tokens.
      mask: bool [B, T], True = a real response token.

    Returns:
      float32 [B, T] in nats, never negative; zero in masked slots.

    Raises:
      ValueError: the arrays differ in shape.

    References:
      Schulman 2020, http://joschu.net/blog/kl-approx.html
      Its gradient: Tang and Munos 2025, https://arxiv.org/abs/2506.09477
    """
    return 0.5 * jnp.square(_log_ratio(logprobs, ref_logprobs, mask))


def k3(logprobs: jax.Array, ref_logprobs: jax.Array, mask: jax.Array) -> jax.Array:
    """Unbiased, never negative, of low variance while π is near π_ref.

    k₃ = π_ref/π − 1 − log(π_ref/π) = exp(−d) − 1 + d

    The exponent is clamped from above at 20, beyond which the estimate has no gradient.

    Args:
      logprobs: float [B, T], log π of the sampled tokens.
      ref_logprobs: float [B, T], log π_ref of the same tokens.
      mask: bool [B, T], True = a real response token.

    Returns:
      float32 [B, T] in nats, never negative; zero in masked slots.

    Raises:
      ValueError: the arrays differ in shape.

    References:
      Schulman 2020, http://joschu.net/blog/kl-approx.html
      GRPO, equation 4, https://arxiv.org/abs/2402.03300
    """
    x = jnp.minimum(-_log_ratio(logprobs, ref_logprobs, mask), MAX_LOG_RATIO)
    # The rounding of exp may fall below the line it touches at zero.
    return jnp.maximum(jnp.expm1(x) - x, 0.0)


def absolute(
    logprobs: jax.Array, ref_logprobs: jax.Array, mask: jax.Array
) -> jax.Array:
    """The size of the log-ratio: a penalty on drift of either sign, not a KL.

    |d| = |log π − log π_ref|

    Args:
      logprobs: float [B, T], log π of the sampled tokens.
      ref_logprobs: float [B, T], log π_ref of the same tokens.
      mask: bool [B, T], True = a real response token.

    Returns:
      float32 [B, T] in nats, never negative; zero in masked slots.

    Raises:
      ValueError: the arrays differ in shape.

    References:
      verl, `kl_penalty` "abs",
      https://github.com/volcengine/verl/blob/main/verl/trainer/ppo/core_algos.py
    """
    return jnp.abs(_log_ratio(logprobs, ref_logprobs, mask))


def straight_through(
    value: jax.Array,
    logprobs: jax.Array,
    ref_logprobs: jax.Array,
    mask: jax.Array,
) -> jax.Array:
    """An estimate's value with the gradient that lowers KL(π ‖ π_ref).

    value k,   gradient ∇k₂ = d·∇log π

    Args:
      value: float [B, T], what `k1`, `k3` or `absolute` gave.
      logprobs: float [B, T], log π of the sampled tokens.
      ref_logprobs: float [B, T], log π_ref of the same tokens.
      mask: bool [B, T], True = a real response token.

    Returns:
      float32 [B, T] in nats; zero in masked slots.

    Raises:
      ValueError: the arrays differ in shape.

    References:
      Tang and Munos 2025, https://arxiv.org/abs/2506.09477
    """
    check_same_shape(logprobs=logprobs, value=value)
    gradient = k2(logprobs, ref_logprobs, mask)
    value = jnp.where(boolean("mask", mask), float32(value), 0.0)
    # x − x is exactly zero, so the value keeps every bit.
    return jax.lax.stop_gradient(value) + (gradient - jax.lax.stop_gradient(gradient))


def estimate(
    logprobs: jax.Array,
    ref_logprobs: jax.Array,
    mask: jax.Array,
    *,
    estimator: str,
) -> jax.Array:
    """The estimate with the given name, for a name that comes from a config.

    Args:
      logprobs: float [B, T], log π of the sampled tokens.
      ref_logprobs: float [B, T], log π_ref of the same tokens.
      mask: bool [B, T], True = a real response token.
      estimator: "k1", "k2", "k3" or "abs", or one of "k1+", "k3+", "abs+" for its value
        with the gradient of k2.

    Returns:
      float32 [B, T] in nats; zero in masked slots.

    Raises:
      ValueError: the estimator is unknown, or the arrays differ in shape.

    References:
      The names are those of verl,
      https://github.com/volcengine/verl/blob/main/verl/trainer/ppo/core_algos.py
    """
    functions = {"k1": k1, "k2": k2, "k3": k3, "abs": absolute}
    if estimator not in ESTIMATORS:
        raise ValueError(
            f"estimator is {estimator!r}, expected one of {', '.join(ESTIMATORS)}."
        )
    value = functions[estimator.removesuffix("+")](logprobs, ref_logprobs, mask)
    if not estimator.endswith("+"):
        return value
    return straight_through(value, logprobs, ref_logprobs, mask)


def ratio(log_ratio: jax.Array) -> jax.Array:
    """The ratio of two policies from its logarithm, which is clamped.

    r = exp(clip(d, −20, 20))

    Args:
      log_ratio: float, of any shape: `k1`, or sums of it.

    Returns:
      float32, the shape of log_ratio; without gradient where d is clamped.

    References:
      OpenRLHF, https://github.com/OpenRLHF/OpenRLHF
    """
    return jnp.exp(jnp.clip(float32(log_ratio), -MAX_LOG_RATIO, MAX_LOG_RATIO))


def exact(
    hidden: jax.Array,
    unembedding: jax.Array,
    ref_hidden: jax.Array,
    ref_unembedding: jax.Array,
    mask: jax.Array | None = None,
    *,
    temperature: float,
    chunk_size: int | None,
    logit_softcap: float | None = None,
) -> jax.Array:
    """KL(π ‖ π_ref) of the next token, summed over the vocabulary, at each position.

    zᵥ = cap(h·Wᵥ) / τ,   KL = Σᵥ π(v) (log π(v) − log π_ref(v))

    Its value has no sampling noise a token and its gradient is exact for the states
    visited; how π changes which states are visited is left out. The two models may
    differ in width and must share the vocabulary.

    Args:
      hidden: float [B, T, D] of π, after the final norm.
      unembedding: float [V, D] of π.
      ref_hidden: float [B, T, D'] of π_ref.
      ref_unembedding: float [V, D'] of π_ref.
      mask: bool [B, T], True = a real token; None when all are real.
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
      Kullback and Leibler 1951, equation 2.4, https://doi.org/10.1214/aoms/1177729694
    """
    states = {
        "hidden": hidden,
        "unembedding": unembedding,
        "ref_hidden": ref_hidden,
        "ref_unembedding": ref_unembedding,
    }
    options = make_options(temperature, logit_softcap)
    return of_states(_exact, states, mask, options, chunk_size)


def exact_from_logits(
    logits: jax.Array,
    ref_logits: jax.Array,
    mask: jax.Array | None = None,
    *,
    temperature: float,
    logit_softcap: float | None = None,
) -> jax.Array:
    """KL(π ‖ π_ref) of the next token at each position, from logits.

    zᵥ = cap(lᵥ) / τ,   KL = Σᵥ π(v) (log π(v) − log π_ref(v))

    A token that π never draws (logit −inf) adds nothing; one that only π_ref never
    draws makes it inf.

    Args:
      logits: float [B, T, V] of π.
      ref_logits: float [B, T, V] of π_ref.
      mask: bool [B, T], True = a real token; None when all are real.
      temperature: τ, a Python number above 0, of both.
      logit_softcap: s, for logits that are not capped yet; None for no cap.

    Returns:
      float32 [B, T] in nats; zero in masked slots.

    Raises:
      ValueError: a shape does not fit, or a hyper-parameter is out of range.

    References:
      As `exact`.
    """
    both = {"logits": logits, "ref_logits": ref_logits}
    return of_logits(_exact, both, mask, make_options(temperature, logit_softcap))


def _exact(z, ref_z):
    """KL(π ‖ π_ref) from their logits."""
    return kl_divergence(jax.nn.log_softmax(z), jax.nn.log_softmax(ref_z))


def _log_ratio(logprobs, ref_logprobs, mask):
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)
    return jnp.where(
        boolean("mask", mask), float32(logprobs) - float32(ref_logprobs), 0.0
    )
