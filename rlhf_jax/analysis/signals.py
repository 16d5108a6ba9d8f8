"""What is measured on the answers of a phase: one number an answer, by name.

Dimension key: N answers, T tokens of one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlhf_jax import text_signals
from rlhf_jax.analysis.samples import PhaseSamples

# log π_ref of a token below this says nothing more, and must not make a mean infinite
LEAST_LOGPROB = -50.0
ADDED = 40  # characters as usual are added to each answer before its shares are taken


class Usual(NamedTuple):
    """What texts are made of before anything changes.

    Attributes:
      script: of most letters, as `text_signals.ScriptShares` calls it.
      shares: of the characters.
    """

    script: str
    shares: text_signals.CharacterShares


def signals_of(samples: PhaseSamples, usual: Usual) -> dict[str, np.ndarray]:
    """name -> [N] float64, nan where an answer has no such number.

        reward, judge/<name>   as scored
        reward_spread          |reward − median reward of the phase|
        tokens                 of the answer, its words where only texts are left
        finished               1 where it ends with EOS
        surprise               mean of −log π_ref a token, nats: log perplexity under
                               the reference
        repeated, copied       `text_signals.repeated_share` and `copied_share`
        near_copies            the same of text_signals, of the phase's own answers
        foreign                share of its letters that are not of the usual script
        format/<share>         `text_signals.character_shares`
        line_breaks            of these

    An answer of one full stop is all punctuation and yet usual: shares are of the
    answer and 40 usual characters or letters.

    What a phase was not scored with, or has no tokens for, is left out.

    Args:
      samples: of a phase.
      usual: of the run's texts, see `usual_of`.
    """
    texts = samples.responses
    found = {
        name: np.asarray(scores, np.float64)
        for name, scores in samples.scores.items()
        if name == "reward" or name.startswith("judge/")
    }
    if "reward" in found:
        found["reward_spread"] = _spread(found["reward"])
    found["tokens"] = lengths(samples)
    found["finished"] = np.asarray(samples.finished, np.float64)
    if samples.ref_logprobs is not None:
        found["surprise"] = surprise(samples.ref_logprobs, samples.mask)
    found["repeated"] = _each(text_signals.repeated_share, texts)
    found["copied"] = _each(text_signals.copied_share, texts)
    found["near_copies"] = text_signals.near_copies(texts, samples.prompts)
    found["foreign"] = _each(lambda text: _foreign(text, usual.script), texts)
    shares = np.array([text_signals.character_shares(text) for text in texts])
    sizes = np.array([[len(text)] for text in texts])
    shares = (sizes * shares + ADDED * np.array(usual.shares)) / (sizes + ADDED)
    for name, values in zip(usual.shares._fields, shares.T):
        found[name if name == "line_breaks" else f"format/{name}"] = values
    return found


def variety(before: Sequence[str], after: Sequence[str]) -> tuple[np.ndarray, ...]:
    """Each text's share in distinct-2 of its phase, ([N], [N]), see `distinct_shares`.

    Longer answers have fewer distinct pairs of words, so of each pair of answers both
    are cut to the words of the shorter one.
    """
    words = [(one.split(), other.split()) for one, other in zip(before, after)]
    shorter = [min(map(len, pair)) for pair in words]
    sides = ([" ".join(w[:n]) for w, n in zip(side, shorter)] for side in zip(*words))
    return tuple(text_signals.distinct_shares(side, 2) for side in sides)


def usual_of(texts: Sequence[str]) -> Usual:
    """What all of the texts together are made of."""
    joined = "".join(texts)
    scripts = text_signals.script_shares(joined)
    main = scripts._fields[int(np.argmax(scripts))]
    return Usual(main, text_signals.character_shares(joined))


def lengths(samples: PhaseSamples) -> np.ndarray:
    """Tokens of each answer [N], its words where only the text is left."""
    if samples.mask is None:
        return _each(lambda text: len(text.split()), samples.responses)
    return samples.mask.sum(axis=1).astype(np.float64)


def surprise(ref_logprobs: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean of −log π_ref over an answer's tokens [N], nats; nan without tokens."""
    counts = mask.sum(axis=1)
    logprobs = np.where(mask, np.maximum(ref_logprobs, LEAST_LOGPROB), 0.0)
    total = -logprobs.sum(axis=1, dtype=np.float64)
    return np.where(counts > 0, total / np.maximum(counts, 1), np.nan)


def _spread(rewards: np.ndarray) -> np.ndarray:
    known = rewards[np.isfinite(rewards)]
    return np.abs(rewards - (np.median(known) if known.size else np.nan))


def _foreign(text: str, script: str) -> float:
    letters = sum(map(str.isalpha, text))
    shares = text_signals.script_shares(text)._asdict()
    other = sum(share for name, share in shares.items() if name != script)
    return other * letters / (letters + ADDED)


def _each(measure, texts: Sequence[str]) -> np.ndarray:
    return np.array([measure(text) for text in texts], np.float64)
