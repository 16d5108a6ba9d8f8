"""Two phases beside each other: by hand, against scipy, and what must not differ."""

import math

import numpy as np
import pytest
from scipy import stats

from rlhf_jax.analysis.compared import Piece, compare, differences, measures

from .answered import drawn, samples_of

BEFORE, AFTER = drawn(0), drawn(1, phase=4)


def test_the_same_phase_twice_has_no_change():
    again = BEFORE._replace(phase=4)
    found = compare(BEFORE, again)
    assert (found.before, found.after) == (0, 4)
    assert (found.identical, found.deviation_ratio) == (1.0, 1.0)
    assert found.first_difference is None
    for name, one in found.scores.items():
        assert (one.change, one.p_value) == ((0.0, 0.0, 0.0), 1.0), name
        assert (one.effect, one.probability) == (0.0, 0.5), name
    kinds = {piece.kind for pair in found.pairs for piece in pair.pieces}
    assert kinds == {"same"}
    assert [pair.sample_idx for pair in found.pairs] == list(range(12))


def columns_of(samples):
    """What is compared, each by a loop."""
    found = {"tokens": [], "finished": [], "characters": [], "kl": []}
    for i, text in enumerate(samples.responses):
        found["characters"].append(len(text))
        found["finished"].append(1.0 if samples.finished[i] else 0.0)
        found["tokens"].append(sum(samples.mask[i].tolist()))
        ratios = samples.logprobs[i] - samples.ref_logprobs[i]
        found["kl"].append(math.fsum(ratios[samples.mask[i]].tolist()))
    return found | {name: x.tolist() for name, x in samples.scores.items()}


def test_scores_are_those_of_scipy():
    found = compare(BEFORE, AFTER)
    before, after = columns_of(BEFORE), columns_of(AFTER)
    names = {"reward", "judge/kind", "tokens", "characters", "finished", "kl"}
    assert found.scores.keys() == names == before.keys()
    for name, one in found.scores.items():
        pair = np.array(before[name]), np.array(after[name])
        change = pair[1] - pair[0]
        exact = stats.permutation_test(
            pair,
            lambda a, b, axis: np.mean(b - a, axis=axis),
            permutation_type="samples",
            n_resamples=np.inf,
        )
        assert one.change.mean == pytest.approx(exact.statistic, abs=1e-6), name
        assert one.p_value == pytest.approx(min(1.0, exact.pvalue)), name
        d_z = stats.ttest_rel(*pair[::-1]).statistic / math.sqrt(12)
        assert one.effect == pytest.approx(d_z, abs=1e-5), name
        greater = np.mean([1.0 if c > 0 else 0.5 if c == 0 else 0.0 for c in change])
        assert one.probability == pytest.approx(greater), name
        assert one.change.low < one.change.mean < one.change.high


def test_a_comparison_by_hand():
    rows = [[(3, -1, -1), (4, -1, -1)], [(3, -1, -1)], [(5, -2, -1)]]
    before = samples_of(["a b", "a", "c"], [1.0, 2.0, 3.0], rows=rows)
    rows = [[(3, -1, -1), (9, -1, -1)], [(8, -1, -1)], [(5, -2, -1)]]
    after = samples_of(["a d", "e", "c"], [2.0, 0.0, 3.0], rows=rows, phase=7)
    found = compare(before, after)
    # one answer of three is the same; the others differ from tokens 1 and 0 on
    assert found.identical == pytest.approx(1 / 3)
    assert found.first_difference == 0.5
    # √(14/9), before √(2/3): their ratio is √(7/3)
    assert found.deviation_ratio == pytest.approx(math.sqrt(7 / 3))
    assert [pair.sample_idx for pair in found.pairs] == [1, 0, 2]
    pair = found.pairs[1]
    assert pair[:4] == (0, "prompt 0", "a b", "a d")
    assert (pair.reward_before, pair.reward_after) == (1.0, 2.0)
    assert pair.pieces == [("same", "a"), ("removed", " b"), ("added", " d")]


def test_a_reward_that_was_constant():
    before = samples_of(["a", "b"], [1.0, 1.0])
    assert compare(before, before).deviation_ratio == 1.0
    after = samples_of(["a", "b"], [1.0, 2.0])
    assert compare(before, after).deviation_ratio == math.inf
    assert compare(after, before).deviation_ratio == 0.0


def test_texts_alone():
    before = samples_of(["one two", "three"], [0.0, 1.0])
    after = samples_of(["one", "three four five"], [0.0, 1.0], judges={"kind": [0, 0]})
    found = compare(before, after)
    assert found.first_difference is None
    assert found.scores.keys() == {"reward", "tokens", "characters", "finished"}
    # words: 2 and 1 before, 1 and 3 after
    assert found.scores["tokens"].change.mean == 0.5
    assert measures(before)["tokens"].tolist() == [2, 1]


def test_other_prompts_are_not_compared():
    other = AFTER._replace(prompts=[*AFTER.prompts[:-1], "another"])
    with pytest.raises(ValueError, match="phases 0 and 4 answer different prompts"):
        compare(BEFORE, other)


@pytest.mark.parametrize(
    ("before", "after", "wanted"),
    [
        ("", "", []),
        ("", " a", [("added", " a")]),
        (" a\n", "", [("removed", " a\n")]),
        ("a b c", "a c", [("same", "a"), ("removed", " b"), ("same", " c")]),
        ("a b", "a  b", [("same", "a"), ("removed", " b"), ("added", "  b")]),
    ],
)
def test_differences_by_hand(before, after, wanted):
    assert differences(before, after) == [Piece(*one) for one in wanted]


def test_differences_join_to_both_texts():
    rng = np.random.default_rng(0)
    parts = ["good", " ", "  ", "\n", "film", ".", "é", "\t", "\u2028", "bad\x1c"]
    for _ in range(300):
        before, after = ("".join(rng.choice(parts, rng.integers(9))) for _ in "ab")
        pieces = differences(before, after)
        joined = lambda kind, pieces=pieces: "".join(
            piece.text for piece in pieces if piece.kind in ("same", kind)
        )
        assert joined("removed") == before
        assert joined("added") == after
