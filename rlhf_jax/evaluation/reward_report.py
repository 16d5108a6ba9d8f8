"""The error analysis of a reward or cost model: a page, its cases and a picture.

    report/report.md     figures in tables, and the worst cases in full
    report/cases.json    the same cases, for other tools
    report/figures.png   margins, calibration, confidence, length, domains

`analyze` is for any scored pairs: it wants texts, scores and nothing of the model.

Dimension key: N pairs; side 0 is chosen, side 1 rejected.
"""

import html
import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data.rows import Pair
from rlhf_jax.evaluation import pair_analysis, pair_baselines
from rlhf_jax.evaluation.pair_analysis import Calibration, Length, Share
from rlhf_jax.evaluation.pair_baselines import Baseline
from rlhf_jax.evaluation.pair_figures import plot_pairs

CASES = 30
SPECIAL = re.compile(r"([\\`*_{}\[\]#|~])")


class Analysis(NamedTuple):
    """What `analyze` finds.

    Attributes:
      margins: [N], above zero where the model agrees with the raters.
      length_differences: [N], in characters, chosen less rejected.
      accuracies: "model", and each baseline by its name.
      domains: accuracy by domain; {} where the pairs name none.
      length: how scores go with length.
      calibration: whether confidence is deserved.
      quantiles: of the margins.
      signs: of a cost model with safety labels, else {}.
      cases: the worst pairs as plain dicts, the worst first.
    """

    margins: np.ndarray
    length_differences: np.ndarray
    accuracies: dict[str, Share]
    domains: dict[str, Share]
    length: Length
    calibration: Calibration
    quantiles: dict[str, float]
    signs: dict[str, Share]
    cases: list[dict[str, Any]]


def analyze(
    pairs: Sequence[Pair],
    scores: np.ndarray,
    baselines: Sequence[Baseline] = (),
    *,
    costs: bool = False,
) -> Analysis:
    """Finds what a model gets right, and what it leans on.

    Args:
      pairs: N pairs it was not trained on, their prompts as strings.
      scores: [N, 2].
      baselines: rules to compare with, on the same pairs.
      costs: the scores are costs: the lower, the better.
    """
    scores = np.asarray(scores, np.float64)
    sign = -1 if costs else 1
    margins = sign * (scores[:, 0] - scores[:, 1])
    probability = np.array([pair.probability for pair in pairs])
    lengths = np.array([[len(p.chosen), len(p.rejected)] for p in pairs])
    rules = {rule.name: pair_analysis.accuracy(rule.margins) for rule in baselines}
    labelled = [None not in (p.chosen_safe, p.rejected_safe) for p in pairs]
    signs = {}
    if costs and all(labelled):
        safe = np.array([[p.chosen_safe, p.rejected_safe] for p in pairs], bool)
        signs = pair_analysis.sign_accuracy(scores, safe)
    domains = [pair.domain for pair in pairs]
    return Analysis(
        margins,
        lengths[:, 0] - lengths[:, 1],
        {"model": pair_analysis.accuracy(margins)} | rules,
        pair_analysis.accuracy_by(margins, domains) if any(domains) else {},
        pair_analysis.length_bias(scores, lengths, probability, sign=sign),
        pair_analysis.calibration(margins, probability),
        pair_analysis.margin_quantiles(margins),
        signs,
        [
            _case(pairs[i], scores[i], margins[i])
            for i in pair_analysis.worst_pairs(margins, CASES)
        ],
    )


def write_report(folder: pathlib.Path, found: Analysis, *, title: str) -> None:
    """Writes the page, the cases and the picture into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = json.dumps(found.cases, ensure_ascii=False, indent=2)
    (folder / "cases.json").write_text(cases + "\n", "utf-8")
    (folder / "report.md").write_text(to_markdown(found, title), "utf-8")
    plot_pairs(
        folder / "figures.png",
        margins=found.margins,
        length_differences=found.length_differences,
        calibration=found.calibration,
        accuracies=found.accuracies,
        domains=found.domains or {"all pairs": found.accuracies["model"]},
        title=title,
    )


def report_pairs(
    folder: pathlib.Path,
    train: Sequence[Pair],
    heldout: Sequence[Pair],
    scores: np.ndarray,
    *,
    costs: bool,
    title: str,
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Writes the report of a model's held-out scores, beside those of the baselines.

    Args:
      folder: where to.
      train: what the model and the baselines learned from.
      heldout: N other pairs.
      scores: [N, 2], of the held-out pairs.
      costs: see `analyze`.
      title: of the page.

    Returns:
      Figures for summary.json, and (label, text) for a run's closing summary.
    """
    rules = pair_baselines.baselines(train, heldout)
    found = analyze(heldout, scores, rules, costs=costs)
    write_report(folder, found, title=title)
    facts = [
        (f"right, {name}", describe(share)) for name, share in found.accuracies.items()
    ]
    return summarize(found), [*facts, ("report", str(folder / "report.md"))]


def summarize(found: Analysis) -> dict[str, Any]:
    """The figures for a run's summary.json."""
    share = lambda s: s._asdict()
    length = {
        name: share(value) if isinstance(value, Share) else value
        for name, value in found.length._asdict().items()
    }
    figures = {
        "accuracy": {name: share(s) for name, s in found.accuracies.items()},
        "domains": {name: share(s) for name, s in found.domains.items()},
        "length": length,
        "calibration": {
            "expected_error": found.calibration.expected_error,
            "raters_error": found.calibration.raters_error,
        },
        "margins": found.quantiles,
        "signs": {name: share(s) for name, s in found.signs.items()},
    }
    return {name: value for name, value in figures.items() if value}


def describe(found: Share) -> str:
    """0.743 [0.704, 0.778]"""
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def to_markdown(found: Analysis, title: str) -> str:
    """The page."""
    parts = [
        f"# {title}",
        f"How it judges {len(found.margins):,} held-out pairs. A margin is by how much "
        "it prefers the response that people chose.",
        _shares("accuracy", found.accuracies),
        "![figures](figures.png)",
    ]
    if found.signs:
        parts += ["## Signs: safe below zero, unsafe above"]
        parts += [_shares("accuracy", found.signs)]
    if found.domains:
        parts += ["## Domains", _shares("accuracy", found.domains)]
    parts += _show_length(found.length)
    parts += _show_calibration(found.calibration)
    numbers = tuple(f"{value:+.3f}" for value in found.quantiles.values())
    parts += ["## Margins", _table(tuple(found.quantiles), [numbers])]
    parts += [f"## The {len(found.cases)} worst cases"]
    parts += [_show_case(number, case) for number, case in enumerate(found.cases, 1)]
    return "\n\n".join(parts) + "\n"


def _show_length(length: Length) -> list[str]:
    accuracies = {
        "the chosen response is longer": length.longer_chosen,
        "it is shorter": length.shorter_chosen,
    }
    favour = {
        "raters prefer the longer response": length.raters_prefer_longer,
        "the model prefers the longer response": length.model_prefers_longer,
    }
    correlations = {
        "score and length, all responses": length.correlation,
        "their ranks": length.rank_correlation,
        "differences within a pair": length.within_pairs,
        "the same at equal quality": length.at_equal_quality,
    }
    return [
        "## Length",
        "Quality is the raters' gap: the share who prefer the response, less the share "
        "who prefer the other.",
        _shares("accuracy", accuracies),
        _shares("share", favour),
        _table(("", "r"), [(name, f"{r:+.3f}") for name, r in correlations.items()]),
    ]


def _show_calibration(calibration: Calibration) -> list[str]:
    rows = [
        (
            f"{b.low:.2f} to {b.high:.2f}",
            f"{b.count:,}",
            *(f"{x:.3f}" for x in (b.confidence, b.accuracy, b.raters)),
        )
        for b in calibration.bins
    ]
    return [
        "## Confidence and calibration",
        f"Expected calibration error {calibration.expected_error:.3f}; against the "
        f"share of raters who agree, {calibration.raters_error:.3f}.",
        _table(("confidence", "pairs", "mean", "accuracy", "raters who agree"), rows),
    ]


def _shares(what: str, rows: Mapping[str, Share]) -> str:
    return _table(
        ("", f"{what}, 95 % interval", "pairs"),
        [(name, describe(found), f"{found.count:,}") for name, found in rows.items()],
    )


def _case(pair: Pair, scores: np.ndarray, margin: float) -> dict[str, Any]:
    """A pair and what the model makes of it, as JSON has it."""
    labels = {"chosen_safe": pair.chosen_safe, "rejected_safe": pair.rejected_safe}
    return {
        "margin": float(margin),
        "confidence": 1.0 / (1.0 + math.exp(-abs(margin))),
        "raters_probability": pair.probability,
        "domain": pair.domain,
        "prompt": pair.prompt,
        "chosen": pair.chosen,
        "chosen_score": float(scores[0]),
        "rejected": pair.rejected,
        "rejected_score": float(scores[1]),
        **{name: value for name, value in labels.items() if value is not None},
    }


def _show_case(number: int, case: Mapping[str, Any]) -> str:
    """One case in full."""
    facts = f"margin {case['margin']:+.3f}, raters {case['raters_probability']:.2f}"
    if case["domain"]:
        facts += f", {case['domain']}"
    lines = [f"### {number}. {facts}"]
    if case["prompt"]:
        lines += ["prompt:", _quote(case["prompt"])]
    for side in ("chosen", "rejected"):
        safe = case.get(f"{side}_safe")
        label = "" if safe is None else f", {'safe' if safe else 'unsafe'}"
        lines += [f"{side}, score {case[f'{side}_score']:+.3f}{label}:"]
        lines += [_quote(case[side])]
    return "\n\n".join(lines)


def _quote(text: str) -> str:
    """A text as it is, whatever Markdown or HTML is in it."""
    plain = SPECIAL.sub(r"\\\1", html.escape(text.strip(), quote=False))
    return "\n".join(f"> {line}  " for line in plain.splitlines())


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    line = lambda cells: (
        "| " + " | ".join(SPECIAL.sub(r"\\\1", c) for c in cells) + " |"
    )
    aligned = "|" + " --- |" + " ---: |" * (len(header) - 1)
    return "\n".join([line(header), aligned, *map(line, rows)])
