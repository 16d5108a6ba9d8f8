"""The parts of a transformer block, as flax.linen modules on one layer's weights.

Dimensions: B sequences, T tokens of this call, S tokens attended to, D model width,
H query heads, K key-value heads, G = H/K query heads that share one, h head width.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from rlhf_jax import backend
from rlhf_jax.models import cache
from rlhf_jax.models.attention import Context, attend, attend_fused, fused_kind
from rlhf_jax.models.config import TransformerConfig

# All linear layers of a block; an adapter may be on any of them.
LINEARS = ("query", "key", "value", "out", "gate", "up", "down")

# What recomputed layers may keep: the results of linear layers and of attention.
MATMUL = "matmul"

ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": nn.gelu,
    "silu": nn.silu,
    "relu": nn.relu,
}


def rotary_frequencies(config: TransformerConfig, *, local: bool) -> jax.Array:
    """θ^(-2i/R) for each rotated pair i, stretched as the configuration says.

    Args:
        config: the model's shape.
        local: whether the layer is a sliding-window one with a base of its own.

    Returns:
        [R/2] float32, radians per position.

    References:
        RoFormer, section 3.2.2, https://arxiv.org/abs/2104.09864; the llama3 stretch
        is the one of Llama 3.1's released code.
    """
    R = config.rotary_dim
    theta = config.rope_local_theta if local else config.rope_theta
    frequencies = theta ** (-jnp.arange(0, R, 2, dtype=jnp.float32) / R)
    scaling = None if local else config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (kept + (1 - kept) / scaling.factor)


@jax.custom_vjp
def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the first R channels of each head; pair i is channels i and i + R/2.

    Args:
        x: [B, T, heads, h].
        cos: [B, T, R/2] float32.
        sin: [B, T, R/2] float32.

    Returns:
        [B, T, heads, h] in x's dtype; cos and sin get no gradient.
    """
    half = cos.shape[-1]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    first = x[..., :half].astype(jnp.float32)
    second = x[..., half : 2 * half].astype(jnp.float32)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    rotated = [part.astype(x.dtype) for part in rotated]
    return jnp.concatenate([*rotated, x[..., 2 * half :]], axis=-1)


def _rotate_forward(x, cos, sin):
    return rotate(x, cos, sin), (cos, sin)


def _rotate_backward(cos_and_sin, gradient):
    # The transpose of a rotation is the one by minus the angle: one pass over memory,
    # where the parts' own transposes are padded and added up.
    cos, sin = cos_and_sin
    return rotate(gradient, cos, -sin), None, None


rotate.defvjp(_rotate_forward, _rotate_backward)


def dot(x: jax.Array, kernel: jax.Array, axis: int = 0) -> jax.Array:
    """x @ kernel in x's dtype with float32 accumulation.

    Args:
        x: [..., in].
        kernel: [in, out], or [out, in] with axis 1; float32 master weights or already
            in x's dtype.
        axis: the kernel's `in` axis.

    Returns:
        [..., out] float32.
    """
    return _dot(x, kernel, axis)


def _contract(x, y, x_axes, y_axes):
    return lax.dot_general(
        x, y, ((x_axes, y_axes), ((), ())), preferred_element_type=jnp.float32
    )


# JAX's own transpose of a bfloat16 dot with a float32 result runs the backward dots
# with one float32 operand. Here both operands are bfloat16 and the weight's gradient
# reaches the float32 master without being rounded on the way. Every product is written
# in the order of its result: XLA's CPU backend cannot run some bfloat16 dots that are
# transposed afterwards, and for float32 ones it would transpose the gradient first,
# which made the backward pass of a layer a third slower.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dot(x, kernel, axis):
    return _contract(x, kernel.astype(x.dtype), (x.ndim - 1,), (axis,))


def _dot_forward(x, kernel, axis):
    # What is kept is the kernel in the dtype of the product: on a mesh its pieces are
    # then brought together once for the whole backward pass.
    cast = kernel.astype(x.dtype)
    return _dot(x, cast, axis), (x, cast, jnp.zeros((0,), kernel.dtype))


def _dot_backward(axis, saved, gradient):
    x, kernel, like_kernel = saved
    gradient = gradient.astype(x.dtype)
    # In x's dtype before it is added up over `tensor`, half the bytes to move; but on
    # a CPU dots with a bfloat16 result are slow.
    x_gradient = lax.dot_general(
        *(gradient, kernel),
        (((x.ndim - 1,), (1 - axis,)), ((), ())),
        preferred_element_type=jnp.float32 if backend.on_cpu() else x.dtype,
    ).astype(x.dtype)
    if x.dtype == jnp.float32:
        # Over several axes a CPU copies the transpose first, fast in bfloat16 only;
        # for others it is the same.
        x, gradient = (y.reshape(-1, y.shape[-1]) for y in (x, gradient))
    pair = (x, gradient) if axis == 0 else (gradient, x)
    rows = tuple(range(x.ndim - 1))
    kernel_gradient = _contract(*pair, rows, rows)
    return x_gradient, kernel_gradient.astype(like_kernel.dtype)


_dot.defvjp(_dot_forward, _dot_backward)


def along_last(vector: jax.Array, like: jax.Array) -> jax.Array:
    """Repeat a vector over all axes of `like` but the last, in float32."""
    vector = vector.astype(jnp.float32)
    return lax.broadcast_in_dim(vector, like.shape, (like.ndim - 1,))


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero entries with probability `rate` and scale up the rest; no key, no change."""
    if key is None or rate == 0.0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def fold(key: jax.Array | None, name: str) -> jax.Array | None:
    """The key of one linear layer of a block, none if there is none."""
    return None if key is None else jax.random.fold_in(key, 2 + LINEARS.index(name))


class Linear(nn.Module):
    """x @ kernel + bias, over the last axis, and an adapter's part where there is one.

    Attributes:
        features: `out`.
        use_bias: whether there is a bias.
        init_std: standard deviation of a fresh kernel.
        config: of a model that may have an adapter: its `lora_scale`, `lora_dropout`.
    """

    features: int
    use_bias: bool
    init_std: float
    config: TransformerConfig | None = None

    @nn.compact
    def __call__(self, x, dropout_key=None):
        """[..., in] -> [..., features] in x's dtype."""
        shape = (x.shape[-1], self.features)
        y = dot(x, self.param("kernel", nn.initializers.normal(self.init_std), shape))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + along_last(bias, y)
        if self.has_variable("params", "lora_a"):
            # Low-rank adaptation, https://arxiv.org/abs/2106.09685, equation 3.
            dropped = dropout(x, self.config.lora_dropout, dropout_key)
            inner = dot(dropped, self.get_variable("params", "lora_a")).astype(x.dtype)
            update = dot(inner, self.get_variable("params", "lora_b"))
            y = y + self.config.lora_scale * update
        return checkpoint_name(y.astype(x.dtype), MATMUL)


class Norm(nn.Module):
    """RMS norm or layer norm over the last axis, computed in float32."""

    kind: str
    eps: float
    unit_offset: bool = False

    @nn.compact
    def __call__(self, x):
        """[..., D] -> [..., D] in x's dtype."""
        start = nn.initializers.zeros if self.unit_offset else nn.initializers.ones
        scale = self.param("scale", start, (x.shape[-1],))
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y = y - y.mean(-1, keepdims=True)
        y = y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        y = y * along_last(scale + 1 if self.unit_offset else scale, y)
        if self.kind == "layer":
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
            y = y + along_last(bias, y)
        return y.astype(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped heads, over this call's tokens or a cache."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x, context: Context, cached=None, slot=None, dropout_key=None):
        """Mix tokens.

        Args:
            x: [B, T, D].
            context: where the tokens are and who may see whom.
            cached: (key, value) of a `Cache`, to be written at `slot` and attended to;
                None attends to this call's tokens.
            slot: int, where in the cache this call's tokens go.
            dropout_key: of an adapter's dropout.

        Returns:
            [B, T, D], and (key, value): the updated cache, or [B, K, T, h] without one.
        """
        c = self.config
        B, T, _ = x.shape
        K, h = c.num_kv_heads, c.head_dim

        def project(name, heads):
            linear = Linear(heads * h, c.qkv_bias, c.init_std, c, name=name)
            return linear(x, fold(dropout_key, name)).reshape(B, T, heads, h)

        query = project("query", c.num_heads)
        key, value = project("key", K), project("value", K)
        if c.qk_norm:
            norm = {"kind": "rms", "eps": c.norm_eps, "unit_offset": c.norm_unit_offset}
            query = Norm(**norm, name="query_norm")(query)
            key = Norm(**norm, name="key_norm")(key)
        if context.cos is not None:
            query = rotate(query, context.cos, context.sin)
            key = rotate(key, context.cos, context.sin)
        settings = {
            "scale": h**-0.5 if c.query_scale is None else c.query_scale,
            "softcap": c.attention_softcap,
        }
        fused = cached is None and fused_kind(
            query, context, c.attention_softcap, jax.default_backend()
        )
        kept = key.swapaxes(1, 2), value.swapaxes(1, 2)
        if fused:
            mixed = attend_fused(
                *(fused, query, key, value, context), scale=settings["scale"]
            )
        else:
            if cached is not None:
                kept = tuple(cache.write(*pair, slot) for pair in zip(cached, kept))
                key, settings["key_scale"] = cache.read(kept[0], x.dtype)
                value, settings["value_scale"] = cache.read(kept[1], x.dtype)
            else:
                key, value = kept
            query = query.swapaxes(1, 2).reshape(B, K, c.num_heads // K, T, h)
            mixed = attend(query, key, value, context.allowed, **settings)
            mixed = mixed.reshape(B, c.num_heads, T, h).swapaxes(1, 2)
        mixed = checkpoint_name(mixed.reshape(B, T, c.num_heads * h), MATMUL)
        out_std = c.init_std / math.sqrt(2 * c.num_layers)
        out = Linear(c.d_model, c.attention_out_bias, out_std, c, name="out")
        return out(mixed, fold(dropout_key, "out")), kept


class MLP(nn.Module):
    """The feed-forward part: gated (GLU) or plain."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x, dropout_key=None):
        """[B, T, D] -> [B, T, D]."""
        c = self.config
        activation = ACTIVATIONS[c.activation]

        def project(x, name, features, std):
            linear = Linear(features, c.mlp_bias, std, c, name=name)
            return linear(x, fold(dropout_key, name))

        up = project(x, "up", c.d_ff, c.init_std)
        if c.gated_mlp:
            gate = project(x, "gate", c.d_ff, c.init_std)
            inner = activation(gate) * up
        else:
            inner = activation(up)
        # Each branch adds to the residual stream 2L times: keep its variance near 1.
        down_std = c.init_std / math.sqrt(2 * c.num_layers)
        return project(inner, "down", c.d_model, down_std)


class Block(nn.Module):
    """One layer: attention and feed-forward, each on a normalised residual stream."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x, context: Context, cached=None, slot=None, dropout_key=None):
        """Return the residual stream [B, T, D] and (key, value) as Attention does."""
        c = self.config

        def norm(name):
            return Norm(c.norm, c.norm_eps, c.norm_unit_offset, name=name)

        def drop(branch, index):
            if dropout_key is None:
                return branch
            return dropout(branch, c.dropout, jax.random.fold_in(dropout_key, index))

        attention, mlp = Attention(c, name="attention"), MLP(c, name="mlp")
        mixed, cached = attention(
            norm("attention_norm")(x), context, cached, slot, dropout_key
        )
        if c.post_norms:
            mixed = norm("post_attention_norm")(mixed)
        after = x + drop(mixed, 0)
        fed = mlp(norm("mlp_norm")(x if c.parallel_residual else after), dropout_key)
        if c.post_norms:
            fed = norm("post_mlp_norm")(fed)
        return after + drop(fed, 1), cached
