"""From the loss of each token to one number: what is a sequence worth, what a token?

B sequences, T tokens. Each function gives a `(sum, count)` pair, like
`masked.sum_and_count`: add the sums and the counts over micro-batches and devices and
divide once, and the loss is the same however the batch was cut.

The functions differ in what a long response weighs. With N responses of nᵢ tokens:

    token_mean      Σᵢ Σₜ ℓᵢₜ / Σᵢ nᵢ          each token alike; DAPO, CISPO
    sequence_mean   Σᵢ (Σₜ ℓᵢₜ / nᵢ) / N       each response alike; GRPO, GSPO, SAPO
    sequence_sum    Σᵢ Σₜ ℓᵢₜ / N              the policy gradient of a whole response
    constant_norm   Σᵢ Σₜ ℓᵢₜ / (N·L)          the same over a constant L; Dr. GRPO

A row without a real token is no sequence: it adds nothing to the sum and is not in N,
so that rows which fill up a batch change nothing. A response whose tokens are masked
out on purpose leaves N as well; who wants it counted divides the sum by a count of
their own. Where nothing is real at all the pair is (0, 0): do not divide by it.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.losses import masked
from rlhf_jax.losses._checks import (
    INF,
    boolean,
    check_range,
    check_rank,
    check_same_shape,
)

MODES = ("token_mean", "sequence_mean", "sequence_sum", "constant_norm")


def token_mean(loss: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Every token weighs the same, so a long response weighs more than a short one.

    S = Σᵢ Σₜ ℓᵢₜ,  n = Σᵢ nᵢ

    "BNPO" in TRL is the mean of S / n over micro-batches: divide before adding.

    Args:
      loss: float [B, T], a loss of each token.
      mask: bool [B, T], True = a real response token.

    Returns:
      (sum, count), float32 scalars; the count is of tokens.

    Raises:
      ValueError: loss is not [B, T], or the mask has another shape.

    References:
      DAPO, equation 8, https://arxiv.org/abs/2503.14476
    """
    check_rank("B T", loss=loss)
    return masked.sum_and_count(loss, mask)


def sequence_mean(loss: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Every response weighs the same, so the tokens of a long one weigh less.

    S = Σᵢ (1/nᵢ) Σₜ ℓᵢₜ,  N = Σᵢ 1[nᵢ > 0]

    Args:
      loss: float [B, T], a loss of each token.
      mask: bool [B, T], True = a real response token.

    Returns:
      (sum, count), float32 scalars; the count is of responses with a real token.

    Raises:
      ValueError: loss is not [B, T], or the mask has another shape.

    References:
      GRPO, equation 3, https://arxiv.org/abs/2402.03300
    """
    check_rank("B T", loss=loss)
    return masked.mean(loss, mask, axis=1).sum(), _num_sequences(loss, mask)


def sequence_sum(loss: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Every response weighs as much as it has tokens, whatever the others have.

    S = Σᵢ Σₜ ℓᵢₜ,  N = Σᵢ 1[nᵢ > 0]

    Args:
      loss: float [B, T], a loss of each token.
      mask: bool [B, T], True = a real response token.

    Returns:
      (sum, count), float32 scalars; the count is of responses with a real token.

    Raises:
      ValueError: loss is not [B, T], or the mask has another shape.

    References:
      verl, `agg_loss` "seq-mean-token-sum",
      https://github.com/volcengine/verl/blob/main/verl/trainer/ppo/core_algos.py
    """
    check_rank("B T", loss=loss)
    return masked.sum(loss, mask), _num_sequences(loss, mask)


def constant_norm(
    loss: jax.Array, mask: jax.Array, *, max_length: float
) -> tuple[jax.Array, jax.Array]:
    """As `sequence_sum` over a constant: no response is favoured for its length.

    S = Σᵢ Σₜ ℓᵢₜ,  n = L Σᵢ 1[nᵢ > 0]

    Args:
      loss: float [B, T], a loss of each token.
      mask: bool [B, T], True = a real response token.
      max_length: L, at least 1: the number of tokens a response may have. The same for
        a whole run, not the T of one batch.

    Returns:
      (sum, count), float32 scalars; the count is L times that of `sequence_sum`.

    Raises:
      ValueError: loss is not [B, T], the mask has another shape, or L is below 1.

    References:
      Dr. GRPO: Liu et al. 2025, https://arxiv.org/abs/2503.20783
    """
    check_range("max_length", max_length, 1, INF)
    total, count = sequence_sum(loss, mask)
    return total, count * max_length


def aggregate(
    loss: jax.Array,
    mask: jax.Array,
    *,
    mode: str,
    max_length: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The aggregation with the given name, for a name that comes from a config.

    Args:
      loss: float [B, T], a loss of each token.
      mask: bool [B, T], True = a real response token.
      mode: "token_mean", "sequence_mean", "sequence_sum" or "constant_norm".
      max_length: L of `constant_norm`; the others do not use it.

    Returns:
      (sum, count), float32 scalars.

    Raises:
      ValueError: the mode is unknown, L is missing, or a shape does not fit.
    """
    functions = {
        "token_mean": token_mean,
        "sequence_mean": sequence_mean,
        "sequence_sum": sequence_sum,
    }
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, expected one of {', '.join(MODES)}.")
    if mode != "constant_norm":
        return functions[mode](loss, mask)
    if max_length is None:
        raise ValueError(
            "max_length is None, expected a number: constant_norm needs it."
        )
    return constant_norm(loss, mask, max_length=max_length)


def _num_sequences(loss, mask):
    check_same_shape(loss=loss, mask=mask)
    return boolean("mask", mask).any(1).astype(jnp.float32).sum()
