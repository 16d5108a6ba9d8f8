"""Heads of transformers' classifiers and of safe-rlhf's score models."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhf_jax import sharding
from rlhf_jax.errors import UserError
from rlhf_jax.models.families import FAMILIES as KNOWN
from rlhf_jax.models.pretrained import load_pretrained, save_pretrained
from rlhf_jax.models.transformer import make_model
from tests.models.conftest import FAMILIES

HEADS = pathlib.Path(__file__).parents[1] / "fixtures" / "heads.npz"


@pytest.fixture(scope="module")
def heads():
    with np.load(HEADS) as arrays:
        return dict(arrays)


def write(folder, name, change, **settings):
    """A copy of a family's fixture with another head and further settings."""
    shutil.copytree(FAMILIES / name, folder)
    tensors = load_file(folder / "model.safetensors")
    for old in ("lm_head.weight", "embed_out.weight", "score.weight"):
        tensors.pop(old, None)
    save_file(tensors | change, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def beaver(folder, heads, *, bias=False, **settings):
    """A checkpoint as safe-rlhf writes it."""
    change = {"score_head.weight": heads["weight"][:1]}
    if bias:
        change["score_head.bias"] = heads["bias"][:1]
    settings = {"architectures": ["LlamaForScore"], "score_dim": 1, **settings}
    return write(folder, "llama_score", change, **settings)


def end_scores(found, name):
    """Every score [2, n] at the last real token of the right-padded batch."""
    with np.load(FAMILIES / name / "logits.npz") as arrays:
        tokens, mask = arrays["tokens"][1], arrays["mask"][1]
    model = make_model(found.config)
    hidden = jax.jit(model.apply)(found.params, tokens, mask)
    ends = hidden[np.arange(2), mask.sum(1) - 1]
    scores = model.classify(found.params, ends)
    np.testing.assert_array_equal(model.score(found.params, ends), scores[:, 0])
    return scores


@pytest.mark.parametrize("name", KNOWN)
def test_classifiers_of_every_family(heads, tmp_path, name):
    folder = write(tmp_path / name, name, {"score.weight": heads["weight"]})
    found = load_pretrained(folder, head=True, num_labels=None)
    assert found.params["score"]["kernel"].shape == (32, 3)
    np.testing.assert_allclose(end_scores(found, name), heads[name], atol=1e-4)


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("plain", {"score_type": "reward", "do_normalize": False, "mean": [9.0]}),
        ("bias", {"bias": True}),
        ("reward", {"score_type": "reward", "do_normalize": True}),
        ("cost", {"score_type": "cost", "do_normalize": True, "bias": True}),
    ],
)
@pytest.mark.parametrize("buffers", [False, True])
def test_score_models_of_safe_rlhf(heads, tmp_path, variant, settings, buffers):
    statistics = {k: heads[k].tolist() for k in ("mean", "var")}
    folder = beaver(
        tmp_path / "beaver",
        heads,
        **{"bias": False, **settings},
        **({} if buffers or "mean" in settings else statistics),
    )
    if buffers:  # the normaliser's state wins over config.json
        path = folder / "model.safetensors"
        state = {f"normalizer.{k}": heads[k] for k in ("mean", "var")}
        state["normalizer.count"] = np.array([7])
        save_file(load_file(path) | state, path)
    found = load_pretrained(folder, head=True)
    want = heads[f"beaver_{variant}"]
    np.testing.assert_allclose(end_scores(found, "llama_score"), want, atol=1e-4)


def test_a_score_model_on_a_mesh_and_back_on_disk(heads, tmp_path):
    """A head with a bias is written as safe-rlhf would, normalised for good."""
    folder = beaver(
        tmp_path / "in",
        heads,
        bias=True,
        do_normalize=True,
        score_type="cost",
        var=heads["var"].tolist(),
    )
    mesh = sharding.make_mesh(2, 2, 2)
    found = load_pretrained(folder, head=True, mesh=mesh)
    save_pretrained(tmp_path / "out", found)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written["score_head.weight"].shape == (1, 32)
    assert written["score_head.bias"].shape == (1,)
    hf_config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert hf_config["architectures"] == ["LlamaForScore"]
    again = load_pretrained(tmp_path / "out", head=True)
    np.testing.assert_allclose(
        end_scores(again, "llama_score"), heads["beaver_cost"], atol=1e-4
    )


def test_a_classifier_keeps_its_labels_on_disk(heads, tmp_path):
    labels = {"0": "no", "1": "perhaps", "2": "yes"}
    head = {"score.weight": heads["weight"]}
    folder = write(tmp_path / "in", "llama", head, id2label=labels)
    found = load_pretrained(folder, head=True, num_labels=None)
    save_pretrained(tmp_path / "out", found)
    hf_config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert hf_config["id2label"] == labels
    again = load_pretrained(tmp_path / "out", head=True, num_labels=None)
    np.testing.assert_array_equal(
        again.params["score"]["kernel"], found.params["score"]["kernel"]
    )


def test_heads_that_do_not_fit(heads, tmp_path):
    folder = write(tmp_path / "three", "llama", {"score.weight": heads["weight"]})
    with pytest.raises(UserError, match=r"classifier with 3 labels; expected .* 1"):
        load_pretrained(folder, head=True)
    folder = beaver(tmp_path / "beaver", heads)
    with pytest.raises(UserError, match=r"\(score_head.weight\), not a language"):
        load_pretrained(folder)
    folder = beaver(tmp_path / "odd", heads, do_normalize=True, score_type="applause")
    with pytest.raises(UserError, match=r"'applause' .*reward, cost, critic"):
        load_pretrained(folder, head=True)
