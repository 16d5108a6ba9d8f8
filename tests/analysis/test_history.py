"""All that was saved and drawn, phase by phase."""

from rlhf_jax import run_files
from rlhf_jax.analysis.history import full_history, sample_rows

from .answered import drawn, samples_of

ROWS = {
    0: [{"split": "heldout", "prompt": "p", "response": "r", "reward": 1.0}],
    2: [
        {"split": "heldout", "prompt": "p", "response": "s", "reward": 0.5},
        {"split": "train", "prompt": "q", "response": "t", "reward": 0.0},
    ],
    10: [{"split": "train", "prompt": "q", "response": "u", "reward": 0.25}],
}


def save(workdir):
    for phase, rows in ROWS.items():
        run_files.write_responses(run_files.RunFiles(workdir), phase, rows)


def test_a_row_of_a_sample():
    rows = [[(5, -1.0, -3.0), (6, -1.0, -0.5)], [(5, -2.0, -2.0)]]
    samples = samples_of(
        ["a b", "é"], [0.5, -1.0], phase=3, rows=rows, judges={"kind": [1, 2]}
    )
    found = sample_rows(samples)
    # log ratios 2 and −0.5
    assert found[0] == {
        "phase": 3,
        "index": 0,
        "prompt": "prompt 0",
        "response": "a b",
        "reward": 0.5,
        "judge/kind": 1.0,
        "characters": 3.0,
        "tokens": 2.0,
        "finished": 1.0,
        "kl": 1.5,
    }
    assert (found[1]["index"], found[1]["response"], found[1]["kl"]) == (1, "é", 0.0)
    assert all(type(x) in (int, float, str) for row in found for x in row.values())


def test_every_saved_row_by_phase(tmp_path):
    save(tmp_path)
    wanted = [{"phase": phase} | row for phase, rows in ROWS.items() for row in rows]
    assert full_history(tmp_path, []) == wanted


def test_drawn_answers_come_behind_the_saved_ones(tmp_path):
    save(tmp_path)
    more, fewer = drawn(0, phase=2, N=5), drawn(1, phase=2, N=3)
    other = drawn(2, phase=7, N=2)
    found = full_history(tmp_path, [fewer, other, more])
    assert full_history(tmp_path, [more, fewer, other]) == found
    phases = [row["phase"] for row in found]
    assert phases == [0, 2, 2, *[2] * 5, 7, 7, 10]
    splits = [row["split"] for row in found if row["phase"] == 2]
    assert splits == ["heldout", "train", *["analysis"] * 5]
    texts = [row["response"] for row in found if row["split"] == "analysis"]
    assert texts == [*more.responses, *other.responses]


def test_a_run_without_responses(tmp_path):
    assert full_history(tmp_path, []) == []
    found = full_history(tmp_path, [drawn(0, phase=1, N=2)])
    assert [row["phase"] for row in found] == [1, 1]
