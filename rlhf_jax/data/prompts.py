"""Prompts: where they come from, and which of them a phase takes.

A source is "builtin" (short openings of reviews, shipped with the package) or anything
that `tables.load_table` reads. Which prompts a phase takes is a pure function of the
seed and the phase, so a resumed run needs no saved position.
"""

import importlib.resources
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from rlhf_jax.data import dialogues
from rlhf_jax.data.formats import read_prompts
from rlhf_jax.data.order import phase_rows
from rlhf_jax.data.splits import open_split, split_rows
from rlhf_jax.data.tables import Table, is_file, load_table, read_texts
from rlhf_jax.data.tokenizer import encode_prompts, encode_texts
from rlhf_jax.errors import UserError

BUILTIN = {"train": "prompts_train.txt", "heldout": "prompts_heldout.txt"}


class Prompts(NamedTuple):
    """Prompts and, for the rewards, other columns of the same rows."""

    texts: list[str]
    columns: dict[str, list[Any]]


def load_prompts(
    source: str,
    *,
    split: str | None = None,
    column: str | None = None,
    extra_columns: Sequence[str] = (),
    limit: int | None = None,
    seed: int | None = None,
    prefix_words: int | None = None,
    prefix_tokens: int | None = None,
    tokenizer=None,
) -> Prompts:
    """The prompts of a source.

    Args:
      source: "builtin", or a file, folder or data set as in `data.tables`.
      split: "train" or "heldout". Of builtin: None is "train". Of a file: nine tenths
        and one tenth by a hash of the prompt; None is all of it. Of a hub's data set:
        its split of that name ("heldout" is its "test"); None is "train".
      column: where the text is; None is what `formats.read_prompts` takes: "prompt",
        what precedes the responses in any known format, or "text".
      extra_columns: handed to the reward functions by name.
      limit: at most so many prompts.
      seed: shuffle before the limit is applied; None keeps the order of the source.
      prefix_words: the prompt is only the first so many words of the text (HTML line
        breaks and runs of spaces become single spaces); shorter texts are dropped.
      prefix_tokens: the same in tokens of `tokenizer`.
      tokenizer: writes chat messages by its template, and counts `prefix_tokens`.

    Raises:
      UserError: whatever is wrong with the source, with file and line; nothing left.
    """
    if prefix_words is not None and prefix_tokens is not None:
        raise UserError("give prefix_words or prefix_tokens, not both")
    counts = {"prefix_words": prefix_words, "prefix_tokens": prefix_tokens}
    for name, value in {**counts, "limit": limit}.items():
        if value is not None and value < 1:
            raise UserError(f"{name} should be at least 1, not {value}")
    table = _open(source, split)
    texts, keys, extra = _read(table, column, extra_columns, tokenizer)
    if prefix_words is not None:
        texts = [_first_words(text, prefix_words) for text in texts]
    if prefix_tokens is not None:
        texts = _first_tokens(texts, prefix_tokens, tokenizer)
    if prefix_words is not None or prefix_tokens is not None:
        keys = [text or "" for text in texts]
    keep = range(table.rows)
    if source != "builtin":  # whose splits are files of their own
        keep = split_rows(table, split, keys)
    keep = [row for row in keep if texts[row] is not None]
    if not keep:
        raise UserError(
            f"no prompts are left of the {len(texts)} rows of {source}: the texts are "
            "shorter than the prefix, or too few to hold a tenth out"
        )
    if seed is not None:
        keep = np.random.default_rng(seed).permutation(keep).tolist()
    keep = keep[:limit]
    columns = {name: [values[row] for row in keep] for name, values in extra.items()}
    return Prompts([texts[row] for row in keep], columns)


def load_both(
    data: ConfigDict, tokenizer: Any, *, prompt_tokens: int
) -> tuple[Prompts, Prompts]:
    """Training and held-out prompts of `config.data`, each at most `prompt_tokens`."""
    shape = {
        "column": data.column or None,
        "extra_columns": tuple(data.extra_columns),
        "tokenizer": tokenizer,
    }
    for name in ("prefix_words", "prefix_tokens"):
        shape[name] = data[name] or None

    def load(source, other, split, limit):
        # Two files are taken whole; one file for both is split.
        whole = source != other and is_file(source)
        split = None if whole else split
        limit = limit or None
        return load_prompts(source, split=split, limit=limit, seed=data.seed, **shape)

    train = load(data.train, data.heldout, "train", data.limit)
    heldout = load(data.heldout, data.train, "heldout", data.heldout_limit)
    # All of them now: a prompt that does not fit is not to be met in some later phase.
    for prompts in (train, heldout):
        encode_prompts(tokenizer, prompts.texts, length=prompt_tokens)
    return train, heldout


def phase_batch(prompts: Prompts, phase: int, *, batch_size: int, seed: int) -> Prompts:
    """The prompts of one phase, counted from 0, as `order.phase_rows` picks them."""
    rows = phase_rows(len(prompts.texts), phase, batch_size=batch_size, seed=seed)
    columns = {name: [v[row] for row in rows] for name, v in prompts.columns.items()}
    return Prompts([prompts.texts[row] for row in rows], columns)


def _read(
    table: Table, column: str | None, extra_columns: Sequence[str], tokenizer: Any
) -> tuple[list[str | None], list[str], dict[str, list[Any]]]:
    """All texts of the table, what tells the split of each, and the extra columns."""
    for name in extra_columns:
        if name not in table.columns:
            raise UserError(
                f"{table.source} has no column {name!r} for the rewards: it has "
                + ", ".join(map(repr, table.columns))
            )
    extra = {name: table.read(name) for name in extra_columns}
    if column is not None:
        texts = read_texts(table, column)
        return list(texts), texts, extra
    prompts = read_prompts(table)
    texts = [
        None
        if prompt is None
        else dialogues.render(prompt, tokenizer, table.place(row))
        for row, prompt in enumerate(prompts)
    ]
    return texts, [dialogues.plain_text(prompt or "") for prompt in prompts], extra


def _open(source: str, split: str | None) -> Table:
    if source != "builtin":
        return open_split(source, split)
    name = BUILTIN.get(split or "train")
    if name is None:
        raise UserError(
            f"the builtin prompts have no split {split!r}: choose from "
            + ", ".join(BUILTIN)
        )
    folder = importlib.resources.files("rlhf_jax") / "builtin"
    with importlib.resources.as_file(folder / name) as path:
        return load_table(str(path))


def _first_words(text: str | None, count: int) -> str | None:
    words = re.sub(r"<br\s*/?>", " ", text or "").split()
    return " ".join(words[:count]) if len(words) >= count else None


def _first_tokens(
    texts: list[str | None], count: int, tokenizer: Any
) -> list[str | None]:
    if tokenizer is None:
        raise UserError("prefix_tokens needs the tokenizer whose tokens are counted")
    ids = encode_texts(tokenizer, [text or "" for text in texts])
    heads = tokenizer.batch_decode(
        [row[:count] for row in ids], clean_up_tokenization_spaces=False
    )
    return [head if len(row) >= count else None for head, row in zip(heads, ids)]
