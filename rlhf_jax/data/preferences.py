"""Pairs of texts of which people preferred one, for reward models."""

import collections
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlhf_jax.data import reviews
from rlhf_jax.data.reviews import Review
from rlhf_jax.errors import UserError


class Pair(NamedTuple):
    """Two real continuations of one prompt, `chosen` rated no lower by people."""

    prompt: str
    chosen: str  # prompt + chosen is the whole text
    rejected: str
    probability: float  # P(a rater of chosen > a rater of rejected), ties half
    domain: str


def load_preferences(
    source: str, *, split: str, domains: Sequence[str], rounds: int, seed: int
) -> list[Pair]:
    """Preference pairs from the human-rated sentences.

    Args:
      source: "builtin:reviews".
      split: "train", "validation" or "test"; a sentence is in one split only.
      domains: of the sentences.
      rounds: besides the pairs that share a beginning, each sentence is compared with
        so many random others of its domain; 0 for none.
      seed: of those random comparisons.

    Raises:
      UserError: an unknown source, or the sentences cannot be had.
    """
    if source != reviews.SOURCE:
        raise UserError(
            f"config.data.source={source!r} is unknown: take {reviews.SOURCE!r}"
        )
    rows = reviews.load_reviews(split, domains=domains)
    return preference_pairs(rows) + random_pairs(rows, rounds=rounds, seed=seed)


def preference_pairs(
    rows: Sequence[Review],
    *,
    max_prefix: int = 4,
    min_gap: float = 1.0,
    min_probability: float = 0.8,
) -> list[Pair]:
    """Pairs of sentences that begin alike and that people rated differently.

    For each prefix length from `max_prefix` words down to one, the sentences of a
    domain that share that prefix are sorted by mean rating and the i-th is paired with
    the one half the group above it, which gives gaps of ordinary size, not only
    extremes. A sentence is in at most one pair for each prefix length, and two
    sentences are paired once. The order is by prefix length, domain, prefix, rating.

    Args:
      rows: the sentences of ONE split, so that no sentence is on two sides of it.
      max_prefix: the longest prompt in words.
      min_gap: least difference of the mean ratings.
      min_probability: least P(rater of chosen > rater of rejected), ties half.
    """
    pairs, seen = [], set()
    for length in range(max_prefix, 0, -1):
        groups = collections.defaultdict(list)
        for row in rows:
            words = row.text.split(" ")
            if len(words) > length:
                groups[row.domain, " ".join(words[:length])].append(row)
        for (domain, prompt), group in sorted(groups.items()):
            group.sort(key=lambda row: (row.rating, row.text))
            half = (len(group) + 1) // 2
            for low, high in zip(group, group[half:]):
                if (low.text, high.text) in seen or high.rating - low.rating < min_gap:
                    continue
                probability = preference(high.ratings, low.ratings)
                if probability < min_probability:
                    continue
                seen.add((low.text, high.text))
                chosen, rejected = high.text[len(prompt) :], low.text[len(prompt) :]
                pairs.append(Pair(prompt, chosen, rejected, probability, domain))
    return pairs


def random_pairs(rows: Sequence[Review], *, rounds: int, seed: int) -> list[Pair]:
    """Sentences against random others of their domain, with the raters' probability.

    Most are no clear case: the probability is the soft label to train with.
    """
    rng = np.random.default_rng(seed)
    by_domain: dict[str, list[Review]] = {}
    for row in rows:
        by_domain.setdefault(row.domain, []).append(row)
    pairs = []
    for _ in range(rounds):
        for domain, group in sorted(by_domain.items()):
            order = rng.permutation(len(group))
            for one, other in zip(order[0::2], order[1::2]):
                high, low = group[one], group[other]
                if high.rating < low.rating:
                    high, low = low, high
                probability = preference(high.ratings, low.ratings)
                pairs.append(Pair("", high.text, low.text, probability, domain))
    return pairs


def preference(first: Sequence[int], second: Sequence[int]) -> float:
    """P(a rater of `first` > a rater of `second`) over all their pairs, ties half."""
    difference = np.subtract.outer(np.asarray(first), np.asarray(second))
    return float(np.mean((np.sign(difference) + 1) / 2))
