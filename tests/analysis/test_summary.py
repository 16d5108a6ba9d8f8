"""The figures of a phase, each by a loop, and where they go."""

import math

import numpy as np
import pytest

from rlhf_jax.analysis.summary import series, summarize, trends

from .answered import drawn, samples_of

SAMPLES = drawn(3, phase=6)


def test_summary_by_hand():
    texts = ["a b c", "a b c", "d d d d", "e", "f"]
    found = summarize(samples_of(texts, [1.0, 2.0, 3.0, 4.0, 10.0], phase=8))
    assert (found["phase"], found["num_samples"]) == (8, 5)
    # mean 4; √((9 + 4 + 1 + 0 + 36) / 5) = √10
    assert [found[f"{name}_reward"] for name in ("mean", "min", "max")] == [4, 1, 10]
    assert found["std_reward"] == pytest.approx(math.sqrt(10))
    # places 0.05·4 = 0.2, 1, 2, 3, 3.8 of the five in order
    wanted = {5: 1.2, 25: 2.0, 50: 3.0, 75: 4.0, 95: 8.8}
    assert found["quantiles"] == pytest.approx(wanted)
    # 12 words, 6 different; pairs: ab bc ab bc dd dd dd, 3 of 7
    assert found["distinct_1"] == 6 / 12
    assert found["distinct_2"] == 3 / 7
    assert found["samples"][4] == {
        "prompt": "prompt 4",
        "response": "f",
        "reward": 10.0,
    }
    means = {name: interval.mean for name, interval in found["means"].items()}
    assert means == pytest.approx(
        {
            "reward": 4.0,
            "characters": (5 + 5 + 7 + 1 + 1) / 5,
            "finished": 1.0,
            "tokens": 12 / 5,
            "repeated": 0.5 / 5,  # d d d twice
            "near_copies": 2 / 5,  # the first two are alike
        }
    )


def test_the_first_five_are_shown():
    found = summarize(drawn(0, N=9))["samples"]
    assert [one["prompt"] for one in found] == [f"prompt {i}" for i in range(5)]


def test_intervals_hold_the_mean_and_follow_the_seed():
    first, again, other = (summarize(SAMPLES, seed=seed)["means"] for seed in (0, 0, 1))
    assert first == again != other
    values = SAMPLES.scores["reward"].astype(np.float64)
    reward = first["reward"]
    assert reward.low < reward.mean < reward.high
    assert reward.mean == pytest.approx(sum(values) / 12)
    # Student's, of 12 prompts; the bootstrap is about as wide
    half = 2.201 * np.std(values, ddof=1) / math.sqrt(12)
    assert reward.high - reward.mean == pytest.approx(half, rel=0.25)


def test_drift_and_surprise_are_those_of_loops():
    found = series(SAMPLES)
    for i in range(12):
        where = np.flatnonzero(SAMPLES.mask[i])
        pairs = [(SAMPLES.logprobs[i, t], SAMPLES.ref_logprobs[i, t]) for t in where]
        pairs = [(float(own), float(other)) for own, other in pairs]
        kl = sum(own - other for own, other in pairs)
        k3 = [math.exp(other - own) - 1 - (other - own) for own, other in pairs]
        assert found["kl"][i] == pytest.approx(kl, abs=1e-5)
        assert found["kl_k3"][i] == pytest.approx(sum(k3) / len(k3), abs=1e-5)
        surprise = -sum(other for _, other in pairs) / len(pairs)
        assert found["surprise"][i] == pytest.approx(surprise, abs=1e-5)


def test_an_answer_without_a_token_has_no_surprise():
    rows = [[(1, -1.0, -2.0)], []]
    found = series(samples_of(["a", ""], [0.0, 0.0], rows=rows))
    assert found["surprise"].tolist() == [2.0, 0.0]
    assert found["kl_k3"][1] == found["kl"][1] == found["tokens"][1] == 0.0


def test_trends_are_those_of_lines():
    every = [drawn(seed, phase=phase) for seed, phase in enumerate((0, 2, 3, 9))]
    rising = [
        one._replace(scores=one.scores | {"reward": one.scores["reward"] + one.phase})
        for one in every
    ]
    found = trends(rising)
    columns = [series(one) for one in rising]
    assert found.keys() == columns[0].keys()
    for name, trend in found.items():
        lines = [
            np.polyfit((0, 2, 3, 9), [column[name][i] for column in columns], 1)[0]
            for i in range(12)
        ]
        assert trend.slope.mean == pytest.approx(np.mean(lines), abs=1e-9), name
    assert found["reward"].direction == "rising" and found["reward"].p_value < 0.01
    assert found["reward"].slope.low < 1 < found["reward"].slope.high


def test_trends_of_what_all_phases_have():
    every = [drawn(0, phase=0), samples_of([""] * 12, [0.0] * 12, phase=1)]
    names = {"reward", "characters", "finished", "tokens", "repeated", "near_copies"}
    assert trends(every).keys() == names


def test_one_phase_has_no_trend():
    assert trends([SAMPLES]) == {}
    assert trends([]) == {}
