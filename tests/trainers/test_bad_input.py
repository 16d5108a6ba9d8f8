"""What a person can get wrong, each told in one sentence; a mistake costs no run."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhf_jax.data.preferences import load_pairs
from rlhf_jax.data.texts import load_completions
from rlhf_jax.data.tokenizer import load_tokenizer, train_tokenizer
from rlhf_jax.errors import UserError

from .conftest import SENTENCES
from .runs import metrics_of

REWARDS = "tests.trainers.reward_functions"


@pytest.fixture
def fails(world, run, tmp_path):
    """`fails(devices=1, **changes)`: the sentence that a run with them ends in."""

    def fails(*, devices=1, workdir=tmp_path / "run", **changes):
        with pytest.raises(UserError) as caught:
            run(world.ppo_config(workdir, **changes), devices=devices)
        message = str(caught.value)
        assert "\n" not in message
        assert len(message) < 500
        return message

    return fails


@pytest.fixture
def broken(world, tmp_path):
    """A copy of the policy, to be broken."""
    return shutil.copytree(world.policy, tmp_path / "broken")


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def test_unknown_algorithm(fails):
    message = fails(algorithm="dpoo")
    assert "config.algorithm='dpoo' is unknown; take one of" in message
    assert " dpo, grpo, " in message


@pytest.mark.parametrize("missing", ["/nowhere/model", "./nowhere", "nowhere/at/all"])
def test_missing_model_directory(fails, missing):
    assert missing in fails(model=missing)


def test_unknown_hub_id(fails, monkeypatch):
    """Without a network, as with a name that the hub does not have."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = fails(model="nobody/nothing")
    assert "nobody/nothing is neither a directory here nor a model that" in message


def test_model_without_config(fails, broken):
    (broken / "config.json").unlink()
    assert f"{broken} has no config.json" in fails(model=str(broken))


def test_model_with_broken_config(fails, broken):
    (broken / "config.json").write_text('{"model_type": ', "utf-8")
    assert "config.json is not valid JSON" in fails(model=str(broken))


def test_model_without_weights(fails, broken):
    (broken / "model.safetensors").unlink()
    assert f"{broken} holds no weights" in fails(model=str(broken))


def test_model_with_truncated_weights(fails, broken):
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "model.safetensors is truncated or corrupt" in fails(model=str(broken))


def test_model_with_a_missing_tensor(fails, broken):
    path = broken / "model.safetensors"
    weights = load_file(path)
    del weights["model.norm.weight"]
    save_file(weights, path)
    assert "lacks model.norm.weight" in fails(model=str(broken))


def test_model_of_another_shape(fails, broken):
    edit_config(broken, intermediate_size=96)
    message = fails(model=str(broken))
    assert "has shape (64, 32); its config.json means (96, 32)" in message


def test_model_without_tokenizer(fails, broken):
    for path in broken.glob("token*"):
        path.unlink()
    assert f"no tokenizer could be read from {broken}" in fails(model=str(broken))


def test_reward_model_as_policy(fails, world):
    assert "is a model with a scalar head" in fails(model=str(world.reward))


def test_unsupported_architecture(fails, broken):
    edit_config(broken, model_type="mamba", architectures=["MambaForCausalLM"])
    message = fails(model=str(broken))
    assert "Unsupported architecture: model_type 'mamba'" in message
    assert "llama" in message


def test_prompt_longer_than_prompt_tokens(fails):
    message = fails(rollout__prompt_tokens=3)
    assert "prompts.txt line " in message
    assert "more than the 3 allowed" in message
    assert "'The " in message
    assert "raise config.rollout.prompt_tokens, or shorten it" in message


def test_prompt_longer_than_the_context(fails):
    message = fails(rollout__prompt_tokens=43)
    assert "make 49 tokens, more than the model's context of 48" in message


def test_long_prompt_among_many_stops_the_run_at_once(fails, world, tmp_path):
    """Not in the phase that takes it, which may be hours later."""
    prompts = tmp_path / "prompts.txt"
    lines = world.prompts.read_text("utf-8").splitlines()
    prompts.write_text("\n".join([*lines, "the cat " * 30]), "utf-8")
    fails(data__train=str(prompts), rollout__prompts=8)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_missing_prompts(fails, tmp_path):
    path = tmp_path / "nowhere.jsonl"
    assert f"there is no file {path}" in fails(data__train=str(path))


def test_prompts_that_are_no_json(fails, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "The cat"}\n{"prompt": \n', "utf-8")
    message = fails(data__train=str(path))
    assert "prompts.jsonl" in message
    assert "line 2" in message


ASK = {"role": "user", "content": "Why?"}
PAIR = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize(
    ("load", "name", "content", "place", "cure"),
    [
        (
            load_pairs,
            "broken.jsonl",
            lines(PAIR) + b'{"prompt":',
            "line 2",
            "mend that",
        ),
        (load_pairs, "lacking.jsonl", lines(PAIR, {"prompt": "x"}), "line 2", "add it"),
        (load_pairs, "columns.jsonl", lines({"a": "x"}), "it has a", "rename them to"),
        (load_pairs, "empty.jsonl", b"\n", "no rows in it", "give a file with one"),
        (load_pairs, "kind.jsonl", lines(PAIR, PAIR | {"chosen": 3}), "line 2", "mend"),
        (load_completions, "binary.jsonl", b"\n\x89PNG", "line 2", "save it in UTF-8"),
        (
            load_pairs,
            "headerless.csv",
            b"Why?,So.\nWho?,I.\n",
            "line 1",
            "rename them to one",
        ),
        (
            load_pairs,
            "commas.csv",
            b"prompt,chosen\na,b,c\n",
            "line 2",
            "put quotation",
        ),
        (load_pairs, "none.parquet", b"PK" * 99, "Parquet", "write it again"),
        (
            *(load_pairs, "ties.jsonl", lines(PAIR | {"rejected": "So."})),
            *("line 1", "give pairs whose two responses differ"),
        ),
        (
            *(load_completions, "asked.jsonl", lines({"messages": [ASK]})),
            *("line 1", "give dialogues with a turn of the assistant"),
        ),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, load, name, content, place, cure):
    """One sentence: which file, where in it, and what to do."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load(str(tmp_path / name), split=None)
    message = str(caught.value)
    assert "\n" not in message
    assert name in message and place in message and cure in message


def test_unknown_data_set(fails):
    message = fails(data__train="nobody/no-such-data")
    assert "no data set for 'nobody/no-such-data'" in message
    assert "check the spelling, or the network" in message


def test_a_tokenizer_whose_pad_is_eos_trains_all_the_same(world, run, tmp_path, capsys):
    """It is said once; no mask comes from the token, so nothing else is different."""
    tokenizer = load_tokenizer(world.policy)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    said = "the tokenizer's pad token is its eos (1)"
    run(world.ppo_config(tmp_path / "plain", total_phases=2))
    assert said not in capsys.readouterr().out
    source = str(tmp_path / "tokenizer")
    run(world.ppo_config(tmp_path / "run", total_phases=2, tokenizer=source))
    assert said in capsys.readouterr().out
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "plain")


def test_batch_that_does_not_divide_the_mesh(fails):
    message = fails(devices=8, rollout__prompts=12)
    assert "config.rollout.prompts=12 does not divide over the 8 rows" in message


def test_minibatch_that_does_not_divide_the_mesh(fails):
    message = fails(devices=8, rollout__prompts=8)
    assert "does not divide over the 8 rows of the mesh" in message
    assert "minibatches" in message


def test_batch_that_does_not_divide_into_minibatches(fails):
    message = fails(ppo__minibatches=3)
    assert "config.rollout.prompts=16 must be a multiple of minibatches=3" in message


def test_mesh_that_does_not_fit_the_devices(fails):
    message = fails(devices=8, mesh__data=3)
    assert "does not fit 8 device(s)" in message


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("breaks", "raised KeyError: 'no such thing'"),
        ("gives_nan", "gave nan for response 1 of 16"),
        ("one_too_few", "gave scores of shape (15,) for 16 responses"),
    ],
)
def test_reward_function_that_fails(fails, function, said):
    message = fails(rewards__human__source=f"{REWARDS}:{function}")
    assert f"reward 'human' ({REWARDS}:{function}) {said}" in message


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("no_such_module:score", "cannot be imported"),
        (f"{REWARDS}:no_such_function", "cannot be imported"),
        (f"{REWARDS}:CALLS", "is not a function"),
        ("/nowhere/reward", "is no directory and no import path"),
    ],
)
def test_reward_that_is_not_there(fails, source, said):
    message = fails(rewards__human__source=source)
    assert source in message
    assert said in message


def test_language_model_as_reward(fails, world):
    message = fails(rewards__human__source=str(world.policy))
    assert "has no scalar head" in message


def test_run_folder_that_cannot_be_made(fails, tmp_path):
    (tmp_path / "file").write_text("", "utf-8")
    message = fails(workdir=tmp_path / "file" / "run")
    assert "cannot write in the run folder" in message
    assert "choose another workdir" in message


def test_resume_with_another_config(fails, world, tmp_path):
    fails(model="/nowhere")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"phase": 0}\n', "utf-8")
    message = fails(model=str(world.policy), ppo__kl_coef=0.5)
    assert f"{tmp_path / 'run'} holds a run with another configuration" in message
    assert "ppo.kl_coef was 0.02 and is now 0.5" in message


def test_a_try_that_failed_at_once_is_no_run(fails, tmp_path):
    """A mended command goes on in the same folder."""
    fails(model="/nowhere")
    assert "/elsewhere is not a model directory" in fails(model="/elsewhere")


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_that_samples_nothing(fails, temperature):
    message = fails(rollout__temperature=temperature)
    assert f"config.rollout.temperature={temperature} must be above 0" in message


@pytest.mark.parametrize("value", [-1, 0])
def test_no_phases(fails, value):
    assert "total_phases" in fails(total_phases=value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "float31"),
        ("export_dtype", "float8"),
        ("optimizer__schedule", "sideways"),
        ("optimizer__name", "adamant"),
        ("ppo__kl_estimator", "k9"),
        ("rollout__max_new_tokens", 0),
        ("rollout__prompts", 0),
        ("rollout__top_p", 0.0),
        ("ppo__epochs", 0),
        ("ppo__minibatches", 0),
        ("ppo__gamma", 1.5),
        ("ppo__clip_low", 2.0),
        ("ppo__dual_clip", 0.5),
        ("ppo__adaptive_kl__horizon", 2.0),
        ("logprob_chunk", -1),
        ("logging__wandb", "sometimes"),
    ],
)
def test_setting_without_meaning(fails, name, value):
    message = fails(**{name: value})
    assert str(value) in message
    assert name.rpartition("__")[2] in message


def test_tokenizer_of_another_model(fails, world, tmp_path):
    """With more tokens than the policy has rows for."""
    train_tokenizer(SENTENCES, 330).save_pretrained(tmp_path / "large")
    message = fails(tokenizer=str(tmp_path / "large"))
    assert "the policy only 320: they are no pair" in message


def test_critic_that_cannot_read_the_policy(fails, broken):
    edit_config(broken, max_position_embeddings=32)
    message = fails(critic__source=str(broken))
    assert "a context of 32, the policy 320 and 48" in message


def test_section_that_the_config_lacks(world, run, tmp_path):
    config = world.ppo_config(tmp_path / "run")
    with config.unlocked():
        del config.judges
    with pytest.raises(UserError, match=r"has no setting 'judges'.* which ppo needs"):
        run(config)


def test_shared_critic_with_a_source(fails):
    message = fails(critic__shared=True, critic__source="builtin:reward")
    assert "config.critic.source='builtin:reward' needs" in message


def test_metric_that_is_not_finite(fails, tmp_path):
    """Weights beyond float32 after the first steps."""
    message = fails(optimizer__lr=1e38, optimizer__critic_lr=1e38, total_phases=3)
    assert "is not finite, so training stops" in message
    rows = (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    assert all(np.isfinite(v) for row in rows for v in json.loads(row).values())
