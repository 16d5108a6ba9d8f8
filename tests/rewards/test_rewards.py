"""Rewards from a config: found by name, weighed, and refused when they are wrong."""

import pathlib
import shutil
import sys

import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.rewards import (
    Reward,
    build_rewards,
    functions,
    judge_scores,
    score_all,
)
from rlhf_jax.rewards.ensemble import Detailed

MODULE = """
import json

import numpy as np

ANSWER = 42

def length(prompts, responses):
    return [len(r) for r in responses]

def double(prompts, responses, **columns):
    return np.array([2 * len(r) for r in responses], np.float64)

def by_label(prompts, responses, *, label):
    return label

def as_jax(prompts, responses, **columns):
    import jax.numpy as jnp
    return jnp.arange(len(responses))

def changes_its_input(prompts, responses, **columns):
    responses.clear()
    return np.zeros(len(prompts))

def raises(prompts, responses, **columns):
    raise KeyError("mood")

def raises_in_json(prompts, responses, **columns):
    return json.loads("{")

def gives_nan(prompts, responses, **columns):
    return [0.0, float("nan"), float("inf")]

def gives_none(prompts, responses, **columns):
    return [0.0, 1.0, None]

def forgets_to_return(prompts, responses, **columns):
    pass

def too_few(prompts, responses, **columns):
    return [1.0] * (len(responses) - 1)

def one_number(prompts, responses, **columns):
    return 1.0

def column_vector(prompts, responses, **columns):
    return np.zeros((len(responses), 1))

def words(prompts, responses, **columns):
    return ["good"] * len(responses)

def ragged(prompts, responses, **columns):
    return [[1.0], [1.0, 2.0], []]
"""

PROMPTS = ["The film", "The phone", "A"]
RESPONSES = [" is good", " is", ""]  # 8, 3 and 0 letters


@pytest.fixture(autouse=True)
def scores_module(tmp_path, monkeypatch):
    """`my_scores`, a module of the user's own."""
    (tmp_path / "my_scores.py").write_text(MODULE)
    (tmp_path / "needs_more.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("my_scores", "needs_more"):
        sys.modules.pop(name, None)


def one(source, weight=1.0):
    return {"mine": {"source": source, "weight": weight}}


def test_a_function_by_import_path(mesh):
    (reward,) = build_rewards(one("my_scores:length"), mesh=mesh)
    assert (reward.name, reward.source, reward.weight) == (
        "mine",
        "my_scores:length",
        1.0,
    )
    total, parts = score_all([reward], PROMPTS, RESPONSES)
    assert total.dtype == parts["mine"].dtype == np.float32
    assert total.tolist() == parts["mine"].tolist() == [8, 3, 0]


def test_rewards_are_summed_with_their_weights(mesh):
    config = {
        "short": {"source": "my_scores:length", "weight": -0.5},
        "double": {"source": "my_scores:double", "weight": 2},
        "watched": {"source": "my_scores:as_jax", "weight": 0.0},
    }
    total, parts = score_all(build_rewards(config, mesh=mesh), PROMPTS, RESPONSES)
    # -0.5 * n + 2 * 2n = 3.5 n for n = 8, 3, 0; weight 0 is logged and counts nothing
    assert total.tolist() == [28, 10.5, 0] and total.dtype == np.float32
    assert {name: list(part) for name, part in parts.items()} == {
        "short": [8, 3, 0],
        "double": [16, 6, 0],
        "watched": [0, 1, 2],
    }
    assert list(parts) == list(config)


def test_no_rewards_and_no_responses(mesh):
    total, parts = score_all([], PROMPTS, RESPONSES)
    assert total.tolist() == [0, 0, 0] and parts == {}
    rewards = build_rewards(one("my_scores:length"), mesh=mesh)
    assert score_all(rewards, [], [])[0].shape == (0,)


def test_columns_reach_the_function_by_name(mesh):
    rewards = build_rewards(one("my_scores:by_label"), mesh=mesh)
    total, _ = score_all(rewards, PROMPTS, RESPONSES, label=[5, 6, 7])
    assert total.tolist() == [5, 6, 7]
    with pytest.raises(UserError, match=r"raised TypeError: .*label"):
        score_all(rewards, PROMPTS, RESPONSES)


def test_vader_by_its_name(mesh):
    total, _ = score_all(build_rewards(one("vader"), mesh=mesh), PROMPTS, RESPONSES)
    np.testing.assert_array_equal(total, functions.vader(PROMPTS, RESPONSES))


def test_a_function_of_the_package_by_import_path(mesh):
    rewards = build_rewards(one("rlhf_jax.rewards.functions:words"), mesh=mesh)
    assert score_all(rewards, PROMPTS, RESPONSES)[0].tolist() == [2, 1, 0]


def test_a_model_directory_and_a_run(model_directory, mesh, tmp_path):
    shutil.copytree(model_directory, tmp_path / "run" / "export")
    (tmp_path / "run" / "config.json").write_text("{}")
    config = {
        "model": {"source": str(model_directory), "weight": 1.0},
        "run": {"source": str(tmp_path / "run"), "weight": 1.0},
    }
    total, parts = score_all(build_rewards(config, mesh=mesh), PROMPTS, RESPONSES)
    np.testing.assert_array_equal(parts["model"], parts["run"])
    np.testing.assert_array_equal(total, 2 * parts["run"])


def test_the_builtin_model(mesh):
    rewards = build_rewards(one("builtin:reward"), mesh=mesh)
    texts = [" is a wonderful film, moving and funny.", " is a dull, tedious mess."]
    total, _ = score_all(rewards, ["The movie"] * 2, texts)
    assert total[0] > total[1] + 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("valder", "reward 'mine' has the source 'valder', which is no directory"),
        (
            "runs/no_such_run",
            r"neither a directory here nor .* hub \(.*\); take vader, built",
        ),
        ("/no/such:model", "no directory and no import path"),
        ("my_scores", "no directory and no import path"),
        ("my_scores:", "no directory and no import path"),
        (
            "my_scores:lenght",
            r"imported \(AttributeError: module 'my_scores' has no attr",
        ),
        (
            "no_such_module:f",
            r"imported \(ModuleNotFoundError: No module named 'no_such_module'",
        ),
        (
            "needs_more:f",
            r"imported \(ModuleNotFoundError: No module named 'no_such_package'",
        ),
        ("my_scores:ANSWER", "'my_scores:ANSWER' is not a function"),
    ],
)
def test_a_source_that_is_not_there(mesh, source, message):
    with pytest.raises(UserError, match=message) as caught:
        build_rewards(one(source), mesh=mesh)
    assert "\n" not in str(caught.value)


def test_a_directory_that_is_no_model(mesh, tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        build_rewards(one(str(tmp_path)), mesh=mesh)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("raises", r"raised KeyError: 'mood', in line \d+ of .*my_scores\.py$"),
        (
            "raises_in_json",
            r"raised JSONDecodeError: .*, in line \d+ of .*my_scores\.py$",
        ),
        ("gives_nan", r"gave nan for response 1 of 3 \(2 not finite\): ' is'"),
        ("gives_none", r"gave nan for response 2 of 3 \(1 not finite\): ''"),
        ("forgets_to_return", r"gave scores of shape \(\) for 3 responses"),
        ("too_few", r"gave scores of shape \(2,\) for 3 responses; expected \(3,\)"),
        ("one_number", r"gave scores of shape \(\) for 3 responses"),
        ("column_vector", r"gave scores of shape \(3, 1\) for 3 responses"),
        ("words", "gave no array of numbers: could not convert string"),
        ("ragged", "gave no array of numbers: setting an array element"),
    ],
)
def test_a_function_that_goes_wrong(mesh, function, message):
    rewards = build_rewards(one(f"my_scores:{function}"), mesh=mesh)
    with pytest.raises(UserError, match=message) as caught:
        score_all(rewards, PROMPTS, RESPONSES)
    assert str(caught.value).startswith(f"reward 'mine' (my_scores:{function}) ")


def test_a_function_cannot_change_the_texts_of_the_next(mesh):
    config = one("my_scores:changes_its_input") | {
        "length": {"source": "my_scores:length", "weight": 1.0}
    }
    responses = list(RESPONSES)
    total, _ = score_all(build_rewards(config, mesh=mesh), PROMPTS, responses)
    assert total.tolist() == [8, 3, 0] and responses == RESPONSES


def test_a_classifier_and_a_function_have_no_scale(mesh):
    encoder = pathlib.Path(__file__).parents[1] / "fixtures" / "encoders" / "bert"
    for source, message in (
        (str(encoder), r"it is a classifier \(bert\), and only reward models"),
        ("vader", "is no model, and only models have normalize"),
    ):
        with pytest.raises(UserError, match=message):
            build_rewards({"mine": {"source": source, "normalize": True}}, mesh=mesh)


def test_a_judge_gives_its_scores_and_no_details():
    """The members' deviation of an ensemble is no judge of its own."""
    detailed = lambda prompts, responses: Detailed(
        np.float32([1.0, 2.0]), {"std": np.float32([0.1, 0.2])}
    )
    judge = Reward("several", "a + b", 1.0, detailed)
    found = judge_scores([judge], ["p", "q"], ["x", "y"])
    assert list(found) == ["judge/several"]
    np.testing.assert_array_equal(found["judge/several"], [1.0, 2.0])
