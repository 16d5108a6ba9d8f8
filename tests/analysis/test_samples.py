"""Saved rows as samples of a phase."""

import numpy as np

from rlhf_jax.analysis.samples import from_rows


def row(split, index, **scores):
    return {
        "split": split,
        "prompt": f"prompt {index}",
        "response": f" answer {index}",
        **scores,
        "kl": 0.5,
        "tokens": 3,
        "finish": "eos" if index % 2 else "length",
        "seed": 0,
        "index": index,
    }


def test_rows_of_the_heldout_split():
    rows = [
        *(row("heldout", i, reward=i / 4, **{"judge/kind": -i}) for i in range(3)),
        *(row("train", i, reward=9.0) for i in range(2)),
    ]
    found = from_rows(7, rows, count=64)
    assert found.phase == 7
    assert found.prompts == ["prompt 0", "prompt 1", "prompt 2"]
    assert found.responses == [" answer 0", " answer 1", " answer 2"]
    assert (found.tokens, found.mask) == (found.logprobs, found.ref_logprobs)
    assert found.tokens is None
    assert found.finished.tolist() == [False, True, False]
    assert found.scores.keys() == {"reward", "judge/kind"}
    assert found.scores["reward"].tolist() == [0.0, 0.25, 0.5]
    assert found.scores["judge/kind"].tolist() == [0.0, -1.0, -2.0]
    assert found.scores["reward"].dtype == np.float32


def test_the_first_so_many():
    rows = [row("train", 0), *(row("heldout", i, reward=0.0) for i in range(5))]
    assert from_rows(0, rows, count=2).prompts == ["prompt 0", "prompt 1"]


def test_parts_of_the_reward_are_kept():
    rows = [row("heldout", 0, reward=1.0, **{"reward/a": 0.25, "reward/b": 0.75})]
    names = from_rows(0, rows, count=2).scores
    assert list(names) == ["reward", "reward/a", "reward/b"]


def test_a_phase_that_was_not_evaluated():
    assert from_rows(3, [row("train", 0, reward=1.0)], count=2) is None
    assert from_rows(3, [], count=2) is None
