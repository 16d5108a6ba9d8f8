"""A run with a safety filter: unsafe responses earn less and are told."""

import pytest

from rlhf_jax import run_files
from rlhf_jax.errors import UserError
from tests.trainers.runs import metrics_of

FILTER = {
    "safety__source": "tests.trainers.reward_functions:has_o",
    "safety__limit": 0.5,
    "safety__penalty": 2.0,
    "total_phases": 1,
}


def letters(text):
    return sum(c == " " or "a" <= c <= "z" for c in text) / max(len(text), 1)


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_unsafe_responses_earn_less(world, run, tmp_path, algorithm):
    changes = dict(FILTER)
    if algorithm == "grpo":
        changes["grpo__dynamic_sampling"] = 2
    run(world.config(algorithm, tmp_path, **changes))
    rows = run_files.read_responses(tmp_path, 1)
    drawn = [row for row in rows if row["split"] == "train"]
    unsafe = ["o" in row["response"] for row in drawn]
    assert 0 < sum(unsafe) < len(unsafe)
    assert [row["unsafe"] for row in drawn] == unsafe
    for row, bad in zip(drawn, unsafe, strict=True):
        want = letters(row["response"]) - 2.0 * bad
        assert row["reward"] == pytest.approx(want, abs=1e-6)
    share = metrics_of(tmp_path)[1]["response/unsafe"]
    assert share == pytest.approx(sum(unsafe) / len(unsafe))
    # Held-out prompts are measured, not filtered.
    heldout = [row for row in rows if row["split"] == "heldout"]
    assert all("unsafe" not in row for row in heldout)


def test_a_penalty_that_would_pay(world, run, tmp_path):
    with pytest.raises(UserError, match=r"penalty=-1\.0 must be at least 0"):
        run(world.ppo_config(tmp_path, **FILTER | {"safety__penalty": -1.0}))
