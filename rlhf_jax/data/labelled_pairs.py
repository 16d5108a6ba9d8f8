"""Preference pairs and what raters said of them as arrays, for models that score.

Dimension key: N pairs, T tokens of a row; side 0 is chosen, side 1 rejected.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data.rows import Pair
from rlhf_jax.data.sequences import encode_sequences
from rlhf_jax.errors import UserError

MARGINS = ("", "column", "raters")


class Pairs(NamedTuple):
    """Preference pairs as arrays; side 0 is chosen, side 1 rejected."""

    tokens: np.ndarray  # [N, 2, T] int32, right-padded
    mask: np.ndarray  # [N, 2, T] bool
    probability: np.ndarray  # [N] float32
    margin: np.ndarray  # [N] float32, m
    safe: np.ndarray  # [N, 2] bool, of a cost model; else False


def encode_pairs(
    tokenizer: Any,
    pairs: Sequence[Pair],
    *,
    length: int,
    soft_labels: bool = False,
    margin: str = "",
) -> Pairs:
    """Prompt + response + EOS of both sides; a long pair loses its beginning.

    Args:
      tokenizer: a transformers tokenizer.
      pairs: N pairs, their prompts as strings.
      length: T.
      soft_labels: p is the raters' probability, in place of 1.
      margin: where m is from: "" is 0, "column" that of the data, "raters" their gap,
        P(chosen is preferred) − P(rejected is).
    """
    sides = [
        encode_sequences(
            tokenizer,
            [pair.prompt + getattr(pair, side) for pair in pairs],
            length=length,
            keep_end=True,
        )
        for side in ("chosen", "rejected")
    ]
    tokens, mask = (np.stack(both, axis=1) for both in zip(*sides))
    labels = [pair.probability if soft_labels else 1.0 for pair in pairs]
    margins = {
        "": lambda pair: 0.0,
        "column": lambda pair: pair.margin,
        "raters": lambda pair: 2.0 * pair.probability - 1.0,
    }
    safe = [(bool(pair.chosen_safe), bool(pair.rejected_safe)) for pair in pairs]
    return Pairs(
        tokens,
        mask,
        np.array(labels, np.float32),
        np.array([margins[margin](pair) for pair in pairs], np.float32),
        np.array(safe, bool).reshape(-1, 2),
    )


def require_labels(pairs: Sequence[Pair], names: Sequence[str], source: str) -> None:
    """Raises a `UserError` where a pair lacks one of these columns."""
    lacking = sum(None in [getattr(pair, name) for name in names] for pair in pairs)
    if lacking:
        raise UserError(
            f"{lacking:,} of {len(pairs):,} pairs of {source} have no "
            f"{' and '.join(names)}: give data with these columns (for costs that of "
            "PKU-SafeRLHF will do), or leave those rows out"
        )
