"""What is measured on a phase's answers, by hand."""

import numpy as np
import pytest

from rlhf_jax.analysis.samples import PhaseSamples
from rlhf_jax.analysis.signals import signals_of, surprise, usual_of, variety
from rlhf_jax.text_signals import near_copies

PROMPTS = ["p", "q", "r"]
TEXTS = ["A good film a good film", "Не то", ""]
USUAL = usual_of(["Some text, as most are.\n"])


def make_samples(**changes):
    logprobs = np.array([[-1, -3, np.nan], [-2, np.nan, np.nan], [np.nan] * 3])
    return PhaseSamples(
        phase=3,
        prompts=PROMPTS,
        responses=TEXTS,
        tokens=np.zeros((3, 3), np.int32),
        mask=np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]], bool),
        logprobs=logprobs.astype(np.float32),
        ref_logprobs=logprobs.astype(np.float32),
        finished=np.array([True, False, True]),
        scores={
            "reward": np.array([1, 5, 2], np.float32),
            "reward/part": np.zeros(3, np.float32),
            "judge/vader": np.array([0.5, 0, 0], np.float32),
        },
    )._replace(**changes)


def test_signals_by_hand():
    got = signals_of(make_samples(), USUAL)
    wanted = {
        "reward": [1, 5, 2],
        "judge/vader": [0.5, 0, 0],
        "reward_spread": [1, 3, 0],  # from the median, 2
        "tokens": [2, 1, 0],
        "finished": [1, 0, 1],
        "surprise": [2, 2, np.nan],
        # of a good film / good film a / film a good / a good film the last is not new
        "repeated": [0.25, 0, 0],
        "near_copies": [0, 0, 0],
        # four letters, all Cyrillic, beside 40 usual ones
        "foreign": [0, 4 / 44, 0],
    }
    for name, values in wanted.items():
        np.testing.assert_allclose(got[name], values, err_msg=name)
    assert "reward/part" not in got


def test_shares_are_taken_with_usual_characters():
    got = signals_of(make_samples(responses=["...", "\n" * 60, ""]), USUAL)
    usual = USUAL.shares
    assert got["format/punctuation"][0] == pytest.approx(
        (3 + 40 * usual.punctuation) / 43
    )
    assert got["line_breaks"][1] == pytest.approx((60 + 40 * usual.line_breaks) / 100)
    assert got["format/letters"][2] == pytest.approx(usual.letters)
    assert "format/line_breaks" not in got


def test_where_only_texts_are_left():
    tokens = {"tokens": None, "mask": None, "logprobs": None, "ref_logprobs": None}
    got = signals_of(make_samples(scores={}, **tokens), USUAL)
    np.testing.assert_array_equal(got["tokens"], [6, 2, 0])  # words
    assert not {"surprise", "reward", "reward_spread"} & got.keys()


def test_scores_that_are_not_finite_stay_so():
    scores = {"reward": np.array([np.nan, 1, 2])}
    got = signals_of(make_samples(scores=scores), USUAL)
    np.testing.assert_allclose(got["reward_spread"], [np.nan, 0.5, 0.5])


def test_near_copies_are_of_other_prompts():
    same = make_samples(responses=["one and the same"] * 3, prompts=["p", "p", "q"])
    np.testing.assert_array_equal(signals_of(same, USUAL)["near_copies"], [1, 1, 1])
    assert near_copies(same.responses[:2], same.prompts[:2]).max() == 0
    alone = same._replace(prompts=["p"] * 3)
    assert signals_of(alone, USUAL)["near_copies"].max() == 0


def test_surprise_is_bounded():
    logprobs = np.array([[-np.inf, -2.0]], np.float32)
    assert surprise(logprobs, np.ones((1, 2), bool)) == (50 + 2) / 2


def test_usual_is_of_all_texts():
    got = usual_of(["Это фильм", "a", "!!"])
    assert got.script == "cyrillic"
    assert got.shares.punctuation == 2 / 12


def test_variety_does_not_go_with_length():
    # of the longer answer only as many words count as the other has
    before, after = variety(["a b c", "d e"], ["x y z x y z x y z", "x y"])
    np.testing.assert_allclose(before, [1, 1])
    # x y, y z / x y: the first comes twice
    np.testing.assert_allclose(after, [0.75, 0.5])
    before, after = variety(["", "d e"], ["a a a", "d"])
    np.testing.assert_allclose([*before, *after], 1)
