"""Preference pairs as right-padded rows: prompt, response, EOS.

Dimension key: N pairs, T tokens of a row; side 0 is chosen, side 1 rejected.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data.packing import common_prefix
from rlhf_jax.data.rows import Pair
from rlhf_jax.data.tokenizer import encode_texts, special_tokens, start_tokens


class EncodedPairs(NamedTuple):
    """Both sides of N pairs."""

    tokens: np.ndarray  # [N, 2, T] int32, right-padded
    mask: np.ndarray  # [N, 2, T] bool, real tokens: what attention sees
    response: np.ndarray  # [N, 2, T] bool, those of the response, EOS included
    cut: np.ndarray  # [N] bool, pairs that were too long


def encode_pairs(tokenizer: Any, pairs: Sequence[Pair], *, length: int) -> EncodedPairs:
    """Prompt + response + EOS of both sides.

    A response begins with the first token that the prompt alone does not have: a token
    may span the border, and the text must be encoded as it is. A pair that is too long
    loses the beginning of its prompt, the same on both sides, bos excepted; a response
    that still does not fit loses its end, and the EOS.

    Args:
      tokenizer: a transformers tokenizer.
      pairs: N pairs of texts.
      length: T, at least 2.
    """
    special, start = special_tokens(tokenizer), start_tokens(tokenizer)
    tokens = np.full((len(pairs), 2, length), special.pad, np.int32)
    mask, response = np.zeros((2, *tokens.shape), bool)
    cut = np.zeros(len(pairs), bool)
    prompts = encode_texts(tokenizer, [pair.prompt for pair in pairs])
    chosen, rejected = (
        encode_texts(tokenizer, [pair.prompt + getattr(pair, side) for pair in pairs])
        for side in ("chosen", "rejected")
    )
    for row, (prompt, *texts) in enumerate(zip(prompts, chosen, rejected)):
        sides = [_split(prompt, ids, start, special.eos) for ids in texts]
        excess = max(len(before) + len(after) for before, after in sides) - length
        cut[row] = excess > 0
        for side, (before, after) in enumerate(sides):
            if excess > 0:
                lost = min(excess, len(before) - 1)
                before = before[: len(start)] + before[len(start) + lost :]
            ids = (before + after)[:length]
            tokens[row, side, : len(ids)] = ids
            mask[row, side, : len(ids)] = True
            response[row, side, len(before) : len(ids)] = True
    return EncodedPairs(tokens, mask, response, cut)


def _split(
    prompt: Sequence[int], whole: list[int], start: list[int], eos: int
) -> tuple[list[int], list[int]]:
    """The tokens before the response, at least one to predict from, and its own."""
    split = common_prefix(prompt, whole)
    return start + whole[:split] or [eos], [*whole[split:], eos]
