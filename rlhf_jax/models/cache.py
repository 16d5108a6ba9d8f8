"""The key-value cache of a decoder, in full, half or eight-bit precision.

Dimensions: B sequences, S slots of the cache, T tokens of this call, K key-value heads,
h head width.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rlhf_jax import sharding

# What `rollout.cache_dtype` may be; "" keeps the dtype of the computation.
CACHE_DTYPES = ("", "float32", "bfloat16", "int8")


class Quantized(NamedTuple):
    """Numbers as round(x / scale), a scale for each token of each head.

    Attributes:
        values: [B, K, S, h] int8.
        scale: [B, K, S, 1] float32.
    """

    values: jax.Array
    scale: jax.Array


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far; every leaf has B as its first axis.

    Attributes:
        layers: per layer a (key, value) pair, each [B, K, S, h] or `Quantized`.
        valid: [B, S] bool, slots that hold a real token.
        positions: [B, S] int32, the position of the token in each slot.
        lengths: [B] int32, real tokens so far = the position of the next one.
    """

    layers: tuple[tuple[Any, Any], ...]
    valid: jax.Array
    positions: jax.Array
    lengths: jax.Array


def encode(x: jax.Array, dtype: Any) -> Any:
    """Keys or values [B, K, T, h] as a cache of this dtype holds them."""
    if jnp.dtype(dtype) != jnp.int8:
        return x.astype(dtype)
    largest = jnp.abs(x.astype(jnp.float32)).max(axis=-1, keepdims=True)
    scale = jnp.maximum(largest, jnp.finfo(jnp.float32).tiny) / 127
    return Quantized(jnp.round(x / scale).astype(jnp.int8), scale)


def read(cached: Any, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """The cached keys or values [B, K, S, h], and what to multiply them by.

    The scale [B, K, S] of a `Quantized` one is left to the products, which are smaller;
    None where there is none.
    """
    if isinstance(cached, Quantized):
        return cached.values.astype(dtype), cached.scale[..., 0]
    return cached.astype(dtype), None


def write(cached: Any, x: jax.Array, slot: jax.Array) -> Any:
    """The cache with keys or values [B, K, T, h] at slots `slot` to `slot + T - 1`."""
    dtype = jax.tree.leaves(cached)[0].dtype
    return jax.tree.map(
        lambda old, new: lax.dynamic_update_slice_in_dim(old, new, slot, axis=2),
        cached,
        encode(x, dtype),
    )


def extend(cache: Cache, length: int) -> Cache:
    """The cache with room for more tokens: `length` slots in all."""
    spare = length - cache.valid.shape[1]

    def pad(x, axis):
        room = [(0, 0)] * x.ndim
        room[axis] = (0, spare)
        return jnp.pad(x, room)

    return Cache(
        layers=jax.tree.map(lambda x: pad(x, 2), cache.layers),
        valid=pad(cache.valid, 1),
        positions=pad(cache.positions, 1),
        lengths=cache.lengths,
    )


def lay_out(cache: Cache) -> Cache:
    """The cache with its rows and heads cut over the mesh, where there is one."""

    def place(x):
        axes = (sharding.BATCH, "tensor", None, None) if x.ndim == 4 else ()
        rest = (sharding.BATCH, *[None] * (x.ndim - 1))
        return sharding.constrain(x, *(axes or rest))

    return jax.tree.map(place, cache)
