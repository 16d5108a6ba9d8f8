"""DPO in a tiny world: whole runs, their references, and eight devices."""

import functools

import jax
import numpy as np
import pytest

from configs.dpo import get_config
from rlhf_jax import run_files
from rlhf_jax.data import reviews
from rlhf_jax.models.pretrained import load_pretrained
from rlhf_jax.trainers import offline

from .runs import assert_close_runs, assert_same_run, metrics_of
from .test_dpo import change
from .test_runs import check_learns_and_resumes, made_up_reviews


def dpo_config(world, workdir, **changes):
    config = get_config()
    settings = {
        "workdir": str(workdir),
        "total_phases": 4,
        "model": str(world.policy),
        "sequence_tokens": 24,
        "learning.batch": 16,
        "learning.steps_per_phase": 4,
        "optimizer.lr": 1e-2,
        "optimizer.schedule": "constant",
        "optimizer.warmup_steps": 0,
        "prompts.train": str(world.prompts),
        "prompts.heldout": str(world.prompts),
        "prompts.heldout_limit": 16,
        "rollout.prompts": 16,
        "rollout.max_new_tokens": 6,
        "rewards.human.source": "tests.trainers.reward_functions:letters",
        "judges.vader.source": "rlhf_jax.rewards.functions:distinct_words",
        "evaluate_every": 2,
        "samples_every": 2,
        "checkpoint.every": 2,
    }
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return change(config, settings | changes)


@pytest.fixture(autouse=True)
def made_up_pairs(monkeypatch):
    monkeypatch.setattr(reviews, "load_reviews", made_up_reviews)


def test_learns_resumes_and_repeats(world, run, tmp_path, monkeypatch, capsys):
    packed = {"learning__accumulation": 2, "learning__packing": True}
    make_config = functools.partial(dpo_config, world, **packed)
    check_learns_and_resumes(run, make_config, tmp_path, monkeypatch, capsys)
    rows = metrics_of(tmp_path / "straight")
    first, last = rows[0], rows[-1]
    assert first["heldout/loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert first["heldout/rewards/margin"] == pytest.approx(0, abs=1e-5)
    assert first["heldout/kl"] == 0 < last["heldout/kl"]
    assert last["heldout/rewards/accuracy"] > 0.8
    assert last["rewards/margin"] > rows[1]["rewards/margin"]
    assert {"grad_norm", "optimizer/lr", "logps/chosen_token"} <= last.keys()
    samples = run_files.read_responses(tmp_path / "straight", 4)
    assert {row["split"] for row in samples} == {"heldout"} and len(samples) == 16
    run(make_config(tmp_path / "again"))
    assert_same_run(tmp_path / "again", tmp_path / "straight")


def test_a_resumed_run_reads_the_reference(world, run, tmp_path, capsys):
    workdir = tmp_path / "run"
    run(dpo_config(world, workdir, total_phases=1))
    assert "96/96 train rows" in capsys.readouterr().out
    kept = {path: path.read_bytes() for path in (workdir / "reference").iterdir()}
    assert sorted(path.name for path in kept) == ["train.npz", "validation.npz"]
    run(dpo_config(world, workdir, total_phases=1))
    assert capsys.readouterr().out.count("read from") == 2
    assert all(path.read_bytes() == before for path, before in kept.items())


@pytest.mark.parametrize("packing", [True, False])
def test_eight_devices_and_one_agree(world, run, tmp_path, packing):
    """After five steps at a learning rate at which rounding does not grow."""
    calm = {
        "optimizer__lr": 3e-4,
        "total_phases": 5,
        "learning__steps_per_phase": 1,
        "learning__accumulation": 2,
        "dpo__rpo_alpha": 0.1,
    }
    split = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
    run(dpo_config(world, tmp_path / "one", **calm))
    split["learning__packing"] = packing
    run(dpo_config(world, tmp_path / "eight", **calm, **split), devices=8)
    # The policy is the reference at first, and rounding tells which response is better.
    ties = [(0, "heldout/rewards/accuracy"), (1, "rewards/accuracy")]
    assert_close_runs(tmp_path / "eight", tmp_path / "one", but=ties)


def test_without_the_reference_there_is_no_kl_and_no_second_copy(
    world, run, tmp_path, monkeypatch
):
    held = []

    def measure(make_update):
        def made(*arguments, **options):
            update = make_update(*arguments, **options)

            def measured(*arguments):
                held.append(sum(x.nbytes for x in jax.live_arrays()))
                return update(*arguments)

            return measured

        return made

    monkeypatch.setattr(offline, "make_update", measure(offline.make_update))
    small = {"total_phases": 1, "learning__steps_per_phase": 1}
    run(dpo_config(world, tmp_path / "with", **small))
    run(dpo_config(world, tmp_path / "without", **small, evaluate_kl=False))
    weights = sum(
        x.nbytes for x in jax.tree.leaves(load_pretrained(world.policy).params)
    )
    assert held[0] - held[1] == pytest.approx(weights, rel=0.05)
    before, after = metrics_of(tmp_path / "without")
    assert "heldout/kl" not in before.keys() | after.keys()
    assert after["heldout/reward_mean"] == pytest.approx(
        metrics_of(tmp_path / "with")[1]["heldout/reward_mean"], abs=1e-6
    )
    assert all(
        "kl" not in row for row in run_files.read_responses(tmp_path / "without", 1)
    )


def test_reference_free_asks_no_reference(world, run, tmp_path):
    settings = {"total_phases": 1, "dpo__reference_free": True}
    run(dpo_config(world, tmp_path / "run", **settings))
    assert not (tmp_path / "run" / "reference").exists()
    row = metrics_of(tmp_path / "run")[0]
    assert row["heldout/rewards/chosen"] == pytest.approx(
        0.1 * row["heldout/logps/chosen"], rel=1e-5
    )


def test_the_reference_of_an_adapter_is_the_model_without_it(world, run, tmp_path):
    """It is there for the KL without being asked for, and is no copy."""
    settings = {"lora__rank": 4, "lora__dropout": 0.1, "evaluate_kl": False}
    workdir = tmp_path / "run"
    run(dpo_config(world, workdir, **settings))
    first, *_, last = metrics_of(workdir)
    assert first["heldout/kl"] == 0 < last["heldout/kl"]
    assert first["heldout/loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert last["heldout/loss"] < 0.9 * np.log(2)
    exported = load_pretrained(workdir / "export").params
    started = load_pretrained(world.policy).params
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), exported, started)
    assert moved["layers"]["mlp"]["up"]["kernel"] and not moved["embed"]["tokens"]


def test_the_reference_of_an_adapter_gone_on_with_has_it_too(world, run, tmp_path):
    """The first loss is log 2 again, though the model is no more what it was."""
    settings = {"lora__rank": 4, "total_phases": 2}
    run(dpo_config(world, tmp_path / "first", **settings))
    start = {"lora__start": str(tmp_path / "first")}
    run(dpo_config(world, tmp_path / "second", **settings, **start))
    before, *_, last = metrics_of(tmp_path / "first")
    first, *_ = metrics_of(tmp_path / "second")
    assert first["heldout/loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert first["heldout/kl"] == 0 < last["heldout/kl"]
    likely = "heldout/logps/chosen"
    assert first[likely] == pytest.approx(last[likely], abs=1e-5)
    assert abs(first[likely] - before[likely]) > 0.1
