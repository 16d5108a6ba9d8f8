"""The losses are tested under strict dtype promotion: no silent widening."""

import jax
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def strict_dtype_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)
