"""A run of the policy that ships with the package, of which some phases are spoilt."""

import json

import jax
import numpy as np
import pytest

from configs import ppo as ppo_file
from rlhf_jax import checkpoint, run_files
from rlhf_jax.analysis.anomalies import find_anomalies
from rlhf_jax.analysis.answers import heldout_questions, make_answer, make_logprobs
from rlhf_jax.analysis.compared import compare
from rlhf_jax.loading import BUILTIN
from rlhf_jax.models.pretrained import load_pretrained

from .conftest import analyze

PROMPTS = 24
DISTINCT = "rlhf_jax.rewards.functions:distinct_words"


def shuffled(params, seed):
    """The rows of all kernels in the feed-forward parts, in another order."""
    rng = np.random.default_rng(seed)

    def change(path, leaf):
        names = [key.key for key in path]
        leaf = np.asarray(leaf)
        return rng.permutation(leaf, axis=1) if "mlp" in names else leaf

    return jax.tree_util.tree_map_with_path(change, params)


@pytest.fixture(scope="module")
def spoilt(run, tmp_path_factory):
    """Phases 0 and 1 are the policy itself, 2 and 3 have shuffled weights."""
    workdir = tmp_path_factory.mktemp("runs") / "spoilt"
    config = ppo_file.get_config()
    config.workdir = str(workdir)
    config.data.heldout_limit = PROMPTS
    config.rollout.max_new_tokens = 12
    with config.unlocked():
        config.rewards = {"it": {"source": DISTINCT, "weight": 1.0}}
        config.judges = {}
    workdir.mkdir()
    files = run_files.RunFiles(workdir)
    files.config.write_text(json.dumps(config.to_dict()), "utf-8")
    params = load_pretrained(BUILTIN["builtin"]).params
    manager = checkpoint.open_checkpoints(files.checkpoints)
    for phase in range(4):
        policy = params if phase < 2 else shuffled(params, phase)
        checkpoint.save(
            manager, phase, policy=policy, train={"phase": np.array(phase)}, meta={}
        )
    checkpoint.close(manager)
    return workdir


@pytest.fixture(scope="module")
def analyzer(spoilt):
    return analyze(spoilt, num_samples=PROMPTS)


def whole(found):
    """(kind, phase) of what is odd about whole phases."""
    return {(one.kind, one.phase) for one in found if one.sample_idx is None}


def test_shuffled_weights_are_gibberish_from_their_phase_on(analyzer):
    found = analyzer.detect_anomalies()
    assert {("gibberish", 2), ("gibberish", 3)} <= whole(found["anomalies"])
    assert {one.phase for one in found["anomalies"]} == {2, 3}
    assert found["onset"] == 2
    told = analyzer.findings()
    assert told.onset == 2 and told.recommendation.phase in (0, 1)
    assert told.weights[2]["layers/0/mlp"] > 1 > told.weights[2]["embed"] == 0
    assert all(x > 0.99 for x in told.states[1]) and min(told.states[2]) < 0.9
    assert told.steps[0].mean == 0.0 < 10 < told.steps[1].mean


def test_shuffled_weights_of_one_phase_pass_by(analyzer):
    """What the last phase has not is no onset."""
    samples = analyzer.evidence().samples
    last = samples[1]._replace(phase=3)
    found = find_anomalies(samples[0], [samples[2], last])
    assert ("gibberish", 2) in whole(found)
    assert {one.phase for one in found} == {2}


def test_another_temperature_is_flagged(analyzer):
    """The same weights at temperature 2, read by the reference as the others are."""
    subject = analyzer.subject
    first = analyzer.evidence().samples[0]
    hot = make_answer(subject, 2.0)
    with jax.set_mesh(subject.mesh):
        asked = heldout_questions(subject, PROMPTS)
        samples, transcripts = hot(subject.reference, 5, asked)
        again, _ = make_answer(subject)(subject.reference, 6, asked)
        read = make_logprobs(subject)(subject.reference, transcripts, PROMPTS)
    samples = samples._replace(ref_logprobs=read)
    again = again._replace(ref_logprobs=again.logprobs)
    found = find_anomalies(first, [samples, again])
    assert ("gibberish", 5) in whole(found)
    assert {one.phase for one in found} == {5}
    assert compare(first, again).identical == 1.0 > compare(first, samples).identical


def test_a_temperature_of_the_analyzer(analyzer):
    usual = analyzer.evidence().samples[0].responses
    for temperature in (None, 0.7, 2.0):
        found = analyzer.generate_responses_from_checkpoint(
            0, PROMPTS, temperature=temperature
        )
        texts = [one["response"] for one in found["samples"]]
        assert (texts == usual) == (temperature != 2.0)
