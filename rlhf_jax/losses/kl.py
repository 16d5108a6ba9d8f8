"""Estimates of KL(π ‖ π_ref) from the log-probabilities of sampled tokens.

B sequences, T tokens. d = log π(y) − log π_ref(y), with y drawn from π. Every estimate
is a positive number where π has drifted from π_ref, whichever estimator is chosen.

As a *reward* (no gradient) k1 and k3 are unbiased. As a *loss* the value and the
gradient are two questions: the gradient of k1 has mean zero, that of k3 leads to the
other KL, KL(π_ref ‖ π), and that of k2 is the right one on fresh samples.
`straight_through` joins the value of any estimate with the gradient of k2.

Use as a module: `kl.k3(logprobs, ref_logprobs, mask)`.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.losses._checks import boolean, check_same_shape, float32

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
    value = jnp.where(boolean(mask), float32(value), 0.0)
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


def _log_ratio(logprobs, ref_logprobs, mask):
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)
    return jnp.where(boolean(mask), float32(logprobs) - float32(ref_logprobs), 0.0)
