"""Texts that are almost the same: MinHash finds candidates, exact counts decide.

A text is the set of its runs of five words (shingles); two texts are alike by Jaccard's
measure J = |A ∩ B| / |A ∪ B|. One MinHash of a set agrees with another's with
probability J, so 24 bands of 5 hashes put a pair with J = 0.8 into one bucket with
probability 1 - (1 - 0.8⁵)²⁴ = 0.9999, and one with J = 0.3 with 0.06. The work grows
with the texts and with the candidates, not with all pairs of texts.

Dimension key: N texts, S shingles of all texts, H hashes.

References:
  Broder 1997, https://doi.org/10.1109/SEQUEN.1997.666900
  Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, chapter 3.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

WORD = re.compile(r"\w+")
RUN = 5  # words of a shingle
BANDS, ROWS = 24, 5
# In a bucket of many, each text is compared with so many that follow it: a template
# that a thousand texts share must not cost a million comparisons.
NEIGHBOURS = 32


class Alike(NamedTuple):
    """Two texts, by their numbers, and their Jaccard similarity."""

    first: int
    second: int
    similarity: float


def near_duplicates(
    texts: Sequence[str], *, threshold: float = 0.8, seed: int = 0
) -> list[Alike]:
    """The pairs of texts above a similarity, the most alike first.

    Case and punctuation do not count. Texts without a word are like no other; one of
    fewer than five words is one shingle. Of texts with the same words, each after the
    first makes a pair with the first, and only the first is compared with others.

    Args:
      texts: N texts.
      threshold: pairs of a greater similarity are found.
      seed: of the hashes; the same seed and texts give the same result.
    """
    sets = shingle_sets(texts, seed=seed)
    first_of: dict[bytes, int] = {}
    found, distinct = [], []
    for number, shingles in enumerate(sets):
        if len(shingles):
            first = first_of.setdefault(shingles.tobytes(), number)
            if first == number:
                distinct.append(number)
            else:
                found.append(Alike(first, number, 1.0))
    signatures = minhashes([sets[number] for number in distinct], seed=seed)
    for one, other in sorted(candidates(signatures)):
        first, second = distinct[one], distinct[other]
        similarity = jaccard(sets[first], sets[second])
        if similarity > threshold:
            found.append(Alike(first, second, similarity))
    return sorted(found, key=lambda pair: (-pair.similarity, pair.first, pair.second))


def shingle_sets(texts: Sequence[str], *, seed: int = 0) -> list[np.ndarray]:
    """Each text's shingles as sorted, distinct numbers [·] uint64."""
    rng = np.random.default_rng(seed)
    vocabulary: dict[str, int] = {}
    words = [
        [vocabulary.setdefault(w, len(vocabulary)) for w in WORD.findall(text.lower())]
        for text in texts
    ]
    codes = _random_bits(rng, len(vocabulary) + 1)
    factors = _random_bits(rng, RUN) | np.uint64(1)
    return [_shingles(codes[np.array(ids, np.int64)], factors) for ids in words]


def minhashes(sets: Sequence[np.ndarray], *, seed: int = 0) -> np.ndarray:
    """The signatures [N, H] uint64 of sets that are not empty."""
    rng = np.random.default_rng([seed, 1])
    salts = _random_bits(rng, BANDS * ROWS)
    result = np.empty((len(sets), len(salts)), np.uint64)
    if not len(sets):
        return result
    everything = np.concatenate(sets)
    starts = np.cumsum([0, *map(len, sets[:-1])])
    for column, salt in enumerate(salts):
        result[:, column] = np.minimum.reduceat(_mix(everything ^ salt), starts)
    return result


def candidates(signatures: np.ndarray) -> set[tuple[int, int]]:
    """Pairs of rows that agree in a whole band."""
    pairs = set()
    for band in np.split(signatures, BANDS, axis=1):
        order = np.lexsort(band.T)
        changes = np.any(np.diff(band[order], axis=0) != 0, axis=1)
        for bucket in np.split(order, np.flatnonzero(changes) + 1):
            bucket = bucket.tolist()  # ascending, since lexsort keeps the order of ties
            for at, one in enumerate(bucket):
                pairs.update((one, o) for o in bucket[at + 1 : at + 1 + NEIGHBOURS])
    return pairs


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """|A ∩ B| / |A ∪ B| of two sets as sorted, distinct numbers, not both empty."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def _shingles(codes: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """The set of a text's runs of words, each mixed to one number."""
    if not len(codes):
        return codes
    run = min(RUN, len(codes))
    count = len(codes) - run + 1
    total = np.zeros(count, np.uint64)
    for at in range(run):
        total += codes[at : at + count] * factors[at]  # wraps around, as it should
    return np.unique(_mix(total))


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64: every bit of the result hangs on every bit.

    Steele et al. 2014, https://doi.org/10.1145/2660193.2660195
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _random_bits(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(0, 2**64, size=count, dtype=np.uint64)
