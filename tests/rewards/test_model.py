"""A reward-model directory as a reward."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import builtin_reward
from rlhf_jax import sharding
from rlhf_jax.data import preferences, reviews
from rlhf_jax.data.tokenizer import encode_texts, load_tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.models.pretrained import load_pretrained
from rlhf_jax.models.transformer import make_model
from rlhf_jax.rewards import build_rewards, score_all
from rlhf_jax.rewards import model as model_module
from rlhf_jax.rewards.model import load_reward_model, score_sequences
from tests.rewards.conftest import FIXTURE

ARCHIVE = os.environ.get("RLHF_JAX_VADER_SDIST")
PROMPTS = ["The film is", "The camera", ""]
RESPONSES = [" good, really good", " dies", " nothing at all"]


@pytest.fixture(scope="module")
def loaded():
    found = load_pretrained(FIXTURE, head=True)
    return make_model(found.config), found.params


@pytest.fixture(scope="module")
def score(model_directory, mesh):
    return load_reward_model(model_directory, mesh=mesh)


def test_scores_equal_those_of_transformers(loaded):
    with np.load(FIXTURE / "logits.npz") as arrays:
        arrays = dict(arrays)
    right = [side for side in (0, 1) if arrays["mask"][side][:, 0].all()]
    assert len(right) == 1
    tokens, mask, wanted = (arrays[k][right[0]] for k in ("tokens", "mask", "scores"))
    assert not mask.all()  # so the last column is not the last token of each row
    got = jax.jit(score_sequences, static_argnums=0)(*loaded, tokens, mask.astype(bool))
    assert got.dtype == jnp.float32 and got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_padding_content_is_irrelevant(loaded):
    tokens = np.array([[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]])
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    other = np.where(mask, tokens, 90)
    run = jax.jit(score_sequences, static_argnums=0)
    first, second = (run(*loaded, each, mask) for each in (tokens, other))
    np.testing.assert_array_equal(first, second)


def test_a_text_is_scored_whole_with_eos(score, loaded, model_directory):
    model, params = loaded
    tokenizer = load_tokenizer(model_directory)
    texts = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES)]
    apply = jax.jit(model.apply)
    wanted = []
    for ids in encode_texts(tokenizer, texts):  # one row at a time, no padding
        row = np.array([[*ids, tokenizer.eos_token_id]])
        hidden = apply(params, row, np.ones(row.shape, bool))
        wanted.append(model.score(params, hidden[:, -1])[0])
    got = score(PROMPTS, RESPONSES)
    assert got.shape == (3,) and got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert np.ptp(got) > 0.1  # the texts are told apart
    np.testing.assert_allclose(score(PROMPTS, RESPONSES, label=[1, 2, 3]), got)


def test_a_score_depends_on_its_own_text_alone(score):
    got = score(PROMPTS, RESPONSES)
    swapped = score(PROMPTS[::-1], RESPONSES[::-1])
    np.testing.assert_allclose(swapped, got[::-1], atol=1e-5)
    # a longer neighbour pads the row further
    more = score([*PROMPTS, "The film " * 5], [*RESPONSES, " good"])
    np.testing.assert_allclose(more[:3], got, atol=1e-5)
    np.testing.assert_allclose(score(PROMPTS[:1], RESPONSES[:1]), got[:1], atol=1e-5)


def test_many_rows_are_scored_in_several_goes(score, monkeypatch):
    prompts, responses = PROMPTS * 7, RESPONSES * 7  # 21 rows: 16 and 5 on 8 devices
    whole = score(prompts, responses)
    monkeypatch.setattr(model_module, "MAX_ROWS", 10)
    np.testing.assert_allclose(score(prompts, responses), whole, atol=1e-5)


def test_no_rows(score):
    assert score([], []).shape == (0,)


def test_a_long_text_loses_its_beginning(score):
    start, end = "really " * 40, "The film is good, " * 12
    first, second = score([start, "nothing " * 40], [end, end])
    assert first == second
    assert score([end], [" good"]) != score([end], [" dies"])


def test_any_mesh_gives_the_same(score, model_directory):
    other = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    got = load_reward_model(model_directory, mesh=other)(PROMPTS, RESPONSES)
    np.testing.assert_allclose(got, score(PROMPTS, RESPONSES), atol=1e-5)


def test_a_language_model_is_refused(model_directory, mesh):
    with pytest.raises(UserError, match="no scalar head"):
        load_reward_model(FIXTURE.parent / "llama", mesh=mesh)


def test_a_directory_without_a_tokenizer(mesh):
    with pytest.raises(UserError, match="no tokenizer could be read"):
        load_reward_model(FIXTURE, mesh=mesh)


def test_a_tokenizer_without_eos(model_directory, mesh, tmp_path):
    folder = shutil.copytree(model_directory, tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load_reward_model(folder, mesh=mesh)(PROMPTS, RESPONSES)


def test_scores_are_brought_to_one_scale(score, model_directory, mesh, tmp_path):
    folder = shutil.copytree(model_directory, tmp_path / "model")
    with pytest.raises(UserError, match="no score_mean and score_std"):
        load_reward_model(folder, mesh=mesh, normalize=True)
    config = json.loads((folder / "config.json").read_text())
    said = {"score_mean": 0.75, "score_std": 0.5}
    (folder / "config.json").write_text(json.dumps(config | said))
    raw = load_reward_model(folder, mesh=mesh)(PROMPTS, RESPONSES)
    np.testing.assert_array_equal(raw, score(PROMPTS, RESPONSES))
    got = load_reward_model(folder, mesh=mesh, normalize=True)(PROMPTS, RESPONSES)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, (raw - 0.75) / 0.5, rtol=1e-6)
    flat = {"score_mean": 0.75, "score_std": 0.0}
    (folder / "config.json").write_text(json.dumps(config | flat))
    with pytest.raises(UserError, match="gave all responses the same score"):
        load_reward_model(folder, mesh=mesh, normalize=True)


def test_the_reward_that_ships_says_its_scale():
    """And keeps to it on a few hundred of the pairs that it was trained with."""
    source = {"source": "builtin:reward", "normalize": True}
    rewards = build_rewards({"human": source}, mesh=sharding.make_mesh())
    if not ARCHIVE:
        pytest.skip("RLHF_JAX_VADER_SDIST does not name a copy of the source archive")
    data = builtin_reward.get_config().data
    rows = reviews.load_reviews("train", domains=data.domains, archive=ARCHIVE)
    pairs = preferences.preference_pairs(rows)
    pairs += preferences.random_pairs(rows, rounds=data.rounds, seed=0)
    pairs = pairs[:: len(pairs) // 300]
    sides = [(p.prompt, side) for p in pairs for side in (p.chosen, p.rejected)]
    scores, _ = score_all(rewards, *map(list, zip(*sides)))
    assert len(scores) >= 600
    assert scores.mean() == pytest.approx(0, abs=0.1)
    assert scores.std() == pytest.approx(1, abs=0.1)
