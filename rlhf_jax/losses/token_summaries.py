"""What a distribution over tokens comes down to, without its logits in memory.

B sequences, T tokens, C tokens of one chunk, D model, V vocabulary.
"""

from typing import NamedTuple

import jax
import numpy as np

from rlhf_jax.losses._checks import (
    check_float,
    check_range,
    check_rank,
    check_shape,
    check_whole,
    given_mask,
)
from rlhf_jax.losses._chunks import (
    cap_and_scale,
    count_chunks,
    keep_real,
    make_options,
    map_chunks,
    unembed,
)


class TopTokens(NamedTuple):
    """The likeliest tokens at each position, from the likeliest on.

    logprobs: float32 [B, T, k] in nats; zero in masked slots.
    tokens: int32 [B, T, k]; zero in masked slots.
    """

    logprobs: jax.Array
    tokens: jax.Array


def top_logprobs(
    hidden: jax.Array,
    unembedding: jax.Array,
    mask: jax.Array | None = None,
    *,
    k: int,
    temperature: float,
    chunk_size: int | None,
    logit_softcap: float | None = None,
) -> TopTokens:
    """The k likeliest tokens at each position and their log-probabilities.

    zᵥ = cap(h·Wᵥ) / τ,   log pᵥ = zᵥ − log Σᵤ exp zᵤ,   the k largest of them

    What distillation keeps of a teacher and analysis of a policy: 2·k numbers a token
    in place of V. The probability of all other tokens is 1 − Σ exp(logprobs).

    Args:
      hidden: float [B, T, D], after the final norm.
      unembedding: float [V, D], the embedding's orientation.
      mask: bool [B, T], True = a real token; None when all are real.
      k: how many, 1 to V.
      temperature: τ, a Python number above 0.
      chunk_size: as in `token_logprobs`.
      logit_softcap: s, a Python number; None for no cap.

    Returns:
      `TopTokens`; gradients flow to `hidden` and `unembedding` from its logprobs.

    Raises:
      ValueError: a shape does not fit, an array is not float, or a hyper-parameter is
        out of range.

    References:
      Sparse teachers: Kim and Rush 2016, section 3, https://arxiv.org/abs/1606.07947
    """
    check_whole("k", k, 1)
    check_range("k", k, 1, np.shape(unembedding)[0])

    def summarize(z):
        best, tokens = jax.lax.top_k(z, k)
        normalizer = jax.nn.logsumexp(z, axis=-1, keepdims=True)
        return TopTokens(best - normalizer, tokens)

    options = make_options(temperature, logit_softcap)
    return _summaries(summarize, hidden, unembedding, mask, options, chunk_size)


def log_sum_squares(
    hidden: jax.Array,
    unembedding: jax.Array,
    mask: jax.Array | None = None,
    *,
    temperature: float,
    chunk_size: int | None,
    logit_softcap: float | None = None,
) -> jax.Array:
    """Log-probability that two draws at a position give the same token.

    zᵥ = cap(h·Wᵥ) / τ,   log Σᵥ pᵥ² = log Σᵥ exp 2zᵥ − 2 log Σᵥ exp zᵥ

    What `wpo_weights` compares the sampled token with; minus the Rényi entropy of
    order 2.

    Args:
      hidden: float [B, T, D], after the final norm.
      unembedding: float [V, D], the embedding's orientation.
      mask: bool [B, T], True = a real token; None when all are real.
      temperature: τ, a Python number above 0.
      chunk_size: as in `token_logprobs`.
      logit_softcap: s, a Python number; None for no cap.

    Returns:
      float32 [B, T] in nats, not above 0; zero in masked slots.

    Raises:
      ValueError: a shape does not fit, an array is not float, or a hyper-parameter is
        out of range.

    References:
      Zhou et al. 2024 (WPO), section 3.2, https://arxiv.org/abs/2406.11827
    """

    def summarize(z):
        return jax.nn.logsumexp(2.0 * z, axis=-1) - 2.0 * jax.nn.logsumexp(z, axis=-1)

    options = make_options(temperature, logit_softcap)
    return _summaries(summarize, hidden, unembedding, mask, options, chunk_size)


def _summaries(summarize, hidden, unembedding, mask, options, chunk_size):
    """What `summarize` makes of the logits [B, C, V] of each chunk, zero if masked."""
    check_rank("B T D", hidden=hidden)
    check_rank("V D", unembedding=unembedding)
    check_float("hidden", hidden)
    check_float("unembedding", unembedding)
    _, T, D = hidden.shape
    expected = (unembedding.shape[0], D)
    check_shape("unembedding", unembedding, expected, "[V, D] with the D of hidden")
    options = options._replace(num_chunks=count_chunks(chunk_size, T))

    def chunk(h):
        logits = unembed(h, unembedding.astype(h.dtype))
        return summarize(cap_and_scale(logits, options))

    mask = given_mask(mask, hidden.shape[:2], "the [B, T] of hidden")
    summaries = map_chunks(chunk, options, keep_real(hidden, mask))
    return jax.tree.map(lambda x: keep_real(x, mask), summaries)
