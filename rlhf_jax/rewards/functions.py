"""Rewards that are plain functions of the texts: cheap, and easy to game."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np


@functools.cache
def _analyzer():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def vader(
    prompts: Sequence[str], responses: Sequence[str], **columns: Any
) -> np.ndarray:
    """Sentiment of prompt and response together, [B] in -1..1.

    The prompt counts because a negation may stand in it ("I did not" + "like it").

    References:
      Hutto & Gilbert 2014, https://ojs.aaai.org/index.php/ICWSM/article/view/14550
    """
    del columns
    analyzer = _analyzer()
    texts = (prompt + response for prompt, response in zip(prompts, responses))
    scores = [analyzer.polarity_scores(text)["compound"] for text in texts]
    return np.array(scores, np.float32)


def words(
    prompts: Sequence[str], responses: Sequence[str], **columns: Any
) -> np.ndarray:
    """Number of words of the response, [B]; pays for length alone."""
    del prompts, columns
    return np.array([len(text.split()) for text in responses], np.float32)


def distinct_words(
    prompts: Sequence[str], responses: Sequence[str], **columns: Any
) -> np.ndarray:
    """Share of different words in the response, [B] in 0..1; 1 where it is empty."""
    del prompts, columns
    split = [text.lower().split() for text in responses]
    return np.array([len(set(w)) / len(w) if w else 1.0 for w in split], np.float32)


def repeats(
    prompts: Sequence[str], responses: Sequence[str], **columns: Any
) -> np.ndarray:
    """Number of words of the response that it has said before, [B]."""
    del prompts, columns
    said = [text.lower().split() for text in responses]
    return np.array([len(words) - len(set(words)) for words in said], np.float32)
