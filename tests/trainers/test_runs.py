"""Whole runs in a tiny world: what they leave, that they repeat, resume and learn."""

import functools
import json
import re
import shutil
import signal

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import builtin_policy, builtin_reward
from rlhf_jax import checkpoint, run_files
from rlhf_jax.data import reviews
from rlhf_jax.data.tokenizer import load_tokenizer
from rlhf_jax.models.pretrained import load_pretrained
from rlhf_jax.trainers import offline, ppo

from .conftest import LLAMA, NOUNS, VERBS
from .runs import (
    assert_close_runs,
    assert_same_run,
    metrics_of,
    start,
)

PHASES = 16


@pytest.fixture(scope="module")
def straight(world, run, tmp_path_factory):
    """The folder of a PPO run of 16 phases that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    run(world.ppo_config(workdir))
    return workdir


def test_what_a_run_leaves(world, straight):
    names = {path.name for path in straight.iterdir()}
    assert names == {
        "config.json",
        "metrics.jsonl",
        "responses",
        "checkpoints",
        "samples.md",
        "curves.png",
        "summary.json",
        "alerts.jsonl",
        "export",
    }
    config = json.loads((straight / "config.json").read_text("utf-8"))
    assert config["model"] == str(world.policy)
    assert config["ppo"]["kl_coef"] == 0.02
    metrics = metrics_of(straight)
    assert [row["phase"] for row in metrics] == list(range(PHASES + 1))
    heldout = [row["phase"] for row in metrics if "heldout/reward_mean" in row]
    assert heldout == [0, 5, 10, 15, 16]
    assert checkpoint.saved_phases(straight / "checkpoints") == [0, 3, 6, 9, 12, 15, 16]
    titles = re.findall(
        r"^## (.*)$", (straight / "samples.md").read_text("utf-8"), re.M
    )
    assert titles == ["Phase 0", "Phase 8", "Phase 16"]
    assert (straight / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_responses_of_a_run(world, straight):
    """A phase's own samples, and, where it was evaluated, those on held-out prompts."""
    prompts = set(world.prompts.read_text("utf-8").splitlines())
    seen = {"train": set(), "heldout": set()}
    for row in metrics_of(straight):
        rows = run_files.read_responses(straight, row["phase"])
        for split, reward in (
            ("train", "reward/mean"),
            ("heldout", "heldout/reward_mean"),
        ):
            part = [sample for sample in rows if sample["split"] == split]
            assert bool(part) == (reward in row)
            if part:
                assert [sample["index"] for sample in part] == list(range(16))
                mean = np.mean([sample["reward"] for sample in part])
                assert mean == pytest.approx(row[reward], abs=1e-6)
                seen[split] |= {sample["prompt"] for sample in part}
        assert all(1 <= sample["tokens"] <= 6 for sample in rows)
    assert seen["train"] | seen["heldout"] <= prompts
    assert not seen["train"] & seen["heldout"]


def test_summary_is_first_and_last_evaluation(straight):
    summary = json.loads((straight / "summary.json").read_text("utf-8"))
    first, *_, last = metrics_of(straight)
    assert summary["phases"] == PHASES
    for key in ("reward_mean", "reward_std", "judge/vader_mean", "kl", "tokens"):
        key = f"heldout/{key}"
        assert summary[key] == {"before": first[key], "after": last[key]}


def test_export_is_the_last_policy(world, straight):
    exported = load_pretrained(straight / "export")
    kept = checkpoint.restore_policy(
        straight / "checkpoints", None, checkpoint.abstract(exported.params)
    )
    jax.tree.map(np.testing.assert_array_equal, exported.params, kept)
    started = load_pretrained(world.policy)
    moved = jax.tree.map(lambda a, b: (a != b).any(), exported.params, started.params)
    assert all(jax.tree.leaves(moved))
    tokenizer = load_tokenizer(straight / "export")
    text = "The cat sees."
    assert tokenizer(text).input_ids == load_tokenizer(world.policy)(text).input_ids


def test_first_step_is_on_policy(straight):
    for row in metrics_of(straight)[1:]:
        assert abs(row["first_step/approx_kl"]) < 1e-6
        assert row["first_step/clip_fraction"] == 0
        assert row["first_step/ratio_deviation"] < 1e-5
        assert row["rollout/logprob_gap_max"] < 1e-4


def test_ppo_learns(straight):
    """The share of plain letters in 8 responses a phase, and on prompts held out."""
    first, *rest = metrics_of(straight)
    rewards = [row["reward/mean"] for row in rest]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.25
    gain = rest[-1]["heldout/reward_mean"] - first["heldout/reward_mean"]
    assert gain > first["heldout/reward_std"]


def test_same_seed_twice_is_the_same_run(world, run, straight, tmp_path):
    run(world.ppo_config(tmp_path / "again"))
    assert_same_run(tmp_path / "again", straight)


def test_another_seed_is_another_run(world, run, straight, tmp_path):
    run(world.ppo_config(tmp_path / "other", seed=1))
    rows, others = metrics_of(tmp_path / "other"), metrics_of(straight)
    assert all(row != other for row, other in zip(rows, others))
    assert rows[1]["reward/mean"] != others[1]["reward/mean"]


def test_a_finished_run_stays_as_it_is(world, run, straight, capsys):
    before = {path: path.read_bytes() for path in straight.glob("*.jsonl")}
    weights = load_file(straight / "export" / "model.safetensors")
    run(world.ppo_config(straight))
    assert "going on after phase 16" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in straight.glob("*.jsonl")} == before
    again = load_file(straight / "export" / "model.safetensors")
    assert all(np.array_equal(again[name], weights[name]) for name in weights)


def test_kill_and_the_same_command_again(world, straight, alone, tmp_path):
    """SIGKILL in phase 9, with metrics up to phase 7 and a checkpoint of phase 6."""
    workdir = tmp_path / "killed"
    # calls 0 and 6: held-out; call 10: phase 9
    killed = start(world, "ppo", workdir, alone | {"KILL_AT_CALL": "10"})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (workdir / "export").exists()
    assert metrics_of(workdir)[-1]["phase"] == 7
    resumed = start(world, "ppo", workdir, alone)
    assert resumed.returncode == 0, resumed.stderr
    assert re.search(r"going on after phase [36]\b", resumed.stdout)
    assert_same_run(workdir, straight)


def test_eight_devices_and_one_agree(world, run, tmp_path):
    """At the learning rates of configs/ppo.py; larger ones make rounding grow."""
    calm = {"optimizer__lr": 3e-4, "optimizer__critic_lr": 1e-3, "total_phases": 5}
    split = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
    run(world.ppo_config(tmp_path / "one", **calm))
    run(world.ppo_config(tmp_path / "eight", **calm, **split), devices=8)
    assert len(metrics_of(tmp_path / "one")) == 6
    assert_close_runs(tmp_path / "eight", tmp_path / "one")


def test_going_on_with_another_mesh(world, run, tmp_path):
    """Phases 4 and 5 on eight devices, from a checkpoint of one device."""
    calm = {"optimizer__lr": 3e-4, "optimizer__critic_lr": 1e-3, "total_phases": 5}
    split = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
    workdir = tmp_path / "run"
    run(world.ppo_config(workdir, **calm))
    expected = metrics_of(workdir)
    last = workdir / "checkpoints" / "5"
    shutil.rmtree(last)
    run(world.ppo_config(workdir, **calm, **split), devices=8)
    assert last.is_dir()
    for row, other in zip(metrics_of(workdir), expected, strict=True):
        assert row == pytest.approx(other, rel=0, abs=1e-4)


def test_resuming_holds_no_second_state(world, run, straight, tmp_path, monkeypatch):
    """What is alive in a phase of a resumed run is what is alive in a fresh one."""
    held = []

    def measure(make_update):
        def made(*arguments):
            update = make_update(*arguments)

            def measured(*arguments):
                held.append(sum(x.nbytes for x in jax.live_arrays()))
                return update(*arguments)

            return measured

        return made

    monkeypatch.setattr(ppo, "make_update", measure(ppo.make_update))
    workdir = tmp_path / "run"
    run(world.ppo_config(workdir, total_phases=2, checkpoint__every=1))
    shutil.rmtree(workdir / "checkpoints" / "2")
    run(world.ppo_config(workdir, total_phases=2, checkpoint__every=1))
    _, fresh, resumed = held
    assert resumed < 1.05 * fresh


def stop_before_phase(phase):
    """A patch of `offline.phase_rows`: Ctrl-C as the phase takes its rows."""
    phase_rows = offline.phase_rows

    def stop(count, counted, **settings):
        if counted == phase - 1:
            raise KeyboardInterrupt
        return phase_rows(count, counted, **settings)

    return stop


def sft_config(world, workdir):
    config = builtin_policy.get_config()
    with config.unlocked():
        config.model = LLAMA
    config.update_from_flattened_dict(
        {
            "workdir": str(workdir),
            "total_phases": 4,
            "dropout": 0.1,
            "data.source": str(world.texts),
            "data.domains": (),
            "sequence_tokens": 20,
            "learning.batch": 8,
            "learning.steps_per_phase": 8,
            "optimizer.warmup_steps": 4,
            "prompts.train": str(world.prompts),
            "prompts.heldout": str(world.prompts),
            "prompts.prefix_words": 2,
            "rollout.max_new_tokens": 6,
            "evaluate_every": 2,
            "samples_every": 2,
            "checkpoint.every": 2,
        }
    )
    return config


def reward_config(world, workdir):
    config = builtin_reward.get_config()
    config.update_from_flattened_dict(
        {
            "workdir": str(workdir),
            "total_phases": 4,
            "model": str(world.policy),
            "data.rounds": 2,
            "sequence_tokens": 24,
            "learning.batch": 8,
            "learning.steps_per_phase": 8,
            "optimizer.lr": 3e-3,
            "optimizer.warmup_steps": 4,
            "evaluate_every": 2,
            "checkpoint.every": 2,
        }
    )
    return config


def made_up_reviews(split, *, domains):
    """Sentences that say how they were rated; no sentence is in two splits."""
    half = NOUNS[:6] if split == "train" else NOUNS[6:]
    return [
        reviews.Review(f"The {noun} {verb} {word}.", "movie", (rating,) * 3, rating)
        for noun in half
        for verb in VERBS
        for word, rating in (("well", 3.0), ("badly", -3.0), ("the dog", 0.0))
    ]


def check_learns_and_resumes(run, make_config, folder, monkeypatch, capsys):
    """Loss falls, and Ctrl-C in phase 4 leaves no trace once the run went on."""
    run(make_config(folder / "straight"))
    rows = metrics_of(folder / "straight")
    assert [row["phase"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[-1]["heldout/loss"] < 0.8 * rows[0]["heldout/loss"]

    with monkeypatch.context() as patch:
        patch.setattr(offline, "phase_rows", stop_before_phase(4))
        with pytest.raises(KeyboardInterrupt):
            run(make_config(folder / "stopped"))
    assert "stopped by hand" in capsys.readouterr().out
    run(make_config(folder / "stopped"))
    assert "going on after phase 2" in capsys.readouterr().out
    assert_same_run(folder / "stopped", folder / "straight")


def test_sft(world, run, tmp_path, monkeypatch, capsys):
    make_config = functools.partial(sft_config, world)
    check_learns_and_resumes(run, make_config, tmp_path, monkeypatch, capsys)
    load_pretrained(tmp_path / "straight" / "export")
    trained = load_tokenizer(tmp_path / "straight" / "export")
    assert len(trained) == LLAMA["vocab_size"]


def test_reward_model_and_ppo_on_its_run(world, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reviews, "load_reviews", made_up_reviews)
    make_config = functools.partial(reward_config, world)
    check_learns_and_resumes(run, make_config, tmp_path, monkeypatch, capsys)
    last = metrics_of(tmp_path / "straight")[-1]
    assert last["heldout/accuracy"] > 0.8

    source = str(tmp_path / "straight")
    workdir = tmp_path / "ppo"
    run(world.ppo_config(workdir, total_phases=1, rewards__human__source=source))
    assert [row["phase"] for row in metrics_of(workdir)] == [0, 1]
    onward = world.ppo_config(tmp_path / "onward", total_phases=1, model=str(workdir))
    run(onward)
    assert [row["phase"] for row in metrics_of(tmp_path / "onward")] == [0, 1]
