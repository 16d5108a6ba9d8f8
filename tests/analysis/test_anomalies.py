"""What is found in made-up phases, and what is not."""

import numpy as np
import pytest

from rlhf_jax.analysis.anomalies import Anomaly, find_anomalies, onset
from rlhf_jax.errors import UserError

from .one_phase import WORDS, T, draw_samples

BASELINE = draw_samples(0)
LATER = draw_samples(1, phase=5)
PHRASE = " so good and then"


def kinds(found, *, whole):
    return {a.kind for a in found if (a.sample_idx is None) == whole}


def scored(samples, name, values):
    return samples._replace(scores=samples.scores | {name: values.astype(np.float32)})


def half_repeat():
    texts = [PHRASE * 10 if i % 2 else t for i, t in enumerate(LATER.responses)]
    return LATER._replace(responses=texts)


def three_times_as_long():
    rng = np.random.default_rng(0)
    sizes = 3 * LATER.mask.sum(axis=1)
    texts = [" ".join(rng.choice(WORDS, size)) for size in sizes]
    return LATER._replace(
        responses=texts,
        mask=np.arange(3 * T) < sizes[:, None],
        ref_logprobs=np.tile(LATER.ref_logprobs, (1, 3)),
    )


def all_the_same(factor=1.0):
    return LATER._replace(
        responses=[LATER.responses[3]] * 64, ref_logprobs=factor * LATER.ref_logprobs
    )


def in_another_script():
    texts = [
        t if i % 3 else f"это фильм {i}" * 3 for i, t in enumerate(LATER.responses)
    ]
    return LATER._replace(responses=texts)


REWARD, JUDGE = LATER.scores["reward"], LATER.scores["judge/kind"]
HARMS = {
    "half repeat a phrase": (half_repeat(), {"repetition", "compression"}),
    "a nat more": (
        LATER._replace(ref_logprobs=LATER.ref_logprobs - 1),
        {"gibberish"},
    ),
    "all the same": (all_the_same(), {"near_copies", "mode_collapse"}),
    "all the same and likely": (
        all_the_same(0.5),
        {"near_copies", "mode_collapse", "low_perplexity"},
    ),
    "three times as long": (three_times_as_long(), {"too_long"}),
    "cut short": (LATER._replace(mask=LATER.mask & (np.arange(T) < 4)), {"too_short"}),
    "no EOS": (LATER._replace(finished=np.zeros(64, bool)), {"missing_eos"}),
    "lower reward": (scored(LATER, "reward", REWARD - 1), {"reward_drop"}),
    "lower judge": (scored(LATER, "judge/kind", JUDGE - 0.25), {"judge_drop"}),
    "wider rewards": (scored(LATER, "reward", 3 * REWARD), {"reward_variance"}),
    "one reward": (scored(LATER, "reward", 0 * REWARD + 1), {"low_reward_variance"}),
    "another script": (in_another_script(), {"script"}),
    "lists": (
        LATER._replace(
            responses=[t.replace(" ", "\n", len(t) // 15) for t in LATER.responses]
        ),
        {"format"},
    ),
}


@pytest.mark.parametrize("name", HARMS)
def test_planted_harm_is_found(name):
    samples, wanted = HARMS[name]
    found = find_anomalies(BASELINE, [samples])
    assert wanted <= kinds(found, whole=True)
    assert {a.phase for a in found} == {5}
    assert all(0 < a.p_value <= 0.025 and a.reason.endswith(".") for a in found)


@pytest.mark.parametrize(
    "name", ["a nat more", "no EOS", "lower reward", "lower judge", "cut short"]
)
def test_nothing_else_is_found(name):
    samples, wanted = HARMS[name]
    assert kinds(find_anomalies(BASELINE, [samples]), whole=True) == wanted


def test_a_likelier_policy_alone_is_no_anomaly():
    samples = LATER._replace(ref_logprobs=0.3 * LATER.ref_logprobs)
    assert find_anomalies(BASELINE, [samples]) == []


def planted(row, **changes):
    """One odd answer."""
    texts, scores = list(LATER.responses), dict(LATER.scores)
    mask, surprise = LATER.mask.copy(), LATER.ref_logprobs.copy()
    texts[row] = changes.get("text", texts[row])
    scores["reward"] = np.where(
        np.arange(64) == row, changes.get("reward", 0.0), scores["reward"]
    )
    surprise[row] -= changes.get("surprise", 0.0)
    return LATER._replace(
        responses=texts, mask=mask, ref_logprobs=surprise, scores=scores
    )


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"reward": -15.0}, "low_reward"),
        ({"reward": 15.0}, "reward_outlier"),
        ({"surprise": 15.0}, "gibberish"),
        ({"text": PHRASE * 12}, "repetition"),
        ({"text": "很好的电影" * 20}, "compression"),
        ({"text": "это очень хороший фильм, и я рад"}, "script"),
        ({"text": "1) 2) 3) 4) 5) 6) 7) 8) 9) " * 3}, "format"),
    ],
)
def test_one_odd_answer_is_found(changes, kind):
    samples = planted(17, **changes)
    (found,) = [a for a in find_anomalies(BASELINE, [samples]) if a.kind == kind]
    assert (found.sample_idx, found.text) == (17, samples.responses[17])
    assert found.phase == 5 and found.p_value <= 0.025


def test_lengths_of_answers():
    narrow = np.arange(T) < 20 + np.arange(64)[:, None] % 5
    wide = np.arange(4 * T) < 20 + np.arange(64)[:, None] % 5
    wide[9], wide[11, 2:] = True, False
    baseline = BASELINE._replace(mask=narrow, ref_logprobs=None)
    found = find_anomalies(baseline, [LATER._replace(mask=wide, ref_logprobs=None)])
    wanted = [(9, "too_long", 192, 22), (11, "too_short", 2, 22)]
    got = [(a.sample_idx, a.kind, a.statistic, a.baseline) for a in found]
    assert sorted(got) == wanted


def test_a_length_is_short_by_its_factor():
    sizes = np.round(20 * np.exp(np.random.default_rng(0).normal(size=64) / 5))
    before = BASELINE._replace(mask=np.arange(T) < sizes[:, None], ref_logprobs=None)
    sizes[7] = 1
    after = before._replace(mask=np.arange(T) < sizes[:, None])
    (found,) = find_anomalies(before, [after])
    assert (found.kind, found.sample_idx, found.statistic) == ("too_short", 7, 1)


def test_answers_a_little_beyond_the_baseline_are_usual():
    # of a constant reward the unit is 1, and 64 times p = 0.002 is significant
    nothing = np.zeros(64)
    before = scored(BASELINE, "reward", nothing)
    found = [
        kinds(
            find_anomalies(before, [scored(before, "reward", nothing + x)]), whole=False
        )
        for x in (2.9, 3.1)
    ]
    assert found == [set(), {"reward_outlier"}]


def test_the_reasons_say_what_and_how_much():
    whole = find_anomalies(BASELINE, [HARMS["no EOS"][0]])[0]
    share = np.mean(BASELINE.finished)
    assert whole[:5] == ("missing_eos", 5, None, 0.0, pytest.approx(share))
    assert whole.text == ""
    assert whole.reason == (
        "From phase 0 to phase 5 the share of answers that end by themselves fell on "
        f"average from {share:.0%} to 0% over the same 64 prompts: "
        f"{share / np.std(BASELINE.finished, ddof=1):.1f} deviations of the answers of "
        "phase 0."
    )
    single = find_anomalies(BASELINE, [planted(17, reward=-15.0)])[0]
    rewards = BASELINE.scores["reward"]
    assert single.reason == (
        "The reward is -15.00; of the 64 answers of phase 0 the median is "
        f"{np.median(rewards):.2f} and the least {rewards.min():.2f}."
    )
    judge = find_anomalies(BASELINE, [HARMS["lower judge"][0]])[0]
    assert "the score of the judge kind fell" in judge.reason


def test_identical_phases_have_no_anomaly():
    for seed in range(20):
        samples = draw_samples(seed, prompts=32)
        again = [samples._replace(phase=phase) for phase in (1, 2)]
        assert find_anomalies(samples, again, rate=0.2) == []


@pytest.mark.parametrize(("prompts", "runs"), [(16, 150), (64, 150)])
def test_seldom_found_where_nothing_happened(prompts, runs):
    alarms = [
        bool(
            find_anomalies(
                draw_samples(2 * run, prompts=prompts),
                [draw_samples(2 * run + 1, prompts=prompts, phase=1)],
            )
        )
        for run in range(runs)
    ]
    assert np.mean(alarms) <= 0.05


def test_one_bad_phase_among_many_is_found():
    phases = [draw_samples(seed, phase=seed) for seed in range(1, 21)]
    phases[12] = HARMS["a nat more"][0]._replace(phase=13)
    found = [a for a in find_anomalies(BASELINE, phases) if a.sample_idx is None]
    assert [(a.kind, a.phase) for a in found] == [("gibberish", 13)]


def test_significant_but_tiny_is_not_found():
    # every answer's reward is lower by a tenth of a deviation: p is the least there is
    rewards = BASELINE.scores["reward"]
    samples = scored(BASELINE, "reward", rewards - 0.1 * rewards.std())
    assert find_anomalies(BASELINE, [samples]) == []
    samples = scored(BASELINE, "reward", rewards - 0.4 * rewards.std())
    assert kinds(find_anomalies(BASELINE, [samples]), whole=True) == {"reward_drop"}


def test_numbers_that_are_not_finite_are_left_out():
    rewards = REWARD - 2
    rewards[::4] = np.nan
    found = find_anomalies(
        scored(BASELINE, "judge/kind", np.full(64, np.nan)),
        [scored(LATER, "reward", rewards)],
    )
    assert kinds(found, whole=True) == {"reward_drop"}
    before = BASELINE.scores["reward"].astype(np.float64)
    known = np.isfinite(rewards)
    assert found[0].baseline == pytest.approx(before[known].mean())
    assert found[0].statistic == pytest.approx(rewards[known].mean())


def test_where_only_texts_are_left():
    nothing = {"tokens": None, "mask": None, "logprobs": None, "ref_logprobs": None}
    found = find_anomalies(
        BASELINE._replace(**nothing, scores={}),
        [half_repeat()._replace(**nothing, scores={})],
    )
    assert "repetition" in kinds(found, whole=True)


def test_each_judge_is_told():
    before, after = (
        scored(samples, "judge/other", samples.scores["judge/kind"] - lower)
        for samples, lower in ((BASELINE, 0.0), (HARMS["lower judge"][0], 0.1))
    )
    found = find_anomalies(before, [after])
    assert [a.kind for a in found if a.sample_idx is None] == ["judge_drop"] * 2
    assert {"kind" in a.reason for a in found} == {True, False}


def test_order_and_what_is_empty():
    found = find_anomalies(BASELINE, [half_repeat()._replace(phase=9), all_the_same()])
    places = [(a.phase, a.sample_idx is not None) for a in found]
    assert places == sorted(places) and len(set(places)) == 3
    assert find_anomalies(BASELINE, []) == []


def test_other_prompts_cannot_be_compared():
    other = LATER._replace(prompts=["?", *LATER.prompts[1:]])
    with pytest.raises(UserError, match="phases 0 and 5 have different prompts"):
        find_anomalies(BASELINE, [other])
    one = draw_samples(0, prompts=1)
    with pytest.raises(UserError, match="in 1 prompts: give 2 or more"):
        find_anomalies(one, [one])


def anomaly(kind, phase, idx=None):
    return Anomaly(kind, phase, idx, 0.0, 0.0, 0.01, "", "")


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ([], None),
        ([("repetition", 4), ("reward_drop", 6)], 4),
        ([("repetition", 2), ("repetition", 6)], 6),  # it went away in 4
        ([("repetition", 2), ("repetition", 4)], None),  # and here at last
        ([("reward_drop", 2), ("gibberish", 4), ("near_copies", 6)], 2),
        ([("format", 6), ("too_long", 6), ("missing_eos", 6)], None),  # news
        ([("low_reward", 6, 3)], None),  # one answer
    ],
)
def test_onset_by_hand(found, wanted):
    assert onset([anomaly(*one) for one in found], [6, 2, 4]) == wanted


def test_onset_of_planted_harm():
    phases = [draw_samples(seed, phase=seed) for seed in (1, 2)]
    phases += [half_repeat()._replace(phase=phase) for phase in (3, 4)]
    numbers = [p.phase for p in phases]
    found = find_anomalies(BASELINE, phases)
    assert onset(found, numbers) == 3
    assert onset(found, numbers, harmful=frozenset({"missing_eos"})) is None
