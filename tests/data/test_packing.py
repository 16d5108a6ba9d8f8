import numpy as np
import pytest

from rlhf_jax.data.packing import (
    Text,
    encode_completions,
    length_batches,
    pack_rows,
    pad_rows,
)
from rlhf_jax.data.rows import Completion
from rlhf_jax.data.tokenizer import encode_texts, special_tokens, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat, and what a film"] * 3, 300)


def texts_of(lengths):
    """Texts whose tokens tell text and place: 10·i + t; all but the first learned."""
    return [
        Text(np.arange(n, dtype=np.int32) + 10 * i, np.arange(n) > 0)
        for i, n in enumerate(lengths, 1)
    ]


def test_the_response_and_its_end_are_learned(tokenizer):
    rows = [Completion("the cat", " sat on"), Completion("", "a film")]
    first, second = encode_completions(tokenizer, rows, length=16, completion_only=True)
    prompt, response = encode_texts(tokenizer, ["the cat", " sat on"])
    eos = special_tokens(tokenizer).eos
    assert first.tokens.tolist() == [*prompt, *response, eos]
    learned = [False] * len(prompt) + [True] * (len(response) + 1)
    assert first.learned.tolist() == learned
    # nothing predicts the first token of a text without a prompt
    assert second.learned.tolist() == [False] + [True] * (len(second.tokens) - 1)


def test_prompts_are_learned_when_asked(tokenizer):
    (text,) = encode_completions(
        tokenizer,
        [Completion("the cat", " sat on")],
        length=16,
        completion_only=False,
    )
    assert text.learned.tolist() == [False] + [True] * (len(text.tokens) - 1)


def test_a_token_over_the_border_belongs_to_the_response(tokenizer):
    """ "fi" + "lm" is one token that the prompt alone does not have."""
    (text,) = encode_completions(
        tokenizer, [Completion("a fi", "lm")], length=16, completion_only=True
    )
    whole = encode_texts(tokenizer, ["a film"])[0]
    assert text.tokens.tolist()[:-1] == whole
    first = text.learned.tolist().index(True)
    assert tokenizer.decode(whole[:first]) in ("a", "a ")


def test_a_long_text_loses_its_end_and_learns_no_eos(tokenizer):
    (text,) = encode_completions(
        tokenizer,
        [Completion("", "the cat sat on the mat")],
        length=3,
        completion_only=True,
    )
    assert len(text.tokens) == 3
    assert special_tokens(tokenizer).eos not in text.tokens


def test_packing_by_hand():
    # rows of 8: 3 + 5 fill one; 2 + 4 + 1 another; 6 is alone
    rows = pack_rows(texts_of([3, 5, 2, 4, 1, 6]), length=8, pad=-1)
    np.testing.assert_array_equal(
        rows.tokens,
        [
            [10, 11, 12, 20, 21, 22, 23, 24],
            [30, 31, 40, 41, 42, 43, 50, -1],
            [60, 61, 62, 63, 64, 65, -1, -1],
        ],
    )
    np.testing.assert_array_equal(
        rows.segments,
        [[1, 1, 1, 2, 2, 2, 2, 2], [1, 1, 2, 2, 2, 2, 3, 0], [1] * 6 + [0] * 2],
    )
    np.testing.assert_array_equal(
        rows.learned,
        [[0, 1, 1, 0, 1, 1, 1, 1], [0, 1, 0, 1, 1, 1, 0, 0], [0] + [1] * 5 + [0] * 2],
    )


def test_packing_loses_and_invents_nothing():
    lengths = np.random.default_rng(0).integers(1, 17, 200)
    texts = [
        Text(np.arange(n, dtype=np.int32) + 100 * i, np.arange(n) % 2 == 1)
        for i, n in enumerate(lengths, 1)
    ]
    rows = pack_rows(texts, length=16, pad=0)
    packed = rows.tokens[rows.segments > 0]
    expected = np.concatenate([text.tokens for text in texts])
    np.testing.assert_array_equal(np.sort(packed), np.sort(expected))
    learned = np.concatenate([text.tokens[text.learned] for text in texts])
    np.testing.assert_array_equal(np.sort(rows.tokens[rows.learned]), np.sort(learned))
    # the tokens of a segment are one text, in its order
    for row, segments in zip(rows.tokens, rows.segments, strict=True):
        for number in range(1, segments.max() + 1):
            found = row[segments == number]
            np.testing.assert_array_equal(found, found[0] + np.arange(len(found)))
    assert (rows.segments > 0).mean() > 0.9


def test_batches_of_like_length_are_cut_to_what_they_need():
    lengths = np.array([2, 9, 3, 16, 2, 8, 15, 3])
    rows = pad_rows(texts_of(lengths), length=16, pad=0)
    order = np.arange(8)
    batches = length_batches(rows, lengths, order, batch=2, widths=(4, 9), seed=0)
    widths = sorted(batch.tokens.shape for batch in batches)
    assert widths == [(2, 4), (2, 4), (2, 9), (2, 16)]
    kept = np.concatenate([batch.tokens[batch.segments > 0] for batch in batches])
    np.testing.assert_array_equal(
        np.sort(kept), np.sort(rows.tokens[rows.segments > 0])
    )
    again = length_batches(rows, lengths, order, batch=2, widths=(4, 9), seed=0)
    for one, other in zip(batches, again, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
