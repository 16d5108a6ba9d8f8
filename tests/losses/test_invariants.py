"""The assertions that kernels are tested with fail where they should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.losses import invariants

X = np.array([[1.0, -2.0], [3.0, 0.5], [0.7, 4.0]], np.float32)
MASK = np.array([[True, True], [True, False], [False, True]])


def squares(x, mask):
    return jnp.where(mask, jnp.square(jnp.where(mask, x, 0.0)), 0.0)


def of_another_gradient(x, mask):
    """The same numbers, but their gradient is divided by the size of the batch."""
    value = squares(x, mask)
    share = value / len(mask)
    return share + jax.lax.stop_gradient(value - share)


def mean(x, mask):
    return squares(x, mask).sum() / len(mask)


def test_microbatches_of_a_sum_pass():
    invariants.assert_microbatches_sum_to_the_whole(squares, [X], MASK)


@pytest.mark.parametrize("function", [of_another_gradient, mean])
def test_microbatches_of_a_mean_fail(function):
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        invariants.assert_microbatches_sum_to_the_whole(function, [X], MASK)
