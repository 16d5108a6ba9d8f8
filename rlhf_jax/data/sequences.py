"""Texts as right-padded rows that end with EOS, for supervised training and scoring.

Dimension key: N texts, T tokens of a row.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax.data.tokenizer import encode_texts, special_tokens, start_tokens


def encode_sequences(
    tokenizer: Any, texts: Sequence[str], *, length: int, keep_end: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Each text, then EOS, cut to `length` tokens.

    Args:
      tokenizer: a transformers tokenizer.
      texts: N texts.
      length: T.
      keep_end: what a text that is too long loses: its end and the EOS (False, for a
        language model, which must not learn to stop in mid-sentence), or its beginning
        (True, for a reward model, which reads its score off the last token).

    Returns:
      tokens [N, T] int32 and mask [N, T] bool, true on real tokens, EOS included.
    """
    special, start = special_tokens(tokenizer), start_tokens(tokenizer)
    tokens = np.full((len(texts), length), special.pad, np.int32)
    mask = np.zeros((len(texts), length), bool)
    for row, ids in enumerate(encode_texts(tokenizer, texts)):
        ids = [*start, *ids, special.eos]
        ids = ids[-length:] if keep_end else ids[:length]
        tokens[row, : len(ids)] = ids
        mask[row, : len(ids)] = True
    return tokens, mask
