"""The table of what counts as anomalous, and from what size on.

A kind needs an effect of the least size besides significance: with enough answers any
change is significant. Sizes are in deviations (the standard deviation of the signal
over the baseline's answers, or `floor` where that is greater), in the signal's own
unit, and as a factor. They are judgements; change them here.

    answers                       signal        deviations  own unit     floor
    low_reward                    reward        −3                       none
    reward_outlier                reward        +3                       none
    too_long                      tokens        +3                       1 token
    too_short                     log(1 + n)    −3                       0.2, a log
    repetition                    repeated      +3          +0.1         0.08
    compression                   copied        +3          +0.1         0.08
    gibberish                     surprise      +3          +0.5 nats    0.2
    script                        foreign       +3          +0.2         0.05
    format                        each share    ±3          ±0.1         0.05
                                  line_breaks   ±3          ±0.02        0.01

    phases                        signal        deviations  own unit     factor
    reward_drop, judge_drop       the scores    −0.3
    reward_variance               spread        +0.3                     1.5
    low_reward_variance           spread        −0.3                     1.5
    too_long, too_short           tokens        ±0.5                     2
    repetition, compression       the same      +0.3        +0.05
    gibberish                     surprise      +0.5        +0.25 nats
    low_perplexity                surprise      −0.5        −0.25 nats
    near_copies                   near_copies   +0.3        +0.15
    mode_collapse                 variety       −0.3        −0.25
    missing_eos                   finished                  −0.1
    script                        foreign                   +0.05
    format                        each share    ±0.5        ±0.05
                                  line_breaks   ±0.5        ±0.02

A phase has low_perplexity only together with near_copies: alone, a policy that is more
certain than its reference has just learned.
"""

import fnmatch
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Kind(NamedTuple):
    """One row of the table.

    Attributes:
      name: of the kind.
      signal: of `signals.signals_of`, or a pattern of names.
      side: 1 where more is anomalous, −1 where less is.
      noun: what the signal is, for a reader; {} is the part of its name after "/".
      form: how a value is written.
      floor: the least deviation, 0 for a signal without a natural unit.
      deviations, change, factor: the least effect.
      log: whether log(1 + x) is compared, for a signal that cannot go below zero.
    """

    name: str
    signal: str
    side: int
    noun: str
    form: str = ".2f"
    floor: float = 0.0
    deviations: float = 0.0
    change: float = 0.0
    factor: float = 1.0
    log: bool = False

    def scale(self, values: np.ndarray) -> np.ndarray:
        """The values as they are compared."""
        return np.log1p(values) if self.log else values


SHARES = ("format/*", "share of {} (40 usual characters added)", ".0%", 0.05)
BREAKS = ("line_breaks", SHARES[1].format("line breaks"), ".1%", 0.01)
REPEATED = ("repeated", 1, "share of word triples said before", ".0%", 0.08)
COPIED = ("copied", 1, "share of bytes copied from earlier ones", ".0%", 0.08)
OTHER_SCRIPT = "share of letters in another script (40 usual ones added)"
FOREIGN = ("foreign", 1, OTHER_SCRIPT, ".0%", 0.05)
SURPRISE = "surprise to the reference (nats a token)"
SPREAD = "distance of the reward from its median"
LIKENESS = "likeness to the most alike answer to another prompt"
VARIETY = "share of distinct word pairs"
FINISHED = "share of answers that end by themselves"

ANSWER_KINDS = (
    Kind("low_reward", "reward", -1, "reward", deviations=3.0),
    Kind("reward_outlier", "reward", 1, "reward", deviations=3.0),
    Kind("too_long", "tokens", 1, "length in tokens", ".0f", 1.0, 3.0),
    Kind("too_short", "tokens", -1, "length in tokens", ".0f", 0.2, 3.0, log=True),
    Kind("repetition", *REPEATED, deviations=3.0, change=0.1),
    Kind("compression", *COPIED, deviations=3.0, change=0.1),
    Kind("gibberish", "surprise", 1, SURPRISE, ".2f", 0.2, 3.0, 0.5),
    Kind("script", *FOREIGN, deviations=3.0, change=0.2),
    *(
        Kind("format", signal, side, *rest, deviations=3.0, change=change)
        for (signal, *rest), change in ((SHARES, 0.1), (BREAKS, 0.02))
        for side in (1, -1)
    ),
)
PHASE_KINDS = (
    Kind("reward_drop", "reward", -1, "reward", deviations=0.3),
    Kind("judge_drop", "judge/*", -1, "score of the judge {}", deviations=0.3),
    *(
        Kind(name, "reward_spread", side, SPREAD, deviations=0.3, factor=1.5)
        for name, side in (("reward_variance", 1), ("low_reward_variance", -1))
    ),
    *(
        Kind(name, "tokens", side, "length in tokens", ".1f", 1.0, 0.5, factor=2.0)
        for name, side in (("too_long", 1), ("too_short", -1))
    ),
    Kind("repetition", *REPEATED, deviations=0.3, change=0.05),
    Kind("compression", *COPIED, deviations=0.3, change=0.05),
    Kind("gibberish", "surprise", 1, SURPRISE, ".2f", 0.2, 0.5, 0.25),
    Kind("low_perplexity", "surprise", -1, SURPRISE, ".2f", 0.2, 0.5, 0.25),
    Kind("near_copies", "near_copies", 1, LIKENESS, ".2f", 0.1, 0.3, 0.15),
    Kind("mode_collapse", "variety", -1, VARIETY, ".2f", 0.1, 0.3, 0.25),
    Kind("missing_eos", "finished", -1, FINISHED, ".0%", change=0.1),
    Kind("script", *FOREIGN, change=0.05),
    *(
        Kind("format", signal, side, *rest, deviations=0.5, change=change)
        for (signal, *rest), change in ((SHARES, 0.05), (BREAKS, 0.02))
        for side in (1, -1)
    ),
)
# Another length, format or spread of the rewards is news; the rest is harm.
HARMFUL = frozenset(kind.name for kind in PHASE_KINDS) - {
    *("format", "reward_variance", "low_reward_variance"),
    *("too_long", "too_short", "missing_eos"),
}


def matches(kinds: Iterable[Kind], names: Iterable[str]) -> list[tuple[Kind, str]]:
    """Each kind with each of the signals that it is about, as far as they are there."""
    names = sorted(names)
    return [
        (kind, name) for kind in kinds for name in fnmatch.filter(names, kind.signal)
    ]


def deviation(values: np.ndarray, floor: float) -> float:
    """The unit of a signal: its spread over the baseline's finite values, not below.

    A constant signal without a natural unit takes its own size, or 1 if that is less.
    """
    spread, size = float(np.std(values, ddof=1)), float(np.abs(values).max())
    unit = max(spread if spread > 1e-9 * size else 0.0, floor)
    return unit or max(1.0, size)


def is_large(
    kind: Kind, before: float, after: np.ndarray, unit: float
) -> np.ndarray | bool:
    """Whether a change is of the kind's least size, and to its side; nan is not."""
    change = kind.side * (after - before)
    less, more = (before, after) if kind.side > 0 else (after, before)
    return (
        (change > 0)
        & (change >= kind.deviations * unit)
        & (change >= kind.change)
        & ((kind.factor == 1) | (more >= kind.factor * less))
    )
