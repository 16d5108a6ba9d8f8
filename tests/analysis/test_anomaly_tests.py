"""The tests behind anomalies, beside scipy's and by hand."""

import numpy as np
import pytest
from scipy import stats

from rlhf_jax.analysis.anomaly_kinds import PHASE_KINDS, Kind, deviation, is_large
from rlhf_jax.analysis.anomaly_tests import (
    Outcomes,
    answer_tests,
    phase_tests,
    significant,
)


def test_a_phase_is_tested_to_one_side():
    rng = np.random.default_rng(0)
    old = {"tokens": np.full(10, 20.0), "reward": rng.normal(size=10)}
    new = old | {"reward": old["reward"] + rng.normal(-0.8, size=10)}
    got = phase_tests([old, old], [new, old], 0.05)
    (row,) = [r for r, (kind, _) in enumerate(got.rows) if kind.name == "reward_drop"]
    wanted = stats.permutation_test(
        (new["reward"] - old["reward"],),
        np.sum,
        permutation_type="samples",
        n_resamples=np.inf,
        alternative="less",
    ).pvalue
    assert wanted < 0.2
    np.testing.assert_allclose(got.p[:, row, 0], [wanted, 1.0], rtol=1e-12)
    assert got.statistic[0, row, 0] == pytest.approx(new["reward"].mean())
    assert got.baseline[0, row] == pytest.approx(old["reward"].mean())
    others = [r for r in range(len(got.rows)) if r != row]
    assert (got.p[:, others] == 1).all()


def test_answers_are_compared_with_all_of_the_baseline():
    old = {"tokens": np.arange(10.0, 30.0)}
    (long, short) = answer_tests(
        old, [{"tokens": np.r_[[400.0, 29.0], [12.0] * 18]}]
    ).p[0]
    assert 0 < long[0] < 1e-3 and (long[1:] == 1).all() and (short == 1).all()


def outcomes(p, names):
    rows = [(Kind(name, name, 1, name), name) for name in names]
    zeros = np.zeros(p.shape)
    return Outcomes(rows, p, zeros, zeros[..., 0], zeros[..., 0])


def test_rows_of_one_kind_are_one_test_by_hand():
    # a: 2 · 0.01, by its second row; b: 0.03. Of two tests 0.02 · 2 and 0.03: both 0.03
    p = np.array([0.5, 0.01, 0.03]).reshape(1, 3, 1)
    got = significant(outcomes(p, ["a", "a", "b"]), 0.03)
    assert got == [(0, 1, 0, pytest.approx(0.03)), (0, 2, 0, pytest.approx(0.03))]
    assert significant(outcomes(p, ["a", "a", "b"]), 0.02) == []
    # three tests: 0.03 · 3 / 2 is too much
    assert significant(outcomes(p, ["a", "b", "c"]), 0.03) == [
        (0, 1, 0, pytest.approx(0.03))
    ]


def test_phases_and_answers_are_one_family():
    p = np.ones((3, 1, 4))
    p[2, 0, 1] = 0.004
    assert significant(outcomes(p, ["a"]), 0.05) == [(2, 0, 1, pytest.approx(0.048))]
    assert significant(outcomes(p, ["a"]), 0.04) == []


def test_units_of_signals():
    assert deviation(np.array([0.0, 2.0]), 0.5) == pytest.approx(np.sqrt(2))
    assert deviation(np.array([0.0, 2.0]), 1.5) == 1.5
    assert deviation(np.full(9, 0.1), 0.02) == 0.02
    assert deviation(np.full(9, 0.1), 0.0) == 1.0
    assert deviation(np.full(9, -7.1), 0.0) == pytest.approx(7.1)


def test_least_effects():
    kind = Kind("k", "s", -1, "s", deviations=2.0, change=0.3, factor=2.0)
    after = np.array([0.4, 0.6, 0.71, 1.0, 1.5, np.nan])
    assert list(is_large(kind, 1.0, after, 0.1)) == [True] + 5 * [False]
    relaxed = kind._replace(factor=1.0)
    assert list(is_large(relaxed, 1.0, after, 0.1)) == [True, True] + 4 * [False]
    assert list(is_large(relaxed, 1.0, after, 0.25)) == [True] + 5 * [False]
    assert not any(is_large(kind._replace(side=1), 1.0, after, 0.1))


def test_every_kind_needs_an_effect():
    assert all(k.deviations > 0 or k.change > 0 for k in PHASE_KINDS)
