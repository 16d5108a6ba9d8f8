"""Pairs of texts of which people preferred one, for reward models."""

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax.data import reviews
from rlhf_jax.data.cleaning import AS_IT_IS, Cleaning, Counts, prepare_rows
from rlhf_jax.data.formats import read_pairs
from rlhf_jax.data.reviews import Review
from rlhf_jax.data.rows import Pair
from rlhf_jax.data.splits import open_split
from rlhf_jax.errors import UserError

HELDOUT = ("validation", "test")

__all__ = ["Pair", "load_pairs", "load_preferences", "preference", "preference_pairs"]


def load_pairs(
    source: str,
    *,
    split: str | None,
    tokenizer: Any = None,
    preference: str = "better",
    cleaning: Cleaning = AS_IT_IS,
    domains: Sequence[str] = (),
    rounds: int = 0,
    seed: int = 0,
) -> tuple[list[Pair], Counts]:
    """The preference pairs of any source, and how many rows were dropped for what.

    Args:
      source: "builtin:reviews", or a file or data set as in `data.tables` with columns
        as in `data.formats`.
      split: of the built-in sentences and of a hub's data set, the split of that name;
        of a file "train" or "validation" ("heldout" is the same), by the hash of the
        prompt; None is all of a file.
      tokenizer: writes chat messages by its template, and counts tokens.
      preference: "better", or "safer" of PKU-SafeRLHF.
      cleaning: what is dropped or cut; the built-in sentences are clean already.
      domains: of the built-in sentences; none named is all of them.
      rounds: of the built-in sentences, see `load_preferences`.
      seed: of those rounds.

    Returns:
      The pairs, their prompts as strings, and the counts of `data.cleaning`.

    Raises:
      UserError: whatever is wrong with the source, with file and line.
    """
    if source == reviews.SOURCE:
        pairs = load_preferences(
            source,
            split=split or "train",
            domains=domains or tuple(reviews.FILES),
            rounds=rounds,
            seed=seed,
        )
        return pairs, {"kept": len(pairs)}
    table = open_split(source, split)
    rows = read_pairs(table, preference)
    return prepare_rows(rows, table, split, tokenizer, cleaning)


def load_preferences(
    source: str, *, split: str, domains: Sequence[str], rounds: int, seed: int
) -> list[Pair]:
    """Preference pairs from the human-rated sentences.

    Args:
      source: "builtin:reviews".
      split: "train", "validation" or "test", a sentence is in one of them only;
        "heldout" is the last two together.
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
    names = HELDOUT if split == "heldout" else (split,)
    parts = [reviews.load_reviews(name, domains=domains) for name in names]
    rows = [row for part in parts for row in part]
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
