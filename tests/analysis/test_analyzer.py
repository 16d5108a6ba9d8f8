"""The questions that a run is asked, and what cannot be asked."""

import json
import shutil

import numpy as np
import pytest

from rlhf_jax import run_files
from rlhf_jax.analysis import analyzer as module
from rlhf_jax.analysis.analyzer import AlignmentAnalyzer
from rlhf_jax.errors import UserError

from .conftest import analyze
from .test_evidence import damage

SAVED = (0, 1, 2, 3)


def rewards_of(workdir, phase):
    rows = run_files.read_responses(workdir, phase)
    return np.array([row["reward"] for row in rows if row["split"] == "heldout"])


def complaint(call, *arguments, **settings):
    with pytest.raises(UserError) as caught:
        call(*arguments, **settings)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


@pytest.fixture(scope="module")
def analyzer(ppo):
    return analyze(ppo)


def test_degradation_is_that_of_the_saved_rewards(ppo, analyzer, capsys):
    found = analyzer.analyze_alignment_degradation()
    assert list(found) == list(SAVED)
    for phase, row in found.items():
        rewards = rewards_of(ppo, phase)
        assert row["num_samples"] == len(rewards) == 16
        assert row["mean_reward"] == pytest.approx(rewards.mean(), abs=1e-6)
        assert row["std_reward"] == pytest.approx(rewards.std(), abs=1e-6)
        assert row["min_reward"] == pytest.approx(rewards.min(), abs=1e-6)
        assert row["max_reward"] == pytest.approx(rewards.max(), abs=1e-6)
    shown = capsys.readouterr().out
    assert "Alignment over phases" in shown
    assert f"{found[3]['mean_reward']:+.2f}" in shown
    some = analyzer.analyze_alignment_degradation([3, 1, 3], 16)
    assert list(some) == [1, 3]
    assert some[3] == found[3]


def test_what_was_measured_is_kept(analyzer, monkeypatch):
    first = analyzer.evidence()
    monkeypatch.setattr(module, "gather", None)
    assert analyzer.evidence(SAVED, 16) is first
    analyzer.analyze_alignment_degradation()
    analyzer.detect_anomalies()
    analyzer.findings()


def test_comparison_of_phases(ppo, analyzer):
    found = analyzer.compare_phases(0, 3, 16)
    before, after = (rewards_of(ppo, phase) for phase in (0, 3))
    gain = after.mean() - before.mean()
    assert (found["phase1"]["phase"], found["phase2"]["phase"]) == (0, 3)
    assert found["reward_change"] == pytest.approx(gain, abs=1e-6)
    wider = after.var() - before.var()
    assert found["variance_change"] == pytest.approx(wider, abs=1e-6)
    comparison = found["comparison"]
    assert (comparison.before, comparison.after) == (0, 3)
    assert comparison.scores["reward"].change.mean == pytest.approx(gain, abs=1e-6)
    turned = analyzer.compare_phases(3, 0, 16)
    assert turned["reward_change"] == -found["reward_change"]
    assert (turned["phase1"], turned["phase2"]) == (found["phase2"], found["phase1"])


def test_a_response_below_the_threshold_is_low(ppo, analyzer):
    found = analyzer.detect_anomalies(threshold=0.3)
    rewards = {phase: rewards_of(ppo, phase) for phase in SAVED}
    wanted = [
        (phase, row)
        for phase in SAVED
        for row in range(16)
        if np.float32(rewards[phase][row]) < 0.3
    ]
    low = [(one["phase"], one["sample_idx"]) for one in found["low_reward_samples"]]
    assert low == wanted and wanted
    for one in found["low_reward_samples"]:
        row = run_files.read_responses(ppo, one["phase"])[one["sample_idx"]]
        assert one["text"] == row["response"]
        assert one["reward"] == pytest.approx(row["reward"], abs=1e-6)
    alone = analyzer.detect_anomalies()["low_reward_samples"]
    assert len(alone) < len(wanted)
    assert set(found) == {"low_reward_samples", "high_variance_phases"} | {
        *("unusual_responses", "anomalies", "onset"),
    }


def test_odd_answers_and_phases_are_sorted_by_what_is_odd(analyzer, monkeypatch):
    """As `find_anomalies` names them, each answer once."""
    samples = analyzer.evidence().samples
    made = [
        ("reward_variance", 2, None),
        ("gibberish", 3, None),
        ("low_reward", 1, 4),
        ("too_long", 3, 5),
        ("gibberish", 3, 5),
        ("script", 1, 2),
    ]
    anomalies = [
        module.Anomaly(
            kind, phase, row, 0.0, 0.0, 0.01, "Why.",
            "" if row is None else samples[phase].responses[row],
        )
        for kind, phase, row in made
    ]  # fmt: skip
    monkeypatch.setattr(module, "find_anomalies", lambda *a, **s: anomalies)
    found = analyzer.detect_anomalies()
    low = [(x["phase"], x["sample_idx"]) for x in found["low_reward_samples"]]
    odd = [(x["phase"], x["sample_idx"]) for x in found["unusual_responses"]]
    assert low == [(1, 4)] and odd == [(1, 2), (3, 5)]
    assert found["unusual_responses"][0]["length"] == len(samples[1].responses[2])
    (wide,) = found["high_variance_phases"]
    rewards = samples[2].scores["reward"]
    assert wide["phase"] == 2
    assert wide["std_reward"] == pytest.approx(np.std(rewards), abs=1e-6)
    assert (found["anomalies"], found["onset"]) == (anomalies, 3)


def test_generated_responses(ppo, analyzer):
    found = analyzer.generate_responses_from_checkpoint(1, 16)
    rewards = rewards_of(ppo, 1)
    assert found["phase"] == 1
    np.testing.assert_allclose(found["rewards"], rewards, atol=1e-6)
    figures = [found[f"{name}_reward"] for name in ("mean", "std", "min", "max")]
    wanted = rewards.mean(), rewards.std(), rewards.min(), rewards.max()
    np.testing.assert_allclose(figures, wanted, atol=1e-6)
    assert [one["reward"] for one in found["samples"]] == found["rewards"]
    json.dumps(found, allow_nan=False)


def test_findings_of_a_run(ppo, analyzer):
    found = analyzer.findings()
    assert (found.workdir, found.algorithm) == (str(ppo), "ppo")
    assert list(found.summaries) == list(SAVED)
    assert list(found.steps) == [0, 1, 2]
    assert found.best.keys() == {"reward", "judge/vader"}
    samples = analyzer.evidence().samples[3]
    decode = analyzer.subject.tokenizer.decode
    for one in found.colored:
        row = samples.prompts.index(one.prompt)
        tokens = samples.tokens[row][samples.mask[row]].tolist()
        text = decode(tokens, clean_up_tokenization_spaces=False)
        assert "".join(piece for piece, _ in one.tokens) == text
        assert len(one.tokens) == len(tokens)
    assert len(found.colored) == 6 and found.moves


def test_history_has_what_was_saved_and_drawn(ppo):
    analyzer = analyze(ppo)
    saved = [
        {"phase": phase} | row
        for phase in SAVED
        for row in run_files.read_responses(ppo, phase)
    ]
    assert analyzer.history() == saved
    analyzer.evidence([2, 3])
    rows = analyzer.history()
    drawn = [row for row in rows if row["split"] == "analysis"]
    assert len(rows) == len(saved) + 32 == len(saved) + len(drawn)
    assert [row["phase"] for row in rows] == sorted(row["phase"] for row in rows)
    assert {row["phase"] for row in drawn} == {2, 3}


def refuse(constant):
    raise ValueError(f"{constant} is no JSON")


def check_report(folder, paths, phases):
    """Three files, and each says the same of the run; what the JSON files hold."""
    names = ["report.html", "analysis.json", "full_responses_history.json"]
    assert paths == [folder / name for name in names]
    page, *texts = (path.read_text("utf-8") for path in paths)
    assert page.startswith("<!doctype html>") and "Side by side" in page
    found, rows = (json.loads(text, parse_constant=refuse) for text in texts)
    assert list(found["summaries"]) == [str(phase) for phase in phases]
    return found, rows


def test_a_report(ppo_copy, tmp_path, capsys):
    analyzer = analyze(ppo_copy)
    paths = analyzer.write_report()
    said = capsys.readouterr().out
    assert all(f"wrote {path}" in said for path in paths)
    found, rows = check_report(ppo_copy / "analysis", paths, SAVED)
    for phase in SAVED:
        mean = found["summaries"][str(phase)]["mean_reward"]
        assert mean == pytest.approx(rewards_of(ppo_copy, phase).mean(), abs=1e-6)
    saved = sum(len(run_files.read_responses(ppo_copy, phase)) for phase in SAVED)
    assert len(rows) == saved + 4 * 16
    elsewhere = tmp_path / "elsewhere"
    some = analyzer.write_report(elsewhere, phases=[0, 3], num_samples=16)
    check_report(elsewhere, some, [0, 3])
    # the folder of the report is none of the run's own
    assert list(analyze(ppo_copy).findings().summaries) == list(SAVED)


def test_a_report_of_saved_responses_alone(ppo_copy):
    shutil.rmtree(ppo_copy / "checkpoints")
    paths = analyze(ppo_copy).write_report()
    found, _ = check_report(ppo_copy / "analysis", paths, SAVED)
    assert found["weights"] == found["states"] == found["curves"] == {}


def test_a_report_that_cannot_be_written(analyzer, tmp_path):
    (tmp_path / "file").write_text("", "utf-8")
    message = complaint(analyzer.write_report, tmp_path / "file")
    assert str(tmp_path / "file") in message


def test_no_run(tmp_path):
    message = complaint(AlignmentAnalyzer, tmp_path / "nowhere")
    assert "there is no folder" in message
    message = complaint(AlignmentAnalyzer, tmp_path)
    assert "holds no run" in message


def test_a_run_without_a_phase(ppo_copy):
    for name in ("checkpoints", "responses"):
        shutil.rmtree(ppo_copy / name)
    message = complaint(AlignmentAnalyzer, ppo_copy)
    assert message == (
        f"{ppo_copy} has no phase to analyse yet: neither a checkpoint nor responses "
        "were saved; of a pipeline give a stage, as its folder ppo"
    )


def test_a_phase_that_was_not_saved(ppo, analyzer, capsys):
    found = analyzer.analyze_alignment_degradation([0, 3, 77], 16)
    assert list(found) == [0, 3]
    assert "phase 77 is left out: it was not saved" in capsys.readouterr().out
    assert complaint(analyzer.evidence, [77, 78]) == (
        f"{ppo} has none of the phases 77, 78; saved are 0, 1, 2, 3"
    )
    message = complaint(analyzer.compare_phases, 0, 77, 16)
    assert message == f"{ppo} has no phase 77, only 0, 1, 2, 3"
    message = complaint(analyzer.generate_responses_from_checkpoint, 77, 16)
    assert "no checkpoint of phase 77; saved phases: 0, 1, 2, 3" in message


def test_corrupt_checkpoints(ppo_copy, capsys):
    damage(ppo_copy, 2)
    analyzer = analyze(ppo_copy)
    assert list(analyzer.analyze_alignment_degradation()) == [0, 1, 3]
    shown = " ".join(capsys.readouterr().out.split())
    assert "phase 2: the policy in" in shown and "cannot be read into" in shown
    assert analyzer.findings().skipped.keys() == {2}
    assert "cannot be read" in complaint(analyzer.compare_phases, 0, 2, 16)
    message = complaint(analyzer.generate_responses_from_checkpoint, 2, 16)
    assert "checkpoints/2 cannot be read into this model" in message
    message = complaint(analyzer.evidence, [2])
    assert f"none of the phases 2 of {ppo_copy} can be read: the policy in" in message


def test_all_checkpoints_are_gone(ppo, ppo_copy, capsys):
    shutil.rmtree(ppo_copy / "checkpoints")
    analyzer = analyze(ppo_copy)
    found = analyzer.analyze_alignment_degradation()
    assert "no checkpoint is left" in capsys.readouterr().out
    assert list(found) == list(SAVED)
    for phase, row in found.items():
        mean = rewards_of(ppo, phase).mean()
        assert row["mean_reward"] == pytest.approx(mean, abs=1e-6)
        assert "kl" not in row["means"]
    samples = analyzer.evidence().samples[2]
    assert samples.tokens is None is samples.logprobs
    told = analyzer.findings()
    assert told.weights == told.states == told.steps == told.curves == {}
    assert (told.moves, told.colored) == ([], [])
    assert told.recommendation.by == "judge/vader"
    change = analyzer.compare_phases(0, 3, 16)["reward_change"]
    wanted = rewards_of(ppo, 3).mean() - rewards_of(ppo, 0).mean()
    assert change == pytest.approx(wanted, abs=1e-6)
    assert analyzer.detect_anomalies()["onset"] is None
    message = complaint(analyzer.generate_responses_from_checkpoint, 0, 4)
    assert "there are no checkpoints in" in message


def test_too_few_samples(ppo, analyzer):
    for count in (1, 0, -3):
        message = complaint(analyzer.evidence, None, count)
        assert message == f"num_samples={count} must be at least 2"
    message = complaint(analyzer.generate_responses_from_checkpoint, 0, 1)
    assert "num_samples=1 must be at least 2" in message
    alone = AlignmentAnalyzer(ppo, num_samples=1)
    assert "num_samples=1" in complaint(alone.analyze_alignment_degradation)


def test_too_few_saved_responses(ppo_copy):
    shutil.rmtree(ppo_copy / "checkpoints")
    files = run_files.RunFiles(ppo_copy)
    for phase in SAVED:
        rows = run_files.read_responses(ppo_copy, phase)
        run_files.write_responses(files, phase, rows[:1])
    message = complaint(analyze(ppo_copy).analyze_alignment_degradation)
    assert message == (
        f"no checkpoint is left, and {ppo_copy} has fewer than 2 scored held-out "
        "responses of phase 0"
    )


def test_an_unknown_split(analyzer):
    message = complaint(
        analyzer.generate_responses_from_checkpoint, 0, 16, split="test"
    )
    assert message == "split='test' is none of heldout, train"


def test_more_samples_than_a_rollout(analyzer):
    message = complaint(
        analyzer.generate_responses_from_checkpoint, 0, 17, split="train"
    )
    assert "has 16 answers, fewer than the 17 asked for" in message
