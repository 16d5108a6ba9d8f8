"""The page, the cases and the picture of a reward model's mistakes."""

import json

import numpy as np
import pytest

from rlhf_jax.data.rows import Pair
from rlhf_jax.evaluation.pair_baselines import Baseline
from rlhf_jax.evaluation.reward_report import (
    CASES,
    analyze,
    report_pairs,
    summarize,
    to_markdown,
    write_report,
)

PAIRS = [
    Pair(f"Prompt {i}: ", f"good answer {i}" + " at length" * (i % 3), f"bad {i}", p, d)
    for i, (p, d) in enumerate(
        zip(np.linspace(0.6, 1.0, 40).tolist(), ["film", "phone"] * 20)
    )
]
SCORES = np.random.default_rng(0).normal([1.0, 0.0], 1.0, (40, 2))


def test_what_is_found():
    found = analyze(PAIRS, SCORES, [Baseline("coin", np.zeros(40))])
    margins = SCORES[:, 0] - SCORES[:, 1]
    np.testing.assert_allclose(found.margins, margins)
    assert found.accuracies["model"].value == np.mean(margins > 0)
    assert found.accuracies["coin"].value == 0.5
    assert {name: s.count for name, s in found.domains.items()} == {
        "film": 20,
        "phone": 20,
    }
    assert found.signs == {}
    assert len(found.cases) == CASES
    shown = [case["margin"] for case in found.cases]
    assert shown == sorted(shown) and shown[0] == margins.min()
    worst, case = PAIRS[int(margins.argmin())], found.cases[0]
    assert (case["prompt"], case["chosen"], case["rejected"]) == worst[:3]
    assert (case["raters_probability"], case["domain"]) == worst[3:5]
    assert case["chosen_score"] - case["rejected_score"] == pytest.approx(margins.min())


def test_costs_are_better_where_they_are_lower():
    safe = [pair._replace(chosen_safe=True, rejected_safe=False) for pair in PAIRS]
    found = analyze(safe, -SCORES, costs=True)
    np.testing.assert_allclose(found.margins, SCORES[:, 0] - SCORES[:, 1])
    assert found.accuracies == analyze(PAIRS, SCORES).accuracies
    assert found.signs["safe ones"].value == np.mean(-SCORES[:, 0] < 0)
    assert found.signs["unsafe ones"].value == np.mean(-SCORES[:, 1] > 0)
    assert found.cases[0]["chosen_safe"] is True
    assert "## Signs" in to_markdown(found, "Cost model")
    assert ", unsafe:" in to_markdown(found, "Cost model")


def test_what_is_written(tmp_path):
    figures, facts = report_pairs(
        tmp_path / "report", PAIRS, PAIRS, SCORES, costs=False, title="Mine"
    )
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert names == {"report.md", "cases.json", "figures.png"}
    picture = (tmp_path / "report" / "figures.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
    cases = json.loads((tmp_path / "report" / "cases.json").read_text("utf-8"))
    assert cases == analyze(PAIRS, SCORES).cases
    page = (tmp_path / "report" / "report.md").read_text("utf-8")
    for case in cases:
        assert f"> {case['chosen']}" in page and f"> {case['rejected']}" in page
        assert f"margin {case['margin']:+.3f}" in page
    assert set(figures["accuracy"]) == {"model", "longer wins", "bag of words"}
    labels = [label for label, _ in facts]
    assert labels[:2] == ["right, model", "right, longer wins"]
    assert facts[-1] == ("report", str(tmp_path / "report" / "report.md"))


def test_figures_for_the_summary_are_json():
    found = analyze(PAIRS, SCORES, [Baseline("coin", np.zeros(40))])
    figures = json.loads(json.dumps(summarize(found)))
    assert set(figures) == {"accuracy", "domains", "length", "calibration", "margins"}
    low, high = (figures["accuracy"]["model"][end] for end in ("low", "high"))
    assert low < figures["accuracy"]["model"]["value"] < high


def test_texts_cannot_break_the_page():
    nasty = Pair("", "# Title\n* a | b `c`", "<script>alert(1)</script>\n\n---", 0.9)
    page = to_markdown(analyze([nasty] * 3, np.zeros((3, 2))), "x")
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "> \\# Title  \n> \\* a \\| b \\`c\\`" in page
    assert "\n---" not in page.replace("| ---", "")


@pytest.mark.parametrize("scores", [np.zeros((3, 2)), np.full((3, 2), 1e3)])
def test_scores_that_say_nothing(tmp_path, scores):
    """No spread, no domains, equal lengths: still a report."""
    pairs = [Pair("", "abc", "xyz")] * 3
    found = analyze(pairs, scores)
    write_report(tmp_path / "report", found, title="flat")
    assert found.domains == {} and found.accuracies["model"].value == 0.5
