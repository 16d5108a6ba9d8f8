"""The plan of a run without its devices."""

import json
import os
import re
import subprocess
import sys

import pytest

from configs import grpo, pipeline
from rlhf_jax import plan
from rlhf_jax.errors import UserError

BIG = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
WEIGHTS = 8_030_261_248  # of Llama 3 8B


@pytest.fixture
def big(tmp_path):
    """A model's folder without weights."""
    (tmp_path / "config.json").write_text(json.dumps(BIG), "utf-8")
    return tmp_path


def config_of(model, **mesh):
    config = grpo.get_config()
    config.model, config.dtype = str(model), "bfloat16"
    config.rollout.prompts = 128
    config.mesh.update(mesh)
    return config


def test_eight_billion_weights_on_devices_that_are_not_here(big, capsys):
    """Cut over 64: a 64th of float32 weights, and twice that of moments."""
    plan.plan(config_of(big, fsdp=64), devices=64, gib=80)
    printed = capsys.readouterr().out
    assert "data=1 x fsdp=64 x tensor=1" in printed
    assert "a device of 85,899.3 MB" in printed
    sizes = dict(re.findall(r"  (weights|optimizer moments) +([\d,.]+) MB", printed))
    sizes = {name: float(size.replace(",", "")) for name, size in sizes.items()}
    # Norms are whole on every device.
    assert sizes["weights"] == pytest.approx(4 * WEIGHTS / 64 / 1e6, rel=0.01)
    assert sizes["optimizer moments"] == pytest.approx(2 * sizes["weights"], rel=1e-3)


def test_what_does_not_fit_is_an_error_with_advice(big, capsys):
    with pytest.raises(
        UserError, match=r"are needed on each device, but it has 80\.00"
    ):
        plan.plan(config_of(big), devices=8, gib=80)
    assert "optimizer moments" in capsys.readouterr().out


def test_those_here_by_default(capsys):
    plan.plan(grpo.get_config(), devices=None, gib=None)
    assert re.search(r"data=8 .* MB a device of", capsys.readouterr().out, re.DOTALL)


def test_a_pipeline_is_several_runs():
    with pytest.raises(UserError, match="give the config of one of them"):
        plan.plan(pipeline.get_config(), devices=8, gib=80)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        (
            "rollout.prompts",
            12,
            "config.rollout.prompts=12 does not divide over the 64",
        ),
        ("grpo.variant", "gpro", "config.grpo.variant='gpro' is unknown"),
        ("algorithm", "gpro", "config.algorithm='gpro' is unknown"),
    ],
)
def test_what_training_refuses(big, name, value, sentence):
    config = config_of(big, fsdp=64)
    config.update_from_flattened_dict({name: value})
    with pytest.raises(UserError, match=re.escape(sentence)):
        plan.plan(config, devices=64)


def test_a_setting_that_is_missing(big):
    config = config_of(big)
    with config.unlocked():
        del config.lora
    with pytest.raises(UserError, match="the config has no setting 'lora'"):
        plan.plan(config, devices=8)


def test_of_a_model_on_the_hub_the_config_alone_is_fetched(big, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(big)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    config = config_of("someone/language-model", fsdp=8)
    config.rewards.human.source = "someone/reward-model"
    plan.plan(config, devices=8)
    assert {name for name, _ in asked} == {
        "someone/language-model",
        "someone/reward-model",
    }
    assert all(patterns == ["config.json"] for _, patterns in asked)


def test_the_command(big):
    command = [sys.executable, "-m", "rlhf_jax.plan", "--config=configs/grpo.py"]
    run = lambda *flags: subprocess.run(
        [*command, f"--config.model={big}", *flags],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    fits = run("--config.mesh.fsdp=8", "--devices=8", "--gib=80", "--platform=gpu")
    assert fits.returncode == 0 and "rlhf_jax grpo" in fits.stdout, fits.stderr
    wrong = run("--config.mesh.fsdp=3", "--devices=64")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: mesh data=-1 x fsdp=3")
