"""How far apart two distributions over tokens are, from states or from logits.

B sequences, T tokens, D model, V vocabulary. A divergence is a function of the logits
[..., V] of two models, which are softcapped and divided by the temperature already.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.losses._checks import (
    check_float,
    check_rank,
    check_same_shape,
    check_shape,
    float32,
    given_mask,
)
from rlhf_jax.losses._chunks import (
    Options,
    cap_and_scale,
    count_chunks,
    keep_real,
    map_chunks,
    unembed,
)

Divergence = Callable[[jax.Array, jax.Array], jax.Array]


def kl_divergence(logp: jax.Array, logq: jax.Array) -> jax.Array:
    """Σᵥ pᵥ (log pᵥ − log qᵥ) over the last axis of float32 log-probabilities."""
    # 0·(−inf) is nan, and so is its gradient: what is never drawn adds nothing.
    drawn = logp > -jnp.inf
    difference = jnp.where(drawn, jnp.where(drawn, logp, 0.0) - logq, 0.0)
    return (jnp.where(drawn, jnp.exp(logp), 0.0) * difference).sum(-1)


def of_states(
    divergence: Divergence, states: dict, mask, options: Options, chunk_size
) -> jax.Array:
    """float32 [B, T] from hidden states and unembeddings, chunk by chunk.

    Args:
      divergence: of two models' logits.
      states: hidden [B, T, D], unembedding [V, D] and those of another model, whose D
        may be another; by the caller's names.
      mask: bool [B, T] or None.
      options: of the distributions.
      chunk_size: tokens of each sequence whose logits exist at a time; None for all.
    """
    (h, W, other_h, other_W), names = states.values(), list(states)
    check_rank("B T D", **{names[0]: h, names[2]: other_h})
    check_rank("V D", **{names[1]: W, names[3]: other_W})
    for name, x in states.items():
        check_float(name, x)
    (B, T, D), V, other_D = h.shape, W.shape[0], other_h.shape[-1]
    check_shape(names[1], W, (V, D), f"[V, D] with the D of {names[0]}")
    check_shape(names[2], other_h, (B, T, other_D), f"the [B, T] of {names[0]}")
    check_shape(names[3], other_W, (V, other_D), f"the V of {names[1]}")
    mask = given_mask(mask, (B, T), f"the [B, T] of {names[0]}")
    options = options._replace(num_chunks=count_chunks(chunk_size, T))

    def chunk(h, other_h):
        z = unembed(h, W.astype(h.dtype))
        other_z = unembed(other_h, other_W.astype(other_h.dtype))
        return divergence(cap_and_scale(z, options), cap_and_scale(other_z, options))

    real = (keep_real(x, mask) for x in (h, other_h))
    return keep_real(map_chunks(chunk, options, *real), mask)


def of_logits(
    divergence: Divergence, logits: dict, mask, options: Options
) -> jax.Array:
    """float32 [B, T] from two models' logits [B, T, V], by the caller's names."""
    (name, first), _ = logits.items()
    check_rank("B T V", **{name: first})
    check_same_shape(**logits)
    mask = given_mask(mask, np.shape(first)[:2], f"the [B, T] of {name}")
    real = (keep_real(float32(x), mask) for x in logits.values())
    return keep_real(divergence(*(cap_and_scale(z, options) for z in real)), mask)
