"""Two phases beside each other: paired figures, and what changed in the texts."""

import difflib
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlhf_jax.analysis.drift import first_difference, sequence_kl
from rlhf_jax.analysis.samples import PhaseSamples
from rlhf_jax.analysis.signals import lengths
from rlhf_jax.analysis.statistics import Difference, paired_difference

WORDS = re.compile(r"\s*\S+|\s+$")


class Piece(NamedTuple):
    """A part of one text: "same", "removed" or "added" by the other phase."""

    kind: str
    text: str


class Pair(NamedTuple):
    """The answers of two phases to one prompt, from the same key.

    Attributes:
      sample_idx: the row.
      prompt, before, after: the texts.
      reward_before, reward_after: the total rewards.
      pieces: what of `before` went and what of `after` came, in order.
    """

    sample_idx: int
    prompt: str
    before: str
    after: str
    reward_before: float
    reward_after: float
    pieces: list[Piece]


class Comparison(NamedTuple):
    """What changed from one phase to another.

    Attributes:
      before, after: the phases.
      scores: "reward", "judge/<name>", "tokens", ... -> its paired difference.
      deviation_ratio: standard deviation of the reward after, over that before; 1 of
        two constant ones, infinite where it was constant before alone.
      identical: share of the prompts with the same answer.
      first_difference: the median place of the first token that differs, None where
        the tokens are not known or no answer differs.
      pairs: every prompt, the greatest change of reward first.
    """

    before: int
    after: int
    scores: dict[str, Difference]
    deviation_ratio: float
    identical: float
    first_difference: float | None
    pairs: list[Pair]


def compare(before: PhaseSamples, after: PhaseSamples, *, seed: int = 0) -> Comparison:
    """Compares two phases over the same prompts and keys.

    Raises:
      ValueError: the prompts are not the same.
    """
    if before.prompts != after.prompts:
        raise ValueError(
            f"phases {before.phase} and {after.phase} answer different prompts"
        )
    columns = [measures(side) for side in (before, after)]
    shared = [name for name in columns[0] if name in columns[1]]
    scores = {
        name: paired_difference(columns[0][name], columns[1][name], seed=seed)
        for name in shared
    }
    spread = [side.scores["reward"].std(dtype=np.float64) for side in (before, after)]
    gained = after.scores["reward"] - before.scores["reward"]
    order = np.argsort(-np.abs(gained), kind="stable").tolist()
    return Comparison(
        before.phase,
        after.phase,
        scores,
        float(spread[1] / spread[0]) if spread[0] else math.inf if spread[1] else 1.0,
        float(np.mean(np.equal(before.responses, after.responses))),
        _first_difference(before, after),
        [_pair(before, after, row) for row in order],
    )


def measures(samples: PhaseSamples) -> dict[str, np.ndarray]:
    """What of an answer is compared, [N] float64 each, by name.

    The scores; "characters" and "tokens" (words where only texts are left); "finished",
    1 where it ended with EOS; and, with tokens, "kl", see `drift.sequence_kl`.
    """
    found = {name: np.asarray(x, np.float64) for name, x in samples.scores.items()}
    found["characters"] = np.array([len(r) for r in samples.responses], np.float64)
    found["finished"] = np.asarray(samples.finished, np.float64)
    found["tokens"] = lengths(samples)
    if samples.ref_logprobs is not None:
        found["kl"] = sequence_kl(samples.logprobs, samples.ref_logprobs)
    return found


def differences(before: str, after: str) -> list[Piece]:
    """What of `before` went and what of `after` came, by words."""
    old, new = (WORDS.findall(text) for text in (before, after))
    pieces: list[Piece] = []
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    for kind, i, j, k, m in matcher.get_opcodes():
        if kind == "equal":
            pieces.append(Piece("same", "".join(new[k:m])))
            continue
        if j > i:
            pieces.append(Piece("removed", "".join(old[i:j])))
        if m > k:
            pieces.append(Piece("added", "".join(new[k:m])))
    return pieces


def _first_difference(before: PhaseSamples, after: PhaseSamples) -> float | None:
    if before.tokens is None or after.tokens is None:
        return None
    places = first_difference(before, after)
    places = places[places >= 0]
    return float(np.median(places)) if len(places) else None


def _pair(before: PhaseSamples, after: PhaseSamples, row: int) -> Pair:
    texts: Sequence[str] = before.responses[row], after.responses[row]
    rewards = (float(side.scores["reward"][row]) for side in (before, after))
    return Pair(row, before.prompts[row], *texts, *rewards, differences(*texts))
