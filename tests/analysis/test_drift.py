"""How far a policy moved: by hand, by enumeration and by loops."""

import math

import numpy as np
import pytest
from scipy import stats

from rlhf_jax.analysis.drift import (
    colored_tokens,
    first_difference,
    sequence_kl,
    token_kl,
    token_moves,
)

from .answered import drawn, samples_of

LOG2 = math.log(2.0)


def test_sequence_kl_by_hand():
    # (−1 + 1.5) + (−2 + 1) = −0.5; −0.5 + 2 = 1.5
    logprobs = np.array([[-1.0, -2.0], [-0.5, 0.0]], np.float32)
    others = np.array([[-1.5, -1.0], [-2.0, 0.0]], np.float32)
    np.testing.assert_array_equal(sequence_kl(logprobs, others), [-0.5, 1.5])


def test_token_kl_by_hand():
    # r = 2: 2 − 1 − log 2; r = ½: ½ − 1 + log 2; their mean is ¼
    logprobs = np.array([[-LOG2, 0.0], [-LOG2, np.nan], [np.nan, np.inf]])
    others = np.array([[0.0, -LOG2], [0.0, np.inf], [np.nan, 0.0]])
    mask = np.array([[True, True], [True, False], [False, False]])
    got = token_kl(logprobs, others, mask)
    np.testing.assert_allclose(got, [0.25, 1.0 - LOG2, 0.0], rtol=1e-6)


def test_both_are_kl_on_average():
    """Every token of a small vocabulary, weighed with its probability."""
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(6), size=2)
    logs = np.log(p)[:, None], np.log(q)[:, None]
    wanted = stats.entropy(p, q)
    assert p @ sequence_kl(*logs) == pytest.approx(wanted)
    each = token_kl(*logs, np.ones((6, 1), bool))
    assert p @ each == pytest.approx(wanted)
    assert (each >= 0).all() and (sequence_kl(*logs) < 0).any()


def test_token_moves_are_those_of_a_loop():
    samples = drawn(0)
    sums, counts, whole = {}, {}, 0.0
    for i, t in np.argwhere(samples.mask):
        token = samples.tokens[i, t]
        ratio = float(samples.logprobs[i, t]) - float(samples.ref_logprobs[i, t])
        sums[token] = sums.get(token, 0.0) + ratio
        counts[token] = counts.get(token, 0) + 1
        whole += ratio
    moves = token_moves(samples, "token {}".format)
    assert {move.token for move in moves} == set(counts)
    for move in moves:
        assert move.text == f"token {move.token}"
        assert move.count == counts[move.token]
        mean = sums[move.token] / counts[move.token]
        assert move.log_ratio == pytest.approx(mean, abs=1e-6)
        assert move.share == pytest.approx(sums[move.token] / whole, abs=1e-6)
    shares = [abs(move.share) for move in moves]
    assert shares == sorted(shares, reverse=True)
    assert sum(move.share for move in moves) == pytest.approx(1.0)
    assert token_moves(samples, str, count=2) == [
        move._replace(text=str(move.token)) for move in moves[:2]
    ]


def test_no_token_has_moved_of_the_reference_itself():
    samples = drawn(1)
    samples = samples._replace(ref_logprobs=samples.logprobs)
    moves = token_moves(samples, str)
    assert moves and {(m.log_ratio, m.share) for m in moves} == {(0.0, 0.0)}


def answers(*rows):
    rows = [[(token, -1.0, -1.0) for token in row] for row in rows]
    return samples_of([""] * len(rows), [0.0] * len(rows), rows=rows)


def test_first_difference_by_hand():
    before = answers([4, 5, 6], [4, 5, 6], [4, 5, 6], [4, 5], [7], [4, 5, 6])
    after = answers([4, 5, 6], [4, 9, 6], [4, 5], [4, 5, 6], [8], [4, 9, 9])
    wanted = [-1, 1, 2, 2, 0, 1]
    assert first_difference(before, after).tolist() == wanted
    assert first_difference(after, before).tolist() == wanted


def test_what_is_under_the_mask_is_no_difference():
    before, after = answers([4, 5], [4]), answers([4, 5], [4])
    after.tokens[1, 1] = 9
    assert first_difference(before, after).tolist() == [-1, -1]


def test_first_difference_beyond_the_shorter_array():
    before, after = answers([4, 5], [4]), answers([4, 5, 6], [4])
    assert first_difference(before, after).tolist() == [2, -1]
    assert first_difference(after, before).tolist() == [2, -1]


def decode(tokens):
    return bytes(tokens).decode("utf-8", errors="replace")


def test_colored_tokens_join_to_the_text():
    """€ is three tokens; its text comes with the last of them."""
    text = "a €ß!"
    rows = [
        [(byte, -0.5 * t, -1.0) for t, byte in enumerate(one.encode())]
        for one in (text, "other", "x€")
    ]
    rows[2].pop()
    samples = samples_of([text, "other", "x"], [0.0] * 3, rows=rows)
    pieces = colored_tokens(samples, 0, decode)
    assert "".join(piece for piece, _ in pieces) == text
    assert [piece for piece, _ in pieces] == ["a", " ", "", "", "€", "", "ß", "!"]
    assert [ratio for _, ratio in pieces] == [1.0 - 0.5 * t for t in range(8)]
    cut = colored_tokens(samples, 2, decode)
    assert [piece for piece, _ in cut] == ["x", "", "�"]


def test_a_byte_that_is_no_character_is_shown():
    rows = [[(byte, 0.0, 0.0) for byte in b"a\xffb"]]
    pieces = colored_tokens(samples_of([""], [0.0], rows=rows), 0, decode)
    assert [piece for piece, _ in pieces] == ["a", "", "�b"]
