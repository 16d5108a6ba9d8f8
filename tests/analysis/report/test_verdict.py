"""What the findings come to."""

from rlhf_jax.analysis.anomalies import Anomaly
from rlhf_jax.analysis.overoptimization import Parting
from rlhf_jax.analysis.report.verdict import change_text, checkpoint, harm_at, verdict

from . import example_findings


def anomaly(kind, phase, *, p_value=0.01, sample_idx=None):
    return Anomaly(kind, phase, sample_idx, 1.0, 0.0, p_value, f"{kind} is up.", "")


def findings(anomalies=(), onset=None, partings=None):
    return example_findings.healthy()._replace(
        anomalies=list(anomalies), onset=onset, partings=partings or {}
    )


def test_healthy():
    found = verdict(findings())
    assert found.state == "healthy"
    assert found.reasons == ["No phase shows any harm."]


def test_harm_that_passed_is_told():
    found = verdict(
        findings(
            [
                anomaly("mode_collapse", 5),
                anomaly("format", 10),  # news, not harm
                anomaly("repetition", 15, sample_idx=3),  # one answer
            ]
        )
    )
    assert found.state == "healthy"
    assert found.reasons == [
        "Signs of harm passed by in phase 5 (mode collapse); phase 20 has none."
    ]


def test_wrong_tells_each_kind_once_the_surest_first():
    found = verdict(
        findings(
            [
                anomaly("mode_collapse", 10, p_value=0.02),
                anomaly("repetition", 10, p_value=0.001),
                anomaly("repetition", 10, p_value=0.01),
                anomaly("judge_drop", 15),
                anomaly("near_copies", 10, sample_idx=0),
            ],
            onset=10,
        )
    )
    assert (found.state, found.title) == ("wrong", "Went wrong from phase 10 on")
    assert found.reasons == [
        "Repetition. repetition is up.",
        "Mode collapse. mode_collapse is up.",
    ]


def test_what_changed_without_harm_is_told():
    found = verdict(findings([anomaly("format", 20), anomaly("format", 15)]))
    assert found.state == "healthy"
    assert found.reasons[1:] == ["Changed without harm at phase 20: format."]


def test_a_judge_that_parts_is_a_verdict_of_its_own():
    parting = Parting(phase=5, seen_at=15, gold_lost=0.25, p_value=0.004)
    found = verdict(findings(partings={"judge/kind": parting}))
    assert found.state == "parted"
    assert found.title.startswith("Over-optimised after phase 5")
    (reason,) = found.reasons
    assert "judge kind is best at phase 5; from phase 15 on" in reason
    assert "p = 0.004" in reason
    assert "0.250 is lost" in reason


def test_one_phase_cannot_be_judged():
    assert verdict(example_findings.one_phase()).state == "unknown"


def test_harm_at_a_phase():
    found = findings(
        [
            anomaly("near_copies", 5, p_value=0.02),
            anomaly("judge_drop", 5),
            anomaly("format", 5),
        ]
    )
    assert harm_at(found, 5) == ["judge drop", "near copies"]
    assert harm_at(found, 10) == []


def test_the_checkpoint_may_be_gone():
    found = example_findings.healthy()
    phase = found.recommendation.phase
    assert checkpoint(found) == f"checkpoints/{phase}"
    assert (
        checkpoint(found._replace(weights={})) == f"checkpoints/{phase}, which is gone"
    )


def test_a_change_is_signed():
    change = example_findings.healthy().comparisons[20].scores["tokens"]
    text = change_text("tokens", change)
    assert text[0] in "+−"
    assert text.endswith(f"p = {change.p_value:.3f}")
