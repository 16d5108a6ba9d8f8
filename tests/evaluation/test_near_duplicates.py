"""Near-duplicates: shingles and Jaccard by hand, banding against all pairs."""

import itertools

import numpy as np
import pytest

from rlhf_jax.evaluation import near_duplicates as near

LONG = "one two three four five six seven eight nine ten eleven twelve"


def word_sets(text):
    words = text.lower().split()
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def varied_texts(count, rng):
    """Texts of 200 words of which later ones copy an earlier one with some changes."""
    texts = [rng.integers(0, 500, 200) for _ in range(count // 2)]
    for _ in range(count - len(texts)):
        copy = texts[rng.integers(len(texts))].copy()
        changed = rng.choice(200, rng.integers(1, 8), replace=False)
        copy[changed] = rng.integers(0, 500, len(changed))
        texts.append(copy)
    return [" ".join(f"w{i}" for i in text) for text in texts]


def test_jaccard_by_hand():
    # 12 words have 8 runs of five; with another last word 7 of them are shared, and
    # 8 + 8 - 7 = 9 are in either.
    one, other = near.shingle_sets([LONG, LONG.replace("twelve", "dozen")])
    assert len(one) == len(other) == 8
    assert near.jaccard(one, other) == pytest.approx(7 / 9)


def test_case_and_punctuation_do_not_count():
    (pair,) = near.near_duplicates(["x", LONG, "  " + LONG.upper() + "!!", "y z"])
    assert pair == (1, 2, 1.0)


def test_short_texts_and_texts_without_words():
    pairs = near.near_duplicates(["", "", "so good", "So good.", "good so", "..."])
    assert pairs == [(2, 3, 1.0)]
    assert near.near_duplicates([]) == []
    assert near.near_duplicates(["", "?"]) == []


def test_the_pairs_are_those_of_a_comparison_of_all():
    texts = varied_texts(80, np.random.default_rng(3))
    sets = [word_sets(text) for text in texts]
    expected = {}
    for i, j in itertools.combinations(range(len(texts)), 2):
        similarity = len(sets[i] & sets[j]) / len(sets[i] | sets[j])
        if 0.8 < similarity < 1:
            expected[i, j] = similarity
    found = near.near_duplicates(texts)
    assert len(expected) > 10
    part = {(p.first, p.second): p.similarity for p in found if p.similarity < 1}
    assert part == pytest.approx(expected)
    assert [p.similarity for p in found] == sorted(
        (p.similarity for p in found), reverse=True
    )


def test_minhashes_agree_as_often_as_the_sets_are_alike():
    sets = [np.arange(0, 300, dtype=np.uint64), np.arange(100, 400, dtype=np.uint64)]
    signatures = near.minhashes(sets)
    # 200 of 400 are shared: of 120 hashes half agree, give or take 3 x 0.046
    assert np.mean(signatures[0] == signatures[1]) == pytest.approx(0.5, abs=0.14)
    assert not np.array_equal(signatures, near.minhashes(sets, seed=1))
    np.testing.assert_array_equal(signatures, near.minhashes(sets))


def test_many_texts_of_one_template_do_not_cost_the_square():
    texts = [f"{LONG} {LONG} {LONG} number {i}" for i in range(400)]
    pairs = near.candidates(near.minhashes(near.shingle_sets(texts)))
    assert len(pairs) <= 24 * 400 * near.NEIGHBOURS
    found = near.near_duplicates(texts)
    assert {number for pair in found for number in pair[:2]} == set(range(400))


def test_copies_give_one_pair_each():
    assert near.near_duplicates([LONG] * 4) == [(0, 1, 1.0), (0, 2, 1.0), (0, 3, 1.0)]
