"""Attention: plain for any device, fused where the device has a kernel for it.

Fused attention never holds the scores [B, H, T, T]. On GPUs it is cuDNN's, on TPUs the
Pallas kernel that comes with JAX. Both are for whole sequences in bfloat16 (on TPUs
float32 too); anything else, soft-capped scores among it, takes the plain way.

Dimensions: B sequences, T tokens of this call, S tokens attended to, H query heads,
K key-value heads, G = H/K query heads that share one, h head width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rlhf_jax.sharding import BATCH, batch_shards, constrain

# Finite, so that a row with nothing to attend to (padding) averages instead of
# turning into nan.
MASKED_SCORE = -1e30

TPU_BLOCK = 128  # the Pallas kernel's least length


class Context(NamedTuple):
    """What attention needs to know about the places of the tokens.

    Attributes:
        cos: [B, T, R/2] float32, R the rotated channels of a head; None without rope.
        sin: [B, T, R/2] float32; None without rope.
        allowed: [B or 1, T, S] bool, whether query t may look at key s; None where it
            may look at all s ≤ t.
        segments: [B, T] int32, if being of one segment and causal says as much as
            `allowed`; else None.
    """

    cos: jax.Array | None
    sin: jax.Array | None
    allowed: jax.Array | None
    segments: jax.Array | None = None


def causal(T: int) -> jax.Array:
    """[1, T, T] bool, s ≤ t."""
    return jnp.tril(jnp.ones((1, T, T), bool))


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    allowed: jax.Array | None,
    *,
    scale: float,
    softcap: float | None,
    key_scale: jax.Array | None = None,
    value_scale: jax.Array | None = None,
) -> jax.Array:
    """softmax(mask(cap(scale · q·k))) v, for grouped query heads.

    Args:
        query: [B, K, G, T, h].
        key: [B, K, S, h].
        value: [B, K, S, h].
        allowed: [B or 1, T, S] bool, None for s ≤ t.
        scale: factor on the scores.
        softcap: c in c·tanh(score/c), or None.
        key_scale: [B, K, S], a factor on each key; None for 1.
        value_scale: the same for values.

    Returns:
        [B, K, G, T, h] in the query's dtype; the softmax is in float32.
    """
    if allowed is None:
        allowed = causal(query.shape[3])
    scores = scale * jnp.einsum(
        "bkgth,bksh->bkgts", query, key, preferred_element_type=jnp.float32
    )
    if key_scale is not None:
        scores = scores * key_scale[:, :, None, None]
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(allowed[:, None, None], scores, MASKED_SCORE)
    weights = jax.nn.softmax(scores, axis=-1)
    if value_scale is not None:
        weights = weights * value_scale[:, :, None, None]
    weights = weights.astype(value.dtype)
    mixed = jnp.einsum(
        "bkgts,bksh->bkgth", weights, value, preferred_element_type=jnp.float32
    )
    return mixed.astype(query.dtype)


def fused_kind(
    query: jax.Array, context: Context, softcap: float | None, backend: str
) -> str | None:
    """Which fused attention serves a call, "cudnn" or "pallas"; None for none.

    Args:
        query: [B, T, H, h].
        context: of the call.
        softcap: of the scores.
        backend: `jax.default_backend()`.
    """
    B, T, H, h = query.shape
    if softcap is not None or T == 1:
        return None
    if backend == "gpu":
        # With a mask cuDNN's backward pass wants an even length.
        fits = h % 8 == 0 and h <= 128 and (context.allowed is None or T % 2 == 0)
        return "cudnn" if fits and query.dtype == jnp.bfloat16 else None
    segmented = context.allowed is None or context.segments is not None
    mesh = jax.sharding.get_abstract_mesh().shape
    divides = B % batch_shards() == 0 and H % mesh.get("tensor", 1) == 0
    if backend == "tpu" and segmented and T >= TPU_BLOCK and divides:
        return "pallas"
    return None


def attend_fused(
    kind: str,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    context: Context,
    *,
    scale: float,
) -> jax.Array:
    """What `attend` computes for whole sequences, by the kernel of `fused_kind`.

    Args:
        kind: "cudnn" or "pallas".
        query: [B, T, H, h].
        key: [B, T, K, h].
        value: [B, T, K, h].
        context: who may see whom.
        scale: factor on the scores.

    Returns:
        [B, T, H, h]; what padding gets is finite and means nothing.
    """
    if kind == "pallas":
        return _attend_pallas(query, key, value, context.segments, scale)
    tensor = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    heads = "tensor" if key.shape[2] % tensor == 0 else None
    query, key, value = (
        constrain(x, BATCH, None, heads, None) for x in (query, key, value)
    )
    allowed = context.allowed
    if allowed is not None:
        allowed = jnp.broadcast_to(allowed, (len(query), *allowed.shape[1:]))[:, None]
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=allowed,
        is_causal=allowed is None,
        scale=scale,
        implementation="cudnn",
    )


def _attend_pallas(query, key, value, segments, scale):
    """JAX's flash attention for TPUs, each device with its own rows and heads."""
    B, T, H, _ = query.shape
    if segments is None:
        segments = jnp.ones((B, T), jnp.int32)
    spare = -T % TPU_BLOCK
    segments = jnp.pad(segments, ((0, 0), (0, spare)))

    def heads_first(x):
        x = x.repeat(H // x.shape[2], axis=2).swapaxes(1, 2)
        return jnp.pad(x, ((0, 0), (0, 0), (0, spare), (0, 0)))

    attend_here = functools.partial(_pallas, scale=scale)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        of_heads = PartitionSpec(BATCH, "tensor", None, None)
        of_rows = PartitionSpec(BATCH, None)
        attend_here = jax.shard_map(
            attend_here,
            in_specs=(of_heads, of_heads, of_heads, of_rows),
            out_specs=of_heads,
            check_vma=False,  # the kernel does not say what it varies over
        )
    mixed = attend_here(*map(heads_first, (query, key, value)), segments)
    return mixed[:, :, :T].swapaxes(1, 2)


def _pallas(query, key, value, segments, *, scale):
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    ids = flash.SegmentIds(segments, segments)
    return flash.flash_attention(
        query, key, value, segment_ids=ids, causal=True, sm_scale=scale
    )
