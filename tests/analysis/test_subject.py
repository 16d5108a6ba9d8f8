"""Runs that are opened, and folders that are none: each told in a sentence."""

import json
import shutil

import jax
import numpy as np
import pytest

from rlhf_jax import progress, sharding
from rlhf_jax.analysis.subject import (
    known_phases,
    open_subject,
    policy_of,
    read_config,
    saved_phases,
)
from rlhf_jax.errors import UserError
from rlhf_jax.models.pretrained import load_pretrained
from tests.trainers.one_phase import single_mesh
from tests.trainers.test_runs import reward_config, sft_config


def open_run(workdir, mesh=None):
    return open_subject(workdir, mesh=mesh, console=progress.make_console())


def complaint(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


def test_the_reference_is_what_the_run_started_from(world, ppo):
    subject = open_run(ppo, single_mesh())
    start = load_pretrained(world.policy).params
    jax.tree.map(np.testing.assert_array_equal, subject.reference, start)
    jax.tree.map(np.testing.assert_array_equal, policy_of(subject, 0), start)
    moved = jax.tree.map(lambda a, b: (a != b).any(), policy_of(subject, 3), start)
    assert all(jax.tree.leaves(moved))
    assert subject.frozen is None
    assert len(subject.prompts["heldout"].texts) == 16
    assert [reward.name for reward in subject.judges] == ["vader"]


def test_the_mesh_is_that_of_the_run_where_it_fits(edit):
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    workdir = edit(lambda config: config.update(mesh=sizes))
    subject = open_run(workdir)
    assert dict(subject.mesh.shape) == sizes
    layout = jax.tree.leaves(policy_of(subject, 1))[0].sharding
    assert layout.mesh.shape == subject.mesh.shape
    edit(lambda config: config.update(mesh=sizes | {"data": 3}))
    assert open_run(workdir).mesh == sharding.make_mesh()


def test_phases(ppo, ppo_copy, tmp_path):
    assert saved_phases(ppo) == known_phases(ppo) == [0, 1, 2, 3]
    shutil.rmtree(ppo_copy / "checkpoints" / "1")
    (ppo_copy / "checkpoints" / "3").rename(ppo_copy / "checkpoints" / "3.unreadable")
    assert saved_phases(ppo_copy) == known_phases(ppo_copy) == [0, 2]
    shutil.rmtree(ppo_copy / "checkpoints")
    (ppo_copy / "responses" / "phase_00002.jsonl").unlink()
    assert saved_phases(ppo_copy) == []
    assert known_phases(ppo_copy) == [0, 1, 3]
    assert known_phases(tmp_path / "nowhere") == []


def test_a_phase_that_is_not_there(ppo):
    message = complaint(policy_of, open_run(ppo, single_mesh()), 7)
    assert "no checkpoint of phase 7; saved phases: 0, 1, 2, 3" in message


def test_no_folder(tmp_path):
    message = complaint(read_config, tmp_path / "nowhere")
    assert f"there is no folder {tmp_path / 'nowhere'}: give that of a run" == message


def test_a_folder_without_a_run(world):
    message = complaint(read_config, world.folder)
    assert "holds no run, for it has no config.json" in message


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b'{"algorithm": "ppo"', "cannot be read: Expecting ',' delimiter"),
        (b"", "cannot be read"),
        (b'{"algorithm": "\xff"}', "cannot be read: 'utf-8' codec"),
        (b"[1, 2]", "names no algorithm"),
        (b'{"model_type": "llama"}', "names no algorithm: it is not the config of a"),
    ],
)
def test_a_broken_config(tmp_path, text, why):
    (tmp_path / "config.json").write_bytes(text)
    message = complaint(read_config, tmp_path)
    assert str(tmp_path / "config.json") in message and why in message


@pytest.mark.parametrize(
    ("make_config", "why"),
    [
        (reward_config, "a run of reward_model whose settings have no rollout and no"),
        (sft_config, "a run of sft whose settings have no rewards"),
    ],
)
def test_a_run_without_answers_for_a_reward(world, tmp_path, make_config, why):
    config = make_config(world, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()), "utf-8")
    message = complaint(open_run, tmp_path)
    assert why in message and "(ppo, grpo, dpo)" in message


@pytest.mark.parametrize(
    "name",
    [
        *("mesh", "model", "seed", "freeze", "remat", "lora.rank", "lora.alpha"),
        *("rollout.temperature", "rollout.prompt_tokens", "data.heldout"),
        "data.column",
    ],
)
def test_a_setting_of_another_version(edit, name):
    def drop(config):
        config["lora"]["rank"] = 2
        *path, last = name.split(".")
        for part in path:
            config = config[part]
        del config[last]

    workdir = edit(drop)
    message = complaint(open_run, workdir, single_mesh() if name != "mesh" else None)
    last = name.split(".")[-1]
    assert message == (
        f"{workdir} was written by another version: its settings have no {last!r}"
    )


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model": "/nowhere/model"}, "/nowhere/model"),
        ({"rewards": {"human": {"source": "/nowhere/rm", "weight": 1.0}}}, "/nowhere"),
        ({"judges": {"it": {"source": "no.module:f", "weight": 1.0}}}, "no.module"),
    ],
)
def test_what_a_run_needs_is_gone(edit, change, why):
    workdir = edit(lambda config: config.update(change))
    assert why in complaint(open_run, workdir, single_mesh())


def test_prompts_are_gone(edit, tmp_path):
    prompts = str(tmp_path / "prompts.txt")
    workdir = edit(lambda config: config["data"].update(train=prompts))
    assert prompts in complaint(open_run, workdir, single_mesh())


def test_a_mistake_of_ours_is_not_taken_for_an_old_run(ppo, monkeypatch):
    def broken(*arguments, **settings):
        raise AttributeError("no such thing", name="thing", obj=ppo)

    monkeypatch.setattr("rlhf_jax.analysis.subject.load_both", broken)
    with pytest.raises(AttributeError, match="no such thing"):
        open_run(ppo, single_mesh())
