"""The report of a run as one HTML page that needs nothing else.

headline    whether it went wrong, why, and which checkpoint to take
curves      every measure over the phases, with 95 % intervals
distance    reward and judges over √KL: over-optimisation
phases      a table
trends      what rises and falls
anomalies   what is odd, with its reason
samples     answers before and after
tokens      what the policy says more, or less, willingly
weights     how far weights and inner states have moved
"""

import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rlhf_jax.analysis.findings import Findings
from rlhf_jax.analysis.report import leads
from rlhf_jax.analysis.report.anomalies import anomaly_parts
from rlhf_jax.analysis.report.curves import knows_tokens, over_distance, over_phases
from rlhf_jax.analysis.report.labels import (
    label,
    listed,
    number,
    p_text,
    signed,
    spread,
)
from rlhf_jax.analysis.report.style import STYLE
from rlhf_jax.analysis.report.tables import (
    change_table,
    move_table,
    phase_table,
    state_table,
    trend_table,
    weight_table,
)
from rlhf_jax.analysis.report.texts import colored_answers, side_by_side
from rlhf_jax.analysis.report.verdict import checkpoint, harm_at, verdict
from rlhf_jax.evaluation import pages
from rlhf_jax.evaluation.pages import escape


class Section(NamedTuple):
    """A part of the page.

    Attributes:
      name: in links.
      title: of the section.
      lead: what is seen and how to read it, HTML as the body.
      body: nothing where the lead says why it is left out.
    """

    name: str
    title: str
    lead: str
    body: str = ""


def render_page(findings: Findings) -> str:
    """The whole page."""
    sections = list(_sections(findings))
    links = [f'<a href="#{s.name}">{escape(s.title)}</a>' for s in sections]
    body = [
        *_headline(findings),
        f"<nav>{''.join(links)}</nav>",
        *(
            f'<section><h2 id="{s.name}">{escape(s.title)}</h2>'
            f'<p class="lead">{s.lead}</p>{s.body}</section>'
            for s in sections
        ),
        f"<footer>{''.join(f'<p>{line}</p>' for line in leads.MEASURED)}</footer>",
    ]
    return pages.frame(f"{_run_name(findings)}: analysis", STYLE, body)


def _headline(findings: Findings) -> list[str]:
    found = verdict(findings)
    phases = list(findings.summaries)
    what = (
        f"{findings.algorithm.upper()}, {_counted(phases)}, "
        f"{findings.num_samples} answers of each"
    )
    reasons = "".join(f"<p>{escape(reason)}</p>" for reason in found.reasons)
    return [
        f"<h1>{escape(_run_name(findings))}</h1>",
        f'<p class="quiet">{escape(what)}<br><code>{escape(findings.workdir)}</code>'
        "</p>",
        f'<div class="verdict {found.state}"><strong>{escape(found.title)}</strong>'
        f"{reasons}</div>",
        f'<div class="cards">{"".join(_cards(findings))}</div>',
        *_skipped(findings),
    ]


def _cards(findings: Findings) -> Iterator[str]:
    take = findings.recommendation
    chosen = f"one from {take.low} to {take.high}" if take.low < take.high else "it"
    about = [checkpoint(findings), f"95 % of resamples choose {chosen}", take.reason]
    harm = harm_at(findings, take.phase)
    if harm:
        about.append(f"but see its anomalies: {', '.join(harm)}")
    yield _card("recommended checkpoint", f"phase {take.phase}", about)
    phases = list(findings.summaries)
    before, after = (findings.summaries[phases[k]]["means"] for k in (0, -1))
    last = findings.comparisons.get(phases[-1])
    for name in findings.best:
        shown = label(name)
        ends = [f"phase {phases[0]}: {spread(before[name], shown.form)}"]
        if last is None:
            yield _card(shown.name, number(before[name].mean, shown.form), ends)
            continue
        found = last.scores[name]
        form = signed(shown.form)
        low, high = (number(x, form) for x in (found.change.low, found.change.high))
        ends.append(f"phase {phases[-1]}: {spread(after[name], shown.form)}")
        about = [f"[{low}, {high}], {p_text(found.p_value)}", *ends]
        title = f"{shown.name}, first to last phase"
        lost = found.change.mean < 0 and found.p_value < 0.05
        yield _card(title, number(found.change.mean, form), about, is_bad=lost)
    if "kl" in after:
        kl = after["kl"]
        about = [f"[{number(kl.low, '.2f')}, {number(kl.high, '.2f')}] nats a response"]
        title = f"KL to the reference, phase {phases[-1]}"
        yield _card(title, number(kl.mean, ".2f"), about)


def _card(title: str, value: str, about: Sequence[str], *, is_bad: bool = False) -> str:
    lines = "".join(f"<span>{escape(line)}</span>" for line in about)
    bold = f'<b class="bad">{value}</b>' if is_bad else f"<b>{value}</b>"
    return f'<div class="card"><span>{escape(title)}</span>{bold}{lines}</div>'


def _skipped(findings: Findings) -> list[str]:
    if not findings.skipped:
        return []
    rows = [
        f"<li>phase {phase}: {escape(why)}</li>"
        for phase, why in findings.skipped.items()
    ]
    title = f"Could not be read: {listed(list(findings.skipped))}"
    return [f"<details><summary>{title}</summary><ul>{''.join(rows)}</ul></details>"]


def _sections(findings: Findings) -> Iterator[Section]:
    several, tokens = len(findings.summaries) > 1, knows_tokens(findings)
    curves = over_phases(findings)
    yield Section("curves", "Curves", leads.CURVES, curves)
    distance = ("distance", "Over-optimisation")
    if tokens and several:
        yield Section(*distance, leads.DISTANCE, over_distance(findings))
    else:
        yield Section(*distance, leads.ALONE if tokens else leads.GONE)
    yield Section("phases", "Phases", leads.PHASES, phase_table(findings))
    if several:
        yield Section("trends", "Trends", leads.TRENDS, trend_table(findings))
        yield _anomalies(findings)
        yield _samples(findings)
    else:
        yield Section("trends", "Trends", leads.ALONE)
        yield Section("anomalies", "Anomalies", leads.ALONE)
        yield Section("samples", "Side by side", leads.ALONE)
    if findings.moves or findings.colored:
        body = move_table(findings) if findings.moves else ""
        body += colored_answers(findings.colored)
        yield Section("tokens", "Token by token", leads.TOKENS, body)
    else:
        yield Section("tokens", "Token by token", leads.GONE)
    yield _weights(findings)


def _anomalies(findings: Findings) -> Section:
    head = ("anomalies", "Anomalies")
    if not findings.anomalies:
        return Section(*head, leads.NO_ANOMALIES)
    return Section(*head, leads.ANOMALIES, "".join(anomaly_parts(findings)))


def _samples(findings: Findings) -> Section:
    last = next(reversed(findings.comparisons.values()))
    facts = [
        f"{last.identical:.0%} of the answers are the same in both phases",
        f"the rewards spread {number(last.deviation_ratio, '.2f')} times as wide",
    ]
    if last.first_difference is not None:
        facts.append(
            f"the median answer differs from token {last.first_difference + 1:.0f} on"
        )
    body = (
        f"<h3>Phase {last.after} beside phase {last.before}</h3>"
        f"<p>{', '.join(facts).capitalize()}.</p>{change_table(findings, last)}"
        f"<h3>Greatest changes</h3>{side_by_side(findings)}"
    )
    return Section("samples", "Side by side", leads.SAMPLES, body)


def _weights(findings: Findings) -> Section:
    head = ("weights", "Weights and inner states")
    if not findings.weights:
        return Section(*head, leads.GONE)
    body = weight_table(findings)
    if findings.states:
        body += f'<h3>Inner states</h3><p class="lead">{leads.STATES}</p>'
        body += state_table(findings)
    return Section(*head, leads.WEIGHTS, body)


def _run_name(findings: Findings) -> str:
    return pathlib.PurePath(findings.workdir).name or findings.workdir


def _counted(phases: list[int]) -> str:
    if len(phases) == 1:
        return f"phase {phases[0]}"
    return f"{len(phases)} phases from {phases[0]} to {phases[-1]}"
