"""Rewards that are plain functions of the texts."""

import numpy as np
import pytest

from rlhf_jax.rewards import functions


def test_words_by_hand():
    scores = functions.words(["ignored"] * 3, [" two words", "", " a\nb  c "])
    assert scores.dtype == np.float32 and scores.tolist() == [2, 0, 3]


def test_distinct_words_by_hand():
    # "The the cat the": {the, cat} of 4 words; the empty response repeats nothing
    responses = ["The the cat the", "", "all new words"]
    scores = functions.distinct_words([""] * 3, responses)
    assert scores.dtype == np.float32 and scores.tolist() == [0.5, 1, 1]


def test_vader_has_the_sign_of_the_sentiment():
    prompts = ["The film is", "The film is", "The film"]
    responses = [" wonderful and moving.", " a terrible waste.", " runs two hours."]
    good, bad, neutral = functions.vader(prompts, responses)
    assert -1 <= bad < -0.4 < neutral == 0 < 0.4 < good <= 1


def test_vader_reads_a_negation_in_the_prompt():
    liked, not_liked = functions.vader(["I did", "I did not"], [" like it."] * 2)
    assert liked > 0 > not_liked


def test_vader_equals_its_own_library_and_ignores_columns():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    texts = ["GREAT!!!", "meh :(", "", "not bad at all"]
    scores = functions.vader([""] * 4, texts, label=[1, 2, 3, 4])
    analyzer = SentimentIntensityAnalyzer()
    wanted = [analyzer.polarity_scores(text)["compound"] for text in texts]
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, np.float32(wanted))


@pytest.mark.parametrize("name", ["vader", "words", "distinct_words"])
def test_no_responses(name):
    assert getattr(functions, name)([], []).shape == (0,)
