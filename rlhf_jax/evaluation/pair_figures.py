"""What the scores of pairs look like, as one picture."""

import os
import pathlib
from collections.abc import Mapping

import numpy as np

from rlhf_jax.evaluation.pair_analysis import Calibration, Share


def plot_pairs(
    path: str | os.PathLike,
    *,
    margins: np.ndarray,
    length_differences: np.ndarray,
    calibration: Calibration,
    accuracies: Mapping[str, Share],
    domains: Mapping[str, Share],
    title: str,
) -> None:
    """Draws six panels and writes a PNG, replacing an old one in one step.

    Args:
      path: where to.
      margins: [N].
      length_differences: [N], chosen less rejected, in characters.
      calibration: of the margins.
      accuracies: the model's, and that of each baseline.
      domains: accuracy by domain.
      title: above all panels.
    """
    from matplotlib.figure import Figure  # a second to import, needed once a run

    figure = Figure(figsize=(13.2, 7.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    panels = (
        lambda axes: _bars(axes, accuracies, "Accuracy, with 95 % interval"),
        lambda axes: _bars(axes, domains, "Accuracy by domain"),
        lambda axes: _margins(axes, margins),
        lambda axes: _reliability(axes, calibration),
        lambda axes: _confidence(axes, margins),
        lambda axes: _lengths(axes, margins, length_differences),
    )
    for number, draw in enumerate(panels, 1):
        axes = figure.add_subplot(2, 3, number)
        draw(axes)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    path = pathlib.Path(path)
    beside = path.with_name(path.name + ".tmp")
    figure.savefig(beside, format="png", dpi=110)
    os.replace(beside, path)


def _bars(axes, shares: Mapping[str, Share], title: str) -> None:
    values = np.array([tuple(share)[:3] for share in shares.values()])
    value, low, high = values.T
    places = np.arange(len(shares))[::-1]
    axes.barh(
        places,
        value,
        xerr=np.maximum([value - low, high - value], 0.0),
        color=[f"C{i}" for i in range(len(shares))],
        capsize=4,
        height=0.6,
    )
    for place, right in zip(places, value):
        axes.text(0.02, place, f"{right:.3f}", va="center", color="white", fontsize=9)
    labels = [f"{name}\n({share.count:,})" for name, share in shares.items()]
    axes.set_yticks(places, labels, fontsize=9)
    axes.axvline(0.5, color="0.4", lw=1, ls="--")
    axes.set(title=title, xlim=(0, 1), xlabel="fraction of pairs")


def _margins(axes, margins: np.ndarray) -> None:
    edges = np.linspace(*_ends(margins), 41)
    for wrong, color, label in (
        (False, "C0", "as people"),
        (True, "C3", "against them"),
    ):
        part = margins[(margins < 0) == wrong]
        axes.hist(part, edges, color=color, label=f"{label} ({len(part):,})")
    axes.axvline(0, color="0.4", lw=1, ls="--")
    axes.set(title="Margins", xlabel="score, chosen less rejected", ylabel="pairs")
    axes.legend(fontsize=8, frameon=False)


def _reliability(axes, calibration: Calibration) -> None:
    confidence, right, raters = np.array(
        [(b.confidence, b.accuracy, b.raters) for b in calibration.bins]
    ).T
    axes.plot((0.5, 1), (0.5, 1), color="0.4", lw=1, ls="--", label="as sure as right")
    axes.plot(confidence, right, "C0o-", ms=5, label="accuracy")
    axes.plot(confidence, raters, "C1s-", ms=4, label="raters who agree")
    axes.set(
        title=f"Calibration (expected error {calibration.expected_error:.3f})",
        xlabel="confidence of the model",
        ylabel="fraction",
        xlim=(0.5, 1),
        ylim=(0, 1.02),
    )
    axes.legend(fontsize=8, frameon=False, loc="lower right")


def _confidence(axes, margins: np.ndarray) -> None:
    confidence = 1.0 / (1.0 + np.exp(-np.abs(margins)))
    axes.hist(confidence, np.linspace(0.5, 1, 21), color="C0")
    axes.axvline(confidence.mean(), color="C3", lw=1.5, label="mean")
    axes.set(title="Confidence", xlabel="σ(|margin|)", ylabel="pairs", xlim=(0.5, 1))
    axes.legend(fontsize=8, frameon=False)


def _lengths(axes, margins: np.ndarray, differences: np.ndarray) -> None:
    axes.scatter(differences, margins, s=9, alpha=0.45, lw=0)
    if np.ptp(differences) > 0:
        slope, start = np.polyfit(differences, margins, 1)
        ends = np.array([differences.min(), differences.max()])
        axes.plot(ends, start + slope * ends, "C3", lw=1.5, label="least squares")
        axes.legend(fontsize=8, frameon=False)
    axes.axhline(0, color="0.4", lw=1, ls="--")
    axes.set(
        title="Margin and length",
        xlabel="characters, chosen less rejected",
        ylabel="margin",
    )


def _ends(values: np.ndarray) -> tuple[float, float]:
    """Ends of an axis: the same on both sides of zero, never empty."""
    end = float(np.abs(values).max(initial=0.0)) or 1.0
    return -end, end
