"""Prompts with their responses as rows of tokens: one a row, or several.

Dimension key: N rows, T tokens of a row.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax.data.rows import Completion
from rlhf_jax.data.tokenizer import encode_texts, special_tokens, start_tokens

OPEN_ROWS = 64  # that a text may still go into


class Rows(NamedTuple):
    """What supervised training reads.

    Attributes:
      tokens: [N, T] int32.
      segments: [N, T] int32, 0 is padding, and positive numbers tell the texts of a
        row apart, for `Model.apply`.
      learned: [N, T] bool, true on the tokens whose prediction is learned.
    """

    tokens: np.ndarray
    segments: np.ndarray
    learned: np.ndarray


class Text(NamedTuple):
    """One text's tokens and which of them are learned, both 1-d of one length."""

    tokens: np.ndarray
    learned: np.ndarray


def encode_completions(
    tokenizer: Any,
    completions: Sequence[Completion],
    *,
    length: int,
    completion_only: bool,
) -> list[Text]:
    """Prompt, response and EOS of each, cut to `length` tokens.

    A text that is too long loses its end and the EOS with it: a model must not learn to
    stop in mid-sentence. The response begins with the first token that the prompt alone
    does not have. The first token of a text is never learned, for nothing predicts it.

    Args:
      tokenizer: a transformers tokenizer.
      completions: the texts.
      length: T.
      completion_only: learn the response and its EOS alone, not the prompt.
    """
    special, start = special_tokens(tokenizer), start_tokens(tokenizer)
    prompts = encode_texts(tokenizer, [row.prompt for row in completions])
    whole = encode_texts(tokenizer, [row.prompt + row.response for row in completions])
    texts = []
    for prompt, ids in zip(prompts, whole, strict=True):
        first = len(start) + common_prefix(prompt, ids) if completion_only else 0
        tokens = np.array([*start, *ids, special.eos][:length], np.int32)
        learned = np.arange(len(tokens)) >= max(first, 1)
        texts.append(Text(tokens, learned))
    return texts


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts share: a token may span the end of a prompt."""
    different = (i for i, (a, b) in enumerate(zip(one, other)) if a != b)
    return next(different, min(len(one), len(other)))


def pad_rows(texts: Sequence[Text], *, length: int, pad: int) -> Rows:
    """One text a row, padded on the right."""
    rows = _empty(len(texts), length, pad)
    for row, text in enumerate(texts):
        width = len(text.tokens)
        rows.tokens[row, :width] = text.tokens
        rows.segments[row, :width] = 1
        rows.learned[row, :width] = text.learned
    return rows


def pack_rows(texts: Sequence[Text], *, length: int, pad: int) -> Rows:
    """Several texts a row: each goes into the first open row that has room (first fit).

    Attention stays inside a text, and positions start anew with each, so that a text is
    read as if it stood alone. The order of the texts decides which share a row.
    """
    from grain import MapDataset, experimental

    packed = experimental.FirstFitPackIterDataset(
        MapDataset.source([text._asdict() for text in texts]).to_iter_dataset(),
        length_struct={"tokens": length, "learned": length},
        num_packing_bins=min(OPEN_ROWS, len(texts)),
        shuffle_bins=False,
    )
    found = list(packed)
    rows = _empty(len(found), length, pad)
    for row, one in enumerate(found):
        rows.segments[row] = one["tokens_segment_ids"]
        real = rows.segments[row] > 0
        rows.tokens[row] = np.where(real, one["tokens"], pad)
        rows.learned[row] = one["learned"].astype(bool) & real
    return rows


def length_batches(
    rows: Any,
    lengths: np.ndarray,
    order: np.ndarray,
    *,
    batch: int,
    widths: Sequence[int],
    seed: int,
) -> list[Any]:
    """The rows `order` in batches of like length, each cut to the least width it needs.

    Less padding is computed. The batches come in random order, or training would go
    from short to long in each phase.

    Args:
      rows: a pytree of arrays [N, ...]; those whose last axis is the longest row, T,
        are cut.
      lengths: [N] tokens of each row.
      order: the row numbers of a phase, a multiple of `batch` of them.
      batch: rows of a batch.
      widths: what a batch may be cut to, for each is compiled; T itself is one more.
      seed: of the order of the batches.
    """
    T = max(x.shape[-1] for x in jax.tree.leaves(rows) if x.ndim > 1)

    def take(x, index, width):
        return x[index][..., :width] if x.ndim > 1 and x.shape[-1] == T else x[index]

    by_length = order[np.argsort(lengths[order], kind="stable")].reshape(-1, batch)
    batches = []
    for index in np.random.default_rng(seed).permutation(by_length):
        width = min(w for w in (*widths, T) if w >= lengths[index].max())
        batches.append(
            jax.tree.map(functools.partial(take, index=index, width=width), rows)
        )
    return batches


def _empty(count: int, length: int, pad: int) -> Rows:
    return Rows(
        np.full((count, length), pad, np.int32),
        np.zeros((count, length), np.int32),
        np.zeros((count, length), bool),
    )
