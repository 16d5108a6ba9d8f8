"""The way through a transformer: embedding, masks and positions, one scan over layers.

Dimensions: B sequences, T tokens of this call, D model width, L layers, K key-value
heads, h head width.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rlhf_jax import backend, sharding
from rlhf_jax.models.attention import Context, causal
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.layers import (
    MATMUL,
    Block,
    Norm,
    dropout,
    rotary_frequencies,
)

KEPT = {"": (), "matmuls": (MATMUL,)}


def final_norm(config: TransformerConfig) -> Norm:
    """The norm over the residual stream before unembedding or a head."""
    return Norm(config.norm, config.norm_eps, config.norm_unit_offset)


def _allowed(segments, branches=None):
    """[B, T, T] bool: causal and inside a segment; padding sees only padding."""
    same = segments[:, :, None] == segments[:, None, :]
    if branches is not None:
        keys = branches[:, None, :]
        same &= (keys == 0) | (keys == branches[:, :, None])
    return causal(segments.shape[1]) & same


def _count(allowed):
    """Positions [B, T] int32: how many tokens a token sees before itself."""
    return allowed.sum(-1, dtype=jnp.int32) - 1


def make_context(
    config: TransformerConfig,
    positions: jax.Array,
    allowed: jax.Array | None,
    *,
    sliding: bool,
    segments: jax.Array | None = None,
    key_positions: jax.Array | None = None,
) -> Context:
    """The Context of one kind of layer.

    Args:
        config: the model's shape.
        positions: [B, T] int32, of the queries.
        allowed: [B, T, S] bool, before the window; None: all that came before.
        sliding: whether the window narrows it.
        segments: [B, T] int32, if they say as much as `allowed`.
        key_positions: [B, S] int32; None for those of the queries.
    """
    if key_positions is None:
        key_positions = positions
    if sliding:
        segments = None
        allowed = causal(positions.shape[1]) if allowed is None else allowed
        distance = positions[:, :, None] - key_positions[:, None, :]
        allowed = allowed & (distance < config.sliding_window)
    if config.positions != "rope":
        return Context(None, None, allowed, segments)
    local = sliding and config.rope_local_theta is not None
    frequencies = rotary_frequencies(config, local=local)
    angles = positions[:, :, None].astype(jnp.float32) * frequencies[None, None]
    return Context(*_cos_and_sin(angles), allowed, segments)


def _cos_and_sin(angles):
    """cos and sin of angles [B, T, R/2], each computed once."""
    if not backend.on_cpu():
        return jnp.cos(angles), jnp.sin(angles)
    # XLA would compute them again for every head of every layer, unless a loop does.
    either = lambda is_sin: lax.cond(is_sin, jnp.sin, jnp.cos, angles)
    cos, sin = lax.map(either, jnp.array([False, True]))
    return cos, sin


# Gathered over fsdp in compute dtype, half the bytes to move: rows cut along D could
# not be laid out by batch. The gradient is summed in float32, and only each device's
# share of it: the transpose of a gather would sum all of it on every device.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _look_up(dtype, table, tokens):
    """Rows of the table; padding may hold any id, also one past the table's end."""
    whole = sharding.gather_vocabulary(table.astype(dtype))
    return whole.at[tokens].get(mode="clip")


def _look_up_forward(dtype, table, tokens):
    return _look_up(dtype, table, tokens), (tokens, table)


def _look_up_backward(dtype, saved, gradient):
    del dtype
    tokens, table = saved
    tokens = jnp.clip(tokens, 0, table.shape[0] - 1)
    # Rows change places within fsdp, and with that each device has its columns.
    gradient = sharding.constrain(gradient.astype(jnp.float32), "data", None, "fsdp")
    summed = jnp.zeros(table.shape, jnp.float32).at[tokens].add(gradient)
    summed = sharding.constrain(summed, "tensor", "fsdp")
    return summed.astype(table.dtype), None


_look_up.defvjp(_look_up_forward, _look_up_backward)


def embed(
    config: TransformerConfig,
    dtype: jnp.dtype,
    params: Any,
    tokens: jax.Array,
    positions: jax.Array,
) -> jax.Array:
    """Token (and learned position) embeddings [B, T, D] in compute dtype."""
    x = _look_up(dtype, params["embed"]["tokens"], tokens)
    x = sharding.constrain(x, sharding.BATCH, None, None)
    if config.embedding_scale is not None:
        x = x * jnp.asarray(config.embedding_scale, dtype)
    if config.positions == "learned":
        table = sharding.constrain(params["embed"]["positions"], None, None)
        x = x + table.at[positions].get(mode="clip").astype(dtype)
    return x


def embedding_noise(
    config: TransformerConfig, segments: jax.Array, x: jax.Array, key: jax.Array
) -> jax.Array:
    """NEFTune's noise [B, T, D], uniform in ±α/√(T·D), T the tokens of the text itself.

    References:
        Jain et al. 2023, algorithm 1, https://arxiv.org/abs/2310.05914
    """
    lengths = (segments[:, :, None] == segments[:, None, :]).sum(-1)
    bound = config.neftune_alpha * lax.rsqrt(jnp.float32(x.shape[-1]) * lengths)
    noise = jax.random.uniform(jax.random.fold_in(key, 1), x.shape, minval=-1.0)
    return (bound[:, :, None] * noise).astype(x.dtype)


def _contexts(config, positions, allowed, segments):
    """The Context of each kind of layer that there is: {slides: Context}."""
    kinds = set(config.slides)
    if len(kinds) > 1:  # chosen between in the scan, so both are written out
        allowed = causal(positions.shape[1]) if allowed is None else allowed
        segments = None
    return {
        slides: make_context(
            config, positions, allowed, sliding=slides, segments=segments
        )
        for slides in kinds
    }


def run_layers(
    config: TransformerConfig,
    dtype: jnp.dtype,
    params: Any,
    tokens: jax.Array,
    segments: jax.Array | None,
    positions: jax.Array | None = None,
    *,
    remat: bool = False,
    remat_keeps: str = "",
    unroll: int = 1,
    branches: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
    keep_cache: bool = False,
    keep_states: bool = False,
) -> tuple[jax.Array, Any]:
    """One scan over the stacked layers.

    Args:
        config: the model's shape.
        dtype: compute dtype.
        params: the tree of `transformer`.
        tokens: [B, T] int.
        segments: [B, T] int32, 0 is padding; None: one segment a row, from its start.
        positions: [B, T] int32, or None to count within each segment.
        remat: recompute layers in the backward pass.
        remat_keeps: what of them is not recomputed: "" or "matmuls".
        unroll: how many layers the scan's body has.
        branches: [B, T] int32, of a segment; see `transformer.apply`.
        dropout_key: a typed PRNG key switches dropout and NEFTune's noise on.
        keep_cache: whether keys and values are wanted.
        keep_states: whether each layer's result is wanted, in place of those.

    Returns:
        The normalised hidden states [B, T, D], and with `keep_cache` the stacked
        (keys, values), each [L, B, K, T, h], or with `keep_states` the residual stream
        after each layer [L, B, T, D].
    """
    if segments is None and branches is not None:
        raise ValueError("branches are of segments: give these too")
    allowed = None if segments is None else _allowed(segments, branches)
    if positions is None and allowed is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    elif positions is None:
        positions = _count(allowed)
    x = embed(config, dtype, params, tokens, positions)
    if dropout_key is not None:
        embed_key = jax.random.fold_in(dropout_key, config.num_layers)
        x = dropout(x, config.dropout, embed_key)
        if config.neftune_alpha:
            whole = jnp.ones(tokens.shape, jnp.int32) if segments is None else segments
            x = x + embedding_noise(config, whole, x, embed_key)
    x = sharding.constrain(x, sharding.BATCH, None, None)
    alone = segments if branches is None else None  # else branches would be seen
    contexts = _contexts(config, positions, allowed, alone)

    def run_layer(x, per_layer):
        weights, index, slides = per_layer
        if len(contexts) == 1:
            (context,) = contexts.values()
        else:
            context = jax.tree.map(
                lambda a, b: jnp.where(slides, a, b), contexts[True], contexts[False]
            )
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
        x, kept = Block(config).apply({"params": weights}, x, context, dropout_key=key)
        x = sharding.constrain(x, sharding.BATCH, None, None)
        if keep_states:
            return x, x
        return x, kept if keep_cache else None

    if remat:
        kept = jax.checkpoint_policies.save_only_these_names(*KEPT[remat_keeps])
        run_layer = jax.checkpoint(run_layer, prevent_cse=False, policy=kept)
    layers = jnp.arange(config.num_layers)
    per_layer = (params["layers"], layers, jnp.array(config.slides))
    x, kept = lax.scan(run_layer, x, per_layer, unroll=unroll)
    return final_norm(config).apply({"params": params["final_norm"]}, x), kept
