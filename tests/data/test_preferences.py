"""Preference pairs: by hand, over random rows, and of the real sentences."""

import numpy as np
import pytest

from rlhf_jax.data import preferences, reviews
from rlhf_jax.data.preferences import (
    Pair,
    load_pairs,
    load_preferences,
    preference,
    preference_pairs,
    random_pairs,
)
from rlhf_jax.data.reviews import Review
from rlhf_jax.errors import UserError


def review(text, *ratings, domain="movie"):
    return Review(text, domain, ratings, sum(ratings) / len(ratings))


def test_preference_by_hand():
    # raters (2, 0) against (0, -1): 2>0, 2>-1, 0=0, 0>-1 -> (1 + 1 + 1/2 + 1) / 4
    assert preference((2, 0), (0, -1)) == pytest.approx(3.5 / 4)
    assert preference((1, 1), (1, 1)) == 0.5
    # of unequal sizes: 3 beats -4 and 4 loses nothing -> 3>-4, 3<4 ... (1 + 0) / 2
    assert preference((3,), (-4, 4)) == 0.5


def test_pairs_share_words_and_domain_and_clear_the_thresholds():
    rows = [
        review("The acting is fine.", 2, 2, 3),
        review("The acting is poor.", -2, -2, -3),
        review("The acting hurts.", -1, -1, -1),
        review("The plot soars.", 3, 3, 3),
        review("The acting is news.", -4, -4, -4, domain="news"),
    ]
    # Three shared words: poor and fine. Two: poor, hurts, fine in order, whose halves
    # pair poor with fine again (dropped). One: poor, hurts | fine, soars.
    assert preference_pairs(rows) == [
        Pair("The acting is", " fine.", " poor.", 1.0, "movie"),
        Pair("The", " plot soars.", " acting hurts.", 1.0, "movie"),
    ]


def test_pairs_need_gap_agreement_and_a_continuation():
    close = [review("It is good.", 2, 2), review("It is nice.", 1.5, 1.5)]
    assert preference_pairs(close) == []
    # The means differ by 1.5, but a rater of the first is above only half of the time.
    split = [review("It is odd.", 4, 4, -1, -1), review("It is so.", 0, 0, 0, 0)]
    assert preference_pairs(split) == []
    short = [review("Great", 4, 4), review("Great waste of time", -3, -3)]
    assert preference_pairs(short) == []


def test_pairs_do_not_depend_on_the_order_of_the_rows():
    rows = [review(f"It was take {i}.", i % 9 - 4, (3 * i) % 9 - 4) for i in range(60)]
    assert preference_pairs(rows) == preference_pairs(rows[::-1])
    assert preference_pairs(rows)


def test_preference_equals_a_loop_and_its_complement():
    rng = np.random.default_rng(0)
    for _ in range(20):
        first, second = rng.integers(-4, 5, 7), rng.integers(-4, 5, 5)
        wins = sum((a > b) + 0.5 * (a == b) for a in first for b in second)
        assert preference(first, second) == pytest.approx(wins / 35)
        assert preference(second, first) == pytest.approx(1 - wins / 35)


def some_rows(count, seed=0):
    rng = np.random.default_rng(seed)
    return [
        review(f"Text {i}", *rng.integers(-4, 5, 6).tolist(), domain=domain)
        for domain in ("movie", "product")
        for i in range(count)
    ]


def test_random_pairs_take_each_sentence_once_a_round():
    rows = some_rows(7)
    pairs = random_pairs(rows, rounds=1, seed=0)
    for domain in ("movie", "product"):
        sides = [t for p in pairs if p.domain == domain for t in p[1:3]]
        assert len(sides) == len(set(sides)) == 6  # the seventh has no partner
    assert len(random_pairs(rows, rounds=3, seed=0)) == 3 * len(pairs)
    assert random_pairs(rows, rounds=0, seed=0) == []
    assert random_pairs(rows, rounds=2, seed=0)[: len(pairs)] == pairs
    assert random_pairs(rows, rounds=1, seed=1) != pairs


def test_random_pairs_put_the_higher_rated_first():
    rows = some_rows(20)
    of = {(row.domain, row.text): row for row in rows}
    for pair in random_pairs(rows, rounds=4, seed=3):
        prompt, chosen, rejected, probability, domain, *others = pair
        assert others == [None, None, None]
        high, low = of[domain, chosen], of[domain, rejected]
        assert prompt == "" and high.rating >= low.rating
        assert probability == preference(high.ratings, low.ratings)


def test_load_preferences_joins_both_kinds(monkeypatch):
    rows = [review(f"It was take {i}.", i % 9 - 4, (3 * i) % 9 - 4) for i in range(30)]
    asked = []

    def load_reviews(split, *, domains):
        asked.append((split, domains))
        return rows

    monkeypatch.setattr(reviews, "load_reviews", load_reviews)
    alike = preference_pairs(rows)
    found = load_preferences(
        "builtin:reviews", split="test", domains=("movie",), rounds=1, seed=5
    )
    assert found == alike + random_pairs(rows, rounds=1, seed=5) and len(alike) > 3
    assert asked == [("test", ("movie",))]


def test_load_pairs_takes_the_builtin_sentences_too(monkeypatch):
    rows = [review(f"It was take {i}.", i % 9 - 4, (3 * i) % 9 - 4) for i in range(30)]
    asked = []

    def load_reviews(split, *, domains):
        asked.append((split, domains))
        return rows

    monkeypatch.setattr(reviews, "load_reviews", load_reviews)
    pairs, counts = load_pairs("builtin:reviews", split="validation", rounds=1, seed=5)
    assert pairs == load_preferences(
        "builtin:reviews", split="validation", domains=(), rounds=1, seed=5
    )
    assert counts == {"kept": len(pairs)} and len(pairs) > 3
    assert asked[0] == ("validation", ("movie", "product", "news", "tweet"))


def test_load_pairs_of_a_file(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,rejected\nWhy?, So., No.\nWho?, I., I. \n")
    pairs, counts = load_pairs(str(path), split=None)
    assert pairs == [Pair("Why?", " So.", " No.")]
    assert counts == {"tie": 1, "kept": 1}
    with pytest.raises(UserError, match="unknown preference 'longer'"):
        load_pairs(str(path), split=None, preference="longer")


def test_an_unknown_source():
    with pytest.raises(UserError, match="'reviews' is unknown: take 'builtin:reviews'"):
        load_preferences("reviews", split="test", domains=(), rounds=0, seed=0)


def test_the_pairs_of_the_real_sentences(archive):
    rows = reviews.load_reviews("test", domains=("movie", "product"), archive=archive)
    pairs = preference_pairs(rows)
    assert len(pairs) == 515
    texts = {row.text for row in rows}
    for pair in pairs:
        assert {pair.prompt + pair.chosen, pair.prompt + pair.rejected} <= texts
        assert 0.8 <= pair.probability <= 1 and pair.chosen.startswith(" ")
        assert 1 <= len(pair.prompt.split()) <= 4
    assert pairs == preferences.preference_pairs(rows[::-1])


def test_what_is_held_out_is_all_that_is_not_trained_on(monkeypatch):
    asked = []
    monkeypatch.setattr(
        reviews, "load_reviews", lambda split, domains: asked.append(split) or []
    )
    load_preferences(
        "builtin:reviews", split="heldout", domains=("movie",), rounds=0, seed=0
    )
    assert sorted([*asked, "train"]) == sorted(reviews.SPLITS)
