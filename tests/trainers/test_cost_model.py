"""Cost models: their loss, whole runs, meshes, and what they need to know."""

import json
import os
import re

import numpy as np
import pytest

from configs.cost_model import get_config
from rlhf_jax import loading, losses
from rlhf_jax.errors import UserError
from rlhf_jax.progress import make_console
from rlhf_jax.rewards import build_rewards, score_all
from rlhf_jax.trainers import reward_model

from .conftest import NOUNS
from .one_phase import single_mesh
from .runs import assert_same_training, metrics_of
from .test_reward_model import SOURCE, changed, measured, trl_batch, write_rows

PKU = os.environ.get("RLHF_JAX_PKU")  # a file of PKU-SafeRLHF's rows

pytestmark = pytest.mark.usefixtures("run")  # which makes XLA quick


def test_costs_are_learned_by_order_and_sign():
    config = get_config()
    config.update_from_flattened_dict(
        {"model": str(SOURCE), "dropout": 0.0, "total_phases": 1, "learning.batch": 4}
    )
    config.optimizer.warmup_steps = 0
    safe = np.array([[True, False], [True, True], [False, False], [True, False]])
    metrics, costs = measured(config, trl_batch("plain")._replace(safe=safe))
    wanted = losses.cost_model_loss(*costs.T, *safe.T, regularization=0.001).mean()
    assert metrics["loss"] == pytest.approx(float(wanted), rel=1e-5)
    assert metrics["accuracy"] == np.mean(costs[:, 1] > costs[:, 0])
    assert metrics["margin"] == pytest.approx(np.mean(costs[:, 1] - costs[:, 0]))
    assert metrics["sign_accuracy"] == np.mean((costs < 0) == safe)


def pku_rows():
    """Rows of PKU-SafeRLHF's form: whoever sees is safe, whoever leaves is not."""
    rows = []
    for number, (one, other) in enumerate((a, b) for a in NOUNS for b in NOUNS):
        answers = [f"It sees the {other}.", f"It leaves the {other}."]
        flip = number % 2
        rows.append(
            {
                "prompt": f"What does the {one} do with the {other}?",
                "response_0": answers[flip],
                "response_1": answers[1 - flip],
                "is_response_0_safe": not flip,
                "is_response_1_safe": bool(flip),
                "better_response_id": 1 - flip,  # the other way round
                "safer_response_id": flip,
            }
        )
    return rows


def cost_settings(world, workdir, source, **changes):
    config = get_config()
    settings = {
        "workdir": str(workdir),
        "model": str(world.policy),
        "data.source": source,
        "data.prompt_template": "",  # the tiny context has no room for its words
        "sequence_tokens": 40,
        "learning.batch": 8,
        "learning.steps_per_phase": 8,
        "optimizer.lr": 3e-3,
    }
    return changed(config, settings | changes)


def test_prompts_stand_in_the_words_of_safe_rlhf(world, tmp_path):
    source = write_rows(tmp_path / "pku.jsonl", pku_rows())
    changes = {"data.prompt_template": get_config().data.prompt_template}
    config = cost_settings(world, tmp_path, source, **changes, sequence_tokens=400)
    tokenizer = loading.load_run_tokenizer(config, make_console())
    for pairs in reward_model.load_data(config, tokenizer, make_console()):
        for pair in pairs:
            # https://github.com/PKU-Alignment/safe-rlhf, configs/constants.py
            assert re.fullmatch(
                r"BEGINNING OF CONVERSATION: USER: What does .*\? ASSISTANT:It \w+ .*",
                pair.prompt + pair.chosen,
            )


def test_a_cost_model(world, run, tmp_path):
    """Safe below zero, unsafe above; its zero is not moved by normalising."""
    source = write_rows(tmp_path / "pku.jsonl", pku_rows())
    run(cost_settings(world, tmp_path / "run", source))
    first, *_, last = metrics_of(tmp_path / "run")
    assert last["heldout/loss"] < 0.5 * first["heldout/loss"]
    assert last["heldout/accuracy"] > 0.9 and last["heldout/sign_accuracy"] > 0.9
    summary = json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))
    signs = summary["signs"]["all responses"]["value"]
    assert signs == pytest.approx(last["heldout/sign_accuracy"])
    assert "## Signs" in (tmp_path / "run" / "report" / "report.md").read_text("utf-8")

    exported = json.loads((tmp_path / "run/export/config.json").read_text("utf-8"))
    assert exported["score_mean"] == 0 < exported["score_std"]
    source = {"source": str(tmp_path / "run"), "normalize": True}
    rewards = build_rewards({"cost": source}, mesh=single_mesh())
    prompts = ["What does the cat do with the dog?"] * 2
    cost, _ = score_all(rewards, prompts, ["It sees the dog.", "It leaves the dog."])
    assert cost[0] < 0 < cost[1]


def test_eight_devices_and_one_agree_on_costs(world, run, tmp_path):
    source = write_rows(tmp_path / "pku.jsonl", pku_rows())
    calm = {
        "optimizer.lr": 3e-4,
        "optimizer.warmup_steps": 0,
        "total_phases": 1,
        "learning.steps_per_phase": 5,
        "learning.accumulation": 2,
    }
    split = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    run(cost_settings(world, tmp_path / "one", source, **calm))
    run(cost_settings(world, tmp_path / "eight", source, **calm, **split), devices=8)
    assert_same_training(tmp_path / "eight", tmp_path / "one")
    first, last = metrics_of(tmp_path / "eight")
    assert last["heldout/loss"] < first["heldout/loss"] - 0.01


def test_a_cost_model_needs_to_know_what_is_safe(world, run, tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(40)]
    source, better = write_rows(tmp_path / "pairs.jsonl", rows), "data.preference"
    with pytest.raises(UserError, match="have no chosen_safe and rejected_safe: give"):
        run(cost_settings(world, tmp_path / "run", source, **{better: "better"}))


@pytest.mark.skipif(not PKU, reason="RLHF_JAX_PKU names no file")
def test_real_rows_of_pku(world, run, tmp_path):
    changes = {
        "model": "builtin",
        "data.prompt_template": get_config().data.prompt_template,
        "sequence_tokens": 256,
        "total_phases": 1,
        "learning.steps_per_phase": 2,
        "optimizer.warmup_steps": 1,
    }
    run(cost_settings(world, tmp_path / "run", PKU, **changes))
    assert {"sign_accuracy", "heldout/sign_accuracy"} <= metrics_of(tmp_path / "run")[
        -1
    ].keys()
