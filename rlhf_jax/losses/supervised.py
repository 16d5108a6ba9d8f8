"""The losses of supervised fine-tuning.

B sequences, T tokens.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.losses import masked
from rlhf_jax.losses._checks import boolean, check_same_shape, float32


def next_token_loss(
    logprobs: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of the real tokens, as a sum and a count.

    L = −Σₜ mₜ log π(yₜ) / Σₜ mₜ, returned as its two sums

    Divide the sum over all micro-batches and devices by the count over all of them.
    Label smoothing is `token_logprobs(..., label_smoothing=ε)`.

    Args:
      logprobs: float [B, T], log-probability of each token given those before it.
      mask: bool [B, T], True = a token to learn; False in prompts and padding.

    Returns:
      (sum, count), float32 scalars: nats, and tokens.

    Raises:
      ValueError: the arrays differ in shape.

    References:
      Ouyang et al. 2022, section 3.5, https://arxiv.org/abs/2203.02155
    """
    total, count = masked.sum_and_count(logprobs, mask)
    return -total, count


def dft(logprobs: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy weighted by the probability of each token (DFT).

    L = −Σₜ mₜ sg(π(yₜ)) log π(yₜ) / Σₜ mₜ, returned as its two sums

    The gradient is −∇π, that of expected accuracy: a token that the policy finds
    unlikely pulls less, where `next_token_loss` has it pull the same. sg stops the
    gradient. Log-probabilities are without label smoothing.

    Args:
      logprobs: float [B, T], log-probability of each token given those before it.
      mask: bool [B, T], True = a token to learn; False in prompts and padding.

    Returns:
      (sum, count), float32 scalars: nats, and tokens.

    Raises:
      ValueError: the arrays differ in shape.

    References:
      Wu et al. 2025, https://arxiv.org/abs/2508.05629
    """
    check_same_shape(logprobs=logprobs, mask=mask)
    logprobs = jnp.where(boolean("mask", mask), float32(logprobs), 0.0)
    return next_token_loss(jax.lax.stop_gradient(jnp.exp(logprobs)) * logprobs, mask)
