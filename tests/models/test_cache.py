import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import cache


def keys_of(rows=2, heads=3, slots=5, width=8):
    """Keys [B, K, S, h], one head far larger than the others, one token all zero."""
    x = np.random.default_rng(0).normal(size=(rows, heads, slots, width))
    x[:, 1] *= 100.0
    x[0, 0, 2] = 0.0
    return x.astype(np.float32)


def whole(cached):
    values, scale = cache.read(cached, jnp.float32)
    return np.asarray(values if scale is None else values * scale[..., None])


def test_eight_bits_by_hand():
    """The largest, -2.54, is -127; a step is 0.02: 1.00 → 50, 0.031 → 2, 0 → 0."""
    x = jnp.float32([[[[1.0, -2.54, 0.031, 0.0]]]])
    found = cache.encode(x, "int8")
    assert found.values.dtype == jnp.int8
    assert found.values.ravel().tolist() == [50, -127, 2, 0]
    np.testing.assert_allclose(found.scale.ravel(), [0.02], rtol=1e-6)
    got = whole(found)
    np.testing.assert_allclose(got.ravel(), [1.0, -2.54, 0.04, 0.0], atol=1e-6)


def test_eight_bits_are_off_by_half_a_step_of_each_token_and_head():
    x = keys_of()
    got = whole(cache.encode(jnp.asarray(x), "int8"))
    step = np.abs(x).max(-1, keepdims=True) / 127
    assert (np.abs(got - x) <= 0.5001 * step).all()
    assert np.abs(got - x).max() > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_what_is_written_is_read_at_its_slot(dtype):
    x = keys_of()
    empty = cache.encode(jnp.zeros_like(jnp.asarray(x)), dtype)
    full = cache.encode(jnp.asarray(x), dtype)
    part = cache.write(empty, jnp.asarray(x[:, :, 3:5]), 2)
    got, want = whole(part), whole(full)
    np.testing.assert_array_equal(got[:, :, 2:4], want[:, :, 3:5])
    assert not got[:, :, [0, 1, 4]].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_more_room_is_empty(dtype):
    x = jnp.asarray(keys_of())
    kept = cache.encode(x, dtype)
    valid = jnp.ones((2, 5), bool)
    small = cache.Cache(
        ((kept, kept),), valid, jnp.arange(10).reshape(2, 5), jnp.ones(2)
    )
    large = cache.extend(small, 7)
    key, value = large.layers[0]
    for got in (key, value):
        got = whole(got)
        np.testing.assert_array_equal(got[:, :, :5], whole(kept))
        assert got.shape == (2, 3, 7, 8) and not got[:, :, 5:].any()
    assert large.valid.tolist() == [[True] * 5 + [False] * 2] * 2
    assert large.positions.shape == (2, 7)
