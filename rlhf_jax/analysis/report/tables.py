"""The tables of a report: phases, trends, changes, tokens, weights and inner states."""

import collections
import re
from collections.abc import Callable, Mapping, Sequence

from rlhf_jax.analysis.compared import Comparison
from rlhf_jax.analysis.findings import Findings
from rlhf_jax.analysis.report.curves import knows_tokens
from rlhf_jax.analysis.report.labels import (
    label,
    number,
    p_text,
    signed,
    spread,
    thinned,
)
from rlhf_jax.evaluation import pages
from rlhf_jax.evaluation.pages import escape

MOST = 24  # phases side by side
ARROWS = {"rising": "↗ rising", "falling": "↘ falling", "none": "→ none"}


def wide(header: Sequence[str], rows: Sequence[Sequence[str]], style: str = "") -> str:
    """A table in a box of its own, in which it scrolls; the cells are HTML."""
    return f'<div class="wide {style}">{pages.table(header, rows)}</div>'


def phase_table(findings: Findings) -> str:
    """A row of figures for each phase."""
    words = not knows_tokens(findings)
    first = next(iter(findings.summaries.values()))
    judges = [name for name in first["means"] if name.startswith("judge/")]
    columns = [n for n in ("kl", "tokens", *judges, "finished") if n in first["means"]]
    found = collections.Counter(anomaly.phase for anomaly in findings.anomalies)
    header = ["phase", "reward, 95 %", "std"]
    header += [escape(label(name, words=words).name) for name in columns]
    header += ["distinct-2", "anomalies"]
    rows = []
    for phase, row in findings.summaries.items():
        means = row["means"]
        cells = [_phase_name(findings, phase), spread(means["reward"], "+.3f")]
        cells.append(number(row["std_reward"], ".3f"))
        cells += [number(means[n].mean, label(n, words=words).form) for n in columns]
        cells += [number(row["distinct_2"], ".3f"), str(found[phase])]
        rows.append(cells)
    return wide(header, rows)


def trend_table(findings: Findings) -> str:
    """Where each measure goes over the phases."""
    words = not knows_tokens(findings)
    rows = []
    for name, trend in findings.trends.items():
        shown = label(name, words=words)
        form = _finer(signed(shown.form))
        direction = ARROWS[trend.direction]
        slope = trend.slope
        interval = f"[{number(slope.low, form)}, {number(slope.high, form)}]"
        cells = [
            f"{escape(shown.name)} <span class='quiet'>{escape(shown.unit)}</span>"
        ]
        cells += [number(slope.mean, form), interval, p_text(trend.p_value), direction]
        rows.append(cells)
    return wide(["measure", "slope a phase", "95 %", "p", "direction"], rows)


def change_table(findings: Findings, found: Comparison) -> str:
    """The paired differences of two phases."""
    words = not knows_tokens(findings)
    rows = []
    for name, one in found.scores.items():
        form = signed(label(name, words=words).form)
        rows.append(
            [
                escape(label(name, words=words).name),
                spread(one.change, form),
                p_text(one.p_value),
                number(one.effect, "+.2f"),
                f"{one.probability:.0%}",
            ]
        )
    header = [
        "measure",
        "change, 95 %",
        "p",
        "effect d<sub>z</sub>",
        "prompts with more",
    ]
    return wide(header, rows)


def move_table(findings: Findings) -> str:
    """The tokens that make most of the KL."""
    greatest = max(abs(move.share) for move in findings.moves) or 1.0
    rows = []
    for move in findings.moves:
        width = 7.0 * abs(move.share) / greatest
        style = f'style="width:{width:.2f}rem"'
        side = "more" if move.share > 0 else "less"
        rows.append(
            [
                f"<code>{escape(visible(move.text))}</code>",
                str(move.count),
                number(move.log_ratio, "+.3f"),
                number(move.share, ".1%"),
                f'<span class="share {side}" {style}></span>',
            ]
        )
    header = ["token", "count", "log ratio, nats", "share of the KL", ""]
    return wide(header, rows, "bars")


def weight_table(findings: Findings) -> str:
    """How far each part of the model is from the reference, phase by phase."""
    parts = sorted(next(reversed(findings.weights.values())), key=_order)
    rows = {part: {p: x[part] for p, x in findings.weights.items()} for part in parts}
    greatest = max(max(row.values()) for row in rows.values()) or 1.0
    return _heat(findings, rows, ".2%", lambda x: x / greatest)


def state_table(findings: Findings) -> str:
    """How alike each layer's states are to the reference's, phase by phase."""
    layers = range(len(next(iter(findings.states.values()))))
    rows = {
        f"layer {layer}": {p: x[layer] for p, x in findings.states.items()}
        for layer in layers
    }
    least = min(min(row.values()) for row in rows.values())
    return _heat(findings, rows, ".4f", lambda x: (1.0 - x) / max(1.0 - least, 1e-9))


def visible(text: str) -> str:
    """A token's text with its spaces and line breaks to be seen."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "∅"


def _heat(
    findings: Findings,
    rows: Mapping[str, Mapping[int, float]],
    form: str,
    strength: Callable[[float], float],
) -> str:
    """A row a part, a column a phase, the stronger in colour the more has changed."""
    phases = list(next(iter(rows.values())))
    shown = thinned(phases, MOST, {findings.recommendation.phase, findings.onset})
    lines = [
        f"<th></th>{''.join(f'<th>{_phase_name(findings, p)}</th>' for p in shown)}"
    ]
    for name, row in rows.items():
        cells = [
            f'<td style="background:rgb(var(--heat)/{0.6 * strength(row[p]):.2f})">'
            f"{number(row[p], form)}</td>"
            for p in shown
        ]
        lines.append(f"<td>{escape(name)}</td>{''.join(cells)}")
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    left = len(phases) - len(shown)
    note = (
        f'<p class="quiet">{left} phases between them are not shown.</p>'
        if left
        else ""
    )
    return f'<div class="wide heat"><table>{body}</table></div>{note}'


def _phase_name(findings: Findings, phase: int) -> str:
    if phase == findings.recommendation.phase:
        return f'<span class="taken" title="recommended">★ {phase}</span>'
    if phase == findings.onset:
        return f'<span class="onset" title="wrong from here on">✕ {phase}</span>'
    return str(phase)


def _finer(form: str) -> str:
    """Two more decimals: a slope a phase is small beside what it is of."""
    return re.sub(r"\.(\d)", lambda found: f".{int(found[1]) + 2}", form)


def _order(part: str) -> tuple:
    """The embedding, the layers by number, what follows them, and the whole last."""
    names = part.split("/")
    if names[0] == "layers":
        return 1, int(names[1]), names[2]
    return {"embed": 0, "all": 3}.get(part, 2), 0, part
