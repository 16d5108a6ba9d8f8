"""What the findings come to, in plain words: healthy, or wrong from a phase on."""

from typing import NamedTuple

from rlhf_jax.analysis.anomalies import Anomaly
from rlhf_jax.analysis.anomaly_kinds import HARMFUL
from rlhf_jax.analysis.findings import Findings
from rlhf_jax.analysis.report.labels import (
    label,
    listed,
    number,
    p_text,
    signed,
    spread,
)
from rlhf_jax.analysis.statistics import Difference

REASONS = 4  # kinds of harm told


class Verdict(NamedTuple):
    """What a run came to.

    Attributes:
      state: "wrong" where harm lasts to the last phase, "parted" where only a judge
        came down from its best while the reward did not, "healthy", or "unknown" with
        a single phase.
      title: a sentence.
      reasons: sentences.
    """

    state: str
    title: str
    reasons: list[str]


def verdict(findings: Findings) -> Verdict:
    """Judges a run by its findings."""
    phases = list(findings.summaries)
    if len(phases) < 2:
        title = (
            f"Only phase {phases[0]} was looked at: there is nothing to compare it with"
        )
        return Verdict("unknown", title, [])
    partings = _partings(findings)
    if findings.onset is not None:
        title = f"Went wrong from phase {findings.onset} on"
        return Verdict("wrong", title, [*_harm(findings), *partings])
    if partings:
        phase = min(found.phase for found in findings.partings.values())
        title = f"Over-optimised after phase {phase}: the reward holds, a judge falls"
        return Verdict("parted", title, [*partings, *_news(findings)])
    title = "Healthy: no harm that lasts to the last phase"
    reasons = _passing(findings) or ["No phase shows any harm."]
    return Verdict("healthy", title, reasons + _news(findings))


def change_text(name: str, found: Difference) -> str:
    """+1.207 [+0.981, +1.432], p < 0.001"""
    form = signed(label(name).form)
    return f"{spread(found.change, form)}, {p_text(found.p_value)}"


def checkpoint(findings: Findings) -> str:
    """The recommended checkpoint in the run's folder, or that it is gone."""
    phase = findings.recommendation.phase
    path = f"checkpoints/{phase}"
    return path if phase in findings.weights else f"{path}, which is gone"


def harm_at(findings: Findings, phase: int) -> list[str]:
    """The kinds of harm at a phase as a whole, the surest first."""
    here = [a for a in findings.anomalies if a.phase == phase and _is_harm(a)]
    here.sort(key=lambda a: a.p_value)
    return list(dict.fromkeys(kind_text(a.kind) for a in here))


def kind_text(kind: str) -> str:
    """A kind of anomaly for a reader."""
    return kind.replace("_", " ")


def _harm(findings: Findings) -> list[str]:
    """Why the onset is the onset: the surest harm of each kind there."""
    found: dict[str, Anomaly] = {}
    for anomaly in sorted(findings.anomalies, key=lambda a: a.p_value):
        if anomaly.phase == findings.onset and _is_harm(anomaly):
            found.setdefault(anomaly.kind, anomaly)
    return [
        f"{kind_text(kind).capitalize()}. {anomaly.reason}"
        for kind, anomaly in list(found.items())[:REASONS]
    ]


def _partings(findings: Findings) -> list[str]:
    return [
        f"The {label(name).name} is best at phase {found.phase}; from phase "
        f"{found.seen_at} on it is measurably lower ({p_text(found.p_value)}), while "
        f"the reward is not; {number(found.gold_lost, '.3f')} is lost at the end."
        for name, found in findings.partings.items()
    ]


def _passing(findings: Findings) -> list[str]:
    harm = [anomaly for anomaly in findings.anomalies if _is_harm(anomaly)]
    if not harm:
        return []
    kinds = sorted({kind_text(anomaly.kind) for anomaly in harm})
    phases = listed(sorted({anomaly.phase for anomaly in harm}))
    last = next(reversed(findings.summaries))
    return [
        f"Signs of harm passed by in {phases} ({', '.join(kinds)}); phase {last} has "
        "none."
    ]


def _news(findings: Findings) -> list[str]:
    """What else is odd about the last phase as a whole."""
    last = next(reversed(findings.summaries))
    here = [
        kind_text(anomaly.kind)
        for anomaly in findings.anomalies
        if (anomaly.phase, anomaly.sample_idx) == (last, None) and not _is_harm(anomaly)
    ]
    kinds = ", ".join(dict.fromkeys(here))
    return [f"Changed without harm at phase {last}: {kinds}."] if kinds else []


def _is_harm(anomaly: Anomaly) -> bool:
    return anomaly.sample_idx is None and anomaly.kind in HARMFUL
