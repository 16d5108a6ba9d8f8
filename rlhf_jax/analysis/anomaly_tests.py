"""The tests behind anomalies: answers beside a baseline's, and phases in pairs with it.

Dimension key: N answers, K phases, S kinds with the signal of each.
"""

import collections
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rlhf_jax.analysis import anomaly_kinds, statistics
from rlhf_jax.analysis.anomaly_kinds import Kind

MOST_RESAMPLES = 100_000

Signals = Mapping[str, np.ndarray]


class Outcomes(NamedTuple):
    """Of the tests of K phases; M is N for answers and 1 for whole phases.

    Attributes:
      rows: S kinds, and the signal of each.
      p: [K, S, M], 1 where the effect is below the least of its kind.
      statistic: [K, S, M].
      baseline: [K, S].
      scale: [K, S], of phases the unit of effects, of answers the greatest or least of
        the baseline.
    """

    rows: list[tuple[Kind, str]]
    p: np.ndarray
    statistic: np.ndarray
    baseline: np.ndarray
    scale: np.ndarray


class Found(NamedTuple):
    """A test that is significant: its place in the arrays, and its adjusted p-value."""

    phase: int
    row: int
    answer: int
    p: float


def answer_tests(before: Signals, after: Sequence[Signals]) -> Outcomes:
    """Every answer [N] beside the distribution of the baseline's answers."""
    rows, shape = _rows(anomaly_kinds.ANSWER_KINDS, before, after)
    found = Outcomes(rows, np.ones(shape), np.zeros(shape), *np.zeros((2, *shape[:2])))
    for row, (kind, signal) in enumerate(rows):
        known = before[signal][np.isfinite(before[signal])]
        values = np.stack([signals[signal] for signals in after])
        found.statistic[:, row] = values
        if len(known) < 2:
            continue
        found.baseline[:, row] = np.median(known)
        found.scale[:, row] = kind.side * np.max(kind.side * known)
        base, x = kind.scale(known), kind.scale(values)
        unit = anomaly_kinds.deviation(base, kind.floor)
        large = anomaly_kinds.is_large(kind, np.median(base), x, unit)
        side = kind.side
        p = statistics.tail_p_value(side * base, side * x.ravel(), resolution=unit / 2)
        found.p[:, row] = np.where(large, p.reshape(x.shape), 1.0)
    return found


def phase_tests(
    before: Sequence[Signals], after: Sequence[Signals], rate: float
) -> Outcomes:
    """Every phase beside the baseline, in pairs of answers to one prompt.

    Args:
      before: the baseline's signals as they are compared with each of K phases.
      after: those of the phases.
      rate: at which the p-values will be adjusted; the signs are flipped often enough
        that one small p-value among all could be found.
    """
    rows, (K, S, _) = _rows(anomaly_kinds.PHASE_KINDS, before[0], after)
    found = Outcomes(rows, *np.ones((2, K, S, 1)), *np.zeros((2, K, S)))
    places, changes = [], []
    for row, (kind, signal) in enumerate(rows):
        for place in range(K):
            old, new = before[place][signal], after[place][signal]
            both = np.isfinite(old) & np.isfinite(new)
            if both.sum() < 2:
                continue
            unit = anomaly_kinds.deviation(old[both], kind.floor)
            first, then = old[both].mean(), new[both].mean()
            found.baseline[place, row], found.scale[place, row] = first, unit
            found.statistic[place, row] = then
            if anomaly_kinds.is_large(kind, first, then, unit):
                places.append((place, row))
                changes.append(np.where(both, new - old, 0.0))
    if places:
        resamples = max(statistics.RESAMPLES, int(2 * K * S / rate))
        p = statistics.sign_flip_p_values(
            np.stack(changes, axis=1), resamples=min(resamples, MOST_RESAMPLES)
        )
        # large ones are to the kind's side, so this is one-sided
        found.p[(*np.transpose(places), 0)] = p / 2
    return _together(found, "low_perplexity", "near_copies")


def significant(tests: Outcomes, rate: float) -> list[Found]:
    """Which tests are, with false discoveries below a rate over all of them.

    Several rows of one kind, as a format's shares, are one test by Bonferroni's rule,
    and the surest of them stands for all; each judge is by itself.
    """
    groups = collections.defaultdict(list)
    for row, (kind, signal) in enumerate(tests.rows):
        groups[kind.name, signal if kind.signal == "judge/*" else ""].append(row)
    chosen, p = [], []
    for rows in groups.values():
        chosen.append(np.array(rows)[np.argmin(tests.p[:, rows], axis=1)])
        p.append(np.minimum(1.0, len(rows) * tests.p[:, rows].min(axis=1)))
    chosen, p = np.stack(chosen, axis=1), np.stack(p, axis=1)  # [K, groups, M]
    adjusted = statistics.benjamini_hochberg(p.ravel()).reshape(p.shape)
    return [
        Found(int(k), int(chosen[k, g, m]), int(m), float(adjusted[k, g, m]))
        for k, g, m in np.argwhere(adjusted <= rate)
    ]


def _rows(kinds, before: Signals, after: Sequence[Signals]):
    """The kinds whose signals are there in all phases, and the shape (K, S, N)."""
    names = set(before).intersection(*after)
    rows = anomaly_kinds.matches(kinds, names)
    return rows, (len(after), len(rows), len(before["tokens"]))


def _together(tests: Outcomes, name: str, other: str) -> Outcomes:
    """Makes one kind need another one too: its p is the greater one of both."""
    names = [kind.name for kind, _ in tests.rows]
    if name in names:
        row, needed = names.index(name), names.index(other)
        tests.p[:, row] = np.maximum(tests.p[:, row], tests.p[:, needed])
    return tests
