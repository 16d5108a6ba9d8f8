"""Preference pairs as rows of prompt, response and EOS."""

import numpy as np
import pytest

from rlhf_jax.data.pairs import encode_pairs
from rlhf_jax.data.preferences import Pair
from rlhf_jax.data.tokenizer import train_tokenizer

PAD, EOS = 0, 1


@pytest.fixture
def letters():
    return train_tokenizer([], 258)  # one token a byte


def pair(prompt, chosen, rejected):
    return Pair(prompt, chosen, rejected, 1.0, "movie")


def ids(tokenizer, text):
    return [tokenizer.convert_tokens_to_ids(letter) for letter in text]


def test_by_hand(letters):
    a, b, c, d = ids(letters, "abcd")
    found = encode_pairs(letters, [pair("ab", "c", "dd")], length=6)
    assert found.tokens.dtype == np.int32
    assert found.tokens[0].tolist() == [
        [a, b, c, EOS, PAD, PAD],
        [a, b, d, d, EOS, PAD],
    ]
    assert found.mask[0].sum(axis=1).tolist() == [4, 5]
    assert (np.diff(found.mask.astype(int)) <= 0).all()
    assert found.response[0].astype(int).tolist() == [
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
    ]
    assert not found.cut.any()


def test_a_long_pair_loses_the_same_beginning_of_its_prompt_on_both_sides(letters):
    b, c, d = ids(letters, "bcd")
    found = encode_pairs(letters, [pair("aab", "c", "dd")], length=4)
    assert found.tokens[0].tolist() == [[b, c, EOS, PAD], [b, d, d, EOS]]
    assert found.response[0].astype(int).tolist() == [[0, 1, 1, 0], [0, 1, 1, 1]]
    assert found.cut.tolist() == [True]


def test_a_response_that_does_not_fit_loses_its_end_and_eos(letters):
    b, c, d = ids(letters, "bcd")
    found = encode_pairs(letters, [pair("aab", "c", "ddddd")], length=4)
    assert found.tokens[0].tolist() == [[b, c, EOS, PAD], [b, d, d, d]]
    assert found.response[0, 1].tolist() == [False, True, True, True]


def test_an_empty_prompt_is_eos_as_it_is_for_the_sampler(letters):
    c, d = ids(letters, "cd")
    found = encode_pairs(letters, [pair("", "c", "d")], length=4)
    assert found.tokens[0].tolist() == [[EOS, c, EOS, PAD], [EOS, d, EOS, PAD]]
    assert found.response[0].astype(int).tolist() == [[0, 1, 1, 0]] * 2


def test_bos_stays_when_a_prompt_is_cut(letters):
    from tokenizers.processors import TemplateProcessing

    a, b, c, d = ids(letters, "abcd")
    letters.bos_token = "!"
    bos = letters.bos_token_id
    letters.backend_tokenizer.post_processor = TemplateProcessing(
        single="! $A", special_tokens=[("!", bos)]
    )
    found = encode_pairs(letters, [pair("aab", "c", "dd")], length=6)
    assert found.tokens[0, 1].tolist() == [bos, a, b, d, d, EOS]
    found = encode_pairs(letters, [pair("aab", "c", "dd")], length=5)
    assert found.tokens[0].tolist() == [[bos, b, c, EOS, PAD], [bos, b, d, d, EOS]]


def test_a_token_over_the_border_belongs_to_the_response():
    tokenizer = train_tokenizer(["good"] * 9, 300)
    (good,) = tokenizer("good")["input_ids"]
    found = encode_pairs(tokenizer, [pair("a goo", "d", "fy")], length=8)
    chosen, response = found.tokens[0, 0], found.response[0, 0]
    assert good in chosen[response]
    text = tokenizer.decode(chosen[found.mask[0, 0]], skip_special_tokens=True)
    assert text == "a good"


def test_the_mask_tells_eos_from_padding_when_they_are_one_token(letters):
    letters.pad_token = letters.eos_token
    found = encode_pairs(letters, [pair("a", "b", "bb")], length=5)
    assert found.tokens[0, 0].tolist()[2:] == [EOS, EOS, EOS]
    assert found.mask[0, 0].tolist() == [True, True, True, False, False]
    assert found.response[0, 0].tolist() == [False, True, True, False, False]
