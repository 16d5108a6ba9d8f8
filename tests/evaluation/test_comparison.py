"""Figures of runs, from run folders written here."""

import json

import numpy as np
import pytest

from rlhf_jax import run_files
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import comparison

TEXTS = ["a good film", "good good good good", "one two one two", "what a film it is"]


def write_run(folder, gains, *, learning=None, prompts=("w", "x", "y", "z")):
    """A run of four phases that evaluates at 0, 2 and 4; the last gain is by prompt."""
    config = {"rollout": {"prompts": 4, "group": 2}, **(learning or {})}
    files = run_files.open_run(folder, config)
    base = np.array([0.0, 1.0, 2.0, 3.0])
    means = {0: base.mean(), 2: base.mean() + 0.5, 4: (base + gains).mean()}
    for phase in range(5):
        row = {"phase": phase}
        if phase:
            row |= {"time/phase_s": 2.0, "time/peak_gib": 0.5 + 0.1 * phase}
            row |= {"policy/entropy": 3.0 - 0.1 * phase}
        if phase in means:
            row |= {"heldout/reward_mean": means[phase], "heldout/kl": 0.5 * phase}
        run_files.append_metrics(files, row)
    for phase, rewards in ((0, base), (4, base + gains)):
        rows = [
            {
                **{"split": "heldout", "index": i, "prompt": prompts[i]},
                **{"response": TEXTS[i], "reward": r, "judge/vader": r / 2},
                **{"tokens": 10 + phase, "finish": "eos", "kl": 0.0},
            }
            for i, r in enumerate(rewards)
        ]
        run_files.write_responses(files, phase, [*rows, rows[0] | {"split": "train"}])
    return folder


def test_figures_worked_by_hand(tmp_path):
    # gains of 0.5, 1, 1.5 and 1: mean 1, sample variance (¼ + 0 + ¼ + 0)/3 = 1/6, so a
    # standard error of √(1/24) = 0.2041241; times t₀.₉₇₅ of 3 degrees, 3.1824463
    got = comparison.measure(write_run(tmp_path, np.array([0.5, 1.0, 1.5, 1.0])))
    assert (got.before, got.after) == (1.5, 2.5)
    np.testing.assert_allclose(got.gain, (1.0, 0.3503859, 1.6496141), rtol=1e-6)
    np.testing.assert_allclose(got.judges["vader"].mean, 0.5)
    assert (got.kl, got.entropy, got.tokens) == (2.0, 2.6, 14.0)
    # nine tenths of the gain are there at phase 4, after 4 · 2 seconds
    assert (got.phases_to, got.seconds_to, got.seconds) == (4, 8.0, 8.0)
    # 4 phases of 4 · 2 responses in 8 seconds
    assert (got.phase_seconds, got.samples_per_s, got.peak_gib) == (2.0, 4.0, 0.9)
    # two pairs, three alike, three of which two are alike, four: 2 + 1 + 2 + 4 of 12
    assert got.distinct == 9 / 12
    # only "good good good" comes twice
    assert got.repeats == 0.25


def test_pairs_learned_from_are_counted(tmp_path):
    learning = {"learning": {"steps_per_phase": 5, "batch": 3}}
    got = comparison.measure(write_run(tmp_path, np.ones(4), learning=learning))
    assert got.samples_per_s == 4 * 5 * 3 / 8


def test_a_run_that_loses_converges_never(tmp_path):
    got = comparison.measure(write_run(tmp_path, np.full(4, -1.0)))
    assert got.phases_to is None and got.seconds_to is None
    # 0.5 above the start at phase 2, then 1.5 below it
    np.testing.assert_allclose(got.roughness, np.sqrt((0 + 0 + 1.5**2) / 3))


def test_table_and_json_say_the_same(tmp_path):
    measured = comparison.compare(
        {
            "ppo": write_run(tmp_path / "ppo", np.ones(4) + np.arange(4)),
            "dpo": write_run(tmp_path / "dpo", np.full(4, -1.0) - np.arange(4)),
        }
    )
    plain = json.loads(comparison.to_json(measured))
    assert plain["ppo"]["gain"]["mean"] == 2.5
    assert plain["dpo"]["phases_to"] is None
    text = comparison.to_markdown(measured)
    assert text.splitlines()[0] == "|  | ppo | dpo |"
    assert "| phases to 90 % of it | 4 | – |" in text


def test_what_cannot_be_compared(tmp_path):
    folder = write_run(tmp_path / "a", np.ones(4))
    files = run_files.RunFiles(folder)
    rows = [r for r in run_files.read_responses(folder, 4) if r["split"] == "heldout"]
    run_files.write_responses(files, 4, [row | {"prompt": "other"} for row in rows])
    with pytest.raises(UserError, match="are not the same"):
        comparison.measure(folder)
    other = run_files.open_run(tmp_path / "b", {})
    run_files.append_metrics(other, {"phase": 0})
    with pytest.raises(UserError, match="b has no held-out reward after training"):
        comparison.measure(other.workdir)
