"""Numbers of texts, by hand and beside plain loops."""

import itertools

import numpy as np
import pytest

from rlhf_jax import text_signals
from rlhf_jax.text_signals import (
    character_shares,
    copied_share,
    distinct,
    distinct_pairs,
    distinct_shares,
    near_copies,
    repeated_share,
    repeats_itself,
    script_shares,
)

TEXTS = ["a good film", "good good good good", "one two one two", "what a film it is"]
WORDS = [f"{a}{b}" for a in ("th", "fi", "w", "s") for b in ("e", "at", "lm", "o")]


def random_text(words, seed=0):
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


def prose(characters):
    """Text of ever new words."""
    rng = np.random.default_rng(1)
    letters = np.array(list("etaoinshrdlucmfwyp"))
    text = ""
    while len(text) < characters:
        text += "".join(rng.choice(letters, rng.integers(2, 9))) + " "
    return text[:characters]


def test_repeats_by_hand():
    # two triples, both "good good good"
    assert repeated_share("good good good good") == 0.5
    # a b c, b c a, c a b, a b c, b c d: one of five came before
    assert repeated_share("A b c a B c d") == pytest.approx(1 / 5)
    assert repeated_share("a b a b a b", 2) == pytest.approx(3 / 5)
    assert repeated_share("a b c d e f g") == 0


def test_a_long_loop_repeats_almost_everything():
    assert repeated_share("so good and then " * 30) == pytest.approx(1 - 4 / 118)


def test_repeating_three_words_is_told():
    assert [repeats_itself(text) for text in TEXTS] == [False, True, False, False]
    assert repeats_itself("It was so good, so it was so bad")
    assert repeats_itself("It was so good. it WAS so bad")


def test_distinct_pairs_by_hand():
    # two pairs, three alike, three of which two are alike, four: 2 + 1 + 2 + 4 of 12
    assert distinct_pairs(TEXTS) == distinct(TEXTS, 2) == 9 / 12
    # a, good, film, one, two, what, it, is of 16 words
    assert distinct(TEXTS, 1) == 8 / 16
    assert distinct([], 2) == distinct(["word"], 2) == 0


def test_shares_of_distinct_add_up():
    texts = [random_text(words, words) for words in (2, 9, 30, 31)] + ["", "one"]
    shares = distinct_shares(texts)
    runs = np.array([max(0, len(text.split()) - 1) for text in texts])
    assert np.sum(runs * shares) / runs.sum() == pytest.approx(distinct(texts, 2))
    assert shares[4] == shares[5] == 1.0
    # "good good" comes three times and nothing else twice but "one two"
    np.testing.assert_allclose(distinct_shares(TEXTS), [1, 1 / 3, 2 / 3, 1])


@pytest.mark.parametrize("characters", [60, 120, 400, 3000])
def test_copies_do_not_go_with_length(characters):
    assert copied_share(prose(characters)) < 0.06
    loop = ("a good film and then " * 200)[:characters]
    assert copied_share(loop) > {60: 0.4}.get(characters, 0.6)
    half = prose(characters // 2) + loop[: characters // 2]
    if characters > 120:
        assert 0.2 < copied_share(half) < copied_share(loop)


def test_copies_in_a_script_without_spaces():
    assert repeated_share("很好的电影" * 20) == 0
    assert copied_share("很好的电影" * 20) > 0.6


def test_near_copies_are_those_of_a_loop():
    texts = [random_text(words, seed) for seed in range(6) for words in (1, 2, 5, 12)]
    texts += [texts[3], "THE of", "the of", texts[7] + " and more words", "", " "]
    prompts = [f"p{i % 11}" for i in range(len(texts))]
    sets = []
    for text in texts:
        words = text.lower().split()
        runs = {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}
        sets.append(runs if words else set())
    for given in (None, prompts):
        wanted = np.zeros(len(texts))
        for i, j in itertools.permutations(range(len(texts)), 2):
            if (given is None or given[i] != given[j]) and sets[i] | sets[j]:
                similarity = len(sets[i] & sets[j]) / len(sets[i] | sets[j])
                wanted[i] = max(wanted[i], similarity)
        np.testing.assert_allclose(near_copies(texts, given), wanted)
    assert wanted.max() == 1 and wanted.min() == 0


def test_answers_to_the_same_prompt_are_no_copies():
    texts = ["a fine film it is", "a fine film it is", "what else is there"]
    np.testing.assert_array_equal(near_copies(texts), [1, 1, 0])
    np.testing.assert_array_equal(near_copies(texts, ["p", "p", "q"]), [0, 0, 0])


def test_characters_by_hand():
    # 10 characters: A b é, 1 2, ! €, a space, two line breaks
    got = character_shares("Abé12!€ \n\n")
    assert got == pytest.approx((0.3, 0.2, 0.2, 0.3, 0.2, 1 / 3, 0.2))


def test_scripts_by_hand():
    got = script_shares("ab, où 12 да 很好 かな 한국 αβ")
    # of 14 letters 4 are Latin, 2 Cyrillic, 6 Chinese, Japanese and Korean, 2 Greek
    assert got == pytest.approx((4 / 14, 2 / 14, 6 / 14, 2 / 14))


@pytest.mark.parametrize(
    ("text", "script"),
    [("Ça va où?", "latin"), ("Это фильм", "cyrillic"), ("שלום", "other")],
)
def test_texts_of_one_script(text, script):
    assert script_shares(text)._asdict()[script] == 1.0


@pytest.mark.parametrize("text", ["", " ", "\n", "\ud800", "\x00", "!?"])
def test_texts_without_words_have_numbers(text):
    assert repeated_share(text) == copied_share(text) == 0
    assert not repeats_itself(text)
    assert sum(script_shares(text)) == 0
    assert all(0 <= share <= 1 for share in character_shares(text))
    assert near_copies([text] * 2).max() in (0, 1)


def test_nothing_at_all():
    assert near_copies([]).shape == distinct_shares([]).shape == (0,)
    assert sum(character_shares("")) == 0
    np.testing.assert_array_equal(near_copies(["", ""]), [0, 0])


@pytest.mark.parametrize("seed", range(5))
def test_shares_are_shares(seed):
    rng = np.random.default_rng(seed)
    codes = rng.choice([32, 10, 46, 65, 97, 233, 1076, 24456], rng.integers(1, 600))
    text = "".join(map(chr, codes))
    one_a_text = (repeated_share, copied_share)
    numbers = [measure(text) for measure in one_a_text]
    numbers += [*character_shares(text), *script_shares(text)]
    assert all(0 <= number <= 1 for number in numbers)
    assert sum(script_shares(text)) == pytest.approx(1)
    assert text_signals.WINDOW == 256  # what the measured figures in the docs are of
