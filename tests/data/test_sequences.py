"""Right-padded rows that end with EOS."""

import numpy as np
import pytest

from rlhf_jax.data.sequences import encode_sequences
from rlhf_jax.data.tokenizer import train_tokenizer
from rlhf_jax.errors import UserError

PAD, EOS = 0, 1


@pytest.fixture
def tokenizer():
    return train_tokenizer([], 258)  # one token a byte


def ids(tokenizer, letters):
    return [tokenizer.convert_tokens_to_ids(letter) for letter in letters]


def test_by_hand(tokenizer):
    a, b, c = ids(tokenizer, "abc")
    tokens, mask = encode_sequences(
        tokenizer, ["ab", "abc", ""], length=4, keep_end=False
    )
    assert tokens.dtype == np.int32 and mask.dtype == bool
    assert tokens.tolist() == [
        [a, b, EOS, PAD],
        [a, b, c, EOS],
        [EOS, PAD, PAD, PAD],
    ]
    assert mask.sum(axis=1).tolist() == [3, 4, 1]
    assert (np.diff(mask.astype(int), axis=1) <= 0).all()  # real first, padding after


def test_what_a_long_text_loses(tokenizer):
    a, b, c, d = ids(tokenizer, "abcd")
    for keep_end, kept in [(False, [a, b, c]), (True, [c, d, EOS])]:
        tokens, mask = encode_sequences(
            tokenizer, ["abcd"], length=3, keep_end=keep_end
        )
        assert tokens.tolist() == [kept] and mask.all()


def test_the_length_with_eos_fits_exactly(tokenizer):
    a, b = ids(tokenizer, "ab")
    for keep_end in (False, True):
        tokens, _ = encode_sequences(tokenizer, ["ab"], length=3, keep_end=keep_end)
        assert tokens.tolist() == [[a, b, EOS]]


def test_the_mask_tells_eos_from_padding_when_they_are_one_token(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    (a,) = ids(tokenizer, "a")
    tokens, mask = encode_sequences(tokenizer, ["a"], length=4, keep_end=False)
    assert tokens.tolist() == [[a, EOS, EOS, EOS]]
    assert mask.tolist() == [[True, True, False, False]]


def test_bos_comes_first(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    (a,) = ids(tokenizer, "a")
    tokens, mask = encode_sequences(tokenizer, ["a", ""], length=3, keep_end=False)
    assert tokens.tolist() == [[bos, a, EOS], [bos, EOS, PAD]]
    assert mask.sum(axis=1).tolist() == [3, 2]


def test_without_eos_there_is_an_error(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        encode_sequences(tokenizer, ["a"], length=3, keep_end=False)
