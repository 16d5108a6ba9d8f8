"""The findings of a run on a terminal, in some forty lines."""

import collections
import textwrap
from collections.abc import Iterator, Sequence

from rich.console import Console

from rlhf_jax import progress
from rlhf_jax.analysis.anomalies import Anomaly
from rlhf_jax.analysis.findings import Findings
from rlhf_jax.analysis.report.labels import label, listed, number, spread, thinned
from rlhf_jax.analysis.report.verdict import (
    change_text,
    checkpoint,
    harm_at,
    kind_text,
    verdict,
)
from rlhf_jax.analysis.statistics import Interval

ROWS = 12  # phases of the table
KINDS = 8  # of anomalies, told with a reason
LINES = 10  # that these take, where there are more than one
JUDGES = 3  # told in a line each
BESIDE = 7  # characters that stand beside a reason


def show_findings(console: Console, findings: Findings) -> None:
    """Shows the verdict, the phases, the surest anomalies and the checkpoint to take.

    Args:
      console: from `progress.make_console`.
      findings: of the run.
    """
    title = f"Analysis of {findings.workdir}"
    progress.show_plan(console, title, list(_facts(findings)))
    phases = list(findings.summaries)
    keep = {findings.recommendation.phase, findings.onset}
    shown = thinned(phases, ROWS, keep)
    title = "Phases: ★ take"
    if findings.onset is not None:
        title += ", ✕ wrong from here on"
    if len(shown) < len(phases):
        title += f"; {len(shown)} of {len(phases)} are shown"
    header, *rows = zip(*_columns(findings, shown, console.width))
    progress.show_table(console, title, header, rows)
    kinds = _kinds(findings.anomalies)
    told = _fitting(list(kinds.values())[:KINDS], console.width - BESIDE)
    if len(told) < len(kinds):
        told.append(f"and in the report: {', '.join(list(kinds)[len(told) :])}")
    if told:
        rows = [("·", text) for text in told]
        progress.show_plan(console, "The surest anomaly of each kind", rows)


def _facts(findings: Findings) -> Iterator[tuple[str, str]]:
    found = verdict(findings)
    yield "verdict", found.title
    if findings.onset is not None:
        yield "because", ", ".join(harm_at(findings, findings.onset))
    if found.state == "healthy":
        yield from (("", reason) for reason in found.reasons)
    for name, parting in findings.partings.items():
        yield (
            label(name).name,
            f"parts from the reward after phase {parting.phase}, seen at phase "
            f"{parting.seen_at}",
        )
    take = findings.recommendation
    yield "take", f"{checkpoint(findings)}: {take.reason}"
    harm = harm_at(findings, take.phase)
    if harm:
        yield "", f"but see its anomalies: {', '.join(harm)}"
    yield from _changes(findings)
    if findings.skipped:
        yield "not read", listed(thinned(list(findings.skipped), ROWS))


def _changes(findings: Findings) -> Iterator[tuple[str, str]]:
    """Reward and judges, first and last phase."""
    phases = list(findings.summaries)
    before, after = (findings.summaries[phases[k]]["means"] for k in (0, -1))
    last = findings.comparisons.get(phases[-1])
    for name in list(findings.best)[: 1 + JUDGES]:
        shown = label(name)
        if last is None:
            yield shown.name, spread(before[name], shown.form)
            continue
        ends = [number(x[name].mean, shown.form) for x in (before, after)]
        yield shown.name, f"{' → '.join(ends)}: {change_text(name, last.scores[name])}"


def _columns(
    findings: Findings, phases: Sequence[int], width: int
) -> list[tuple[str, ...]]:
    """The columns that fit, each its name and then a cell for each phase."""
    rows = [findings.summaries[phase] for phase in phases]
    names = list(rows[0]["means"])
    judges = [name for name in names if name.startswith("judge/")]
    heads = {"kl": "KL", "tokens": "length"}
    forms = {"kl": ".2f"}
    odd = collections.Counter(anomaly.phase for anomaly in findings.anomalies)
    found = [("phase", *(f"{_sign(findings, phase)}{phase}" for phase in phases))]
    found.append(("reward ± 95 %", *(_reward(row["means"]["reward"]) for row in rows)))
    for name in (n for n in ("kl", "tokens", *judges) if n in names):
        shown = label(name)
        head, form = heads.get(name, shown.name), forms.get(name, shown.form)
        cells = [number(row["means"][name].mean, form) for row in rows]
        found.append((head, *cells))
    found.append(("distinct-2", *(number(row["distinct_2"], ".3f") for row in rows)))
    found.append(("odd", *(str(odd[phase] or "") for phase in phases)))
    kept = []
    for column in found:
        width -= 3 + max(map(len, column))
        if width >= 0:
            kept.append(column)
    return kept


def _reward(found: Interval) -> str:
    return f"{number(found.mean, '+.3f')} ± {found.high - found.mean:.3f}"


def _sign(findings: Findings, phase: int) -> str:
    if phase == findings.recommendation.phase:
        return "★ "
    return "✕ " if phase == findings.onset else "  "


def _kinds(anomalies: Sequence[Anomaly]) -> dict[str, str]:
    """Kind -> where it is and the reason of its surest; whole phases come first."""
    groups = collections.defaultdict(list)
    for anomaly in sorted(
        anomalies, key=lambda a: (a.sample_idx is not None, a.p_value)
    ):
        groups[kind_text(anomaly.kind)].append(anomaly)
    found = {}
    for kind, group in groups.items():
        phases = sorted({anomaly.phase for anomaly in group})
        if len(phases) > 3:
            where = f"{len(phases)} phases from {phases[0]} to {phases[-1]}"
        else:
            where = listed(phases)
        found[kind] = f"{kind}, {where}: {group[0].reason}"
    return found


def _fitting(texts: Sequence[str], width: int) -> list[str]:
    """The first text, and those after it that fit in `LINES` with it."""
    left, kept = LINES, []
    for text in texts:
        left -= len(textwrap.wrap(text, max(width, 1)))
        if kept and left < 0:
            break
        kept.append(text)
    return kept
