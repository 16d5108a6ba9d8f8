"""Watches a run while it trains: what has gone wrong, since when, and what to do.

The first phases of a run are its baseline. Each rule looks at one metric and speaks
when it has been beyond its bound for `patience` rows in a row that have the metric. All
is a function of metrics.jsonl alone, so a resumed run says what the other one said.

    rule              metric                       speaks where it is
    reward_hacking    heldout/judge_drop_p         below 0.01, while the reward holds
    kl                kl/sequence, heldout/kl      above `config.monitor.kl`
    repetition        .../repeated                 0.15 above the baseline
    mode_collapse     .../distinct_2               below half the baseline
    length_growth     response/tokens ...          above 1.5 times the baseline
    length_collapse   response/tokens ...          below a third of it
    missing_eos       .../finished                 0.3 below the baseline
    entropy_collapse  policy/entropy               below a fifth of it
    clipping          policy/clip_fraction         above 0.5
    large_update      policy/approx_kl             above 0.2
    sampler_gap       rollout/logprob_gap_mean     above 0.1
    gradient_spike    grad_norm, policy/grad_norm  above ten times the median of 20 rows
    loss_spike        loss (of offline training)   above three times the median of 10
    overfitting       heldout/loss                 5 % above its least
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.errors import UserError

ACTIONS = ("off", "warn", "stop", "rollback")
BASELINE = 3  # rows that have the metric; held-out ones: the first

Row = Mapping[str, Any]


class Alert(NamedTuple):
    """Something has gone wrong.

    Attributes:
      rule: its name.
      phase: when it was seen.
      since: the first phase of the rows in a row that were beyond the bound.
      metric: what was looked at.
      value, bound: what it is, and what it should not pass.
      reason: a sentence.
      advice: what to do.
    """

    rule: str
    phase: int
    since: int
    metric: str
    value: float
    bound: float
    reason: str
    advice: str


class Rule(NamedTuple):
    """One row of the table.

    Attributes:
      name: of the rule.
      metrics: those that it looks at, each alone.
      side: 1 where more is wrong, −1 where less is.
      bound: (values so far, the baseline's mean) -> what the newest should not pass,
        or None where that cannot be said yet.
      noun: what the metric is, for a reader.
      advice: what to do.
    """

    name: str
    metrics: tuple[str, ...]
    side: int
    bound: Callable[[np.ndarray, float], float | None]
    noun: str
    advice: str


def _fixed(value: float) -> Callable:
    return lambda values, baseline: value


def _plus(change: float) -> Callable:
    return lambda values, baseline: baseline + change


def _times(factor: float) -> Callable:
    return lambda values, baseline: factor * baseline


def _beyond(value: float, factor: float) -> float:
    """`factor` times a value, and as far above it where it is negative."""
    return value + (factor - 1.0) * abs(value)


def _median(factor: float, rows: int) -> Callable:
    """Of the rows before the newest."""

    def bound(values, baseline):
        if len(values) <= rows:
            return None
        return _beyond(float(np.median(values[-rows - 1 : -1])), factor)

    return bound


def _least(factor: float) -> Callable:
    return lambda values, baseline: (
        _beyond(float(values[:-1].min()), factor) if len(values) > BASELINE else None
    )


def _both(name: str) -> tuple[str, str]:
    return f"response/{name}", f"heldout/{name}"


LOWER_RATE = "lower config.optimizer.lr, or the epochs of a phase"
HOLD_BACK = (
    "take an earlier checkpoint, and hold the policy nearer to its reference: a higher "
    "kl_coef, an adaptive KL, a lower learning rate, fewer phases"
)
RULES = (
    Rule(
        "repetition",
        _both("repeated"),
        1,
        _plus(0.15),
        "the share of word triples said before",
        HOLD_BACK + "; look at what the reward pays for",
    ),
    Rule(
        "mode_collapse",
        _both("distinct_2"),
        -1,
        _times(0.5),
        "the share of distinct word pairs (distinct-2)",
        HOLD_BACK + "; an entropy bonus helps too",
    ),
    Rule(
        "length_growth",
        _both("tokens"),
        1,
        _times(1.5),
        "the length in tokens",
        "look whether the reward pays for length; take a length penalty or "
        "config.*.overlong, or a reward model trained without length bias",
    ),
    Rule(
        "length_collapse",
        _both("tokens"),
        -1,
        _times(1 / 3),
        "the length in tokens",
        "look whether the reward pays for ending early; hold back by a higher kl_coef",
    ),
    Rule(
        "missing_eos",
        _both("finished"),
        -1,
        _plus(-0.3),
        "the share of responses that end by themselves",
        "raise rollout.max_new_tokens, or set missing_eos_penalty",
    ),
    Rule(
        "entropy_collapse",
        ("policy/entropy",),
        -1,
        _times(0.2),
        "the entropy a token, in nats",
        "set entropy_coef, raise clip_high or kl_coef, or " + LOWER_RATE,
    ),
    Rule(
        "clipping",
        ("policy/clip_fraction",),
        1,
        _fixed(0.5),
        "the share of tokens whose ratio was clipped",
        LOWER_RATE,
    ),
    Rule(
        "large_update",
        ("policy/approx_kl",),
        1,
        _fixed(0.2),
        "the KL of one phase's update, in nats a token",
        LOWER_RATE + "; or set target_kl",
    ),
    Rule(
        "sampler_gap",
        ("rollout/logprob_gap_mean",),
        1,
        _fixed(0.1),
        "the gap between the sampler's and the learner's log-probabilities, in nats",
        "sample in the dtype that is trained in, or set grpo.importance",
    ),
    Rule(
        "gradient_spike",
        ("grad_norm", "policy/grad_norm"),
        1,
        _median(10.0, 20),
        "the gradient's norm",
        LOWER_RATE + ", or lower optimizer.clip_norm; look at the data of that phase",
    ),
    Rule(
        "loss_spike",
        ("loss",),
        1,
        _median(3.0, 10),
        "the training loss",
        LOWER_RATE + "; look at the data of that phase",
    ),
    Rule(
        "overfitting",
        ("heldout/loss",),
        1,
        _least(1.05),
        "the held-out loss",
        "take the checkpoint of the least held-out loss; train fewer phases, with "
        "dropout, weight decay or more data",
    ),
)
ONLY_OFFLINE = ("loss_spike", "overfitting")  # a policy's loss has no scale of its own


def rules_of(settings: Mapping[str, Any]) -> list[Rule]:
    """The rules of a run, with the bounds of its `config.monitor`.

    Raises:
      UserError: a setting that cannot be.
    """
    if settings["action"] not in ACTIONS:
        raise UserError(
            f"config.monitor.action={settings['action']!r} is unknown; take one of "
            + ", ".join(ACTIONS)
        )
    if settings["patience"] < 1 or settings["kl"] < 0:
        raise UserError(
            f"config.monitor.patience={settings['patience']} must be at least 1, and "
            f"config.monitor.kl={settings['kl']} at least 0 (0: no bound)"
        )
    if settings["action"] == "off":
        return []
    hacking = Rule(
        "reward_hacking",
        ("heldout/judge_drop_p",),
        -1,
        _fixed(0.01),
        "the p-value of an unseen judge's drop from its best while the reward held",
        HOLD_BACK,
    )
    kl = Rule(
        "kl",
        ("kl/sequence", "heldout/kl"),
        1,
        _fixed(settings["kl"]),
        "the KL to the reference, in nats a response",
        HOLD_BACK + "; if this much is wanted, raise config.monitor.kl",
    )
    return [hacking, *([kl] if settings["kl"] else []), *RULES]


def check(rules: Sequence[Rule], rows: Sequence[Row], *, patience: int) -> list[Alert]:
    """What the newest row says that the rows before it did not say yet.

    Args:
      rules: of `rules_of`.
      rows: of metrics.jsonl, from phase 0 to the newest.
      patience: rows in a row that must be beyond a bound; of held-out metrics, which
        are measured seldom, one.

    Returns:
      One alert a rule and metric, in the row in which its patience ends.
    """
    offline = "reward/mean" not in rows[-1]
    found = []
    for rule in rules:
        if rule.name in ONLY_OFFLINE and not offline:
            continue
        for metric in rule.metrics:
            alert = _check_one(rule, metric, rows, patience)
            if alert:
                found.append(alert)
    return found


def _check_one(
    rule: Rule, metric: str, rows: Sequence[Row], patience: int
) -> Alert | None:
    if metric not in rows[-1]:
        return None
    seldom = metric.startswith("heldout/")
    wait = 1 if seldom else patience
    has = [row for row in rows if metric in row]
    values = np.array([row[metric] for row in has], np.float64)
    first = 1 if seldom else BASELINE
    if len(values) <= first:
        return None
    baseline = float(values[:first].mean())
    beyond = [
        _is_beyond(rule, values[: n + 1], baseline)
        for n in range(max(first, len(values) - wait - 1), len(values))
    ]
    streak = beyond[-wait:]
    already = len(beyond) > wait and beyond[-wait - 1]
    if len(streak) < wait or not all(streak) or already:
        return None
    bound = rule.bound(values, baseline)
    phase, since = has[-1]["phase"], has[-wait]["phase"]
    where = f"at {baseline:.3g} in the first phases and is now"
    reason = (
        f"{rule.noun} ({metric}) was {where} {values[-1]:.3g}, "
        f"{'above' if rule.side > 0 else 'below'} the bound of {bound:.3g}"
    )
    return Alert(
        *(rule.name, phase, since, metric, float(values[-1]), float(bound)),
        *(reason, rule.advice),
    )


def _is_beyond(rule: Rule, values: np.ndarray, baseline: float) -> bool:
    bound = rule.bound(values, baseline)
    return bound is not None and rule.side * (values[-1] - bound) > 0
