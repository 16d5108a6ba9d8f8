"""How far a policy has moved: from its reference, and from one phase to the next.

Dimension key: N answers, T tokens of one.
"""

import collections
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from rlhf_jax.analysis.samples import PhaseSamples


class TokenMove(NamedTuple):
    """A token that the policy says more, or less, willingly than the other model.

    Attributes:
      token: its id.
      text: what it decodes to.
      count: how often it is in the answers.
      log_ratio: nats, the mean of log π − log π_ref where it is said.
      share: of the KL, Σ log ratio of this token over that of all.
    """

    token: int
    text: str
    count: int
    log_ratio: float
    share: float


def sequence_kl(logprobs: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Σ_t (log π − log π_other) of each answer [N], nats.

    Its mean over answers of π is an unbiased estimate of KL(π ‖ π_other) of a response.
    """
    return (logprobs - others).sum(axis=1, dtype=np.float64)


def token_kl(logprobs: np.ndarray, others: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The mean over an answer's tokens of (r − 1) − log r, r = π_other/π, [N] nats.

    Never negative, with less spread than the log ratio; an answer without a token: 0.

    References:
      Schulman 2020, http://joschu.net/blog/kl-approx.html (k3)
    """
    log_ratio = np.where(mask, others - logprobs, 0.0).astype(np.float64)
    sums = (np.expm1(log_ratio) - log_ratio).sum(axis=1)
    return sums / np.maximum(mask.sum(axis=1), 1)


def token_moves(
    samples: PhaseSamples, decode: Callable[[int], str], *, count: int = 20
) -> list[TokenMove]:
    """The tokens that make most of the KL to the reference, the greatest share first.

    Args:
      samples: of one phase.
      decode: a token's text.
      count: at most so many.
    """
    log_ratio = samples.logprobs - samples.ref_logprobs
    found: dict[int, list[float]] = collections.defaultdict(list)
    for token, ratio in zip(
        samples.tokens[samples.mask].tolist(), log_ratio[samples.mask].tolist()
    ):
        found[token].append(ratio)
    whole = sum(map(sum, found.values()))
    moves = [
        TokenMove(
            token,
            decode(token),
            len(ratios),
            float(np.mean(ratios)),
            sum(ratios) / whole if whole else 0.0,
        )
        for token, ratios in found.items()
    ]
    return sorted(moves, key=lambda move: -abs(move.share))[:count]


def first_difference(before: PhaseSamples, after: PhaseSamples) -> np.ndarray:
    """The place of the first token in which two answers differ, [N] int; −1 for none.

    Both were drawn from the same keys, so that equal policies give equal answers.
    """
    width = max(before.tokens.shape[1], after.tokens.shape[1])
    pair = [np.full((len(before.tokens), width), -1) for _ in range(2)]
    for tokens, side in zip(pair, (before, after)):
        tokens[:, : side.tokens.shape[1]][side.mask] = side.tokens[side.mask]
    differs = pair[0] != pair[1]
    return np.where(differs.any(axis=1), differs.argmax(axis=1), -1)


def colored_tokens(
    samples: PhaseSamples, row: int, decode: Callable[[Sequence[int]], str]
) -> list[tuple[str, float]]:
    """(text, log π − log π_ref) of each token of one answer, in nats.

    The texts join to the whole answer: a token that is part of a character gives its
    text with the last of that character's.
    """
    tokens = samples.tokens[row][samples.mask[row]].tolist()
    ratios = (samples.logprobs - samples.ref_logprobs)[row][samples.mask[row]]
    pieces, said = [], ""
    for end, ratio in enumerate(ratios.tolist(), 1):
        text = decode(tokens[:end])
        whole = text if not text.endswith("�") or end == len(tokens) else said
        pieces.append((whole[len(said) :], ratio))
        said = whole
    return pieces
