import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.losses import masked
from tests.losses import invariants

X = np.array([[1.0, 2.0, 3.0, np.nan], [6.0, np.inf, np.nan, np.nan]], np.float32)
MASK = np.array([[True, True, True, False], [True, False, False, False]])

REDUCTIONS = {
    "sum_and_count": masked.sum_and_count,
    "sum": masked.sum,
    "mean": masked.mean,
    "var": masked.var,
    "whiten": functools.partial(masked.whiten, shift_mean=True),
    "whiten_around_the_mean": functools.partial(masked.whiten, shift_mean=False),
}
each_reduction = pytest.mark.parametrize(
    "function", REDUCTIONS.values(), ids=REDUCTIONS.keys()
)


def test_values_worked_by_hand():
    # real entries 1, 2, 3, 6: the sum is 12, there are 4, the mean is 3
    total, count = masked.sum_and_count(X, MASK)
    assert (float(total), float(count)) == (12.0, 4.0)
    assert float(masked.sum(X, MASK)) == 12.0
    assert float(masked.mean(X, MASK)) == 3.0
    # deviations -2, -1, 0, 3: squares 4 + 1 + 0 + 9 = 14, over 4 entries
    assert float(masked.var(X, MASK)) == 3.5
    # of the row 1, 2, 3: (1 + 0 + 1) / 3; of 6 alone none
    np.testing.assert_allclose(masked.var(X, MASK, axis=1), [2 / 3, 0.0], rtol=1e-6)
    # by row: 1 + 2 + 3 = 6 of three, 6 of one
    np.testing.assert_array_equal(masked.sum(X, MASK, axis=1), [6.0, 6.0])
    np.testing.assert_array_equal(masked.mean(X, MASK, axis=1), [2.0, 6.0])


def test_whiten_worked_by_hand():
    # (x - 3) / sqrt(3.5): sqrt(3.5) = 1.8708287
    expected = np.array([[-1.0690450, -0.5345225, 0.0, 0.0], [1.6035675, 0, 0, 0]])
    got = masked.whiten(X, MASK, shift_mean=True)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    # without the shift of the mean, 3 is added back to the real entries
    got = masked.whiten(X, MASK, shift_mean=False)
    np.testing.assert_allclose(got, expected + 3.0 * MASK, rtol=1e-6)


def loop_statistics(x, mask):
    real = [
        float(x[i, t])
        for i in range(x.shape[0])
        for t in range(x.shape[1])
        if mask[i, t]
    ]
    mean = sum(real) / len(real)
    var = sum((value - mean) ** 2 for value in real) / len(real)
    return sum(real), len(real), mean, var


def test_whiten_of_equal_entries_is_zero():
    """Of 205 entries whose float32 mean is not the entry itself."""
    for value in (0.1, 0.7, 10.1, 333.3):
        x = np.full((5, 41), value, np.float32)
        mask = np.ones_like(x, bool)
        call = jax.jit(functools.partial(masked.whiten, shift_mean=True))
        assert not np.asarray(call(x, mask)).any()
        call = jax.jit(functools.partial(masked.whiten, shift_mean=False))
        np.testing.assert_array_equal(call(x, mask), x)


def test_equals_a_loop(rng):
    x, mask = rng.normal(2.0, 3.0, (5, 7)), invariants.random_mask(rng, 5, 7)
    total, count, mean, var = loop_statistics(x, mask)
    np.testing.assert_allclose(masked.sum_and_count(x, mask), (total, count), rtol=1e-6)
    np.testing.assert_allclose(masked.mean(x, mask), mean, rtol=1e-6)
    np.testing.assert_allclose(masked.var(x, mask), var, rtol=1e-6)
    for shift_mean in (True, False):
        whitened = np.zeros(x.shape)
        for i, t in zip(*np.nonzero(mask), strict=True):
            whitened[i, t] = (x[i, t] - mean) / (var + 1e-8) ** 0.5
            whitened[i, t] += 0.0 if shift_mean else mean
        got = masked.whiten(x, mask, shift_mean=shift_mean)
        np.testing.assert_allclose(got, whitened, rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(1, 1), (2, 5), (3, 8)]),
    seed=st.integers(0, 2**16),
    density=st.floats(0.0, 1.0),
)
def test_whitened_has_mean_zero_and_variance_one(shape, seed, density):
    rng = np.random.default_rng(seed)
    x = rng.normal(-4.0, 3.0, shape)
    mask = rng.random(shape) < density
    whitened = masked.whiten(np.where(mask, x, np.nan), mask, shift_mean=True)
    assert np.isfinite(whitened).all()
    assert not np.asarray(whitened)[~mask].any()
    assert abs(float(masked.mean(whitened, mask))) < 1e-5
    # one entry has no spread to scale
    spread = 1.0 if mask.sum() > 1 else 0.0
    np.testing.assert_allclose(masked.var(whitened, mask), spread, atol=1e-4)


@each_reduction
def test_nothing_real_gives_zero(function):
    nothing = np.zeros(X.shape, bool)
    for result in jax.tree.leaves(function(X, nothing)):
        assert not np.asarray(result).any()
    gradient = jax.grad(
        lambda x: jnp.sum(jnp.stack(jax.tree.leaves(function(x, nothing))))
    )
    assert not np.asarray(gradient(jnp.asarray(X))).any()


@each_reduction
def test_batch_order_is_irrelevant(rng, function):
    x, mask = rng.normal(size=(5, 6)), invariants.random_mask(rng, 5, 6)
    order = rng.permutation(5)
    for got, plain in zip(
        jax.tree.leaves(function(x[order], mask[order])),
        jax.tree.leaves(function(x, mask)),
        strict=True,
    ):
        expected = np.asarray(plain)[order] if np.ndim(plain) else plain
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_microbatches_sum_to_the_whole(rng):
    x, mask = rng.normal(size=(6, 9)), invariants.random_mask(rng, 6, 9)
    whole = masked.sum_and_count(x, mask)
    parts = [masked.sum_and_count(x[i : i + 2], mask[i : i + 2]) for i in (0, 2, 4)]
    np.testing.assert_allclose(np.sum(parts, axis=0), whole, rtol=1e-6)


@pytest.mark.parametrize("name", ["sum_and_count", "whiten"])
def test_eight_devices_equal_one(rng, name):
    function = REDUCTIONS[name]
    x = jnp.asarray(rng.normal(size=(16, 6)), jnp.float32)
    mask = jnp.asarray(invariants.random_mask(rng, 16, 6))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    sharded = jax.jit(function)(jax.device_put(x, rows), jax.device_put(mask, rows))
    for got, expected in zip(
        jax.tree.leaves(sharded), jax.tree.leaves(function(x, mask)), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@each_reduction
def test_wrong_shape_raises(function):
    invariants.assert_wrong_shapes_raise(function, [X, MASK], ["x", "mask"])
