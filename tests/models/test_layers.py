import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import backend
from rlhf_jax.models import forward, layers
from rlhf_jax.models.config import RopeScaling, TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=16,
    d_model=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    d_ff=8,
    max_positions=64,
    rope_theta=100.0,
)


def test_rotary_frequencies_by_hand():
    # θ = 100, R = 4: 100^(-0/4) = 1 and 100^(-2/4) = 0.1.
    np.testing.assert_allclose(
        layers.rotary_frequencies(CONFIG, local=False), [1.0, 0.1], rtol=1e-6
    )


def test_linear_scaling_divides_every_frequency():
    config = dataclasses.replace(CONFIG, rope_scaling=RopeScaling("linear", 4.0))
    np.testing.assert_allclose(
        layers.rotary_frequencies(config, local=False), [0.25, 0.025], rtol=1e-6
    )


def test_llama3_scaling_by_hand():
    # R = 6, θ = 1000: frequencies 1, 0.1, 0.01. Over an original context of 100
    # these make 100·f/2π = 15.9, 1.59 and 0.159 turns. Bounds 1 and 4: the first is
    # kept, the last divided by 8, and the middle one is kept to
    # (1.5915 - 1) / 3 = 0.19718, so 0.1·(0.19718 + 0.80282/8) = 0.029753.
    config = dataclasses.replace(
        CONFIG,
        head_dim=6,
        rope_theta=1000.0,
        rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 100),
    )
    np.testing.assert_allclose(
        layers.rotary_frequencies(config, local=False),
        [1.0, 0.029753, 0.01 / 8],
        rtol=1e-4,
    )


def test_local_layers_have_their_own_base_and_no_scaling():
    config = dataclasses.replace(
        CONFIG, rope_local_theta=16.0, rope_scaling=RopeScaling("linear", 4.0)
    )
    np.testing.assert_allclose(
        layers.rotary_frequencies(config, local=True), [1.0, 0.25], rtol=1e-6
    )


def test_rotate_is_multiplication_by_a_unit_complex_number():
    x = jax.random.normal(jax.random.key(0), (2, 3, 2, 6))
    angles = jax.random.normal(jax.random.key(1), (2, 3, 2))
    got = np.asarray(layers.rotate(x, jnp.cos(angles), jnp.sin(angles)))
    x, angles = np.asarray(x), np.asarray(angles)
    pairs = x[..., :2] + 1j * x[..., 2:4]
    turned = pairs * np.exp(1j * angles)[:, :, None]
    np.testing.assert_allclose(got[..., :2], turned.real, atol=1e-6)
    np.testing.assert_allclose(got[..., 2:4], turned.imag, atol=1e-6)
    np.testing.assert_array_equal(got[..., 4:], x[..., 4:])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_a_rotation_is_its_transpose(dtype):
    """<g, rotate(x)> = <gradient, x>, and an untouched channel's is g's own."""
    x, g = (jax.random.normal(jax.random.key(n), (2, 3, 2, 6), dtype) for n in (0, 1))
    angles = jax.random.normal(jax.random.key(2), (2, 3, 2))
    turned, back = jax.vjp(
        lambda x: layers.rotate(x, jnp.cos(angles), jnp.sin(angles)), x
    )
    (gradient,) = back(g)
    assert gradient.dtype == x.dtype
    one, other = (
        np.vdot(*map(np.float64, pair)) for pair in ((g, turned), (gradient, x))
    )
    rounding = {"float32": 1e-6, "bfloat16": 0.05}[dtype]
    np.testing.assert_allclose(one, other, rtol=rounding)
    np.testing.assert_array_equal(gradient[..., 4:], g[..., 4:])


def test_accelerators_have_the_same_angles(monkeypatch):
    angles = jax.random.normal(jax.random.key(0), (2, 3, 4))
    on_cpu = forward._cos_and_sin(angles)
    monkeypatch.setattr(backend, "on_cpu", lambda: False)
    for got, want in zip(on_cpu, forward._cos_and_sin(angles), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("kind", "unit_offset", "expected"),
    [
        # x = (3, 4): mean square 12.5, so x/√12.5 = (0.848528, 1.131371), times the
        # scale (2, 3), or (1 + 2, 1 + 3) with unit offset.
        ("rms", False, [2 * 0.848528, 3 * 1.131371]),
        ("rms", True, [3 * 0.848528, 4 * 1.131371]),
        # Mean 3.5, deviation 0.5: (-1, 1), times the scale, plus the bias (10, 20).
        ("layer", False, [-2 + 10, 3 + 20]),
    ],
)
def test_norm_by_hand(kind, unit_offset, expected):
    params = {"scale": jnp.array([2.0, 3.0])}
    if kind == "layer":
        params["bias"] = jnp.array([10.0, 20.0])
    norm = layers.Norm(kind, 0.0, unit_offset)
    got = norm.apply({"params": params}, jnp.array([[3.0, 4.0]]))
    np.testing.assert_allclose(got, [expected], rtol=1e-5)


def test_norm_starts_as_the_identity_on_normalised_input():
    x = jnp.array([[1.0, -1.0, 1.0, -1.0]])
    for unit_offset in (False, True):
        norm = layers.Norm("rms", 0.0, unit_offset)
        variables = norm.init(jax.random.key(0), x)
        np.testing.assert_allclose(norm.apply(variables, x), x, rtol=1e-6)


def attend_in_numpy(query, key, value, allowed, scale, softcap):
    B, K, G, T, _ = query.shape
    out = np.zeros_like(query)
    for b, k, g, t in np.ndindex(B, K, G, T):
        # Not by @: some BLAS read past such short rows and flag what they find.
        scores = (key[b, k] * query[b, k, g, t]).sum(-1) * scale
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores) * allowed[b, t]
        out[b, k, g, t] = (weights[:, None] * value[b, k]).sum(0) / weights.sum()
    return out


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_attend_matches_a_loop(softcap):
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, 2, 3, 4, 5)).astype(np.float32)
    key, value = rng.normal(size=(2, 2, 2, 6, 5)).astype(np.float32)
    allowed = rng.random((2, 4, 6)) < 0.5
    allowed[..., 0] = True
    got = layers.attend(query, key, value, allowed, scale=0.6, softcap=softcap)
    expected = attend_in_numpy(query, key, value, allowed, 0.6, softcap)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_attend_with_nothing_allowed_is_finite():
    x = jnp.ones((1, 1, 1, 2, 4))
    key = jnp.ones((1, 1, 3, 4))
    got = layers.attend(
        x, key, key, jnp.zeros((1, 2, 3), bool), scale=1.0, softcap=None
    )
    np.testing.assert_allclose(got, np.ones((1, 1, 1, 2, 4)), rtol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
def test_low_precision_dot_accumulates_and_differentiates_in_float32(axis):
    x = jax.random.normal(jax.random.key(0), (3, 7, 64)).astype(jnp.bfloat16)
    kernel = jax.random.normal(jax.random.key(1), (64, 5)).astype(jnp.bfloat16)
    kernel = kernel.astype(jnp.float32)  # exactly representable in both
    kernel = kernel if axis == 0 else kernel.T

    def loss(x, kernel):
        y = layers.dot(x, kernel, axis)
        return jnp.square(y).sum() / 100, y

    differentiate = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    exact, y_exact = differentiate(x.astype(jnp.float32), kernel)
    low, y_low = differentiate(x, kernel)
    assert y_low.dtype == jnp.float32
    np.testing.assert_allclose(y_low, y_exact, atol=1e-4)
    assert [g.dtype for g in low] == [jnp.bfloat16, jnp.float32]
    for got, want in zip(low, exact, strict=True):
        scale = np.abs(want).max()
        np.testing.assert_allclose(np.float32(got), want, atol=0.01 * scale)
    # The master's gradient is not rounded to bfloat16 on its way.
    rounded = low[1].astype(jnp.bfloat16).astype(jnp.float32)
    assert (rounded != low[1]).any()


def test_linear_adds_its_bias():
    linear = layers.Linear(2, True, 0.02)
    params = {
        "kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]]),
        "bias": jnp.array([5.0, 6]),
    }
    # (1, 1) @ [[1, 2], [3, 4]] + (5, 6) = (9, 12)
    got = linear.apply({"params": params}, jnp.ones((1, 2)))
    np.testing.assert_array_equal(got, [[9.0, 12.0]])


def test_dropout_keeps_the_mean_and_needs_a_key():
    x = jnp.ones((100, 100))
    assert layers.dropout(x, 0.25, None) is x
    dropped = np.asarray(layers.dropout(x, 0.25, jax.random.key(0)))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    assert math.isclose(dropped.mean(), 1.0, abs_tol=0.03)


@pytest.mark.parametrize("silent", ["attention/out", "mlp/down"])
def test_dropout_acts_on_each_residual_branch(silent):
    config = dataclasses.replace(CONFIG, dropout=0.5, init_std=0.5)
    block = layers.Block(config)
    x = jnp.ones((1, 4, 8)) * jnp.arange(8.0)[None, None]
    context = layers.Context(None, None, jnp.tril(jnp.ones((1, 4, 4), bool)))
    params = block.init(jax.random.key(0), x, context)["params"]
    part, matrix = silent.split("/")
    params[part][matrix]["kernel"] = jnp.zeros_like(params[part][matrix]["kernel"])
    plain, _ = block.apply({"params": params}, x, context)
    key = jax.random.key(1)
    dropped, _ = block.apply({"params": params}, x, context, dropout_key=key)
    # The other branch alone speaks: each entry is dropped, or doubled.
    gain = np.asarray((dropped - x) / (plain - x)).round(4)
    assert set(np.unique(gain)) == {0.0, 2.0}
