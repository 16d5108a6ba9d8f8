"""What holds for every kernel, as assertions that a kernel's test calls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

FILLS = (np.nan, np.inf, -np.inf, 1e30)


def random_mask(rng, B, T):
    """Left gaps, holes, right padding; the last row has no real token if B > 1."""
    mask = rng.random((B, T)) < 0.7
    mask[0, 0] = True
    if B > 1:
        mask[-1] = False
    return mask


@functools.cache  # one function object a kernel, so that jit compiles a shape once
def results_and_gradients(function):
    """Jitted: all results, and the gradient of a random sum of the float ones."""

    def combination(arrays, mask):
        leaves = jax.tree.leaves(function(*arrays, mask))
        rng = np.random.default_rng(1)
        total = jnp.float32(0.0)
        for x in leaves:
            if jnp.issubdtype(x.dtype, jnp.floating):
                total += (jnp.asarray(rng.normal(size=x.shape), x.dtype) * x).sum()
        return total, leaves

    @jax.jit
    def both(arrays, mask):
        gradients, leaves = jax.grad(combination, has_aux=True)(arrays, mask)
        return leaves, gradients

    return both


def real_entries(mask, array):
    """The mask in the rank of an array: a row counts if any of its tokens does."""
    if array.ndim < mask.ndim:
        return mask.any(1)
    return mask.reshape(*mask.shape, *[1] * (array.ndim - mask.ndim))


def assert_padding_is_irrelevant(function, arrays, mask):
    """Filling masked slots changes no bit of result or gradient, and none is nan."""
    compiled = results_and_gradients(function)

    def filled(fill):
        return compiled(
            [
                np.where(real_entries(mask, x), x, fill).astype(np.float32)
                for x in arrays
            ],
            mask,
        )

    clean_results, clean_gradients = filled(0.0)
    for x in clean_results + clean_gradients:
        assert np.isfinite(np.asarray(x, np.float32)).all()
    for gradient in clean_gradients:
        padding = np.where(real_entries(mask, gradient), 0.0, gradient)
        assert not padding.any()
    for fill in FILLS:
        results, gradients = filled(fill)
        for got, expected in zip(
            results + gradients, clean_results + clean_gradients, strict=True
        ):
            np.testing.assert_array_equal(got, expected, err_msg=f"filled with {fill}")


def assert_batch_order_is_irrelevant(function, arrays, mask, *, group=1):
    """Permuting the rows permutes the rows of every result, and moves no total.

    `group` rows that are next to each other stay so.
    """
    rng, B = np.random.default_rng(2), len(mask)
    order = rng.permutation(B // group)[:, None] * group + rng.permutation(group)
    order = order.reshape(-1)
    compiled = jax.jit(function)
    plain = jax.tree.leaves(compiled(*arrays, mask))
    permuted = jax.tree.leaves(compiled(*(x[order] for x in arrays), mask[order]))
    for got, expected in zip(permuted, plain, strict=True):
        if expected.ndim:
            expected = np.asarray(expected)[order]
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@functools.cache
def sums_and_gradients(function, group):
    """Jitted: the sum of each result, and the gradients of a sum of the float ones.

    In that the rows of a group, and what is in them, have weights that are the same
    whatever the size of the batch.
    """

    def combination(arrays, mask):
        rng, total, sums = np.random.default_rng(1), jnp.float32(0.0), []
        for x in jax.tree.leaves(function(*arrays, mask)):
            sums.append(x.sum())
            if jnp.issubdtype(x.dtype, jnp.floating):
                rows = (group, *x.shape[1:]) if x.ndim else ()
                weights = jnp.asarray(rng.normal(size=rows), x.dtype)
                times = (len(mask) // group, *[1] * (x.ndim - 1)) if x.ndim else ()
                total += (jnp.tile(weights, times) * x).sum()
        return total, sums

    @jax.jit
    def both(arrays, mask):
        gradients, sums = jax.grad(combination, has_aux=True)(arrays, mask)
        return sums, gradients

    return both


def assert_microbatches_sum_to_the_whole(function, arrays, mask, *, group=1):
    """Group by group, the sums of the results add up to those of the whole batch.

    And the gradients of the groups' rows, one after the other, are the whole batch's.
    """
    compiled = sums_and_gradients(function, group)
    whole, whole_gradients = compiled(list(arrays), mask)
    done = [
        compiled([x[i : i + group] for x in arrays], mask[i : i + group])
        for i in range(0, len(mask), group)
    ]
    parts, gradients = zip(*done, strict=True)
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    for i, expected in enumerate(whole):
        near(sum(np.asarray(part[i], np.float64) for part in parts), expected)
    for i, expected in enumerate(whole_gradients):
        near(np.concatenate([part[i] for part in gradients]), expected)


def assert_jit_equals_eager(function, *arrays):
    """Both give the same numbers but for round-off, in the same dtypes."""
    arrays = [jnp.asarray(x) for x in arrays]
    eager = jax.tree.leaves(function(*arrays))
    jitted = jax.tree.leaves(jax.jit(function)(*arrays))
    for got, expected in zip(jitted, eager, strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-6)


def assert_bfloat16_gives_float32(function, arrays, *others):
    """Float results are float32 from bfloat16, and equal those of rounded float32."""
    halves = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    singles = [np.asarray(x, np.float32) for x in halves]
    compiled = jax.jit(function)
    low = jax.tree.leaves(compiled(*halves, *others))
    high = jax.tree.leaves(compiled(*singles, *others))
    for got, expected in zip(low, high, strict=True):
        assert got.dtype in (jnp.float32, jnp.bool_)
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def assert_wrong_shapes_raise(function, arrays, names):
    """Each array in turn gets one more column: the message names it and its shape.

    The first array sets the expectation, so another is named when it is the odd one.
    """
    for i, name in enumerate(names):
        wrong = list(arrays)
        wrong[i] = np.concatenate([wrong[i], wrong[i][..., :1]], axis=-1)
        culprit = name if i else names[1]
        expected = np.shape(wrong[0])
        with pytest.raises(ValueError, match=f"{culprit} has shape") as error:
            function(*wrong)
        assert str(np.shape(wrong[i])) in str(error.value)
        assert str(expected) in str(error.value)
