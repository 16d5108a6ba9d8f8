"""Which label, on which scale, of which text."""

import math

import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.rewards.labels import (
    OUTPUTS,
    Reading,
    check_reading,
    fill_text,
    find_label,
    label_names,
    read_scores,
)

MOODS = ["NEGATIVE", "POSITIVE"]
FEELINGS = ["anger", "joy", "fear"]


@pytest.mark.parametrize(
    ("labels", "label", "want"),
    [
        (["LABEL_0"], None, 0),
        (["toxic"], None, 0),
        (MOODS, None, 1),
        (["pos", "neg"], None, 0),
        (["LABEL_0", "LABEL_1"], None, 1),
        (MOODS, "NEGATIVE", 0),
        (MOODS, "negative", 0),
        (FEELINGS, 2, 2),
        (FEELINGS, "2", 2),
        (["joy", "Joy"], "Joy", 1),  # case counts where it must
        (["2", "1", "0"], "2", 0),  # a name before a number
        (["2", "1", "0"], 2, 0),
    ],
)
def test_the_label_is_found(labels, label, want):
    assert find_label(labels, label, "m") == want


@pytest.mark.parametrize(
    ("labels", "label", "words"),
    [
        (FEELINGS, None, r"m has several labels \(0: anger, 1: joy, 2: fear\)"),
        (["toxic", "fine"], None, "say which by `label`"),
        (["positive", "LABEL_1"], None, "say which by `label`"),
        (["neg", "neutral", "pos"], None, "say which by `label`"),
        (FEELINGS, "hate", "no label 'hate'; its labels are 0: anger, 1: joy"),
        (FEELINGS, 3, "no label 3"),
        (FEELINGS, -1, "no label -1"),
        (["joy", "Joy"], "JOY", "no label 'JOY'"),
    ],
)
def test_a_label_that_is_not_there(labels, label, words):
    with pytest.raises(UserError, match=words):
        find_label(labels, label, "m")


def test_names_come_from_config_json():
    table = {"id2label": {"1": "yes", "0": "no"}}
    assert label_names(table, 2) == ["no", "yes"]
    assert label_names(table, 3) == ["no", "yes", "LABEL_2"]
    assert label_names({"id2label": None}, 2) == ["LABEL_0", "LABEL_1"]


def test_two_labels_worked_by_hand():
    """z = 1, 3: p = e³/(e + e³) = 1/(1 + e⁻²) = 0.8808; odds e², log odds 2."""
    z = np.float32([[1, 3]])
    got = {name: read_scores(z, 1, name, None) for name in OUTPUTS}
    assert all(x.shape == (1,) and x.dtype == np.float32 for x in got.values())
    p = 1 / (1 + math.exp(-2))
    want = {"logit": 3, "probability": p, "log_probability": math.log(p), "log_odds": 2}
    for name, value in want.items():
        np.testing.assert_allclose(got[name], [value], rtol=1e-6)


def test_labels_that_do_not_exclude_each_other_and_one_alone():
    """p = σ(3) = 1/(1 + e⁻³) = 0.9526, whatever the other label says."""
    p = [1 / (1 + math.exp(-3))]
    many = read_scores(
        np.float32([[1, 3]]), 1, "probability", "multi_label_classification"
    )
    alone = read_scores(np.float32([[3]]), 0, "probability", None)
    np.testing.assert_allclose(many, p, rtol=1e-6)
    np.testing.assert_allclose(alone, p, rtol=1e-6)
    odds = read_scores(np.float32([[3]]), 0, "log_odds", None)
    np.testing.assert_allclose(odds, [3], rtol=1e-6)


@pytest.mark.parametrize("index", range(3))
def test_three_labels_equal_a_softmax(index):
    z = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    for row in range(5):
        weights = [math.exp(value) for value in z[row]]
        p = weights[index] / sum(weights)
        got = {name: read_scores(z, index, name, None)[row] for name in OUTPUTS}
        np.testing.assert_allclose(got["probability"], p, rtol=1e-5)
        np.testing.assert_allclose(got["log_probability"], math.log(p), rtol=1e-5)
        np.testing.assert_allclose(got["log_odds"], math.log(p / (1 - p)), rtol=1e-4)


@pytest.mark.parametrize("output", OUTPUTS)
def test_sure_classifiers_give_finite_rewards(output):
    z = np.float32([[300, -300], [-300, 300]])
    assert np.isfinite(read_scores(z, 1, output, None)).all()


def test_texts_are_filled_in_once():
    template = "USER: {prompt} ASSISTANT:{response}"
    got = fill_text(template, "print {response}", " {prompt}\\1")
    assert got == "USER: print {response} ASSISTANT: {prompt}\\1"
    assert fill_text("{response}", "a", "b") == "b"
    assert fill_text(Reading().text, "a", " b") == "a b"


@pytest.mark.parametrize(
    ("reading", "problem", "words"),
    [
        (Reading(output="p"), None, "unknown output 'p'.*logit, probability"),
        (Reading(text="{prompt}"), None, "shows the classifier no response"),
        (Reading(text="response"), None, r"take \"{prompt}{response}\", \"{response}"),
        (Reading(output="log_odds"), "regression", "this model is a regression"),
    ],
)
def test_a_reading_that_makes_no_sense(reading, problem, words):
    with pytest.raises(UserError, match=words):
        check_reading(reading, problem)
    check_reading(Reading(), "regression")
