"""The rules of the monitor, on rows of metrics made by hand."""

import pytest

from rlhf_jax import monitor
from rlhf_jax.errors import UserError

SETTINGS = {"action": "warn", "kl": 20.0, "patience": 2}
HEALTHY = {
    "reward/mean": 1.0,
    "kl/sequence": 2.0,
    "policy/entropy": 2.0,
    "policy/clip_fraction": 0.1,
    "policy/approx_kl": 0.01,
    "policy/grad_norm": 1.0,
    "rollout/logprob_gap_mean": 1e-6,
    "response/tokens": 20.0,
    "response/finished": 0.9,
    "response/repeated": 0.01,
    "response/distinct_2": 0.8,
}


def rows_of(metric, values, others=HEALTHY):
    """Rows of phases 1, 2, ... in which one metric takes these values."""
    return [
        {"phase": phase, **others, metric: value}
        for phase, value in enumerate(values, 1)
    ]


def alerts_of(rows, **settings):
    """Every alert of a run, row by row, as training asks."""
    settings = SETTINGS | settings
    rules = monitor.rules_of(settings)
    patience = settings["patience"]
    return [
        alert
        for end in range(1, len(rows) + 1)
        for alert in monitor.check(rules, rows[:end], patience=patience)
    ]


def test_a_healthy_run_is_silent():
    assert alerts_of(rows_of("reward/mean", range(30))) == []


@pytest.mark.parametrize(
    ("rule", "metric", "good", "bad"),
    [
        ("kl", "kl/sequence", 19.9, 20.1),
        ("repetition", "response/repeated", 0.159, 0.161),
        ("mode_collapse", "response/distinct_2", 0.401, 0.399),
        ("length_growth", "response/tokens", 29.9, 30.1),
        ("length_collapse", "response/tokens", 6.7, 6.6),
        ("missing_eos", "response/finished", 0.61, 0.59),
        ("entropy_collapse", "policy/entropy", 0.41, 0.39),
        ("clipping", "policy/clip_fraction", 0.49, 0.51),
        ("large_update", "policy/approx_kl", 0.19, 0.21),
        ("sampler_gap", "rollout/logprob_gap_mean", 0.09, 0.11),
    ],
)
def test_each_bound(rule, metric, good, bad):
    """Three rows of the baseline, then two beyond the bound."""
    start = [HEALTHY[metric]] * 3
    assert alerts_of(rows_of(metric, [*start, good, good, good])) == []
    (alert,) = alerts_of(rows_of(metric, [*start, good, bad, bad, bad]))
    assert (alert.rule, alert.metric) == (rule, metric)
    assert (alert.since, alert.phase) == (5, 6)
    assert alert.value == bad
    assert (good - alert.bound) * (bad - alert.bound) < 0
    assert metric in alert.reason and alert.advice


def test_one_row_is_no_alarm_with_patience():
    values = [20.0] * 3 + [40.0, 20.0, 40.0, 20.0]
    assert alerts_of(rows_of("response/tokens", values)) == []
    assert len(alerts_of(rows_of("response/tokens", values), patience=1)) == 2


def test_it_speaks_again_only_after_it_was_well():
    values = [20.0] * 3 + [40.0] * 5 + [20.0] + [40.0] * 2
    found = alerts_of(rows_of("response/tokens", values))
    assert [alert.phase for alert in found] == [5, 11]


def test_spikes_are_measured_by_the_median():
    """Ten times the median of twenty rows, whatever its drift."""
    norms = [1.0 + 0.05 * n for n in range(21)]
    assert alerts_of(rows_of("policy/grad_norm", [*norms, 15.0, 15.0])) == []
    found = alerts_of(rows_of("policy/grad_norm", [*norms, 16.0, 16.0]))
    assert [alert.rule for alert in found] == ["gradient_spike"]


def test_the_loss_counts_where_it_has_a_scale():
    losses = [2.0] * 11 + [6.1, 6.1]
    policy = rows_of("loss", losses)
    assert alerts_of(policy) == []  # a policy's loss is no measure
    offline = [{"phase": row["phase"], "loss": row["loss"]} for row in policy]
    assert [alert.rule for alert in alerts_of(offline)] == ["loss_spike"]


def test_overfitting_is_seen_on_held_out_loss():
    values = [3.0, 2.0, 1.5, 1.0, 1.04, 1.06]
    rows = rows_of("heldout/loss", values, others={"loss": 1.0})
    (alert,) = alerts_of(rows)
    assert (alert.rule, alert.phase, alert.since) == ("overfitting", 6, 6)
    assert alert.bound == pytest.approx(1.05)


def test_a_judge_that_falls_is_reward_hacking():
    rows = rows_of("heldout/judge_drop_p", [1.0, 0.3, 0.011, 0.009])
    (alert,) = alerts_of(rows)
    assert (alert.rule, alert.phase) == ("reward_hacking", 4)


def test_rows_without_the_metric_do_not_count():
    """Held-out figures come in every fifth row; one beyond the bound is enough."""
    rows = rows_of("reward/mean", range(1, 21))
    for row in rows[::5]:
        row["heldout/tokens"] = 20.0 if row["phase"] < 16 else 40.0
    (alert,) = alerts_of(rows)
    assert (alert.metric, alert.phase) == ("heldout/tokens", 16)


def test_off_and_no_bound():
    high = rows_of("kl/sequence", [2.0] * 3 + [50.0] * 3)
    assert alerts_of(high, kl=0.0) == []
    assert alerts_of(high, action="off") == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action": "halt"}, "action='halt' is unknown; take one of off, warn"),
        ({"patience": 0}, "patience=0 must be at least 1"),
        ({"kl": -1.0}, "kl=-1.0 at least 0"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        monitor.rules_of(SETTINGS | changes)


def test_losses_below_zero():
    """Of some losses; a factor alone would call every fall a rise."""
    offline = lambda name, values: rows_of(name, values, others={"lr": 1.0})
    falls = [-1.0 - 0.01 * n for n in range(14)]
    assert alerts_of(offline("loss", falls)) == []
    assert alerts_of(offline("heldout/loss", falls)) == []
    rises = [-1.0] * 11 + [1.1, 1.1]
    assert [a.rule for a in alerts_of(offline("loss", rises))] == ["loss_spike"]
    rises = [-1.0] * 5 + [-0.9]
    found = alerts_of(offline("heldout/loss", rises))
    assert [alert.rule for alert in found] == ["overfitting"]
