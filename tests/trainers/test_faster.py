"""Settings that save time change nothing but round-off."""

import json

import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.run_files import read_responses
from rlhf_jax.trainers import online
from tests.trainers.runs import metrics_of

ROUND_OFF = 1e-4
# Adam's first steps have the size of the rate, whatever rounding did to a gradient.
BRIEF = {"total_phases": 2, "ppo__accumulation": 2, "optimizer__lr": 1e-3}


def compared(workdir, other, *, but=()):
    """The largest difference of any metric that both runs have."""
    worst = 0.0
    for row, want in zip(metrics_of(workdir), metrics_of(other), strict=True):
        for key in row.keys() & want.keys() - set(but):
            worst = max(worst, abs(row[key] - want[key]))
    return worst


@pytest.fixture(scope="module")
def straight(world, run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("faster") / "straight"
    run(world.ppo_config(workdir, **BRIEF))
    return workdir


@pytest.mark.parametrize("setting", [{"ppo__packing": True}, {"rollout__slots": 4}])
def test_the_same_run(world, run, straight, tmp_path, setting):
    run(world.ppo_config(tmp_path, **BRIEF, **setting))
    assert compared(tmp_path, straight) < ROUND_OFF


def test_the_samplers_logprobs_are_the_learners(world, run, straight, tmp_path):
    """The entropy is then the mean of -log p, another figure of the same size."""
    run(world.ppo_config(tmp_path, **BRIEF, rollout__reuse_logprobs=True))
    gap = {"rollout/logprob_gap_mean", "rollout/logprob_gap_max"}
    assert compared(tmp_path, straight, but=gap | {"policy/entropy"}) < ROUND_OFF
    for row in metrics_of(tmp_path)[1:]:
        assert row["rollout/logprob_gap_max"] == 0
        assert row["first_step/ratio_deviation"] < 1e-4


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rollout__top_p": 0.9}, "with top_p they are another"),
        ({"rollout__min_p": 0.1}, "with min_p they are another"),
    ],
)
def test_what_cannot_be_reused(world, tmp_path, changes, sentence):
    config = world.ppo_config(tmp_path, rollout__reuse_logprobs=True, **changes)
    with pytest.raises(UserError, match=sentence):
        online.check_rollout(config)


@pytest.mark.parametrize("texts_too", [False, True])
def test_a_reward_that_reads_tokens(world, run, tmp_path, texts_too):
    """Alone, and added to one that reads texts; the host waits for the latter only."""
    config = world.ppo_config(tmp_path, **BRIEF)
    rewards = {"model": {"source": str(world.reward), "on": "tokens", "weight": 2.0}}
    if texts_too:
        rewards["letters"] = config.rewards.human.to_dict()
    with config.unlocked():
        del config.rewards.human
        config.rewards.update(rewards)
    run(config)
    lines = (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()
    assert ("time/rollout_s" in json.loads(lines[-1])) == texts_too
    for phase in (1, 2):
        rows = [r for r in read_responses(tmp_path, phase) if r["split"] == "train"]
        scores = np.array([row["reward"] for row in rows])
        assert np.isfinite(scores).all() and scores.std() > 0
        if texts_too:
            parts = [2.0 * row["reward/model"] + row["reward/letters"] for row in rows]
            np.testing.assert_allclose(scores, parts, rtol=1e-5)


def test_tokens_are_for_one_reward_model(world, run, tmp_path):
    config = world.ppo_config(tmp_path, **BRIEF)
    source = [str(world.reward), str(world.reward)]
    with config.unlocked():
        config.rewards = {"both": {"source": source, "on": "tokens"}}
    with pytest.raises(UserError, match="only a single reward model reads tokens"):
        run(config)
    with config.unlocked():
        config.rewards = {}
    with pytest.raises(UserError, match=r"config\.rewards is empty"):
        run(config)
