"""Whole GRPO runs in a tiny world: they learn, repeat, resume and draw again."""

import shutil
import signal

import numpy as np
import pytest

from rlhf_jax import run_files
from rlhf_jax.errors import UserError

from .runs import assert_close_runs, assert_same_run, metrics_of, start

PHASES = 12
DAPO = {
    "grpo__variant": "dapo",
    "grpo__clip_high": 0.28,
    "grpo__kl_coef": 0.0,
    "grpo__dynamic_sampling": 3,
    "rewards__human__source": "tests.trainers.reward_functions:says_good",
    "total_phases": 4,
    "checkpoint__every": 2,
}


@pytest.fixture(scope="module")
def straight(world, run, tmp_path_factory):
    """The folder of a run of 12 phases that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    run(world.grpo_config(workdir))
    return workdir


def test_grpo_learns(straight):
    """The share of plain letters, in training and on prompts held out."""
    first, *rest = metrics_of(straight)
    assert [row["phase"] for row in rest] == list(range(1, PHASES + 1))
    rewards = [row["reward/mean"] for row in rest]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.25
    gain = rest[-1]["heldout/reward_mean"] - first["heldout/reward_mean"]
    assert gain > first["heldout/reward_std"]


def test_first_step_is_on_policy(straight):
    for row in metrics_of(straight)[1:]:
        assert abs(row["first_step/approx_kl"]) < 1e-6
        assert row["first_step/clip_fraction"] == 0
        assert row["first_step/ratio_deviation"] < 1e-5
        assert row["rollout/logprob_gap_max"] < 1e-4


def test_responses_are_in_groups(straight):
    """Four prompts a phase, four responses to each, next to each other."""
    for phase in range(1, PHASES + 1):
        rows = run_files.read_responses(straight, phase)
        prompts = [row["prompt"] for row in rows if row["split"] == "train"]
        assert len(prompts) == 16
        groups = [set(prompts[i : i + 4]) for i in range(0, 16, 4)]
        assert all(len(group) == 1 for group in groups)
        assert len(set.union(*groups)) == 4
    assert metrics_of(straight)[-1]["episodes"] == 16 * PHASES


def test_same_seed_twice_is_the_same_run(world, run, straight, tmp_path):
    run(world.grpo_config(tmp_path / "again"))
    assert_same_run(tmp_path / "again", straight)


def test_kill_and_the_same_command_again(world, straight, alone, tmp_path):
    """SIGKILL in phase 8, with metrics up to phase 6 and a checkpoint of phase 6."""
    workdir = tmp_path / "killed"
    # calls 0 and 6: held-out; call 9: phase 8
    killed = start(world, "grpo", workdir, alone | {"KILL_AT_CALL": "9"})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (workdir / "export").exists()
    assert metrics_of(workdir)[-1]["phase"] == 6
    resumed = start(world, "grpo", workdir, alone)
    assert resumed.returncode == 0, resumed.stderr
    assert "going on after phase " in resumed.stdout
    assert_same_run(workdir, straight)


@pytest.mark.parametrize("packing", [True, False])
def test_eight_devices_and_one_agree(world, run, tmp_path, packing):
    """After 12 steps, at a calm learning rate: larger ones make rounding grow."""
    calm = {"optimizer__lr": 3e-4, "total_phases": 3, "grpo__accumulation": 2}
    split = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
    split["grpo__packing"] = packing
    run(world.grpo_config(tmp_path / "one", **calm))
    run(world.grpo_config(tmp_path / "eight", **calm, **split), devices=8)
    assert len(metrics_of(tmp_path / "one")) == 4
    assert_close_runs(tmp_path / "eight", tmp_path / "one")


def test_dynamic_sampling_goes_on_where_it_was(world, run, tmp_path, capsys):
    """Phases 3 and 4 again, from the checkpoint of phase 2."""
    run(world.grpo_config(tmp_path / "straight", **DAPO))
    rows = metrics_of(tmp_path / "straight")[1:]
    assert max(row["groups/draws"] for row in rows) > 1
    for row in rows:
        assert row["groups/draws"] <= 3
        assert row["groups/draws"] == 3 or row["groups/kept"] == 1
        # with rewards alone, what differs and what is learned from are the same
        assert row["groups/informative"] == row["groups/kept"]

    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "4")
    shutil.rmtree(tmp_path / "resumed" / "export")
    capsys.readouterr()
    run(world.grpo_config(tmp_path / "resumed", **DAPO))
    assert "going on after phase 2" in capsys.readouterr().out
    assert_same_run(tmp_path / "resumed", tmp_path / "straight")


def test_what_a_run_says_of_its_settings(world, run, tmp_path, capsys):
    with pytest.raises(UserError, match=r"config.grpo.variant='gppo' is unknown"):
        run(world.grpo_config(tmp_path / "run", grpo__variant="gppo"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="/nowhere"):
        run(world.grpo_config(tmp_path / "run", grpo__variant="gspo", model="/nowhere"))
    told = " ".join(capsys.readouterr().out.split())
    assert "clip_high=0.2 will hardly clip anything" in told
