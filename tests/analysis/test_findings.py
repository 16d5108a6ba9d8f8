"""What the evidence comes to: which checkpoint, which figures, and valid JSON."""

import json
import math

import numpy as np
import pytest
from ml_collections import ConfigDict

from rlhf_jax.analysis.anomalies import Anomaly
from rlhf_jax.analysis.evidence import Evidence
from rlhf_jax.analysis.findings import as_json, make_findings, plain, recommend

from .answered import drawn, samples_of

CONFIG = ConfigDict({"algorithm": "ppo"})
PHASES = (0, 5, 10, 15)


def spell(tokens):
    return "".join(f" w{token}" for token in tokens)


def evidence_of(phases=PHASES, **fields):
    samples = {phase: drawn(phase, phase=phase) for phase in phases}
    said = {
        phase: samples[phase].logprobs - 0.25 * samples[phase].mask
        for phase in phases[:-1]
    }
    states = {phase: np.array([1.0, 0.5]) for phase in phases}
    made = Evidence(samples, said, {p: {"all": 0.1} for p in phases}, states, {})
    return made._replace(**fields)


def anomaly(phase, kind="gibberish", sample_idx=None):
    return Anomaly(kind, phase, sample_idx, 1.0, 0.0, 0.01, "Why.", "")


def find(evidence=None, anomalies=(), decode=spell, **settings):
    evidence = evidence or evidence_of()
    return make_findings("runs/it", CONFIG, evidence, anomalies, decode, **settings)


def values_of(means, N=20):
    noise = np.random.default_rng(0).normal(0, 0.1, (len(means), N))
    noise -= noise.mean(axis=1, keepdims=True)
    return np.array(means, float)[:, None] + noise


def test_the_best_by_the_judge_is_recommended():
    values = {
        "reward": values_of([0, 1, 2, 3]),
        "judge/kind": values_of([0, 1, 0.5, 0.2]),
    }
    found = recommend(PHASES, values, None)
    assert found[:4] == (5, 5, 5, "judge/kind")
    assert found.reason == "the mean of the judge kind is greatest there, 1.000"


def test_without_a_judge_it_is_the_reward():
    found = recommend(PHASES, {"reward": values_of([0, 1, 2, 3])}, None)
    assert found[:4] == (15, 15, 15, "reward")


def test_what_has_gone_wrong_is_not_recommended():
    values = {"reward": values_of([0, 1, 2, 3])}
    found = recommend(PHASES, values, 10)
    assert found[:3] == (5, 5, 5)
    assert found.reason.endswith("1.000; phases from 10 on have gone wrong")
    assert recommend(PHASES, values, 0).phase == 0


def test_an_earlier_phase_that_is_as_good_is_named():
    found = recommend(PHASES, {"reward": values_of([0, 2.99, 2.98, 3])}, None)
    assert found.phase == 15
    assert found.reason.endswith(", and from phase 5 on not measurably less")


def test_no_recommendation_at_or_past_the_onset():
    rng = np.random.default_rng(0)
    for _ in range(60):
        phases = np.cumsum(rng.integers(1, 9, rng.integers(2, 7))).tolist()
        values = {"reward": rng.normal(size=(len(phases), 8))}
        if rng.random() < 0.5:
            values["judge/kind"] = rng.normal(size=(len(phases), 8))
        wrong_from = phases[rng.integers(1, len(phases))]
        found = recommend(phases, values, wrong_from)
        assert phases[0] <= found.low <= found.high < wrong_from
        assert found.phase < wrong_from
        healthy = [k for k, phase in enumerate(phases) if phase < wrong_from]
        means = {phases[k]: values[found.by][k].mean() for k in healthy}
        assert found.phase == max(means, key=means.get)


def test_findings_hold_the_figures_of_all_phases():
    evidence = evidence_of(skipped={20: "it cannot be read"})
    found = find(evidence)
    assert found[:3] == ("runs/it", "ppo", 12)
    assert list(found.summaries) == [0, 5, 10, 15]
    assert found.summaries[10]["mean_reward"] == pytest.approx(
        sum(evidence.samples[10].scores["reward"].tolist()) / 12, abs=1e-6
    )
    assert {(p, c.before, c.after) for p, c in found.comparisons.items()} == {
        (p, 0, p) for p in (5, 10, 15)
    }
    assert found.trends.keys() == found.summaries[0]["means"].keys()
    assert found.weights[5] == {"all": 0.1}
    assert found.states[5] == [1.0, 0.5]
    assert found.skipped == {20: "it cannot be read"}
    assert found.best.keys() == {"reward", "judge/kind"}
    assert (found.anomalies, found.onset) == ([], None)


def test_steps_are_the_kl_to_the_next_phase():
    found = find()
    assert list(found.steps) == [0, 5, 10]
    for phase, step in found.steps.items():
        tokens = drawn(phase).mask.sum() / 12
        assert step.mean == pytest.approx(0.25 * tokens, rel=1e-5)
        assert step.low < step.mean < step.high


def test_the_onset_binds_the_recommendation():
    found = find(anomalies=[anomaly(10), anomaly(15), anomaly(5, sample_idx=3)])
    assert found.onset == 10 and found.recommendation.phase in (0, 5)
    assert len(found.anomalies) == 3
    assert find(anomalies=[anomaly(10)]).onset is None


def test_curves_are_over_the_root_of_the_kl():
    alpha, beta, samples = 1.5, 0.5, {}
    for phase, d in zip((0, 1, 2, 3, 4), (0.0, 0.5, 1.0, 2.0, 3.0)):
        gold = d * (alpha - beta * math.log(d)) if d else 0.0
        rows = [[(4, 0.0, -d * d - off)] for off in (-0.25, 0.0, 0.25)]
        samples[phase] = samples_of(
            ["a"] * 3,
            [d - 1, d, d + 1],
            phase=phase,
            rows=rows,
            judges={"it": [gold] * 3},
        )
    found = find(Evidence(samples, {}, {}, {}, {})).curves
    assert found.keys() == {"reward", "judge/it"}
    assert found["judge/it"][:2] == pytest.approx((alpha, beta), rel=1e-4)
    assert found["judge/it"].peak == pytest.approx(math.exp(2.0), rel=1e-3)
    assert found["reward"][:2] == pytest.approx((1.0, 0.0), abs=1e-4)


def test_a_parting_of_the_judge_is_named():
    samples = {}
    for phase, (reward, kind) in enumerate(zip((0, 1, 2, 3), (0, 1, 0.6, 0.2))):
        scores = zip(*values_of([reward, kind]).tolist())
        reward, kind = zip(*scores)
        samples[phase] = samples_of(
            ["a"] * 20, reward, phase=phase, judges={"kind": kind}
        )
    found = find(Evidence(samples, {}, {}, {}, {}), decode=None)
    assert found.partings.keys() == {"judge/kind"}
    parting = found.partings["judge/kind"]
    assert (parting.phase, parting.seen_at) == (1, 2)
    assert parting.gold_lost == pytest.approx(0.8)
    assert find().partings == {}


def test_the_answers_farthest_from_the_reference_are_colored():
    found = find()
    last = drawn(15)
    kl = {
        row: sum((last.logprobs - last.ref_logprobs)[row].tolist()) for row in range(12)
    }
    farthest = sorted(kl, key=kl.get, reverse=True)[:6]
    assert [one.prompt for one in found.colored] == [f"prompt {r}" for r in farthest]
    for row, one in zip(farthest, found.colored):
        assert one.reward == pytest.approx(last.scores["reward"][row])
        text = "".join(piece for piece, _ in one.tokens)
        assert text == spell(last.tokens[row][last.mask[row]].tolist())
        assert sum(x for _, x in one.tokens) == pytest.approx(kl[row], abs=1e-5)
    assert {move.text for move in found.moves} <= {f" w{t}" for t in range(7)}


def test_texts_alone():
    nothing = dict.fromkeys(("tokens", "mask", "logprobs", "ref_logprobs"))
    samples = {p: drawn(p, phase=p)._replace(**nothing) for p in PHASES}
    found = find(Evidence(samples, {}, {}, {}, {}), decode=None)
    assert (found.moves, found.colored) == ([], [])
    assert found.steps == found.weights == found.states == found.curves == {}
    assert "kl" not in found.summaries[0]["means"]
    assert list(found.comparisons) == [5, 10, 15]


def test_one_phase_alone():
    found = find(evidence_of((0,)))
    assert found.trends == found.comparisons == found.steps == found.curves == {}
    assert (found.recommendation.phase, found.onset) == (0, None)


def test_the_seed_is_that_of_all_resamples():
    assert find(seed=1) == find(seed=1)
    assert find(seed=1).summaries[0]["means"] != find(seed=2).summaries[0]["means"]


def refuse(constant):
    raise ValueError(f"{constant} is no JSON")


def test_findings_are_json():
    found = find(anomalies=[anomaly(10)])
    text = as_json(found)
    assert text.endswith("}\n")
    read = json.loads(text, parse_constant=refuse)
    assert read.keys() == set(found._fields)
    assert read["summaries"]["5"]["quantiles"].keys() == {"5", "25", "50", "75", "95"}
    assert read["anomalies"][0]["sample_idx"] is None
    piece = read["comparisons"]["5"]["pairs"][0]["pieces"][0]
    assert piece.keys() == {"kind", "text"}
    assert read["recommendation"]["phase"] == found.recommendation.phase
    step = read["steps"]["0"]
    assert (step["mean"], step["low"]) == (found.steps[0].mean, found.steps[0].low)


def test_numbers_that_are_none_are_null():
    value = {
        3: [math.nan, math.inf, -math.inf, 1.5],
        "array": np.array([[np.nan, 2.0]], np.float32),
        "number": np.float32("inf"),
        "count": np.int64(4),
        "flag": np.bool_(True),
        "text": "naïve ∞ NaN",
        "nothing": None,
        "pair": (1, np.nan),
    }
    text = as_json(value)
    assert "∞" in text and "Infinity" not in text
    assert json.loads(text, parse_constant=refuse) == {
        "3": [None, None, None, 1.5],
        "array": [[None, 2.0]],
        "number": None,
        "count": 4,
        "flag": True,
        "text": "naïve ∞ NaN",
        "nothing": None,
        "pair": [1, None],
    }
    assert plain(anomaly(3)) == anomaly(3)._asdict()


def test_a_phase_with_harm_of_its_own_is_not_recommended():
    """The judge is best at 8, where something was wrong for once."""
    judge = np.array([[0.0, 0.0], [1.0, 1.0], [3.0, 3.0], [2.0, 2.0]])
    values = {"reward": judge, "judge/kind": judge}
    found = recommend([0, 4, 8, 12], values, None, harmed={8})
    assert found.phase == 12
    assert recommend([0, 4, 8, 12], values, 12, harmed={8}).phase == 4
    assert recommend([0, 4, 8, 12], values, 4, harmed={0}).phase == 0  # none is left
