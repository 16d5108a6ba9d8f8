"""Where a policy's answers went odd: single answers and whole phases, by name.

Answers are held against the distribution of a baseline phase (`tail_p_value`); phases
against the baseline's answers to the same prompts, in pairs (`sign_flip_p_values`). The
tests of all answers are one family, those of all phases another, and in each the false
discoveries are kept below half of the rate: of runs in which nothing happened, a share
of `rate` at most has any anomaly. A test whose effect is below the least of its kind
(`anomaly_kinds`) counts with p = 1.

Measured with 64 prompts at a rate of 5 %: of 400 pairs of phases that the built-in
policy answered under two keys 0.5 % had any anomaly, of as many made-up ones 1.3 %. A
reward lower by 0.7 deviations was found in 20 of 20 runs, with 16 prompts in 4.
"""

from collections.abc import Sequence
from typing import NamedTuple

from rlhf_jax.analysis.anomaly_kinds import HARMFUL, Kind
from rlhf_jax.analysis.anomaly_tests import (
    Found,
    Outcomes,
    answer_tests,
    phase_tests,
    significant,
)
from rlhf_jax.analysis.samples import PhaseSamples
from rlhf_jax.analysis.signals import signals_of, usual_of, variety
from rlhf_jax.errors import UserError


class Anomaly(NamedTuple):
    """One thing that is odd.

    Attributes:
      kind: a name of `anomaly_kinds`.
      phase: where.
      sample_idx: which answer; None for a whole phase.
      statistic: the signal's value, of a phase its mean.
      baseline: of an answer the baseline's median, of a phase its mean.
      p_value: adjusted for all tests of the family.
      reason: a sentence that says what, how much, and compared with what.
      text: the answer; "" for a phase.
    """

    kind: str
    phase: int
    sample_idx: int | None
    statistic: float
    baseline: float
    p_value: float
    reason: str
    text: str


def find_anomalies(
    baseline: PhaseSamples, phases: Sequence[PhaseSamples], *, rate: float = 0.05
) -> list[Anomaly]:
    """What is odd about some phases beside a baseline phase.

    Args:
      baseline: the phase to compare with, as a rule before training.
      phases: those to look at, of the same prompts.
      rate: of false discoveries, half of it for answers, half for phases.

    Returns:
      By phase, whole phases before answers, the surest first.

    Raises:
      UserError: other prompts, or fewer than two.
    """
    if len(baseline.prompts) < 2:
        raise UserError(
            f"anomalies are looked for in {len(baseline.prompts)} prompts: give 2 or "
            "more, better 64"
        )
    for phase in phases:
        if phase.prompts != baseline.prompts:
            raise UserError(
                f"phases {baseline.phase} and {phase.phase} have different prompts: "
                "sample the same ones in every phase"
            )
    if not phases:
        return []
    usual = usual_of(baseline.responses)
    before = signals_of(baseline, usual)
    after = [signals_of(phase, usual) for phase in phases]
    answers = answer_tests(before, after)
    pairs = [variety(baseline.responses, phase.responses) for phase in phases]
    wholes = phase_tests(
        [before | {"variety": old} for old, _ in pairs],
        [signals | {"variety": new} for signals, (_, new) in zip(after, pairs)],
        rate / 2,
    )
    found = [
        *(
            _of_phase(baseline, phases, wholes, f)
            for f in significant(wholes, rate / 2)
        ),
        *(
            _of_answer(baseline, phases, answers, f)
            for f in significant(answers, rate / 2)
        ),
    ]
    order = lambda a: (a.phase, a.sample_idx is not None, a.p_value, a.sample_idx or 0)
    return sorted(found, key=order)


def harmed_phases(
    anomalies: Sequence[Anomaly], harmful: frozenset[str] = HARMFUL
) -> set[int]:
    """The phases that have harm as a whole."""
    return {a.phase for a in anomalies if a.sample_idx is None and a.kind in harmful}


def onset(
    anomalies: Sequence[Anomaly],
    phases: Sequence[int],
    *,
    harmful: frozenset[str] = HARMFUL,
) -> int | None:
    """The first phase from which there is harm, in it and in every later one.

    Args:
      anomalies: those found; the ones of whole phases count.
      phases: numbers of all phases that were looked at.
      harmful: the kinds that are harm.

    Returns:
      None where the last phase is without harm.
    """
    harmed = harmed_phases(anomalies, harmful)
    first = None
    for phase in sorted(phases, reverse=True):
        if phase not in harmed:
            break
        first = phase
    return first


def _of_phase(
    baseline: PhaseSamples,
    phases: Sequence[PhaseSamples],
    tests: Outcomes,
    found: Found,
) -> Anomaly:
    kind, signal = tests.rows[found.row]
    phase = phases[found.phase].phase
    old = tests.baseline[found.phase, found.row]
    new = tests.statistic[found.phase, found.row, 0]
    sizes = abs(new - old) / tests.scale[found.phase, found.row]
    reason = (
        f"From phase {baseline.phase} to phase {phase} the {_noun(kind, signal)} "
        f"{'rose' if new > old else 'fell'} on average from {old:{kind.form}} to "
        f"{new:{kind.form}} over the same {len(baseline.prompts)} prompts: {sizes:.1f} "
        f"deviations of the answers of phase {baseline.phase}."
    )
    return Anomaly(kind.name, phase, None, float(new), float(old), found.p, reason, "")


def _of_answer(
    baseline: PhaseSamples,
    phases: Sequence[PhaseSamples],
    tests: Outcomes,
    found: Found,
) -> Anomaly:
    kind, signal = tests.rows[found.row]
    phase, (_, row, idx, p) = phases[found.phase], found
    value, median = (
        tests.statistic[found.phase, row, idx],
        tests.baseline[found.phase, row],
    )
    reason = (
        f"The {_noun(kind, signal)} is {value:{kind.form}}; of the "
        f"{len(baseline.prompts)} answers of phase {baseline.phase} the median is "
        f"{median:{kind.form}} and the {'greatest' if kind.side > 0 else 'least'} "
        f"{tests.scale[found.phase, row]:{kind.form}}."
    )
    text = phase.responses[idx]
    return Anomaly(
        kind.name, phase.phase, idx, float(value), float(median), p, reason, text
    )


def _noun(kind: Kind, signal: str) -> str:
    return kind.noun.format(signal.partition("/")[2].replace("_", " "))
