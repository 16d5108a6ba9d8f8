"""How measures, numbers and phases are written for a reader."""

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from rlhf_jax.analysis.statistics import Interval


class Label(NamedTuple):
    """How a measure is shown.

    Attributes:
      name: in a sentence.
      unit: and of what.
      form: of a value.
      low, high: what it cannot be beyond; None where it can.
    """

    name: str
    unit: str
    form: str
    low: float | None = None
    high: float | None = None


LABELS = {
    "reward": Label("reward", "the run's own", "+.3f"),
    "characters": Label("length in characters", "characters a response", ".0f", 0),
    "tokens": Label("length", "tokens a response", ".1f", 0),
    "words": Label("length", "words a response", ".1f", 0),
    "finished": Label("ends by itself", "share of responses", ".1%", 0, 1),
    "kl": Label("KL to the reference", "nats a response", ".3f"),
    "kl_k3": Label("KL to the reference, k3", "nats a token", ".4f", 0),
    "step": Label("KL from the phase before", "nats a response", ".3f"),
    "repeated": Label("repetition", "share of word triples said before", ".1%", 0, 1),
    "near_copies": Label("near-copies", "likeness to the nearest other", ".3f", 0, 1),
    "surprise": Label("perplexity to the reference", "its log, nats a token", ".3f", 0),
    "distinct_1": Label("distinct-1", "share of words, all responses", ".3f", 0, 1),
    "distinct_2": Label(
        "distinct-2", "share of word pairs, all responses", ".3f", 0, 1
    ),
}


def label(name: str, *, words: bool = False) -> Label:
    """The label of a measure of `summary.series`, or of those above.

    Args:
      name: of the measure; "judge/<name>" and "reward/<name>" too.
      words: lengths are in words, where tokens are not known.
    """
    if name == "tokens" and words:
        name = "words"
    if name in LABELS:
        return LABELS[name]
    group, _, rest = name.partition("/")
    if group == "judge":
        return Label(f"judge {rest}", "never trained on", "+.3f")
    if group == "reward":
        return Label(f"reward {rest}", "a part of the reward", "+.3f")
    return Label(name, "", ".3f")


def number(value: float | None, form: str) -> str:
    """A number with a true minus; – where there is none."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "−∞" if value < 0 else "∞"
    return format(value, form).replace("-", "−")


def spread(interval: Interval, form: str) -> str:
    """+1.404 [+1.210, +1.598]"""
    mean, low, high = (number(value, form) for value in interval)
    return f"{mean} [{low}, {high}]"


def signed(form: str) -> str:
    """The form of a change of a value of some form."""
    return form if form.startswith("+") else f"+{form}"


def p_text(p_value: float) -> str:
    """p = 0.012, or p < 0.001"""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


def listed(phases: Sequence[int]) -> str:
    """phase 3; or phases 3, 6 and 9"""
    *most, last = map(str, phases)
    return f"phases {', '.join(most)} and {last}" if most else f"phase {last}"


def thinned(items: Sequence[Any], most: int, keep: Collection[Any] = ()) -> list[Any]:
    """At most so many of the items, evenly spread, with both ends and those to keep.

    Raises:
      ValueError: fewer than two may be left, or more are to be kept.
    """
    kept = [i for i, item in enumerate(items) if item in keep]
    if most < 2 + len(kept):
        raise ValueError(f"most={most} must be at least {2 + len(kept)}")
    if len(items) <= most:
        return list(items)
    places = most - len(kept)
    even = {round(k * (len(items) - 1) / (places - 1)) for k in range(places)}
    return [items[i] for i in sorted(even.union(kept))]
