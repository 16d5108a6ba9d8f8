"""What a reward model must beat: rules that know nothing but words and lengths.

Each is fitted on the training pairs alone and gives margins (see `pair_analysis`) of
the held-out ones.

Dimension key: N pairs, V words.
"""

import collections
import re
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, sparse, special

from rlhf_jax.data.rows import Pair

WORD = re.compile(r"\w+(?:'\w+)*|[!?]")
STRENGTHS = (300.0, 100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1)
MIN_PAIRS = 2  # a word of fewer training pairs tells nothing about others


class Baseline(NamedTuple):
    """A rule's name, as it turned out on the training pairs, and what it says."""

    name: str
    margins: np.ndarray  # [N] float64, of the held-out pairs


def baselines(train: Sequence[Pair], heldout: Sequence[Pair]) -> list[Baseline]:
    """The better of "longer wins" and "shorter wins" on `train`, and a bag of words."""
    return [by_length(train, heldout), bag_of_words(train, heldout)]


def by_length(train: Sequence[Pair], heldout: Sequence[Pair]) -> Baseline:
    """The longer response in characters, or the shorter, if that is better on `train`.

    Of pairs of equal length it knows nothing: margin zero.
    """
    longer = lambda pairs: np.sign(
        [float(len(pair.chosen) - len(pair.rejected)) for pair in pairs]
    )
    sign = 1.0 if longer(train).sum() >= 0 else -1.0
    name = "longer wins" if sign > 0 else "shorter wins"
    return Baseline(name, sign * longer(heldout))


def bag_of_words(train: Sequence[Pair], heldout: Sequence[Pair]) -> Baseline:
    """Bradley-Terry on differences of word counts: logistic regression without order.

    r(y) = w · counts(y),   min_w Σ ℓ(w) + λ/2 ‖w‖²

    with the raters' probabilities as labels. λ is the one that is best, by its loss on
    the other half, after fitting one half of the training texts; no text is in both.
    """
    words = _vocabulary(train)
    differences = count_differences(train, words)
    labels = np.array([pair.probability for pair in train])
    strength = choose_strength(differences, labels, _halves(train))
    weights = fit(differences, labels, strength)
    return Baseline("bag of words", count_differences(heldout, words) @ weights)


def split_words(text: str) -> list[str]:
    """The words of a text in lower case, and its exclamation and question marks."""
    return WORD.findall(text.lower())


def count_differences(
    pairs: Sequence[Pair], words: dict[str, int]
) -> sparse.csr_matrix:
    """[N, V]: how many more times a word is in the chosen response."""
    rows, columns, values = [], [], []
    for row, pair in enumerate(pairs):
        for side, value in ((pair.chosen, 1.0), (pair.rejected, -1.0)):
            found = [words[word] for word in split_words(side) if word in words]
            columns += found
            rows += [row] * len(found)
            values += [value] * len(found)
    shape = len(pairs), len(words)
    return sparse.csr_matrix((values, (rows, columns)), shape)  # doubles are summed


def choose_strength(
    differences: sparse.csr_matrix, labels: np.ndarray, halves: np.ndarray
) -> float:
    """The λ of `STRENGTHS` that is best on the half it was not fitted on, both ways.

    From the strongest on, until weaker ones are worse.

    Args:
      differences: [N, V].
      labels: [N], P(chosen is preferred).
      halves: [N], 0 or 1; −1 for pairs across both, which are left out.
    """
    parts = [np.flatnonzero(halves == half) for half in (0, 1)]
    if not all(map(len, parts)):
        return 1.0
    best, least = STRENGTHS[0], np.inf
    weights: list[np.ndarray | None] = [None, None]
    for strength in STRENGTHS:
        total = 0.0
        for half, (fitted, judged) in enumerate((parts, parts[::-1])):
            found = fit(differences[fitted], labels[fitted], strength, weights[half])
            total += _loss(differences[judged] @ found, labels[judged]).sum()
            weights[half] = found
        if total > least:
            break
        best, least = strength, total
    return best


def fit(
    differences: sparse.csr_matrix,
    labels: np.ndarray,
    strength: float,
    start: np.ndarray | None = None,
) -> np.ndarray:
    """The weights w [V] of the least loss, by Newton's method with conjugate gradients.

    The loss is convex and its Hessian times a vector is two sparse products, so that a
    few steps are enough.
    """
    transposed = differences.T.tocsr()
    sigmoid = lambda w: special.expit(differences @ w)

    def value(w):
        penalty = 0.5 * strength * np.sum(w * w)
        return _loss(differences @ w, labels).sum() + penalty

    def gradient(w):
        return transposed @ (sigmoid(w) - labels) + strength * w

    def curvature(w, direction):
        p = sigmoid(w)
        return transposed @ (p * (1 - p) * (differences @ direction)) + (
            strength * direction
        )

    found = optimize.minimize(
        value,
        np.zeros(differences.shape[1]) if start is None else start,
        jac=gradient,
        hessp=curvature,
        method="Newton-CG",
        options={"maxiter": 50, "xtol": 1e-5},
    )
    return found.x


def _loss(margins: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """−p log σ(m) − (1 − p) log σ(−m), [N]."""
    return np.logaddexp(0.0, margins) - labels * margins


def _vocabulary(pairs: Sequence[Pair]) -> dict[str, int]:
    """The words of at least `MIN_PAIRS` pairs, numbered."""
    counts = collections.Counter(
        word
        for pair in pairs
        for word in {*split_words(pair.chosen), *split_words(pair.rejected)}
    )
    known = sorted(word for word, count in counts.items() if count >= MIN_PAIRS)
    return {word: number for number, word in enumerate(known)}


def _halves(pairs: Sequence[Pair]) -> np.ndarray:
    """[N]: the half, 0 or 1, that both whole texts are in by their hash, else −1."""
    half = lambda text: zlib.crc32(text.strip().encode()) % 2
    found = [
        [half(pair.prompt + side) for side in (pair.chosen, pair.rejected)]
        for pair in pairs
    ]
    return np.array([one if one == other else -1 for one, other in found], int)
