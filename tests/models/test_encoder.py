"""Encoders that classify, against transformers' logits on tiny random checkpoints."""

import functools
import json
import pathlib
import re
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhf_jax import sharding
from rlhf_jax.errors import UserError
from rlhf_jax.models.encoder import Encoder, make_encoder
from rlhf_jax.models.encoder_weights import (
    ENCODERS,
    PretrainedEncoder,
    encoder_config,
    encoder_rows,
    load_encoder,
)

FOLDER = pathlib.Path(__file__).parents[1] / "fixtures" / "encoders"
NAMES = sorted(folder.name for folder in FOLDER.iterdir())


class Fixture(NamedTuple):
    pretrained: PretrainedEncoder
    arrays: dict[str, np.ndarray]
    encoder: Encoder


@functools.cache
def load(name):
    with np.load(FOLDER / name / "logits.npz") as arrays:
        arrays = dict(arrays)
    found = load_encoder(FOLDER / name)
    encoder = make_encoder(found.config)
    return Fixture(found, arrays, encoder._replace(apply=jax.jit(encoder.apply)))


@pytest.fixture(params=NAMES)
def fixture(request):
    return load(request.param)


@pytest.fixture
def copied(tmp_path):
    """Copy a fixture to a folder that a test may spoil."""

    def copy(name, change=lambda tensors: tensors, **settings):
        folder = tmp_path / name
        shutil.copytree(FOLDER / name, folder)
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path)
        hf_config = json.loads((folder / "config.json").read_text()) | settings
        (folder / "config.json").write_text(json.dumps(hf_config))
        return folder

    return copy


def to_the_left(arrays):
    """The same rows with their padding in front."""
    shift = (arrays["mask"].shape[1] - arrays["mask"].sum(1))[:, None]
    index = np.arange(arrays["mask"].shape[1])[None] - shift
    moved = lambda x: np.take_along_axis(x, index % x.shape[1], axis=1)
    return {k: moved(arrays[k]) for k in ("tokens", "mask", "types")}


def logits_of(fixture, rows):
    apply = fixture.encoder.apply
    return apply(fixture.pretrained.params, rows["tokens"], rows["mask"], rows["types"])


def test_logits_equal_those_of_transformers(fixture):
    """Rows of three lengths in one batch, padded on the right and on the left."""
    arrays = fixture.arrays
    assert sorted(set(arrays["mask"].sum(1))) == [3, 7, 12]
    left = to_the_left(arrays)
    assert left["mask"][:, -1].all() and not left["mask"][:, 0].all()
    for rows in (arrays, left):
        got = logits_of(fixture, rows)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, arrays["logits"], atol=1e-4)


def test_wider_padding_and_what_stands_in_it_change_nothing(fixture):
    arrays = {k: fixture.arrays[k] for k in ("tokens", "mask", "types")}
    want = fixture.arrays["logits"]
    wide = {k: np.pad(x, ((0, 0), (5, 9))) for k, x in arrays.items()}
    wide["tokens"] = np.where(wide["mask"], wide["tokens"], 10**6)
    np.testing.assert_allclose(logits_of(fixture, wide), want, atol=1e-4)


def test_token_types_count(fixture):
    """Only BERT's fixture has two kinds; no types are those of the first text."""
    arrays = fixture.arrays
    args = (fixture.pretrained.params, arrays["tokens"], arrays["mask"])
    without = fixture.encoder.apply(*args)
    zeros = fixture.encoder.apply(*args, np.zeros_like(arrays["types"]))
    np.testing.assert_array_equal(without, zeros)
    same = np.allclose(without, arrays["logits"], atol=1e-3)
    assert same == (not arrays["types"].any())


def test_bfloat16_is_close_and_its_logits_are_float32(fixture):
    encoder = make_encoder(fixture.pretrained.config, dtype="bfloat16")
    low = fixture._replace(encoder=encoder._replace(apply=jax.jit(encoder.apply)))
    got = logits_of(low, fixture.arrays)
    assert got.dtype == jnp.float32
    want = fixture.arrays["logits"]
    assert 1e-4 < np.abs(got - want).max() < 0.1 * np.ptp(want)


def test_a_mesh_gives_the_same(fixture):
    mesh = sharding.make_mesh(2, 2, 2)
    name = fixture.pretrained.hf_config["model_type"]
    params = load_encoder(FOLDER / name, mesh=mesh).params
    assert not params["layers"]["mlp"]["up"]["kernel"].sharding.is_fully_replicated
    rows = {
        k: sharding.to_devices(
            np.repeat(fixture.arrays[k], 4, axis=0), sharding.rows(mesh)
        )
        for k in ("tokens", "mask", "types")
    }
    with jax.set_mesh(mesh):
        apply = jax.jit(make_encoder(fixture.pretrained.config).apply)
        got = apply(params, rows["tokens"], rows["mask"], rows["types"])
    want = np.repeat(fixture.arrays["logits"], 4, axis=0)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_each_leaf_has_one_tensor_and_one_rule(fixture):
    params = fixture.pretrained.params
    family = ENCODERS[fixture.pretrained.hf_config["model_type"]]
    rows = encoder_rows(family, fixture.pretrained.config)
    paths = [path for row in rows for path in row.paths]
    found = jax.tree_util.tree_leaves_with_path(params)
    assert sorted(paths) == sorted(sharding.path_string(path) for path, _ in found)
    fresh = jax.eval_shape(fixture.encoder.init, jax.random.key(0))
    assert jax.tree.structure(fresh) == jax.tree.structure(params)
    for path, leaf in found:
        name = sharding.path_string(path)
        hits = [axes for rule, axes in sharding.RULES if re.fullmatch(rule, name)]
        assert len(hits) == 1 and len(hits[0]) == leaf.ndim, (name, hits)


def test_fresh_parameters_compute():
    fixture = load("bert")
    params = jax.jit(fixture.encoder.init)(jax.random.key(0))
    arrays = fixture.arrays
    got = fixture.encoder.apply(params, arrays["tokens"], arrays["mask"])
    assert got.shape == arrays["logits"].shape and np.isfinite(got).all()


def test_what_each_config_json_means():
    config = load("bert").pretrained.config
    assert (config.num_labels, config.position_offset, config.num_types) == (3, 0, 2)
    assert load("distilbert").pretrained.config.head_activation == "relu"
    roberta = load("roberta").pretrained.config
    # its pad id is 3, and the table's rows 0 to 3 belong to padding
    assert (roberta.position_offset, roberta.trunk.max_positions) == (4, 36)
    assert load("xlm-roberta").pretrained.config.num_labels == 2  # the default


def equal_trees(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_old_names_and_what_is_left_of_pretraining(copied):
    def as_in_2019(tensors):
        renamed = {
            k.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): x
            for k, x in tensors.items()
        }
        positions = np.arange(40)[None]
        rest = {"cls.predictions.bias": np.ones(99, np.float32)}
        return renamed | rest | {"bert.embeddings.position_ids": positions}

    folder = copied("bert", as_in_2019)
    equal_trees(load_encoder(folder).params, load("bert").pretrained.params)


def test_a_pooler_that_the_head_does_without(copied):
    def add(tensors):
        extra = {"weight": np.ones((32, 32)), "bias": np.ones(32)}
        return tensors | {f"roberta.pooler.dense.{k}": v for k, v in extra.items()}

    folder = copied("roberta", add, model_type="camembert")
    equal_trees(load_encoder(folder).params, load("roberta").pretrained.params)


def half(tensors):
    return {k: v.astype(np.float16) for k, v in tensors.items()}


def test_a_half_precision_file_comes_out_as_float32(copied):
    params = load_encoder(copied("distilbert", half)).params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}


def no_classifier(tensors):
    return {k: v for k, v in tensors.items() if not k.startswith("classifier.")}


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        (no_classifier, {}, r"no classifier.weight: it is no sequence classifier \(a"),
        (dict, {"id2label": {"0": "a"}}, r"shape \(2, 32\).*means \(1, 32\)"),
        (dict, {"n_layers": 1}, "no place for: distilbert.transformer.layer.1"),
        (dict, {"n_layers": 3}, "lacks distilbert.transformer.layer.2"),
        (dict, {"activation": "mish"}, "'mish'; supported are gelu"),
        (dict, {"model_type": "deberta"}, "'deberta'; supported are bert, distilbert"),
        (dict, {"quantization_config": {"bits": 4}}, "only None is supported"),
    ],
)
def test_checkpoints_that_are_refused(copied, change, settings, words):
    with pytest.raises(UserError, match=words) as caught:
        load_encoder(copied("distilbert", change, **settings))
    assert "\n" not in str(caught.value)


def test_settings_that_change_the_computation():
    bert = json.loads((FOLDER / "bert" / "config.json").read_text())
    for setting in ({"position_embedding_type": "relative_key"}, {"is_decoder": True}):
        with pytest.raises(UserError, match=f"{next(iter(setting))}=.* is supported"):
            encoder_config(bert | setting)
    del bert["hidden_size"]
    with pytest.raises(UserError, match="lacks 'hidden_size'"):
        encoder_config(bert)
