"""What is trained of a model: an adapter alone, or all that no pattern freezes."""

import jax
import numpy as np
import pytest

from configs.grpo import get_config
from rlhf_jax import sharding, trainable
from rlhf_jax.errors import UserError
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.transformer import make_model
from rlhf_jax.trees import join

MODEL = make_model(
    TransformerConfig(
        vocab_size=20,
        d_model=8,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=4,
        d_ff=8,
        max_positions=16,
        tied_embeddings=True,
    )
)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init, static_argnames="head")(jax.random.key(0), head=True)


def config_with(**changes):
    config = get_config()
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in changes.items()}
    )
    return config


def names(tree):
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(key.key for key in path) for path, _ in paths}


def test_all_is_trained_where_nothing_is_said(params, mesh):
    parts = trainable.cut(config_with(), params, mesh)
    assert parts.trained is params and parts.frozen is None
    reference = trainable.reference_of(config_with(), parts)
    for leaf in jax.tree.leaves(params):
        assert all(leaf is not other for other in jax.tree.leaves(reference))


def test_an_adapter_and_the_head_are_trained(params, mesh):
    config = config_with(lora__rank=2, lora__targets=("query", "down"))
    parts = trainable.cut(config, params, mesh)
    assert names(parts.trained) == {
        *(f"layers/attention/query/lora_{x}" for x in "ab"),
        *(f"layers/mlp/down/lora_{x}" for x in "ab"),
        "score/kernel",
    }
    assert names(parts.frozen) == names(params) - {"score/kernel"}
    # adapter off: the reference, and no copy of anything
    reference = trainable.reference_of(config, parts)
    assert reference is parts.frozen
    query = parts.trained["layers"]["attention"]["query"]["lora_a"]
    assert query.sharding.shard_shape(query.shape) == (2, 4, 2)


def test_patterns_freeze(params, mesh):
    config = config_with(freeze=("embed", r"layers/mlp/.*kernel"))
    parts = trainable.cut(config, params, mesh)
    assert names(parts.frozen) == {
        "embed/tokens",
        *(f"layers/mlp/{x}/kernel" for x in ("up", "gate", "down")),
    }
    assert names(join(*parts)) == names(params)
    assert names(trainable.reference_of(config, parts)) == names(params)


def test_merged_is_one_model_again(params, mesh):
    config = config_with(lora__rank=2, lora__alpha=4.0)
    parts = trainable.cut(config, params, mesh)
    whole = trainable.merged(config, join(*parts))
    assert names(whole) == names(params)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(params)):
        np.testing.assert_array_equal(one, other)  # a fresh adapter adds nothing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze": ("embedding",)}, "'embedding', which is in none .* embed/tokens"),
        ({"freeze": (".",)}, "freezes all of the model"),
        ({"freeze": ("embed",), "lora__rank": 2}, "has no meaning with config.lora"),
        ({"lora__rank": 2, "lora__targets": ("q",)}, "names 'q'"),
    ],
)
def test_what_cannot_be_trained(params, mesh, changes, message):
    with pytest.raises(UserError, match=message):
        trainable.cut(config_with(**changes), params, mesh)
