"""An analysed policy says, token for token, what it said in training."""

import json
import subprocess
import sys

import numpy as np
import pytest

from rlhf_jax import run_files, sharding
from rlhf_jax.analysis.answers import (
    heldout_questions,
    make_answer,
    make_logprobs,
    training_questions,
)
from rlhf_jax.errors import UserError
from tests.trainers.runs import ROOT

from .conftest import EVERY_PHASE, analyze

SAME = ("index", "prompt", "response", "reward")
GROUPS = {
    "total_phases": 2,
    "rewards__human__source": "tests.trainers.reward_functions:says_good",
    "grpo__kl_coef": 0.0,
}


def rows_of(workdir, phase, split):
    rows = run_files.read_responses(workdir, phase)
    return [row for row in rows if row["split"] == split]


def assert_same_answers(found, rows):
    """The same texts of as many tokens, with the same scores."""
    assert len(found) == len(rows)
    for one, row in zip(found, rows):
        assert [one[name] for name in SAME] == [row[name] for name in SAME]
        assert (one["tokens"], one["finished"]) == (
            row["tokens"],
            row["finish"] == "eos",
        )


@pytest.fixture(scope="module")
def analyzer(ppo):
    return analyze(ppo)


def test_heldout_answers_of_every_phase(ppo, analyzer):
    different = set()
    for phase in range(4):
        found = analyzer.generate_responses_from_checkpoint(phase, 16)["samples"]
        rows = rows_of(ppo, phase, "heldout")
        assert_same_answers(found, rows)
        assert [x["judge/vader"] for x in found] == [x["judge/vader"] for x in rows]
        different.add(tuple(one["response"] for one in found))
    assert len(different) == 4


def test_training_answers_of_every_phase(ppo, analyzer):
    for phase in range(3):
        found = analyzer.generate_responses_from_checkpoint(phase, 16, split="train")
        assert_same_answers(found["samples"], rows_of(ppo, phase + 1, "train"))


def test_fewer_are_the_first_of_them(ppo, analyzer):
    for split, phase in (("heldout", 2), ("train", 3)):
        found = analyzer.generate_responses_from_checkpoint(2, 5, split=split)
        assert_same_answers(found["samples"], rows_of(ppo, phase, split)[:5])


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_answers_on_another_mesh(ppo, sizes):
    mesh = sharding.make_mesh(**sizes)
    assert mesh.size == 8
    found = analyze(ppo, mesh=mesh).generate_responses_from_checkpoint(3, 12)
    assert_same_answers(found["samples"], rows_of(ppo, 3, "heldout")[:12])


def test_answers_in_a_process_with_one_device(ppo, alone):
    program = (
        "import json; from rlhf_jax.analysis.analyzer import AlignmentAnalyzer as A; "
        f"found = A({str(ppo)!r}).generate_responses_from_checkpoint(2, 16); "
        "print(json.dumps(found['samples']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=alone,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert_same_answers(found, rows_of(ppo, 2, "heldout"))


def test_logprobs_are_those_of_the_run(ppo, analyzer):
    """The saved KL is Σ (log π − log π_ref) of the saved answers."""
    evidence = analyzer.evidence()
    for phase, samples in evidence.samples.items():
        saved = [row["kl"] for row in rows_of(ppo, phase, "heldout")]
        kl = (samples.logprobs - samples.ref_logprobs).sum(axis=1)
        np.testing.assert_allclose(kl, saved, atol=1e-4)
        assert not samples.logprobs[~samples.mask].any()
        assert samples.tokens.shape == samples.mask.shape == (16, 6)


def test_answers_of_groups(world, run, tmp_path):
    run(world.grpo_config(tmp_path, **EVERY_PHASE, **GROUPS))
    analyzer = analyze(tmp_path)
    for phase in range(3):
        found = analyzer.generate_responses_from_checkpoint(phase, 16)["samples"]
        assert_same_answers(found, rows_of(tmp_path, phase, "heldout"))
    for phase in range(2):
        found = analyzer.generate_responses_from_checkpoint(phase, 16, split="train")
        found = found["samples"]
        assert len({one["prompt"] for one in found}) == 4
        assert_same_answers(found, rows_of(tmp_path, phase + 1, "train"))
        fewer = analyzer.generate_responses_from_checkpoint(phase, 6, split="train")
        assert fewer["samples"] == found[:6]


def test_answers_of_the_first_draw(world, run, tmp_path):
    """With dynamic sampling a phase keeps the groups whose rewards differ."""
    changes = GROUPS | {"grpo__dynamic_sampling": 3, "grpo__variant": "dapo"}
    run(world.grpo_config(tmp_path, **EVERY_PHASE, **changes))
    analyzer = analyze(tmp_path)
    for phase in range(2):
        found = analyzer.generate_responses_from_checkpoint(phase, 16, split="train")
        groups = [found["samples"][i : i + 4] for i in range(0, 16, 4)]
        differ = [g for g in groups if len({one["reward"] for one in g}) > 1]
        drawn = [one for group in differ for one in group]
        assert len(drawn) >= 4
        rows = rows_of(tmp_path, phase + 1, "train")
        for one, row in zip(drawn, rows):
            assert (one["prompt"], one["response"]) == (row["prompt"], row["response"])


def test_more_answers_than_prompts(analyzer):
    """The prompts are asked again, and answered from keys of their own."""
    found = analyzer.generate_responses_from_checkpoint(0, 40)["samples"]
    again = analyzer.generate_responses_from_checkpoint(0, 16)["samples"]
    assert found[:16] == again
    for i in (0, 7, 15):
        asked = [found[i + 16 * turn] for turn in range(2)]
        assert asked[0]["prompt"] == asked[1]["prompt"]
    turns = [[one["response"] for one in found[i : i + 16]] for i in (0, 16)]
    same = sum(one == other for one, other in zip(*turns))
    assert same <= 1


def test_questions(analyzer):
    subject = analyzer.subject
    held = heldout_questions(subject, 40)
    prompts = subject.prompts["heldout"].texts
    assert held.texts == (prompts * 3)[:40]
    assert held.batch == 16
    assert heldout_questions(subject, 5).batch == 5
    assert training_questions(subject, 0, 3).batch == 3
    pages = [training_questions(subject, phase, 16).texts for phase in (0, 1)]
    assert pages[0] != pages[1] and not set(pages[0]) & set(prompts)


def test_more_than_a_rollout(analyzer):
    with pytest.raises(UserError, match="has 16 answers, fewer than the 17 asked for"):
        training_questions(analyzer.subject, 0, 17)


def test_another_temperature(analyzer):
    """Greedy answers are the same whatever the key, and read at temperature 1."""
    subject = analyzer.subject
    asked = heldout_questions(subject, 32)
    greedy, transcripts = make_answer(subject, 0)(subject.reference, 0, asked)
    assert greedy.responses[:16] == greedy.responses[16:]
    read = make_logprobs(subject, 1.0)(subject.reference, transcripts, 32)
    np.testing.assert_array_equal(greedy.logprobs, read)
    # colder, each of the likeliest tokens is likelier still
    colder = make_logprobs(subject)(subject.reference, transcripts, 32)
    assert subject.config.rollout.temperature == 0.7
    assert (colder > greedy.logprobs)[greedy.mask].all()
