"""The training curves of a run, or of several beside each other, as one picture."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Panel(NamedTuple):
    """One set of axes: one quantity with its unit, one or more metrics.

    Attributes:
      title: What is shown.
      unit: The label of the y axis.
      lines: Legend -> metrics key, measured every phase: drawn raw and smoothed.
      points: Legend -> metrics key, measured now and then: drawn as marked points.
      limits: The y axis' ends, as (0, 1) for a fraction; None fits the data.
    """

    title: str
    unit: str
    lines: Mapping[str, str]
    points: Mapping[str, str] = {}
    limits: tuple[float, float] | None = None


def plot_curves(
    rows: Sequence[Mapping[str, Any]],
    path: str | os.PathLike,
    panels: Sequence[Panel],
    *,
    title: str = "",
) -> None:
    """Draws metrics against the phase, one panel a quantity, and writes a PNG.

    Args:
      rows: As `run_files.read_metrics` gives them; each has "phase".
      path: Where to; an old picture is replaced in one step.
      panels: What to draw; panels none of whose metrics were measured are left out.
      title: Above all panels.
    """
    from matplotlib.figure import Figure  # a second to import, needed once a run

    panels = [p for p in panels if any(map(len, _series(rows, p).values()))]
    columns = min(3, max(1, len(panels)))
    lines = max(1, math.ceil(len(panels) / columns))
    figure = Figure(figsize=(4.4 * columns, 3.1 * lines + 0.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    if title:
        figure.suptitle(title, fontsize=13, fontweight="bold")
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(lines, columns, index + 1)
        _draw(axes, panel, _series(rows, panel))
    _write(figure, path)


def plot_comparison(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    gains: Mapping[str, tuple[float, float, float]],
    path: str | os.PathLike,
    *,
    title: str = "",
) -> None:
    """Draws what several methods reached on held-out prompts, and writes a PNG.

    Args:
      runs: Method -> its metrics, as `run_files.read_metrics` gives them.
      gains: Method -> (mean, low, high) of its gain in reward.
      path: Where to; an old picture is replaced in one step.
      title: Above all panels.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.2, 3.9), layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    by_time, by_kl, bars = (figure.add_subplot(1, 3, i) for i in (1, 2, 3))
    for color, (method, rows) in enumerate(runs.items()):
        seconds = np.cumsum([row.get("time/phase_s", 0.0) for row in rows])
        points = np.array(
            [
                (at, row["heldout/kl"], row["heldout/reward_mean"])
                for at, row in zip(seconds, rows, strict=True)
                if "heldout/reward_mean" in row
            ]
        ).reshape(-1, 3)
        at, kl, reward = points.T
        style = {"color": f"C{color}", "marker": "o", "ms": 4, "lw": 1.4}
        by_time.plot(at, reward, label=method, **style)
        by_kl.plot(kl, reward, label=method, **style)
        mean, low, high = gains[method]
        spread = [[mean - low], [high - mean]]
        bars.bar(method, mean, yerr=spread, color=f"C{color}", capsize=5)
    labels = (
        (by_time, "Held-out reward", "seconds of training", "score"),
        (by_kl, "What it costs", "KL, nats a response", "held-out reward"),
        (bars, "Gain, with 95 % interval", "", "score"),
    )
    for axes, heading, x, y in labels:
        axes.set_title(heading, fontsize=11)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    by_time.legend(fontsize=9, frameon=False)
    _write(figure, path)


def _write(figure, path: str | os.PathLike) -> None:
    """Beside it first, so that no half-written picture is ever there."""
    path = pathlib.Path(path)
    beside = path.with_name(path.name + ".tmp")
    figure.savefig(beside, format="png", dpi=110)
    os.replace(beside, path)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centered moving average [N] -> [N]; near the ends the window gets shorter."""
    half = window // 2
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    index = np.arange(len(values))
    low = np.maximum(index - half, 0)
    high = np.minimum(index + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _series(rows, panel: Panel) -> dict[str, np.ndarray]:
    """Returns metrics key -> finite (phase, value) pairs [N, 2]."""
    keys = [*panel.lines.values(), *panel.points.values()]
    return {
        key: np.array(
            [
                (row["phase"], row[key])
                for row in rows
                if key in row and math.isfinite(row[key])
            ]
        ).reshape(-1, 2)
        for key in keys
    }


def _draw(axes, panel: Panel, series: Mapping[str, np.ndarray]) -> None:
    for color, (legend, key) in enumerate(panel.lines.items()):
        phases, values = series[key].T
        if not len(phases):
            continue
        window = len(phases) // 12
        if window < 3:  # too few points for an average to say more than they do
            marker = "." if len(phases) < 40 else None
            axes.plot(phases, values, f"C{color}", marker=marker, lw=1.6, label=legend)
            continue
        axes.plot(phases, values, f"C{color}", lw=0.8, alpha=0.35)
        smoothed = smooth(smooth(values, window), window)
        axes.plot(phases, smoothed, f"C{color}", lw=2, label=legend)
    for color, (legend, key) in enumerate(panel.points.items(), len(panel.lines)):
        phases, values = series[key].T
        if len(phases):
            axes.plot(phases, values, f"C{color}o--", ms=5, lw=1, label=legend)
    axes.set_title(panel.title, fontsize=11)
    axes.set_xlabel("phase")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel(panel.unit)
    if panel.limits:
        axes.set_ylim(*panel.limits)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(panel.lines) + len(panel.points) > 1:
        axes.legend(fontsize=8, frameon=False)
