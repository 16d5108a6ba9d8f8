import numpy as np
import pytest

from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.weight_names import BY_HEAD, SIDE_BY_SIDE, TRANSPOSED

CONFIG = TransformerConfig(
    vocab_size=8,
    d_model=4,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=2,
    d_ff=4,
    max_positions=8,
)


def test_by_head_takes_each_head_apart():
    # Rows of query_key_value for 2 heads of width 2: q0 q0 k0 k0 v0 v0 q1 q1 k1 ...
    bias = np.arange(12)
    query, key, value = BY_HEAD.split(bias, CONFIG)
    assert query.tolist() == [0, 1, 6, 7]
    assert key.tolist() == [2, 3, 8, 9]
    assert value.tolist() == [4, 5, 10, 11]
    kernel = np.arange(48).reshape(12, 4)
    np.testing.assert_array_equal(
        BY_HEAD.split(kernel, CONFIG)[1], kernel[[2, 3, 8, 9]].T
    )


@pytest.mark.parametrize("shape", [(12,), (12, 4)])
def test_by_head_comes_back(shape):
    tensor = np.random.default_rng(0).normal(size=shape)
    again = BY_HEAD.join(BY_HEAD.split(tensor, CONFIG), CONFIG)
    np.testing.assert_array_equal(again, tensor)


@pytest.mark.parametrize("shape", [(12,), (4, 12)])
def test_side_by_side_comes_back(shape):
    tensor = np.arange(np.prod(shape)).reshape(shape)
    query, key, value = SIDE_BY_SIDE.split(tensor, CONFIG)
    np.testing.assert_array_equal(query, tensor[..., :4])
    np.testing.assert_array_equal(value, tensor[..., 8:])
    again = SIDE_BY_SIDE.join((query, key, value), CONFIG)
    np.testing.assert_array_equal(again, tensor)


def test_transposed_comes_back():
    tensor = np.arange(6).reshape(2, 3)
    (leaf,) = TRANSPOSED.split(tensor, CONFIG)
    assert leaf.shape == (3, 2)
    np.testing.assert_array_equal(TRANSPOSED.join((leaf,), CONFIG), tensor)
