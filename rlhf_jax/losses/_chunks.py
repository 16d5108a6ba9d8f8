"""Logits of hidden states, a chunk of tokens at a time.

B sequences, T tokens, N chunks of C tokens, D model, V vocabulary.

The time axis is cut, never the batch: the batch is what a mesh shards, and a loop over
a sharded axis would move every chunk between devices.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.losses._checks import INF, TINY, check_range, check_whole


class Options(NamedTuple):
    """The hyper-parameters of a distribution over tokens; hashable, so static."""

    temperature: float
    logit_softcap: float | None
    label_smoothing: float
    num_chunks: int | None = None
    batch_shards: int = 1
    gather: Callable[[jax.Array], jax.Array] | None = None


def make_options(temperature, logit_softcap, label_smoothing=0.0):
    """Check what the caller gave; `num_chunks` and `batch_shards` are set after."""
    check_range("temperature", temperature, TINY, INF)
    check_range("label_smoothing", label_smoothing, 0.0, 1.0)
    check_range("logit_softcap", logit_softcap, TINY, INF)
    capped = None if logit_softcap is None else float(logit_softcap)
    return Options(float(temperature), capped, float(label_smoothing))


def count_chunks(chunk_size, T):
    """How many chunks cover T tokens; None where all are done at once."""
    if chunk_size is None:
        return None
    check_whole("chunk_size", chunk_size, 1, ", or None")
    return max(1, -(-T // chunk_size))


def unembed(hidden, unembedding):
    """Logits [B, C, V] float32, in the product of the dtype of `hidden`."""
    return jnp.einsum(
        "btd,vd->btv", hidden, unembedding, preferred_element_type=jnp.float32
    )


def cap_and_scale(logits, options):
    """s·tanh(l/s)/τ: logits as the model caps them, at the sampler's temperature."""
    if options.logit_softcap is not None:
        logits = options.logit_softcap * jnp.tanh(logits / options.logit_softcap)
    return logits / options.temperature


def keep_real(x, mask):
    """[B, T, ...] with zeros where the mask is False; as it is where that is None."""
    if mask is None:
        return x
    mask = mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim))
    return jnp.where(mask, x, jnp.zeros_like(x))


def split(x, options):
    """[B, T, ...] -> [N, B, C, ...], with zeros appended where C does not divide T."""
    N = options.num_chunks or 1
    B, T = x.shape[:2]
    C = -(-T // N)
    x = jnp.pad(x, [(0, 0), (0, N * C - T)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(B, N, C, *x.shape[2:]), 1, 0)


def join(x, T):
    """[N, B, C, ...] -> [B, T, ...]: the inverse of `split`."""
    N, B, C = x.shape[:3]
    return jnp.moveaxis(x, 0, 1).reshape(B, N * C, *x.shape[3:])[:, :T]


def map_chunks(function: Callable[..., Any], options: Options, *arrays) -> Any:
    """Results [B, T, ...] of `function`, which sees [B, C, ...] of each [B, T, ...].

    With chunks, what `function` computes is dropped after the forward pass and computed
    again in the backward pass.
    """
    T = arrays[0].shape[1]
    if options.num_chunks is None:
        return function(*arrays)
    chunks = tuple(split(x, options) for x in arrays)
    remade = jax.checkpoint(lambda inputs: function(*inputs), prevent_cse=False)
    return jax.tree.map(lambda x: join(x, T), jax.lax.map(remade, chunks))
