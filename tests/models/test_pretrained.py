import dataclasses
import json
import os
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhf_jax import sharding
from rlhf_jax.errors import UserError
from rlhf_jax.models.families import config_from_hf
from rlhf_jax.models.pretrained import Pretrained, load_pretrained, save_pretrained
from rlhf_jax.models.transformer import make_model
from tests.models.conftest import FAMILIES


def assert_equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def copied(tmp_path):
    """Copy a fixture to a folder that a test may spoil, changing some tensors."""

    def copy(name, change=lambda tensors: tensors):
        directory = tmp_path / name
        shutil.copytree(FAMILIES / name, directory)
        path = directory / "model.safetensors"
        save_file(change(load_file(path)), path)
        return directory

    return copy


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_import_export_import_is_bit_equal(checkpoint, tmp_path, max_shard_bytes):
    save_pretrained(tmp_path, checkpoint.pretrained, max_shard_bytes=max_shard_bytes)
    again = load_pretrained(tmp_path, head=None)
    assert again.config == checkpoint.pretrained.config
    assert_equal_trees(again.params, checkpoint.pretrained.params)
    original = load_file(checkpoint.directory / "model.safetensors")
    written = {}
    files = sorted(tmp_path.glob("*.safetensors"))
    for file in files:
        written |= load_file(file)
    assert set(written) == set(original)
    for name, tensor in original.items():
        np.testing.assert_array_equal(written[name], tensor)
    if max_shard_bytes == 20_000:
        assert len(files) > 2
        assert max(file.stat().st_size for file in files) < 25_000
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(original)


def test_config_json_is_kept_and_mended(checkpoint, tmp_path):
    save_pretrained(tmp_path, checkpoint.pretrained, dtype="bfloat16")
    before = checkpoint.pretrained.hf_config
    after = json.loads((tmp_path / "config.json").read_text())
    assert after.pop("dtype") == "bfloat16"
    changed = {key for key in after if after[key] != before.get(key)}
    assert not changed
    assert set(before) - set(after) <= {"dtype", "torch_dtype"}


def test_bfloat16_export_rounds_and_comes_back_as_float32(llama, tmp_path):
    save_pretrained(tmp_path, llama.pretrained, dtype="bfloat16")
    stored = load_file(tmp_path / "model.safetensors")
    assert {x.dtype for x in stored.values()} == {np.dtype(ml_dtypes.bfloat16)}
    again = load_pretrained(tmp_path).params

    def check(got, want):
        assert got.dtype == np.float32
        rounded = np.asarray(want).astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(got, rounded)

    jax.tree.map(check, again, llama.pretrained.params)


def test_float16_and_mixed_sources(copied, llama):
    def halve(tensors):
        return {
            name: x.astype(np.float16) if "mlp" in name else x
            for name, x in tensors.items()
        }

    params = load_pretrained(copied("llama", halve)).params
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
    want = np.asarray(llama.pretrained.params["layers"]["mlp"]["up"]["kernel"])
    np.testing.assert_array_equal(
        params["layers"]["mlp"]["up"]["kernel"], np.float32(want.astype(np.float16))
    )


def test_gpt2_without_prefix_and_with_buffers(copied):
    def as_on_the_hub(tensors):
        tensors = {k.removeprefix("transformer."): v for k, v in tensors.items()}
        causal = np.tril(np.ones((1, 1, 64, 64), np.uint8))
        buffers = {"h.0.attn.bias": causal, "h.1.attn.masked_bias": np.float32([-1e4])}
        return tensors | buffers

    found = load_pretrained(copied("gpt2", as_on_the_hub))
    assert_equal_trees(found.params, load_pretrained(FAMILIES / "gpt2").params)


def test_gpt_neox_under_its_old_and_new_names(copied):
    def rename(tensors):
        names = {
            "embed_out.weight": "lm_head.weight",
            "lm_head.weight": "embed_out.weight",
        }
        return {names.get(k, k): v for k, v in tensors.items()}

    found = load_pretrained(copied("gpt_neox", rename))
    assert_equal_trees(found.params, load_pretrained(FAMILIES / "gpt_neox").params)


def test_a_written_out_tied_unembedding_is_passed_over(copied):
    def add(tensors):
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}

    found = load_pretrained(copied("gemma", add))
    assert_equal_trees(found.params, load_pretrained(FAMILIES / "gemma").params)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_weights_go_straight_to_their_shardings(name):
    mesh = sharding.make_mesh(2, 2, 2)
    found = load_pretrained(FAMILIES / name, mesh=mesh)
    want = load_pretrained(FAMILIES / name).params
    assert_equal_trees(jax.device_get(found.params), jax.device_get(want))
    targets = sharding.param_shardings(want, mesh)
    jax.tree.map(
        lambda x, s: np.testing.assert_equal(x.sharding, s), found.params, targets
    )


def test_a_sharded_model_is_written_whole(llama, tmp_path):
    mesh = sharding.make_mesh(2, 2, 2)
    params = llama.pretrained.params
    placed = jax.device_put(params, sharding.param_shardings(params, mesh))
    save_pretrained(tmp_path, llama.pretrained._replace(params=placed))
    assert_equal_trees(load_pretrained(tmp_path).params, params)


def test_a_model_made_from_scratch(tmp_path, llama):
    hf_config = {k: v for k, v in llama.pretrained.hf_config.items() if k != "dtype"}
    config = config_from_hf(hf_config)
    params = jax.jit(make_model(config).init)(jax.random.key(0))
    save_pretrained(tmp_path / "new" / "model", Pretrained(config, hf_config, params))
    again = load_pretrained(tmp_path / "new" / "model")
    assert again.config == dataclasses.replace(config)
    assert_equal_trees(again.params, params)


def test_heads():
    scored = load_pretrained(FAMILIES / "llama_score", head=True)
    assert scored.params["score"]["kernel"].shape == (32, 1)
    assert "unembed" not in scored.params
    with pytest.raises(UserError, match="no scalar head"):
        load_pretrained(FAMILIES / "llama", head=True)
    with pytest.raises(UserError, match="not a language model"):
        load_pretrained(FAMILIES / "llama_score")
    fresh = load_pretrained(FAMILIES / "llama", head=True, key=jax.random.key(0))
    assert fresh.params["score"]["kernel"].shape == (32, 1)
    assert "unembed" not in fresh.params
    mesh = sharding.make_mesh(2, 2, 2)
    placed = load_pretrained(
        FAMILIES / "llama", head=True, key=jax.random.key(0), mesh=mesh
    )
    assert_equal_trees(jax.device_get(placed.params), jax.device_get(fresh.params))


def test_a_language_model_becomes_a_classifier(tmp_path):
    found = load_pretrained(FAMILIES / "gemma2", head=True, key=jax.random.key(0))
    save_pretrained(tmp_path, found)
    hf_config = json.loads((tmp_path / "config.json").read_text())
    assert hf_config["architectures"] == ["Gemma2ForSequenceClassification"]
    assert len(hf_config["id2label"]) == 1
    assert load_file(tmp_path / "model.safetensors")["score.weight"].shape == (1, 32)
    assert_equal_trees(load_pretrained(tmp_path, head=True).params, found.params)


def without(name):
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


def changed(name, value):
    return lambda tensors: tensors | {name: value}


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(UP), f"lacks {UP}"),
        (without("lm_head.weight"), "lacks lm_head.weight"),
        (changed("extra.weight", np.ones(2, np.float32)), "no place for: extra.weight"),
        (
            changed("model.layers.2.mlp.up_proj.weight", np.ones(2, np.float32)),
            "no place for: model.layers.2",
        ),
        (changed(UP, np.ones((36, 31), np.float32)), r"\(36, 31\).*means \(36, 32\)"),
        (changed(UP, np.ones((36, 32), np.int8)), "stored as I8"),
    ],
)
def test_tensors_that_do_not_fit_the_config(copied, change, words):
    with pytest.raises(UserError, match=words):
        load_pretrained(copied("llama", change))


def truncate(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def garbage(directory):
    (directory / "model.safetensors").write_bytes(b"version https://git-lfs.github.com")


def only_pickles(directory):
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x02never opened")


def missing_shard(directory):
    (directory / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def broken_index(directory):
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text("{}")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda d: (d / "config.json").unlink(), "no config.json"),
        (
            lambda d: (d / "config.json").write_text("{"),
            "config.json is not valid JSON",
        ),
        (lambda d: (d / "config.json").write_text("[]"), "no JSON object"),
        (lambda d: (d / "model.safetensors").unlink(), "holds no weights"),
        (truncate, "truncated or corrupt"),
        (garbage, "truncated or corrupt"),
        (only_pickles, "only as pickles"),
        (missing_shard, "model-00001-of-00001.safetensors is missing"),
        (broken_index, "index.json is broken"),
    ],
)
def test_broken_directories(copied, spoil, words):
    directory = copied("llama")
    spoil(directory)
    with pytest.raises(UserError, match=words) as caught:
        load_pretrained(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no-such-owner/no-such-model", "gpt2-not-here"])
def test_a_hub_id_without_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"{name} is neither a directory here nor"):
        load_pretrained(name)


def test_a_path_that_is_no_directory(tmp_path):
    with pytest.raises(UserError, match="not a model directory"):
        load_pretrained(tmp_path / "absent" / "model" / "x")


def test_a_crash_while_writing_leaves_no_model(llama, tmp_path, monkeypatch):
    save_pretrained(tmp_path, llama.pretrained, max_shard_bytes=20_000)
    (tmp_path / "tokenizer.json").write_text("{}")

    def crash(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            save_pretrained(tmp_path, llama.pretrained)
    with pytest.raises(UserError, match=r"no config\.json"):
        load_pretrained(tmp_path)
    save_pretrained(tmp_path, llama.pretrained)
    assert_equal_trees(load_pretrained(tmp_path).params, llama.pretrained.params)
    # The tokenizer stayed, and the earlier model's shards are gone.
    names = ["config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_directory_that_cannot_be_written(llama, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write a model to"):
        save_pretrained(tmp_path / "file" / "model", llama.pretrained)
