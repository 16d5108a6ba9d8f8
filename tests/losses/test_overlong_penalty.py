import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import overlong_penalty

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "losses" / "advantages.npz"


@pytest.fixture(scope="module")
def reference():
    with np.load(FIXTURE) as file:
        return dict(file)


def test_overlong_penalty_worked_by_hand():
    # nothing up to 100 - 40 = 60, -0.5 * 10 / 40 at 70, -0.5 from 100 on; and 60 - 70
    # is not to wrap around
    lengths = np.array([0, 60, 70, 100, 140], np.uint8)
    got = overlong_penalty(lengths, max_length=100, buffer=40, factor=0.5)
    np.testing.assert_array_equal(got, [0.0, 0.0, -0.125, -0.5, -0.5])
    assert got.dtype == jnp.float32


def test_overlong_penalty_equals_trl_and_openrlhf(reference):
    lengths = reference["lengths"]
    got = overlong_penalty(lengths, max_length=100, buffer=40, factor=1.0)
    np.testing.assert_allclose(got, reference["trl/overlong"], rtol=1e-6)
    got = jax.jit(overlong_penalty)(lengths, max_length=100, buffer=40, factor=0.5)
    np.testing.assert_allclose(got, reference["openrlhf/overlong"], rtol=1e-6)


def test_overlong_penalty_of_bad_arguments_raises():
    lengths = np.array([1, 2])
    good = {"max_length": 100, "buffer": 40, "factor": 1.0}
    with pytest.raises(ValueError, match=r"lengths has shape \(1, 2\), expected \[B\]"):
        overlong_penalty(lengths[None], **good)
    with pytest.raises(ValueError, match="buffer is 0, expected"):
        overlong_penalty(lengths, **{**good, "buffer": 0})
    with pytest.raises(ValueError, match=r"max_length is 30, .* \[40, inf\]"):
        overlong_penalty(lengths, **{**good, "max_length": 30})
    with pytest.raises(ValueError, match=r"factor is -1.0, expected"):
        overlong_penalty(lengths, **{**good, "factor": -1.0})
