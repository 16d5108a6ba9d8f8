"""What is measured on the weights of whole runs: small ones, with planted phases."""

import gc
import os
import shutil

import jax
import numpy as np
import pytest

from rlhf_jax import run_files
from rlhf_jax.analysis import evidence as module
from rlhf_jax.analysis.drift import sequence_kl
from rlhf_jax.analysis.evidence import from_files, gather
from rlhf_jax.analysis.subject import policy_of
from rlhf_jax.data import reviews
from rlhf_jax.errors import UserError
from tests.trainers.test_dpo_runs import dpo_config
from tests.trainers.test_runs import made_up_reviews

from .conftest import EVERY_PHASE, analyze


def repeat_phase(workdir, phase, copies):
    """The checkpoint of one phase as that of others too."""
    folder = workdir / "checkpoints"
    for copy in copies:
        shutil.rmtree(folder / str(copy), ignore_errors=True)
        shutil.copytree(folder / str(phase), folder / str(copy))


def damage(workdir, phase):
    """Cuts the largest file of a policy in half."""
    folder = workdir / "checkpoints" / str(phase) / "policy"
    files = [path for path in folder.rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


@pytest.fixture(scope="module")
def analyzer(ppo):
    return analyze(ppo)


def test_evidence_of_a_run(ppo, analyzer):
    found = analyzer.evidence()
    assert list(found.samples) == list(found.weights) == list(found.states)
    assert list(found.samples) == [0, 1, 2, 3] and found.skipped == {}
    assert list(found.next_logprobs) == [0, 1, 2]
    for phase, samples in found.samples.items():
        assert samples.phase == phase
        rows = run_files.read_responses(ppo, phase)[:16]
        assert samples.responses == [row["response"] for row in rows]
        saved = [row["judge/vader"] for row in rows]
        np.testing.assert_allclose(samples.scores["judge/vader"], saved)
    assert set(found.weights[0].values()) == {0.0}
    np.testing.assert_allclose(found.states[0], 1.0)
    parts = {f"layers/{layer}/{p}" for layer in (0, 1) for p in ("attention", "mlp")}
    for phase in (1, 2, 3):
        assert found.weights[phase].keys() == parts | {"all", "embed", "final_norm"}
        assert all(x > 0 for x in found.weights[phase].values())
        assert found.states[phase].shape == (2,)
        assert ((found.states[phase] > 0) & (found.states[phase] < 1)).all()
    # Adam goes on: the longer, the farther
    far = [found.weights[phase]["all"] for phase in range(4)]
    assert far == sorted(far)


def test_the_next_policy_reads_the_answers_before(analyzer):
    """What phase 1 says of the answers of phase 0 is what phase 0's reference isn't."""
    found = analyzer.evidence()
    own, said = found.samples[0].logprobs, found.next_logprobs[0]
    assert not said[~found.samples[0].mask].any()
    assert np.abs(own - said).max() > 1e-3
    # each policy is likelier than the next to say what it said
    for phase in range(3):
        step = sequence_kl(found.samples[phase].logprobs, found.next_logprobs[phase])
        assert step.mean() > 0


def test_phases_with_the_same_weights(ppo_copy):
    repeat_phase(ppo_copy, 0, [1])
    repeat_phase(ppo_copy, 3, [2])
    analyzer = analyze(ppo_copy)
    found = analyzer.evidence()
    assert set(found.weights[1].values()) == {0.0}
    np.testing.assert_allclose(found.states[1], 1.0, rtol=1e-12)
    np.testing.assert_array_equal(found.next_logprobs[0], found.samples[0].logprobs)
    np.testing.assert_array_equal(found.next_logprobs[2], found.samples[2].logprobs)
    assert (found.next_logprobs[1] != found.samples[1].logprobs).any()
    assert found.weights[2] == found.weights[3]
    for pair in ((0, 1), (2, 3)):
        told = analyzer.compare_phases(*pair)
        assert told["reward_change"] == told["variance_change"] == 0.0
        comparison = told["comparison"]
        assert comparison.identical == 1.0 and comparison.first_difference is None
        assert {one.p_value for one in comparison.scores.values()} == {1.0}
        assert {one.change for one in comparison.scores.values()} == {(0.0, 0.0, 0.0)}
        odd = analyzer.detect_anomalies(pair)
        assert (odd["anomalies"], odd["onset"]) == ([], None)
    step = analyzer.findings().steps[0]
    assert step == (0.0, 0.0, 0.0)


def test_the_reference_and_one_policy_are_all_that_is_in_memory(
    ppo, ppo_copy, monkeypatch
):
    """Two phases or six: the same, but for the answers themselves."""
    repeat_phase(ppo_copy, 3, [4, 5])
    subject = analyze(ppo_copy).subject
    size = sum(x.nbytes for x in jax.tree.leaves(subject.reference))
    before, after, peaks = [], [], []
    alive = lambda: sum(x.nbytes for x in jax.live_arrays())

    def measured(subject, phase):
        before.append(alive() - start)
        return policy_of(subject, phase)

    monkeypatch.setattr(module, "policy_of", measured)
    show = lambda done: after.append(alive() - start)
    gc.collect()
    start = alive()
    # numbers and masks of 16 prompts and their answers
    answers = (4 + 1) * 16 * (subject.config.rollout.prompt_tokens + 6)
    for count in (2, 6):
        gather(subject, range(count), num_samples=16, show=show)
        peaks.append(max(after[-count:]))
    assert len(before) == len(after) == 8
    assert size < peaks[0] < 1.1 * size
    assert peaks[1] - peaks[0] <= 4 * answers < 0.1 * size
    # no policy is alive any more when the next one is read
    assert max(before) <= 6 * answers


def test_a_corrupt_checkpoint_is_left_out(ppo_copy, capsys):
    damage(ppo_copy, 1)
    found = analyze(ppo_copy).evidence()
    assert list(found.samples) == list(found.weights) == [0, 2, 3]
    assert list(found.next_logprobs) == [0, 2]
    assert list(found.skipped) == [1]
    assert "checkpoints/1 cannot be read into this model" in found.skipped[1]
    assert found.skipped[1] in capsys.readouterr().out
    assert found.samples[2].ref_logprobs is not None


def test_a_run_with_an_adapter(world, run, tmp_path):
    changes = {"lora__rank": 2, "lora__targets": ("query", "down"), "lora__alpha": 8.0}
    changes |= EVERY_PHASE | {"total_phases": 1, "critic__shared": True}
    run(world.ppo_config(tmp_path, **changes))
    analyzer = analyze(tmp_path)
    found = analyzer.evidence()
    check_saved_answers(tmp_path, found)
    assert found.weights[0]["all"] == 0.0 == found.weights[1]["embed"]
    assert found.weights[1]["layers/0/attention"] > 0 < found.weights[1]["layers/1/mlp"]
    np.testing.assert_allclose(found.states[0], 1.0, rtol=1e-6)
    assert analyzer.findings().summaries.keys() == {0, 1}


def test_a_run_on_preferences_with_frozen_weights(world, run, tmp_path, monkeypatch):
    """It has no rollouts; its prompts stand apart from its pairs."""
    monkeypatch.setattr(reviews, "load_reviews", made_up_reviews)
    changes = EVERY_PHASE | {"total_phases": 1, "learning__steps_per_phase": 2}
    run(dpo_config(world, tmp_path, **changes, freeze=("embed", "mlp")))
    monkeypatch.undo()
    analyzer = analyze(tmp_path)
    found = analyzer.evidence()
    check_saved_answers(tmp_path, found)
    assert found.weights[1]["embed"] == 0.0 == found.weights[0]["all"]
    assert found.weights[1]["final_norm"] > 0 < found.weights[1]["layers/1/attention"]
    assert analyzer.findings().summaries.keys() == {0, 1}
    with pytest.raises(UserError, match="is a run of dpo, which learns from no answe"):
        analyzer.generate_responses_from_checkpoint(0, 4, split="train")


def check_saved_answers(workdir, found):
    """Answers and KL are those that the training saved, of phases 0 and 1."""
    assert list(found.samples) == [0, 1]
    for phase, samples in found.samples.items():
        rows = run_files.read_responses(workdir, phase)[:16]
        assert samples.responses == [row["response"] for row in rows]
        kl = sequence_kl(samples.logprobs, samples.ref_logprobs)
        np.testing.assert_allclose(kl, [row["kl"] for row in rows], atol=1e-4)


def test_saved_responses_alone(ppo):
    found = from_files(ppo, [0, 2, 3], 10)
    assert list(found.samples) == [0, 2, 3]
    assert found.weights == found.states == found.next_logprobs == found.skipped == {}
    for phase, samples in found.samples.items():
        rows = run_files.read_responses(ppo, phase)[:10]
        assert samples.responses == [row["response"] for row in rows]
        assert samples.tokens is None is samples.ref_logprobs


def test_a_phase_with_too_few_held_out_responses(ppo_copy):
    files = run_files.RunFiles(ppo_copy)
    rows = run_files.read_responses(ppo_copy, 2)
    run_files.write_responses(files, 2, [r for r in rows if r["split"] == "train"])
    run_files.write_responses(files, 3, rows[:1])
    found = from_files(ppo_copy, [1, 2, 3], 10)
    assert list(found.samples) == [1]
    assert found.skipped == {
        phase: f"{ppo_copy} has fewer than 2 scored held-out responses of phase {phase}"
        for phase in (2, 3)
    }
