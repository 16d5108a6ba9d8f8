"""Fused attention against the plain one; cuDNN only where there is a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu
from jax.sharding import AxisType

from rlhf_jax.models.attention import Context, attend, attend_fused, causal, fused_kind
from rlhf_jax.sharding import AXES

B, T, H, K, h = 4, 200, 4, 2, 64
SCALE = 0.1


def one_device():
    return jax.make_mesh(
        (1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1]
    )


def inputs(dtype=jnp.float32):
    """Queries, keys, values and two segments a row, padding between and after."""
    rng = np.random.default_rng(0)
    make = lambda heads: jnp.asarray(rng.normal(size=(B, T, heads, h)), dtype)
    segments = np.zeros((B, T), np.int32)
    for row in range(B):
        first, second = 20 + 30 * row, 150 + 10 * row
        segments[row, 3:first], segments[row, first + 2 : second] = 1, 2
    return make(H), make(K), make(K), jnp.asarray(segments)


def by_hand(query, key, value, allowed):
    """softmax in float64, a head and a row at a time; zeros where nothing is seen."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros((B, T, H, h))
    for b in range(B):
        for head in range(H):
            of = head // (H // K)
            scores = SCALE * query[b, :, head] @ key[b, :, of].T
            weights = np.exp(scores - scores.max(1, keepdims=True)) * allowed[b]
            total = weights.sum(1, keepdims=True)
            out[b, :, head] = weights / np.where(total > 0, total, 1) @ value[b, :, of]
    return out


def plain(query, key, value, allowed):
    grouped = query.swapaxes(1, 2).reshape(B, K, H // K, T, h)
    mixed = attend(
        *(grouped, key.swapaxes(1, 2), value.swapaxes(1, 2), allowed),
        scale=SCALE,
        softcap=None,
    )
    return mixed.reshape(B, H, T, h).swapaxes(1, 2)


def seen(segments):
    return np.asarray(
        causal(T) & (segments[:, :, None] == segments[:, None, :])
    ) & np.ones((B, 1, 1), bool)


def test_plain_equals_a_loop():
    query, key, value, segments = inputs()
    real = np.asarray(segments) > 0
    got = np.asarray(plain(query, key, value, jnp.asarray(seen(segments))))
    want = by_hand(query, key, value, seen(segments))
    np.testing.assert_allclose(got[real], want[real], atol=1e-5)
    got = plain(query, key, value, None)
    want = by_hand(query, key, value, np.broadcast_to(causal(T), (B, T, T)))
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="it is interpreted on CPUs")
@pytest.mark.parametrize("packed", [False, True])
def test_the_tpu_kernel_equals_a_loop(packed):
    """Interpreted, which is for one device; 200 tokens are no full block."""
    query, key, value, segments = inputs()
    context = Context(None, None, None, segments if packed else None)
    allowed = seen(segments) if packed else np.broadcast_to(causal(T), (B, T, T))
    with jax.set_mesh(one_device()):
        run = jax.jit(lambda *x: attend_fused("pallas", *x, context, scale=SCALE))
        with tpu.force_tpu_interpret_mode():
            got = np.asarray(run(query, key, value))
    real = np.asarray(segments) > 0 if packed else np.ones((B, T), bool)
    want = by_hand(query, key, value, allowed)
    np.testing.assert_allclose(got[real], want[real], atol=1e-5)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN runs on GPUs")
@pytest.mark.parametrize("packed", [False, True])
def test_the_gpu_kernel_equals_the_plain_one(packed):
    query, key, value, segments = inputs(jnp.bfloat16)
    allowed = jnp.asarray(seen(segments)) if packed else None
    real = jnp.asarray(segments > 0) if packed else jnp.ones((B, T), bool)
    context = Context(None, None, allowed, None)
    assert fused_kind(query, context, None, "gpu") == "cudnn"

    def total(attend, *x):
        mixed = attend(*x).astype(jnp.float32)
        return jnp.where(real[:, :, None, None], jnp.sin(mixed), 0).sum(), mixed

    fused = lambda *x: attend_fused("cudnn", *x, context, scale=SCALE)
    usual = lambda *x: plain(*x, allowed)
    grad = lambda f: jax.jit(
        jax.grad(lambda *x: total(f, *x), argnums=(0, 1, 2), has_aux=True)
    )
    got, want = grad(fused)(query, key, value), grad(usual)(query, key, value)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        x, y = (np.asarray(a, np.float32) for a in (x, y))
        if x.shape[:2] == real.shape:
            x, y = x[np.asarray(real)], y[np.asarray(real)]
        np.testing.assert_allclose(x, y, atol=0.02, rtol=2.0**-6)  # four roundings


def test_which_kernel_serves():
    query = jnp.zeros((2, 256, 4, 64), jnp.bfloat16)
    context = Context(None, None, None, None)
    window = Context(None, None, causal(256), None)
    assert fused_kind(query, context, None, "cpu") is None
    assert fused_kind(query, context, None, "gpu") == "cudnn"
    assert fused_kind(query, window, None, "gpu") == "cudnn"
    assert fused_kind(query, context, 30.0, "gpu") is None
    assert fused_kind(query.astype(jnp.float32), context, None, "gpu") is None
    assert fused_kind(query[:, :1], context, None, "gpu") is None
    assert fused_kind(query, context, None, "tpu") == "pallas"
    assert fused_kind(query, window, None, "tpu") is None
    assert fused_kind(query[:, :64], context, None, "tpu") is None
