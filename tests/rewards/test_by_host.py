"""Python rewards on several processes: each scores its share, and all have all."""

import json
import os
import sys

import numpy as np
import pytest

from rlhf_jax.rewards import build_rewards, by_host, functions
from rlhf_jax.rewards.ensemble import Detailed
from tests import processes

SCORES = """
import numpy as np
import jax
from rlhf_jax.rewards.ensemble import Detailed

CALLS = []

def length(prompts, responses, **columns):
    CALLS.append(len(responses))
    return [len(r) for r in responses]

def with_details(prompts, responses, *, offset):
    scores = np.array([len(r) + o for r, o in zip(responses, offset)], np.float32)
    return Detailed(scores, {"words": np.array([len(r.split()) for r in responses])})

def fails_on_one(prompts, responses, **columns):
    if jax.process_index() == 1:
        raise KeyError("mood")
    return [0.0] * len(responses)

def nan_in_the_last_row(prompts, responses, **columns):
    return [float("nan") if r == "r6" else 0.0 for r in responses]

def too_few(prompts, responses, **columns):
    return [0.0] * (len(responses) - 1)
"""
PROGRAM = """
import json
from rlhf_jax import hosts, sharding
from rlhf_jax.errors import UserError
from rlhf_jax.rewards import build_rewards, score_all

hosts.join_hosts()
import jax, my_scores

def told(names, rows):
    rewards = build_rewards({n: {"source": f"my_scores:{n}"} for n in names}, mesh=mesh)
    responses = [("x " * i).strip() for i in range(rows)]
    if rows == 7 and names == ["nan_in_the_last_row"]:
        responses = [f"r{i}" for i in range(rows)]
    columns = {"offset": [100 * i for i in range(rows)]}
    total, parts = score_all(rewards, ["p"] * rows, responses, **columns)
    return total.tolist(), {name: part.tolist() for name, part in parts.items()}

mesh = sharding.make_mesh(data=-1, fsdp=jax.device_count())
with jax.set_mesh(mesh):
    found = {}
    for rows in (7, 6, 2, 1, 0):
        my_scores.CALLS.clear()
        found[rows] = [*told(["length", "with_details"], rows), sum(my_scores.CALLS)]
    for name in ("fails_on_one", "nan_in_the_last_row", "too_few"):
        try:
            told([name], 7)
        except UserError as error:
            found[name] = str(error)
print("found", json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of three processes, with two devices each, has in the end."""
    folder = tmp_path_factory.mktemp("scores")
    (folder / "my_scores.py").write_text(SCORES)
    env = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    program = [sys.executable, "-c", PROGRAM]
    ended = processes.run(program, env, processes.given(3))
    assert [process.status for process in ended] == [0, 0, 0], ended[0].err
    lines = [process.out.splitlines()[-1] for process in ended]
    return [json.loads(line.removeprefix("found ")) for line in lines]


@pytest.mark.parametrize("rows", [7, 6, 2, 1, 0])
def test_all_processes_have_all_scores(found, rows):
    """Response i is i times "x", with spaces between: max(2 i - 1, 0) letters."""
    letters = np.array([max(2 * i - 1, 0) for i in range(rows)])
    offset = 100 * np.arange(rows)
    for total, parts, _ in (process[str(rows)] for process in found):
        np.testing.assert_array_equal(parts["length"], letters)
        np.testing.assert_array_equal(parts["with_details"], letters + offset)
        if rows:
            np.testing.assert_array_equal(parts["with_details_words"], range(rows))
        np.testing.assert_array_equal(total, 2 * letters + offset)


def test_each_scores_its_share(found):
    calls = {rows: [process[rows][2] for process in found] for rows in ("7", "6", "2")}
    assert calls == {"7": [2, 2, 3], "6": [2, 2, 2], "2": [0, 1, 1]}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("fails_on_one", "raised KeyError: 'mood', in line "),
        ("fails_on_one", "(process 1 of 3, rows 2 to 3)"),
        ("nan_in_the_last_row", "(1 not finite): 'r6' (process 2 of 3, rows 4 to 6)"),
        ("too_few", "gave scores of shape (1,) for 2 responses"),
    ],
)
def test_what_is_wrong_on_one_is_told_on_all(found, name, sentence):
    (told,) = {process[name] for process in found}
    assert told.startswith(f"reward '{name}' (my_scores:{name}) ")
    assert sentence in told


def test_alone_one_scores_all():
    def score(prompts, responses, columns):
        return Detailed(
            np.array([len(r) for r in responses], np.float32), {"p": prompts}
        )

    scores, details = by_host.score_share(score, ["a", "b"], ["x", "yy"], {})
    np.testing.assert_array_equal(scores, [1, 2])
    assert details == {"p": ["a", "b"]}


def test_which_rewards_are_shared(mesh, model_directory):
    entries = {"vader": "vader", "letters": "rlhf_jax.rewards.functions:distinct_words"}
    entries["model"] = str(model_directory)
    rewards = build_rewards({k: {"source": v} for k, v in entries.items()}, mesh=mesh)
    shared = {reward.name: reward.by_host for reward in rewards}
    assert shared == {"vader": True, "letters": True, "model": False}
    assert rewards[0].score is functions.vader
