"""The anomalies of a report: an overview, then phase by phase, kind by kind."""

import collections
from collections.abc import Iterator, Sequence

from rlhf_jax.analysis.anomalies import Anomaly
from rlhf_jax.analysis.findings import Findings
from rlhf_jax.analysis.report.labels import number, p_text, thinned
from rlhf_jax.analysis.report.tables import wide
from rlhf_jax.analysis.report.texts import folded
from rlhf_jax.analysis.report.verdict import kind_text
from rlhf_jax.evaluation.pages import escape

TEXTS = 60  # answers shown
PHASES = 30  # phases told in full


def anomaly_parts(findings: Findings) -> list[str]:
    """The whole section."""
    phases = sorted({anomaly.phase for anomaly in findings.anomalies})
    shown = thinned(phases, PHASES, {findings.onset})
    texts = _chosen([a for a in findings.anomalies if a.phase in shown])
    parts = [_overview(findings.anomalies, phases)]
    for phase in shown:
        here = [anomaly for anomaly in findings.anomalies if anomaly.phase == phase]
        is_open = phase in (findings.onset, shown[0], shown[-1])
        parts.append(_phase(phase, here, texts, is_open=is_open))
    if len(phases) > len(shown):
        left = len(phases) - len(shown)
        parts.append(f'<p class="quiet">{left} more phases are in analysis.json.</p>')
    answers = sum(anomaly.sample_idx is not None for anomaly in findings.anomalies)
    if answers > len(texts):
        parts.append(
            f'<p class="quiet">{answers - len(texts)} more answers of {answers} are in '
            "analysis.json.</p>"
        )
    return parts


def _overview(anomalies: Sequence[Anomaly], phases: Sequence[int]) -> str:
    """Kinds by phases: ● for the phase as a whole, and how many of its answers."""
    counts = collections.Counter(
        (a.kind, a.phase, a.sample_idx is None) for a in anomalies
    )
    rows = []
    for kind in sorted({a.kind for a in anomalies}):
        cells = [kind_text(kind)]
        for phase in phases:
            whole, answers = (
                counts[kind, phase, of_phase] for of_phase in (True, False)
            )
            cells.append(f"{'●' if whole else ''} {answers or ''}".strip() or "·")
        rows.append(cells)
    return wide(["kind", *map(str, phases)], rows)


def _phase(
    phase: int, anomalies: Sequence[Anomaly], texts: set[Anomaly], *, is_open: bool
) -> str:
    whole = [anomaly for anomaly in anomalies if anomaly.sample_idx is None]
    answers = [anomaly for anomaly in anomalies if anomaly.sample_idx is not None]
    told = [kind_text(kind) for kind in dict.fromkeys(a.kind for a in whole)]
    odd = {a.sample_idx for a in answers}
    told += [_answers(len(odd))] if odd else []
    parts = [f"<summary><b>Phase {phase}</b>: {', '.join(told)}</summary>"]
    parts += [
        f'<div class="odd"><b>{kind_text(a.kind).capitalize()}.</b> {_reason(a)}</div>'
        for a in whole
    ]
    for kind, group in _by_kind(answers):
        shown = [a for a in group if a in texts]
        more = f", {len(shown)} shown" if len(shown) < len(group) else ""
        title = f"{kind_text(kind)}: {_answers(len(group))}{more}"
        parts += [f"<h3>{title}</h3>", *map(_answer, shown)]
    return f"<details{' open' if is_open else ''}>{''.join(parts)}</details>"


def _answers(count: int) -> str:
    return "1 answer" if count == 1 else f"{count} answers"


def _answer(anomaly: Anomaly) -> str:
    return f'<div class="odd">{_reason(anomaly)}{folded(anomaly.text)}</div>'


def _reason(anomaly: Anomaly) -> str:
    before, here = (number(x, ".3g") for x in (anomaly.baseline, anomaly.statistic))
    facts = f"{here}, baseline {before}, adjusted {p_text(anomaly.p_value)}"
    return f'{escape(anomaly.reason)} <span class="quiet">({facts})</span>'


def _chosen(anomalies: Sequence[Anomaly]) -> set[Anomaly]:
    """The answers to show: the surest of each phase and kind in turn."""
    answers = [anomaly for anomaly in anomalies if anomaly.sample_idx is not None]
    queues = collections.defaultdict(list)
    for anomaly in sorted(answers, key=lambda a: a.p_value):
        queues[anomaly.phase, anomaly.kind].append(anomaly)
    rounds = sorted(
        ((place, a) for queue in queues.values() for place, a in enumerate(queue)),
        key=lambda pair: pair[0],
    )
    return {anomaly for _, anomaly in rounds[:TEXTS]}


def _by_kind(anomalies: Sequence[Anomaly]) -> Iterator[tuple[str, list[Anomaly]]]:
    groups = collections.defaultdict(list)
    for anomaly in anomalies:
        groups[anomaly.kind].append(anomaly)
    yield from groups.items()
