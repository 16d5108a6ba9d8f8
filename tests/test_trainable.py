"""What is trained of a model: an adapter alone, or all that no pattern freezes."""

import pathlib
import shutil

import jax
import numpy as np
import pytest

from configs.grpo import get_config
from rlhf_jax import loading, sharding, trainable
from rlhf_jax.errors import UserError
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.transformer import make_model
from rlhf_jax.trees import join

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
# Adapters that PEFT wrote, and what the config has to say to go on with them.
LLAMA = {"model": str(FIXTURES / "families" / "llama"), "lora__rank": 3}
LLAMA |= {"lora__alpha": 6.0, "lora__start": str(FIXTURES / "peft" / "llama")}
SCORE = {"model": str(FIXTURES / "families" / "llama_score"), "lora__rank": 2}
SCORE |= {"lora__alpha": 8.0, "lora__start": str(FIXTURES / "peft" / "llama_score")}
SCORE |= {"lora__targets": ("query", "value")}

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


# going on from an adapter


def start(mesh, changes, head=False):
    """The config, the model as loaded, and its parts."""
    config = config_with(**changes)
    found = loading.load_model(config.model, config, mesh, head=head)
    return config, found, trainable.cut(config, found.params, mesh)


def arrays_of(name):
    with np.load(FIXTURES / "families" / name / "logits.npz") as arrays:
        tokens, mask = arrays["tokens"][0], arrays["mask"][0]
    with np.load(FIXTURES / "peft" / name / "logits.npz") as arrays:
        return tokens, mask, dict(arrays)


def test_training_starts_where_peft_stopped(mesh):
    config, found, parts = start(mesh, LLAMA)
    assert all("lora" in name for name in names(parts.trained))
    assert names(parts.frozen) == names(found.params)
    tokens, mask, want = arrays_of("llama")
    model = found.model
    logits = lambda params: model.unembed(params, model.apply(params, tokens, mask))
    got = np.asarray(jax.jit(logits)(trainable.start_of(config, parts)))
    real = mask.astype(bool)
    np.testing.assert_allclose(got[real], want["logits"][real], atol=1e-4)
    query = parts.trained["layers"]["attention"]["query"]["lora_a"]
    shape = query.shape
    assert query.sharding.shard_shape(shape) == (shape[0], shape[1] // 2, shape[2])


def test_the_reference_is_what_is_started_from(mesh):
    """Base and adapter, of which the adapter is a copy: training gives its own away."""
    config, _, parts = start(mesh, LLAMA)
    started = jax.device_get(trainable.start_of(config, parts))
    reference = trainable.reference_of(config, parts)
    for leaf in jax.tree.leaves(parts.trained):
        leaf.delete()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(reference), started)
    frozen = {id(leaf) for leaf in jax.tree.leaves(parts.frozen)}
    copied = [x for x in jax.tree.leaves(reference) if id(x) not in frozen]
    assert len(copied) == len(jax.tree.leaves(parts.trained)) == 14  # A, B of 7 targets


def test_a_runs_folder_means_its_adapter(mesh, tmp_path):
    shutil.copytree(LLAMA["lora__start"], tmp_path / "adapter")
    _, _, parts = start(mesh, LLAMA | {"lora__start": str(tmp_path)})
    _, _, expected = start(mesh, LLAMA)
    jax.tree.map(np.testing.assert_array_equal, parts.trained, expected.trained)


def test_the_head_of_an_adapter_takes_the_place_of_the_models(mesh):
    config, found, parts = start(mesh, SCORE, head=True)
    assert names(parts.trained) >= {"score/kernel"}
    assert "score" not in parts.frozen
    tokens, mask, want = arrays_of("llama_score")
    model = found.model
    score = lambda params: model.score(params, model.apply(params, tokens, mask))
    got = jax.jit(score)(trainable.start_of(config, parts))[:, -1]
    np.testing.assert_allclose(got, want["scores"], atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora__rank": 0}, "has no meaning with config.lora.rank=0"),
        (
            {"lora__rank": 4, "lora__alpha": 8.0},
            "llama has rank 3, but config.lora.rank is 4; alpha 6.0, but config.lora"
            ".alpha is 8.0: training goes on with",
        ),
        (
            {"lora__targets": ("query",)},
            "has targets .*'down'.*, but config.lora.targets is .'query',.: training",
        ),
        ({"lora__start": "/nowhere"}, "/nowhere has no adapter_config.json: not an ad"),
        (SCORE | {"model": LLAMA["model"]}, "has a score head, which grpo does not"),
    ],
)
def test_what_cannot_be_gone_on_with(mesh, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        start(mesh, LLAMA | changes)
    assert "\n" not in str(caught.value)
