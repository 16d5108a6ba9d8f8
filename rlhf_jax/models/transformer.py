"""A decoder-only transformer as pure functions on a params pytree.

Dimensions: B sequences, T tokens of this call, S slots of the cache, D model width,
V vocabulary, L layers, K key-value heads, h head width.

The tree (float32 masters; the weights of all layers are stacked on a leading L axis):

    embed/tokens [V, D]   embed/positions [P, D]                learned positions only
    layers/attention_norm/{scale,bias} [L, D]                   bias: layer norm only
    layers/attention/{query,key,value,out}/{kernel,bias}        kernels [L, in, out]
    layers/attention/{query_norm,key_norm}/scale [L, h]
    layers/post_attention_norm/scale   layers/mlp_norm/{scale,bias}
    layers/mlp/{gate,up,down}/{kernel,bias}   layers/post_mlp_norm/scale
    final_norm/{scale,bias} [D]
    unembed/kernel [V, D]                                       untied models only
    score/kernel [D, 1]   score/bias [1]                        scalar heads only; n
                                                                labels of a classifier
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rlhf_jax.models import cache as caches
from rlhf_jax.models.cache import Cache
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.forward import embed, final_norm, make_context, run_layers
from rlhf_jax.models.layers import Block, along_last, dot

Params = Any  # the tree above


class Model(NamedTuple):
    """The functions of one transformer; see `make_model` for each."""

    config: TransformerConfig
    init: Callable[..., Any]
    apply: Callable[..., jax.Array]
    prefill: Callable[..., tuple[jax.Array, Cache]]
    decode: Callable[..., tuple[jax.Array, Cache]]
    unstack: Callable[[Any], Any]
    unembed: Callable[[Any, jax.Array], jax.Array]
    unembedding: Callable[[Any], jax.Array]
    score: Callable[[Any, jax.Array], jax.Array]
    classify: Callable[[Any, jax.Array], jax.Array]
    layer_states: Callable[..., jax.Array]


def make_model(
    config: TransformerConfig,
    *,
    dtype: str = "float32",
    remat: bool = False,
    remat_keeps: str = "",
    unroll: int = 1,
) -> Model:
    """Bind a configuration to pure functions.

    Args:
        config: the shape of the model.
        dtype: what matmuls and the residual stream are computed in; sums, norms and
            softmax are float32 always.
        remat: recompute each layer in the backward pass instead of storing it.
        remat_keeps: "matmuls" stores their results all the same: that takes more
            memory, and on accelerators less time.
        unroll: how many layers are written out in the body of the scan over them:
            more is faster backwards on a CPU, and takes longer to compile.

    Returns:
        A Model:
        - `init(key, *, head=False) -> params`.
        - `apply(params, tokens, mask, *, positions=None, branches=None,
          dropout_key=None) -> hidden [B, T, D]`.
        - `prefill(params, tokens, mask, *, cache_length, cache_dtype="")
          -> (hidden, Cache)`.
        - `unstack(params) -> params` whose layers are a tuple, for `decode`.
        - `decode(unstacked, token, cache, slot) -> (hidden [B, D], Cache)`.
        - `unembed(params, hidden [..., D]) -> logits [..., V]` float32.
        - `unembedding(params) -> [V, D]`, the matrix `unembed` multiplies by.
        - `score(params, hidden [..., D]) -> [...]` float32, from the scalar head.
        - `classify(params, hidden [..., D]) -> [..., n]` float32, a logit a label.
        - `layer_states(params, tokens, mask) -> [L, B, T, D]`, after each layer.
    """
    dtype = jnp.dtype(dtype)
    return Model(
        config,
        functools.partial(init, config),
        functools.partial(apply, config, dtype, remat, remat_keeps, unroll),
        functools.partial(prefill, config, dtype),
        functools.partial(decode, config, dtype),
        functools.partial(unstack, config, dtype),
        functools.partial(unembed, config, dtype),
        functools.partial(unembedding, config),
        score,
        classify,
        functools.partial(layer_states, config, dtype),
    )


def init(config: TransformerConfig, key: jax.Array, *, head: bool = False) -> Params:
    """Fresh float32 parameters.

    Args:
        config: the model's shape.
        key: a typed PRNG key.
        head: a scalar head (std 1/sqrt(D+1), as reward models are started) in place
            of an unembedding.
    """
    c = config
    D = c.d_model
    tokens_key, positions_key, layers_key, last_key = jax.random.split(key, 4)
    normal = jax.nn.initializers.normal(c.init_std)
    params = {"embed": {"tokens": normal(tokens_key, (c.vocab_size, D))}}
    if c.positions == "learned":
        params["embed"]["positions"] = normal(positions_key, (c.max_positions, D))

    def init_layer(layer_key):
        x = jnp.zeros((1, 1, D))
        context = make_context(
            c, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1, 1), bool), sliding=False
        )
        return Block(c).init(layer_key, x, context)["params"]

    params["layers"] = jax.vmap(init_layer)(jax.random.split(layers_key, c.num_layers))
    params["final_norm"] = final_norm(c).init(last_key, jnp.zeros((1, D)))["params"]
    last_key = jax.random.fold_in(last_key, 1)
    if head:
        params["score"] = init_head(c, last_key)
    elif not c.tied_embeddings:
        params["unembed"] = {"kernel": normal(last_key, (c.vocab_size, D))}
    return params


def init_head(config: TransformerConfig, key: jax.Array) -> Params:
    """A fresh scalar head, {kernel: [D, 1]}, normal with std 1/sqrt(D+1).

    References:
        Stiennon et al., Learning to summarize from human feedback, appendix B.1,
        https://arxiv.org/abs/2009.01325.
    """
    std = 1 / math.sqrt(config.d_model + 1)
    return {"kernel": std * jax.random.normal(key, (config.d_model, 1))}


def apply(
    config: TransformerConfig,
    dtype: jnp.dtype,
    remat: bool,
    remat_keeps: str,
    unroll: int,
    params: Params,
    tokens: jax.Array,
    mask: jax.Array | None,
    *,
    positions: jax.Array | None = None,
    branches: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Hidden states of whole sequences, after the final norm.

    Args:
        config: the model's shape.
        dtype: compute dtype.
        remat: recompute layers in the backward pass.
        remat_keeps: what of them is stored.
        unroll: layers in the scan's body.
        params: the tree above.
        tokens: [B, T] int; what stands under the mask does not matter.
        mask: [B, T] bool or int: 0 is padding, positive integers name the segment of
            a packed row, and attention stays inside a segment. None where every row
            is one text from its first token on, and what follows it does not matter.
        positions: [B, T] int, or None to count the real tokens of each segment, which
            makes left- and right-padded rows agree.
        branches: [B, T] int32: 0 is the beginning of a segment, seen by all of it;
            n > 0 is its n-th continuation, seen by itself alone, and in position right
            after the beginning. With a mask only. None: a segment is one text.
        dropout_key: a typed PRNG key switches `config.dropout` and `neftune_alpha` on.

    Returns:
        [B, T, D] in `dtype`; finite, but meaningless, under the mask.
    """
    hidden, _ = run_layers(
        config,
        dtype,
        params,
        tokens,
        None if mask is None else mask.astype(jnp.int32),
        positions,
        remat=remat,
        remat_keeps=remat_keeps,
        unroll=unroll,
        branches=branches,
        dropout_key=dropout_key,
    )
    return hidden


def layer_states(
    config: TransformerConfig,
    dtype: jnp.dtype,
    params: Params,
    tokens: jax.Array,
    mask: jax.Array,
) -> jax.Array:
    """The residual stream after each layer, [L, B, T, D]; see `apply`."""
    segments = mask.astype(jnp.int32)
    _, states = run_layers(config, dtype, params, tokens, segments, keep_states=True)
    return states


def prefill(
    config: TransformerConfig,
    dtype: jnp.dtype,
    params: Params,
    tokens: jax.Array,
    mask: jax.Array,
    *,
    cache_length: int,
    cache_dtype: str = "",
) -> tuple[jax.Array, Cache]:
    """Hidden states of the prompts, and a cache that holds them.

    Args:
        config: the model's shape.
        dtype: compute dtype.
        params: the tree above, stacked.
        tokens: [B, T] int, left-padded: the next token of every row goes to slot T.
        mask: [B, T] bool.
        cache_length: S, prompt slots and all those to come.
        cache_dtype: of the cache, one of `cache.CACHE_DTYPES`; "": compute dtype.

    Returns:
        [B, T, D], and the Cache.
    """
    mask = mask.astype(jnp.int32)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    hidden, (keys, values) = run_layers(
        config, dtype, params, tokens, mask, positions, keep_cache=True
    )
    encode = lambda x: caches.encode(x, cache_dtype or dtype)
    kept = [
        (encode(keys[layer]), encode(values[layer]))
        for layer in range(config.num_layers)
    ]
    cache = Cache(tuple(kept), mask.astype(bool), positions, mask.sum(1))
    return hidden, caches.lay_out(caches.extend(cache, cache_length))


def unstack(config: TransformerConfig, dtype: jnp.dtype, params: Params) -> Params:
    """Parameters for `decode`: a tree per layer, matrices already in compute dtype.

    Done once before a decode loop, so that no step slices or casts a weight.
    """

    def cast(path, leaf):
        matrices = ("kernel", "lora_a", "lora_b", "tokens", "positions")
        is_matrix = path[-1].key in matrices
        return leaf.astype(dtype) if is_matrix and path[0].key != "score" else leaf

    params = jax.tree_util.tree_map_with_path(cast, params)
    layers = tuple(
        jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["layers"])
        for layer in range(config.num_layers)
    )
    return {**params, "layers": layers}


def decode(
    config: TransformerConfig,
    dtype: jnp.dtype,
    unstacked: Params,
    token: jax.Array,
    cache: Cache,
    slot: jax.Array,
) -> tuple[jax.Array, Cache]:
    """One more token for every row.

    Args:
        config: the model's shape.
        dtype: compute dtype.
        unstacked: what `unstack` returned.
        token: [B] int.
        cache: the Cache so far; donate it, or carry it in a while_loop, and it is
            updated in place.
        slot: scalar int, the slot this token takes in every row.

    Returns:
        [B, D] hidden states after the final norm, and the new Cache.
    """
    B = token.shape[0]
    positions = cache.lengths[:, None]
    write = lax.dynamic_update_slice_in_dim
    cache = cache._replace(
        valid=write(cache.valid, jnp.ones((B, 1), bool), slot, axis=1),
        positions=write(cache.positions, positions, slot, axis=1),
        lengths=cache.lengths + 1,
    )
    x = embed(config, dtype, unstacked, token[:, None], positions)
    contexts = {
        sliding: make_context(
            config,
            positions,
            cache.valid[:, None],
            sliding=sliding,
            key_positions=cache.positions,
        )
        for sliding in set(config.slides)
    }
    layers = []
    for layer, cached, sliding in zip(
        unstacked["layers"], cache.layers, config.slides, strict=True
    ):
        x, cached = Block(config).apply(
            {"params": layer}, x, contexts[sliding], cached, slot
        )
        layers.append(cached)
    hidden = final_norm(config).apply({"params": unstacked["final_norm"]}, x[:, 0])
    return hidden, cache._replace(layers=tuple(layers))


def unembedding(config: TransformerConfig, params: Params) -> jax.Array:
    """The matrix [V, D] that turns hidden states into logits."""
    if config.tied_embeddings:
        return params["embed"]["tokens"]
    return params["unembed"]["kernel"]


def unembed(
    config: TransformerConfig, dtype: jnp.dtype, params: Params, hidden: jax.Array
) -> jax.Array:
    """Logits [..., V] float32 of hidden states [..., D], soft cap applied."""
    logits = dot(hidden.astype(dtype), unembedding(config, params), axis=1)
    if config.logit_softcap is not None:
        logits = config.logit_softcap * jnp.tanh(logits / config.logit_softcap)
    return logits


def score(params: Params, hidden: jax.Array) -> jax.Array:
    """The scalar head: float32 [...] of hidden states [..., D]."""
    return classify(params, hidden)[..., 0]


def classify(params: Params, hidden: jax.Array) -> jax.Array:
    """All scores of a head, float32 [..., n] of hidden states [..., D]."""
    head = params["score"]
    scores = dot(hidden.astype(jnp.float32), head["kernel"])
    return along_last(head["bias"], scores) + scores if "bias" in head else scores
