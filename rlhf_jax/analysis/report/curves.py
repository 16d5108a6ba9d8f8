"""The charts of a report: measures over phases, and rewards over √KL."""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from rlhf_jax.analysis.findings import Findings
from rlhf_jax.analysis.report.charts import Axis, Mark, Point, curve_chart, line_chart
from rlhf_jax.analysis.report.labels import (
    Label,
    label,
    number,
    p_text,
    spread,
    thinned,
)
from rlhf_jax.analysis.statistics import Interval
from rlhf_jax.evaluation.pages import escape

MOST = 120  # phases in one chart
NEAR = 1.25  # a peak is drawn up to so many times the greatest √KL seen


def over_phases(findings: Findings) -> str:
    """A chart of each measure."""
    words = not knows_tokens(findings)
    first = next(iter(findings.summaries.values()))
    names = [n for n in first["means"] if n.partition("/")[0] in ("reward", "judge")]
    charts = [_phase_chart(findings, name, words) for name in names]
    charts.insert(1, _quantile_chart(findings))
    for name in ("kl", "step", "tokens", "repeated", "surprise", "distinct_2"):
        charts.append(_phase_chart(findings, name, words))
    charts += [
        _phase_chart(findings, name, words) for name in ("finished", "near_copies")
    ]
    return f'<div class="charts">{"".join(charts)}</div>'


def over_distance(findings: Findings) -> str:
    """Reward and judges over √KL, with what the fitted curves say."""
    names = ["reward", *(n for n in findings.best if n != "reward")]
    figures = "".join(_distance_chart(findings, name) for name in names)
    said = "".join(f"<li>{escape(_says(findings, name))}</li>" for name in names)
    return f'<div class="charts large">{figures}</div><ul>{said}</ul>'


def knows_tokens(findings: Findings) -> bool:
    """Whether the models were asked, or only texts are left."""
    return "kl" in next(iter(findings.summaries.values()))["means"]


def values(findings: Findings, name: str) -> dict[int, Interval]:
    """A measure of each phase that has it; of all answers together without width."""
    if name == "step":
        phases = list(findings.summaries)
        after = dict(itertools.pairwise(phases))
        return {after[p]: x for p, x in findings.steps.items() if p in after}
    found = {}
    for phase, row in findings.summaries.items():
        if name in row["means"]:
            found[phase] = row["means"][name]
        elif name in row:
            found[phase] = Interval(*[row[name]] * 3)
    return found


def _phase_chart(findings: Findings, name: str, words: bool) -> str:
    found = {
        phase: x
        for phase, x in values(findings, name).items()
        if all(map(math.isfinite, x))
    }
    if not found:
        return ""
    shown = label(name, words=words)
    points = [
        Point(p, found[p], f"phase {p}: {spread(found[p], shown.form)}")
        for p in _shown_phases(findings, list(found))
    ]
    y = Axis(shown.name, shown.form, low=shown.low, high=shown.high)
    chart = line_chart(points, _phases(findings), y, marks=_marks(findings))
    return _figure(shown, points, chart)


def _quantile_chart(findings: Findings) -> str:
    """How the rewards of single answers are spread: 5, 25, 50, 75 and 95 %."""
    shown = Label("reward of single answers", "median, half of them, 90 %", "+.3f")
    points, inner = [], []
    for phase in _shown_phases(findings, list(findings.summaries)):
        q = findings.summaries[phase]["quantiles"]
        told = ", ".join(f"{k} % {number(x, '+.2f')}" for k, x in q.items())
        points.append(
            Point(phase, Interval(q[50], q[5], q[95]), f"phase {phase}: {told}")
        )
        inner.append(Interval(q[50], q[25], q[75]))
    axes = _phases(findings), Axis(shown.name, shown.form)
    chart = line_chart(points, *axes, marks=_marks(findings), inner=inner)
    return _figure(shown, points, chart)


def _distance_chart(findings: Findings, name: str) -> str:
    shown, curve = label(name), findings.curves.get(name)
    distances = _distances(findings)
    means = values(findings, name)
    points = [
        Point(
            distances[p],
            means[p],
            f"phase {p}: √KL {distances[p]:.2f}, {spread(means[p], shown.form)}",
            str(p),
        )
        for p in _shown_phases(findings, list(distances))
    ]
    taken = findings.recommendation.phase
    marks = [Mark(distances[taken], f"take {taken}", "taken")]
    if findings.onset is not None:
        marks += [
            Mark(distances[findings.onset], f"wrong from {findings.onset}", "onset")
        ]
    if name in findings.partings:
        phase = findings.partings[name].phase
        marks.append(Mark(distances[phase], f"parts after {phase}", "onset"))
    if curve and _is_near(curve.peak, distances):
        marks.append(Mark(curve.peak, f"peak at √KL {curve.peak:.2f}", "peak"))
    axes = Axis("√KL to the reference, √nats"), Axis(shown.name, shown.form)
    chart = curve_chart(points, curve.at if curve else None, *axes, marks=marks)
    return _figure(shown, points, chart)


def _says(findings: Findings, name: str) -> str:
    """What the curve, the best phase and the parting of one measure are."""
    curve, best = findings.curves.get(name), findings.best[name]
    form = label(name).form
    chosen = f"one from {best.low} to {best.high}" if best.low < best.high else "it"
    text = (
        f"{label(name).name}: best at phase {best.phase} with "
        f"{number(best.mean, form)} (95 % of resamples choose {chosen})"
    )
    if best.earliest < best.phase:
        text += f", and from phase {best.earliest} on not measurably less"
    if not curve:
        return f"{text}; no curve could be fitted to so few phases."
    text += f". The curve explains {curve.r_squared:.0%} of the variance over phases, "
    if curve.peak is None:
        text += "and does not come down."
    elif _is_near(curve.peak, _distances(findings)):
        text += f"and has its peak at √KL {curve.peak:.2f}."
    else:
        text += "and does not come down within what was seen."
    if name in findings.partings:
        found = findings.partings[name]
        text += (
            f" It parts from the reward after phase {found.phase}: from phase "
            f"{found.seen_at} on it is measurably lower ({p_text(found.p_value)}), "
            "while the reward is not."
        )
    return text


def _is_near(peak: float | None, distances: dict[int, float]) -> bool:
    return peak is not None and peak <= NEAR * max(distances.values())


def _distances(findings: Findings) -> dict[int, float]:
    kl = values(findings, "kl")
    return {phase: float(np.sqrt(max(x.mean, 0.0))) for phase, x in kl.items()}


def _shown_phases(findings: Findings, phases: Sequence[int]) -> list[int]:
    return thinned(phases, MOST, {findings.recommendation.phase, findings.onset})


def _phases(findings: Findings) -> Axis:
    """The same in every chart, so that they can be read beside each other."""
    return Axis("phase", ".0f", ends=tuple(findings.summaries), whole=True)


def _marks(findings: Findings) -> list[Mark]:
    if len(findings.summaries) < 2:
        return []
    taken = findings.recommendation.phase
    marks = [Mark(taken, f"take {taken}", "taken")]
    if findings.onset is not None:
        marks.append(Mark(findings.onset, f"wrong from {findings.onset}", "onset"))
    return marks


def _figure(shown: Label, points: Sequence[Point], chart: str) -> str:
    ends = [number(p.y.mean, shown.form) for p in (points[0], *points[1:][-1:])]
    return (
        f"<figure><figcaption><b>{escape(shown.name)}</b>"
        f"<span>{' → '.join(ends)}</span>"
        f'<span class="quiet">{escape(shown.unit)}</span></figcaption>{chart}</figure>'
    )
