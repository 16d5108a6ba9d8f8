"""A bidirectional transformer that classifies texts: BERT and its kin.

Attention and feed-forward parts are those of the decoder (layers.py); the norm comes
after each residual sum, and the first real token is read by a small head. Only what a
frozen reward needs: no dropout, no cache.

Dimensions: B texts, T tokens, D model width, V vocabulary, L layers, n labels.

The tree (float32; the weights of all layers are stacked on a leading L axis):

    embed/tokens [V, D]   embed/positions [P, D]   embed/types [t, D]   types: not all
    embed_norm/{scale,bias} [D]
    layers/attention/{query,key,value,out}/{kernel,bias}   layers/attention_norm/...
    layers/mlp/{up,down}/{kernel,bias}                     layers/mlp_norm/...
    classifier/dense/{kernel,bias}   classifier/out/{kernel,bias}      [D, D], [D, n]

References:
    Devlin et al., BERT, https://arxiv.org/abs/1810.04805; Liu et al., RoBERTa,
    https://arxiv.org/abs/1907.11692; Sanh et al., DistilBERT,
    https://arxiv.org/abs/1910.01108.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from rlhf_jax import sharding
from rlhf_jax.models.attention import Context
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.layers import MLP, Attention, Linear, Norm

Params = Any  # the tree above
HEAD_ACTIVATIONS = {"tanh": jnp.tanh, "relu": nn.relu}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The shape of an encoder with a classification head.

    Attributes:
        trunk: sizes, biases, activation and norm of the layers; its `max_positions` is
            the longest text.
        position_offset: the row of `embed/positions` of a text's first token (RoBERTa
            keeps the first rows for padding).
        num_types: rows of the token type table, 0 without one.
        head_activation: between the head's two layers, "tanh" or "relu".
        num_labels: n.
    """

    trunk: TransformerConfig
    position_offset: int
    num_types: int
    head_activation: str
    num_labels: int

    @property
    def num_layers(self) -> int:
        """L."""
        return self.trunk.num_layers


class Encoder(NamedTuple):
    """The functions of one encoder; see `make_encoder` for each."""

    config: EncoderConfig
    init: Callable[..., Any]
    apply: Callable[..., jax.Array]


def make_encoder(config: EncoderConfig, *, dtype: str = "float32") -> Encoder:
    """Bind a configuration to pure functions.

    Args:
        config: the shape of the encoder.
        dtype: what matmuls and the residual stream are computed in; sums, norms,
            softmax and the head are float32 always.

    Returns:
        An Encoder:
        - `init(key) -> params`.
        - `apply(params, tokens, mask, types=None) -> logits [B, n]` float32.
    """
    return Encoder(
        config,
        functools.partial(init, config),
        functools.partial(apply, config, jnp.dtype(dtype)),
    )


class EncoderBlock(nn.Module):
    """One layer: attention and feed-forward, each normalised with its residual."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x, context: Context):
        """[B, T, D] -> [B, T, D]."""
        c = self.config
        mixed, _ = Attention(c, name="attention")(x, context)
        x = Norm(c.norm, c.norm_eps, name="attention_norm")(x + mixed)
        fed = MLP(c, name="mlp")(x)
        return Norm(c.norm, c.norm_eps, name="mlp_norm")(x + fed)


class ClassifierHead(nn.Module):
    """Dense, activation, dense: BERT's pooler and classifier, or the like."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x):
        """[B, D] -> [B, n]."""
        c = self.config
        std = c.trunk.init_std
        hidden = Linear(c.trunk.d_model, True, std, name="dense")(x)
        hidden = HEAD_ACTIVATIONS[c.head_activation](hidden)
        return Linear(c.num_labels, True, std, name="out")(hidden)


def init(config: EncoderConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters."""
    c = config.trunk
    D = c.d_model
    keys = jax.random.split(key, 6)
    normal = jax.nn.initializers.normal(c.init_std)
    rows = c.max_positions + config.position_offset
    embed = {
        "tokens": normal(keys[0], (c.vocab_size, D)),
        "positions": normal(keys[1], (rows, D)),
    }
    if config.num_types:
        embed["types"] = normal(keys[2], (config.num_types, D))

    def init_layer(layer_key):
        context = Context(None, None, jnp.ones((1, 1, 1), bool))
        return EncoderBlock(c).init(layer_key, jnp.zeros((1, 1, D)), context)["params"]

    return {
        "embed": embed,
        "embed_norm": _norm(c).init(keys[3], jnp.zeros((1, D)))["params"],
        "layers": jax.vmap(init_layer)(jax.random.split(keys[4], c.num_layers)),
        "classifier": ClassifierHead(config).init(keys[5], jnp.zeros((1, D)))["params"],
    }


def apply(
    config: EncoderConfig,
    dtype: jnp.dtype,
    params: Params,
    tokens: jax.Array,
    mask: jax.Array,
    types: jax.Array | None = None,
) -> jax.Array:
    """Logits of whole texts.

    Args:
        config: the shape of the encoder.
        dtype: compute dtype.
        params: the tree above.
        tokens: [B, T] int, the classification token first; what stands under the mask
            does not matter.
        mask: [B, T] bool or int, 0 on padding, which may stand on either side.
        types: [B, T] int, which text of a pair a token is of; None says the first.

    Returns:
        [B, n] float32.
    """
    c = config.trunk
    real = mask.astype(bool)
    positions = jnp.cumsum(real, axis=1) - 1 + config.position_offset
    x = _embed(params["embed"], dtype, tokens, positions, types)
    x = _norm(c).apply({"params": params["embed_norm"]}, x)
    T = tokens.shape[1]
    allowed = jnp.broadcast_to(real[:, None, :], (tokens.shape[0], T, T))
    context = Context(None, None, allowed)

    def run_layer(x, weights):
        x = EncoderBlock(c).apply({"params": weights}, x, context)
        return sharding.constrain(x, sharding.BATCH, None, None), None

    x, _ = lax.scan(run_layer, x, params["layers"])
    first = jnp.argmax(real, axis=1)
    pooled = jnp.take_along_axis(x, first[:, None, None], axis=1)[:, 0]
    head = {"params": params["classifier"]}
    return ClassifierHead(config).apply(head, pooled.astype(jnp.float32))


def _norm(c: TransformerConfig) -> Norm:
    return Norm(c.norm, c.norm_eps)


def _embed(tables, dtype, tokens, positions, types):
    """The sum of token, position and type embeddings [B, T, D] in compute dtype."""
    if types is None:
        types = jnp.zeros_like(tokens)
    ids = {"tokens": tokens, "positions": positions, "types": types}
    # Padding may hold any id, also one past the table's end.
    # Gathered over fsdp first: rows cut along D could not be laid out by batch.
    axes = {"tokens": "tensor"}
    x = sum(
        sharding.constrain(table, axes.get(name), None).at[ids[name]].get(mode="clip")
        for name, table in tables.items()
    )
    return sharding.constrain(x.astype(dtype), sharding.BATCH, None, None)
