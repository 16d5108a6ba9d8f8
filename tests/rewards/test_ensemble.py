"""Several reward models as one: how they are combined, and that each counts alone."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhf_jax import sharding
from rlhf_jax.errors import UserError
from rlhf_jax.rewards import build_rewards, name_scores, score_all
from rlhf_jax.rewards.ensemble import combine_scores, load_ensemble
from rlhf_jax.rewards.model import load_reward_model

PROMPTS = ["The film is", "The camera", ""]
RESPONSES = [" good, really good", " dies", " nothing at all"]
STATISTICS = [(0.5, 2.0), (-1.0, 0.25), (0.0, 1.0)]


def write_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.fixture(scope="module")
def members(model_directory, tmp_path_factory):
    """Three directories: the fixture's model, and two whose weights differ from it."""
    folders = []
    for number, (mean, std) in enumerate(STATISTICS):
        folder = tmp_path_factory.mktemp("members") / f"rm{number}"
        shutil.copytree(model_directory, folder)
        weights = load_file(folder / "model.safetensors")
        rng = np.random.default_rng(number)
        moved = {
            k: v + np.float32(0.1 * number) * rng.normal(size=v.shape).astype(v.dtype)
            for k, v in weights.items()
        }
        save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
        write_config(folder, score_mean=mean, score_std=std)
        folders.append(str(folder))
    return folders


@pytest.fixture(scope="module")
def alone(members, mesh):
    """[3, 3]: the raw scores of each member, loaded alone."""
    return np.stack(
        [load_reward_model(m, mesh=mesh)(PROMPTS, RESPONSES) for m in members]
    )


def test_the_ways_to_combine_by_hand():
    scores = np.array([[1.0, 0.0], [3.0, 0.0], [8.0, 0.0]])
    # mean (1 + 3 + 8) / 3 = 4; deviation sqrt((9 + 1 + 16) / 3) = sqrt(26 / 3)
    deviation = (26 / 3) ** 0.5
    assert combine_scores(scores, "mean", 2.0).tolist() == [4, 0]
    assert combine_scores(scores, "min", 2.0).tolist() == [1, 0]
    got = combine_scores(scores, "uncertainty", 2.0)
    np.testing.assert_allclose(got, [4 - 2 * deviation, 0], rtol=1e-12)
    assert combine_scores(scores, "uncertainty", 0.0).tolist() == [4, 0]


@pytest.mark.parametrize("way", ["mean", "min", "uncertainty"])
def test_raw_members_are_those_alone(members, alone, mesh, way):
    score = load_ensemble(members, mesh=mesh, combine=way, penalty=0.5, normalize=False)
    got, details = score(PROMPTS, RESPONSES)
    assert got.dtype == np.float32 and got.shape == (3,)
    np.testing.assert_allclose(got, combine_scores(alone, way, 0.5), atol=1e-5)
    np.testing.assert_allclose(details["std"], alone.std(axis=0), atol=1e-5)
    assert details["std"].min() > 0.05  # they do differ


def test_members_are_brought_to_one_scale_first(members, alone, mesh):
    got, details = load_ensemble(members, mesh=mesh)(PROMPTS, RESPONSES)
    mean, std = (np.array(x)[:, None] for x in zip(*STATISTICS))
    wanted = (alone - mean) / std
    np.testing.assert_allclose(got, wanted.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(details["std"], wanted.std(axis=0), atol=1e-4)


def test_equal_members_agree(members, alone, mesh):
    score = load_ensemble(
        [members[0]] * 2, mesh=mesh, combine="uncertainty", normalize=False
    )
    got, details = score(PROMPTS, RESPONSES)
    np.testing.assert_allclose(got, alone[0], atol=1e-5)
    np.testing.assert_array_equal(details["std"], 0)


def test_any_mesh_gives_the_same(members, mesh):
    other = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    got, _ = load_ensemble(members, mesh=other)(PROMPTS, RESPONSES)
    wanted, _ = load_ensemble(members, mesh=mesh)(PROMPTS, RESPONSES)
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_members_are_scored_in_one_pass(members, mesh, monkeypatch):
    """One compiled program is called, once for all members."""
    calls = []
    put = sharding.to_devices
    monkeypatch.setattr(
        sharding, "to_devices", lambda *given: calls.append(given) or put(*given)
    )
    score = load_ensemble(members, mesh=mesh)
    calls.clear()
    score(PROMPTS, RESPONSES)
    assert len(calls) == 1


def test_no_rows(members, mesh):
    got, details = load_ensemble(members, mesh=mesh)([], [])
    assert got.shape == details["std"].shape == (0,)


def test_an_ensemble_in_a_config(members, alone, mesh):
    config = {
        "human": {
            "source": members,
            "weight": 2.0,
            "combine": "min",
            "normalize": False,
        }
    }
    rewards = build_rewards(config, mesh=mesh)
    total, parts = score_all(rewards, PROMPTS, RESPONSES)
    assert list(parts) == ["human", "human_std"]
    np.testing.assert_allclose(parts["human"], alone.min(axis=0), atol=1e-5)
    np.testing.assert_allclose(parts["human_std"], alone.std(axis=0), atol=1e-5)
    np.testing.assert_array_equal(total, 2 * parts["human"])
    columns = name_scores(total, parts)
    assert list(columns) == ["reward", "reward/human", "reward/human_std"]


def test_a_reward_called_as_a_detail_still_counts(members, mesh):
    config = {
        "human": {"source": members, "weight": 0.0},
        "human_std": {"source": "rlhf_jax.rewards.functions:words", "weight": 1.0},
    }
    total, parts = score_all(build_rewards(config, mesh=mesh), PROMPTS, RESPONSES)
    assert parts["human_std"].tolist() == total.tolist() == [3, 1, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"combine": "max"}, "unknown combine 'max' .* mean, min, uncertainty"),
        ({"penalty": -1.0}, "penalty of an ensemble is -1.0, expected 0 or more"),
        ({"dtype": "float16"}, "unknown dtype 'float16'"),
        (
            {"output": "probability"},
            "normalize is for scores, and output='probability'",
        ),
    ],
)
def test_an_option_that_cannot_be(members, mesh, options, message):
    with pytest.raises(UserError, match=message):
        build_rewards({"human": {"source": members} | options}, mesh=mesh)


def test_one_member_is_no_ensemble(members, mesh):
    with pytest.raises(UserError, match="has several members"):
        build_rewards({"human": {"source": members[:1]}}, mesh=mesh)
    with pytest.raises(UserError, match="has no source"):
        build_rewards({"human": {"source": [members[0], ""]}}, mesh=mesh)


def test_another_architecture_is_refused(members, mesh, tmp_path):
    folder = shutil.copytree(members[0], tmp_path / "other")
    write_config(folder, rms_norm_eps=1e-3)
    with pytest.raises(UserError, match=r"norm_eps is 0\.001 and 1e-06, and members"):
        load_ensemble([members[0], folder], mesh=mesh)


def test_another_tokenizer_is_refused(members, mesh, tmp_path):
    folder = shutil.copytree(members[0], tmp_path / "other")
    words = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    one, other = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (folder / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(UserError, match="their tokenizers differ"):
        load_ensemble([members[0], folder], mesh=mesh)


def test_a_member_that_does_not_know_its_scale(members, model_directory, mesh):
    with pytest.raises(UserError, match=r"no score_mean .*; set normalize to False"):
        load_ensemble([members[0], model_directory], mesh=mesh)
    load_ensemble([members[0], model_directory], mesh=mesh, normalize=False)


def test_members_keep_their_memory_once(members, mesh):
    """What stays is the stacked weights: no member beside them."""
    before = {id(x) for x in jax.live_arrays()}
    score = load_ensemble(members, mesh=mesh)
    held = [x for x in jax.live_arrays() if id(x) not in before]
    weights = load_file(f"{members[0]}/model.safetensors")
    one = sum(w.nbytes for w in weights.values())
    assert sum(x.nbytes for x in held) < 1.1 * len(members) * one
    del score
