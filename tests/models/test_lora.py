import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import sharding
from rlhf_jax.errors import UserError
from rlhf_jax.models import lora
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.layers import LINEARS
from rlhf_jax.models.transformer import make_model
from rlhf_jax.trees import join

SHAPE = TransformerConfig(
    vocab_size=31,
    d_model=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    d_ff=24,
    max_positions=32,
    init_std=0.3,
    lora_scale=0.5,
)
MODEL = make_model(SHAPE)
TOKENS = np.random.default_rng(0).integers(0, 31, (3, 7))
MASK = np.arange(7)[None] >= np.array([[0], [2], [4]])  # left padding

apply = jax.jit(MODEL.apply)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def adapter(params):
    """On every linear layer, and not at its start: B is random too."""
    fresh = lora.init_adapter(params, jax.random.key(1), rank=3, targets=LINEARS)
    rng = np.random.default_rng(2)
    return jax.tree.map(
        lambda x: x + rng.normal(0.0, 0.2, x.shape).astype(np.float32), fresh
    )


def test_a_fresh_adapter_changes_no_bit(params):
    fresh = lora.init_adapter(params, jax.random.key(1), rank=3, targets=LINEARS)
    got = apply(join(params, fresh), TOKENS, MASK)
    np.testing.assert_array_equal(got, apply(params, TOKENS, MASK))
    a = fresh["layers"]["mlp"]["down"]["lora_a"]
    assert a.shape == (2, 24, 3)
    assert 0.9 / np.sqrt(24) < np.abs(a).max() <= 1 / np.sqrt(24)


def test_merged_equals_unmerged(params, adapter):
    got = apply(join(params, adapter), TOKENS, MASK)
    merged = lora.merge(params, adapter, scale=SHAPE.lora_scale)
    expected = apply(merged, TOKENS, MASK)
    np.testing.assert_allclose(got[MASK], expected[MASK], atol=1e-5)
    assert np.abs(np.asarray(got - apply(params, TOKENS, MASK)))[MASK].max() > 0.1


def test_one_linear_layer_by_a_loop(params, adapter):
    got = lora.merge(params, adapter, scale=0.5)["layers"]["attention"]["key"]
    leaf = adapter["layers"]["attention"]["key"]
    expected = np.array(params["layers"]["attention"]["key"]["kernel"])
    for layer, i, j in np.ndindex(*expected.shape):
        for r in range(3):
            expected[layer, i, j] += (
                0.5 * leaf["lora_a"][layer, i, r] * leaf["lora_b"][layer, r, j]
            )
    np.testing.assert_allclose(got["kernel"], expected, rtol=1e-5, atol=1e-6)


def test_decoding_applies_it_too(params, adapter):
    """Prefill and one step of decoding, against the merged weights."""

    @jax.jit
    def decode(params):
        _, cache = MODEL.prefill(params, TOKENS[:, :6], MASK[:, :6], cache_length=7)
        hidden, _ = MODEL.decode(MODEL.unstack(params), TOKENS[:, 6], cache, 6)
        return hidden

    merged = lora.merge(params, adapter, scale=SHAPE.lora_scale)
    np.testing.assert_allclose(decode(join(params, adapter)), decode(merged), atol=1e-5)


def test_dropout_acts_on_the_adapter_alone_and_with_a_key(params, adapter):
    model = make_model(TransformerConfig(**vars(SHAPE) | {"lora_dropout": 0.5}))
    call = jax.jit(lambda tree, key: model.apply(tree, TOKENS, MASK, dropout_key=key))
    both, key = join(params, adapter), jax.random.key(3)
    plain = apply(both, TOKENS, MASK)
    np.testing.assert_array_equal(call(both, None), plain)
    assert np.abs(np.asarray(call(both, key) - plain))[MASK].max() > 1e-3
    np.testing.assert_array_equal(call(params, key), apply(params, TOKENS, MASK))


def test_bfloat16_is_near(params, adapter):
    model = make_model(SHAPE, dtype="bfloat16")
    got = jax.jit(model.apply)(join(params, adapter), TOKENS, MASK)
    assert got.dtype == jnp.bfloat16
    expected = apply(join(params, adapter), TOKENS, MASK)
    np.testing.assert_allclose(
        np.asarray(got, np.float32)[MASK], np.asarray(expected)[MASK], atol=0.15
    )


def test_every_leaf_has_its_place_on_a_mesh(params, adapter):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    shardings = sharding.param_shardings(adapter, mesh)
    placed = jax.tree.map(lambda x, at: jax.device_put(x, at), adapter, shardings)
    query = placed["layers"]["attention"]["query"]
    assert query["lora_a"].sharding.shard_shape((2, 16, 3)) == (2, 8, 3)
    assert query["lora_b"].sharding.shard_shape((2, 3, 16)) == (2, 3, 8)


def test_a_target_that_is_not_there(params):
    with pytest.raises(UserError, match=r"names 'q_proj', .* take some of query, key"):
        lora.init_adapter(params, jax.random.key(0), rank=2, targets=("q_proj",))
    with pytest.raises(UserError, match="rank=0 must be at least 1"):
        lora.init_adapter(params, jax.random.key(0), rank=0, targets=("query",))
