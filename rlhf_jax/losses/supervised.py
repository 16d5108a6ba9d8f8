"""The loss of supervised fine-tuning.

B sequences, T tokens.
"""

import jax

from rlhf_jax.losses import masked


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
