"""Rules that know only words or lengths, fitted on training pairs alone."""

import numpy as np
import pytest
from scipy import optimize

from rlhf_jax.data.rows import Pair
from rlhf_jax.evaluation import pair_baselines
from rlhf_jax.evaluation.pair_baselines import (
    bag_of_words,
    baselines,
    by_length,
    choose_strength,
    count_differences,
    fit,
    split_words,
)

LONGER = [Pair("", "a good long answer", "short"), Pair("", "quite long", "no")]
SHORTER = [Pair("", "yes", "a long answer that rambles")]
GOOD, BAD = ("fine", "lovely", "witty"), ("dull", "poor", "dreary")
NOUNS = [f"film{i}" for i in range(30)]


def opinions(nouns):
    """Praise beats blame, of any length, about nouns that say nothing."""
    rng = np.random.default_rng(0)
    pairs = []
    for noun in nouns:
        good, bad = rng.choice(GOOD), rng.choice(BAD)
        filler = " and so on" * int(rng.integers(3))
        pairs.append(Pair("The ", f"{noun} is {good}{filler}", f"{noun} is {bad}"))
        pairs.append(Pair("The ", f"{noun} is {good}", f"{noun} is {bad}{filler}"))
    return pairs


def test_the_better_length_rule_of_the_training_pairs():
    found = by_length(LONGER, LONGER + SHORTER + [Pair("", "abc", "xyz")])
    assert found.name == "longer wins"
    assert found.margins.tolist() == [1, 1, -1, 0]
    found = by_length(SHORTER, LONGER + SHORTER)
    assert found.name == "shorter wins"
    assert found.margins.tolist() == [-1, -1, 1]


def test_words():
    assert split_words("It's GOOD, isn't it?! 5-star") == [
        *("it's", "good", "isn't", "it", "?", "!", "5", "star")
    ]


def test_count_differences_by_hand():
    words = {"good": 0, "film": 1, "bad": 2}
    pairs = [Pair("A ", "good good film", "bad film"), Pair("A ", "unknown", "Bad")]
    got = count_differences(pairs, words).toarray()
    assert got.tolist() == [[2, 0, -1], [0, 0, -1]]


def test_the_fit_is_that_of_another_minimizer():
    rng = np.random.default_rng(1)
    pairs = opinions(NOUNS)
    words = pair_baselines._vocabulary(pairs)
    differences = count_differences(pairs, words)
    labels = rng.uniform(0.5, 1.0, len(pairs))

    def loss(w):  # −p log σ(m) − (1 − p) log(1 − σ(m)), and λ/2 ‖w‖² with λ = 2
        p = 1 / (1 + np.exp(-(differences.toarray() @ w)))
        parts = labels * np.log(p) + (1 - labels) * np.log(1 - p)
        return -parts.sum() + w @ w

    wanted = optimize.minimize(loss, np.zeros(len(words)), tol=1e-10).x
    np.testing.assert_allclose(fit(differences, labels, 2.0), wanted, atol=1e-4)


def test_a_bag_of_words_learns_words():
    train, heldout = opinions(NOUNS[:20]), opinions(NOUNS[20:])
    found = bag_of_words(train, heldout)
    assert (found.margins > 0).all()
    # and it has no side: the same pair the other way round is its negative
    swapped = [p._replace(chosen=p.rejected, rejected=p.chosen) for p in heldout]
    np.testing.assert_allclose(bag_of_words(train, swapped).margins, -found.margins)


def test_soft_labels_make_it_less_sure():
    train, heldout = opinions(NOUNS[:20]), opinions(NOUNS[20:])
    unsure = [pair._replace(probability=0.6) for pair in train]
    sure = bag_of_words(train, heldout).margins
    assert bag_of_words(unsure, heldout).margins.max() < sure.min()


def test_strength_is_chosen_by_texts_that_were_not_fitted():
    """Words that come once each: all that can be learned is noise."""
    rng = np.random.default_rng(2)
    noise = rng.normal(size=(200, 50))
    labels = rng.integers(0, 2, 200).astype(float)
    halves = np.arange(200) % 2
    sparse = pair_baselines.sparse.csr_matrix
    strongest = pair_baselines.STRENGTHS[0]
    assert choose_strength(sparse(noise), labels, halves) == strongest
    clear = (noise[:, 0] > 0).astype(float)
    assert choose_strength(sparse(noise), clear, halves) < strongest
    assert choose_strength(sparse(noise), clear, np.full(200, -1)) == 1.0


def test_no_text_is_in_both_halves():
    pairs = opinions(NOUNS)
    halves = pair_baselines._halves(pairs)
    assert set(halves) == {-1, 0, 1}
    texts = [
        {p.prompt + side for p, h in zip(pairs, halves) if h == half for side in p[1:3]}
        for half in (0, 1)
    ]
    assert texts[0] and texts[1] and not texts[0] & texts[1]


def test_the_held_out_pairs_teach_nothing():
    """Whatever they say, the margins of another held-out pair stay."""
    train, asked = opinions(NOUNS[:20]), opinions(NOUNS[20:21])
    others = opinions(NOUNS[21:])
    turned = [p._replace(chosen=p.rejected, rejected=p.chosen) for p in others]
    for one, other in zip(
        baselines(train, asked + others), baselines(train, asked + turned)
    ):
        assert one.name == other.name
        np.testing.assert_array_equal(one.margins[:2], other.margins[:2])


@pytest.mark.parametrize("count", [1, 2])
def test_a_handful_of_pairs(count):
    found = baselines(LONGER[:count], SHORTER)
    assert all(np.isfinite(rule.margins).all() for rule in found)
