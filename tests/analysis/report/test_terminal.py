"""What a person sees on a terminal, wide or narrow."""

import io
import re

import pytest
from rich.console import Console

from rlhf_jax.analysis.report.terminal import show_findings

from . import example_findings
from .example_findings import PHASES, make_evidence

EVERY = ["healthy", "wrong", "texts_only", "one_phase"]


def shown(findings, width=80):
    console = Console(file=io.StringIO(), width=width, _environ={})
    show_findings(console, findings)
    return console.file.getvalue()


def table_rows(text):
    return re.findall(r"^ +[★✕]? *\d+ +[+−]\d.*$", text, re.M)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("width", [44, 80, 160])
def test_it_fits(name, width):
    findings = getattr(example_findings, name)()
    lines = shown(findings, width).splitlines()
    whole = [line for line in lines if re.search(r" ± \d\.\d{3} ", line)]
    assert len(whole) == len(findings.summaries)  # no cell is folded
    assert max(map(len, lines)) <= width
    if width >= 80:
        assert len(lines) <= 42


def test_a_healthy_run():
    text = shown(example_findings.healthy())
    assert "Healthy" in text
    take = example_findings.healthy().recommendation.phase
    assert f"checkpoints/{take}: the mean of the judge kind" in text
    rows = table_rows(text)
    assert len(rows) == len(PHASES)
    for row, samples in zip(rows, make_evidence().samples.values()):
        # 5e-4 of rounding
        mean = float(re.search(r"[+−]\d\.\d+", row)[0].replace("−", "-"))
        assert mean == pytest.approx(samples.scores["reward"].mean(), abs=6e-4)
    assert next(row for row in rows if "★" in row).split()[1] == str(take)
    assert re.search(r"reward +[+−]0\.\d+ → \+\d\.\d+: \+\d\.\d+ \[.*p < 0\.001", text)


def test_a_run_that_went_wrong():
    text = " ".join(shown(example_findings.wrong()).split())
    assert "Went wrong from phase 10 on" in text
    assert "✕ 10" in text
    assert "3 phases" not in text  # three are listed
    assert "phases 10, 15 and 20: From phase 0 to phase" in text
    assert "and in the report:" in text
    kinds = {a.kind.replace("_", " ") for a in example_findings.wrong().anomalies}
    assert all(kind in text for kind in kinds)


def test_many_phases_are_thinned_and_it_is_said():
    findings = example_findings.healthy()
    row = findings.summaries[0]
    findings = findings._replace(
        summaries=dict.fromkeys(range(100), row),
        comparisons={99: findings.comparisons[20]},
        recommendation=findings.recommendation._replace(phase=37),
    )
    text = shown(findings)
    rows = table_rows(text)
    assert len(rows) == 12
    assert f"{len(rows)} of 100 are shown" in text
    assert any(row.split()[:2] == ["★", "37"] for row in rows)


def test_few_anomalies_are_told_whole():
    anomaly = example_findings.wrong().anomalies[0]
    findings = example_findings.healthy()._replace(anomalies=[anomaly])
    text = " ".join(shown(findings).split())
    assert anomaly.reason in text
    assert "and in the report" not in text


def test_a_whole_phase_says_more_than_an_answer():
    (whole, *_) = (
        a for a in example_findings.wrong().anomalies if a.kind == "repetition"
    )
    answer = whole._replace(sample_idx=0, p_value=0.0, reason="One answer is odd.")
    findings = example_findings.healthy()._replace(anomalies=[answer, whole])
    text = " ".join(shown(findings).split())
    assert whole.reason in text
    assert answer.reason not in text


def test_what_was_not_read_is_told():
    text = shown(example_findings.texts_only())
    assert re.search(r"not read +phase 25", text)
    assert "which is gone" in text
    assert "KL" not in text
