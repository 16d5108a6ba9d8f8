"""Pictures of a data set, each as the bytes of a PNG."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from rlhf_jax.evaluation.data_report import Findings

MAX_POINTS = 5_000
MAX_BARS = 12


def draw_all(findings: Findings, *, max_tokens: int | None = None) -> dict[str, bytes]:
    """Name of the picture -> PNG, of whatever the data set has to show."""
    report, pictures = findings.report, {}
    if report["usable"]:
        pictures["lengths"] = draw_lengths(findings.lengths, max_tokens)
    if "length_bias" in report:
        lengths = findings.lengths.get("tokens", findings.lengths["words"])
        unit = "tokens" if "tokens" in findings.lengths else "words"
        pictures["length_bias"] = draw_length_bias(
            lengths["chosen"], lengths["rejected"], unit, report["length_bias"][unit]
        )
    if report["turns"]["dialogues"]:
        pictures["turns"] = draw_turns(report["turns"]["rows_by_turns"])
    shown = dict(report["labels"])
    if report.get("safety"):
        shown = {"safety of the pairs": report["safety"], **shown}
    shown = {name: counts for name, counts in shown.items() if len(counts) > 1}
    if shown:
        pictures["labels"] = draw_labels(shown)
    return pictures


def draw_lengths(
    lengths: Mapping[str, Mapping[str, np.ndarray]], max_tokens: int | None = None
) -> bytes:
    """A histogram of every text's lengths, a panel for each unit."""
    units = [unit for unit in ("words", "tokens", "characters") if unit in lengths]
    figure = _figure(len(units), 1)
    for number, unit in enumerate(units, 1):
        axes = figure.add_subplot(1, len(units), number)
        fields = lengths[unit]
        # The longest hundredth would press all others against the axis.
        end = max(np.quantile(values, 0.99) for values in fields.values())
        edges = np.linspace(0, max(float(end), 1.0), 41)
        for name, values in fields.items():
            inside = np.minimum(values, edges[-1])
            style = {"histtype": "step", "lw": 1.6, "label": name}
            axes.hist(inside, edges, **style)
        if unit == "tokens" and max_tokens is not None:
            axes.axvline(max_tokens, color="0.4", lw=1, ls="--", label="max_tokens")
        _finish(axes, f"Length in {unit}", f"{unit}, the last bin and more", "rows")
        axes.legend(fontsize=8, frameon=False)
    return _png(figure)


def draw_length_bias(
    chosen: np.ndarray, rejected: np.ndarray, unit: str, figures: Mapping[str, Any]
) -> bytes:
    """Differences of length within pairs, and both lengths against each other."""
    figure = _figure(2, 1)
    difference = chosen - rejected
    end = float(np.quantile(np.abs(difference), 0.99)) or 1.0
    edges = np.linspace(-end, end, 42)
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    inside = np.clip(difference, -end, end)
    rule, mean = figures["longer_wins"], figures["mean_difference"]["value"]
    left.hist(inside, edges, color="C0")
    left.axvline(0, color="0.4", lw=1, ls="--")
    left.axvline(mean, color="C3", lw=1.5, label=f"mean {mean:+.1f}")
    heading = (
        f"Longer wins: {rule['value']:.3f} ({rule['low']:.3f} to {rule['high']:.3f})"
    )
    _finish(left, heading, f"{unit}, chosen less rejected", "pairs")
    left.legend(fontsize=8, frameon=False)
    step = max(1, len(chosen) // MAX_POINTS)
    right.scatter(rejected[::step] + 1, chosen[::step] + 1, s=8, alpha=0.35, lw=0)
    ends = (1, max(float(chosen.max()), float(rejected.max())) + 1)
    right.plot(ends, ends, color="0.4", lw=1, ls="--", label="equal")
    right.set(xscale="log", yscale="log")
    _finish(
        right, "Both sides of a pair", f"{unit} + 1, rejected", f"{unit} + 1, chosen"
    )
    right.legend(fontsize=8, frameon=False)
    return _png(figure)


def draw_turns(rows_by_turns: Mapping[int, int]) -> bytes:
    """How many dialogues have how many turns."""
    figure = _figure(1, 1)
    axes = figure.add_subplot()
    axes.bar(list(rows_by_turns), list(rows_by_turns.values()), color="C0")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _finish(axes, "Turns of a dialogue", "turns, the response among them", "rows")
    return _png(figure)


def draw_labels(labels: Mapping[str, Mapping[str, int]]) -> bytes:
    """A panel of bars for each column of labels."""
    columns = min(3, len(labels))
    lines = -(-len(labels) // columns)
    figure = _figure(columns, lines)
    for number, (name, counts) in enumerate(labels.items(), 1):
        axes = figure.add_subplot(lines, columns, number)
        shown = list(counts.items())[:MAX_BARS]
        places = np.arange(len(shown))[::-1]
        axes.barh(places, [count for _, count in shown], color="C0")
        axes.set_yticks(places, [_short(label, 36) for label, _ in shown], fontsize=8)
        more = f", the first {MAX_BARS} values" if len(counts) > MAX_BARS else ""
        _finish(axes, _short(name, 32), "rows" + more, "")
    return _png(figure)


def _short(label: str, width: int) -> str:
    # "$" would start a formula
    label = " ".join(label.split()).replace("$", r"\$")
    return label if len(label) <= width else label[: width - 1] + "…"


def _figure(columns: int, lines: int):
    from matplotlib.figure import Figure  # a second to import, needed once a run

    size = (max(5.6, 4.8 * columns), 3.3 * lines)
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    return figure


def _finish(axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
