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
from rlhf_jax.data.dialogues import Prompt
from rlhf_jax.data.formats import read_prompts
from rlhf_jax.data.order import phase_rows
from rlhf_jax.data.splits import has_splits, open_split, split_rows
from rlhf_jax.data.tables import Table, load_table, read_texts
from rlhf_jax.data.tokenizer import encode_texts, start_tokens
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
    prompt_template: str = "",
    max_tokens: int | None = None,
    tokenizer=None,
) -> Prompts:
    """The prompts of a source.

    Args:
      source: "builtin", or a file, folder or data set as in `data.tables`.
      split: "train" or "heldout". Of builtin: None is "train". Of a file: nine tenths
        and one tenth by a hash of the prompt; None is all of it. Of a hub's data set:
        as `splits.open_split` has it ("heldout" is its "test"); None is "train".
      column: where the text is; None is what `formats.read_prompts` takes: "prompt",
        what precedes the responses in any known format, or "text".
      extra_columns: handed to the reward functions by name.
      limit: at most so many prompts.
      seed: shuffle before the limit is applied; None keeps the order of the source.
      prefix_words: the prompt is only the first so many words of the text (HTML line
        breaks and runs of spaces become single spaces); shorter texts are dropped.
      prefix_tokens: the same in tokens of `tokenizer`.
      prompt_template: what is around a prompt that is no chat, "" for nothing; as in
        `dialogues.fill_template`.
      max_tokens: how many tokens a prompt may have.
      tokenizer: writes chat messages by its template, and counts tokens.

    Raises:
      UserError: whatever is wrong with the source, with file and line; nothing left; a
        prompt that is too long.
    """
    if prefix_words is not None and prefix_tokens is not None:
        raise UserError("give prefix_words or prefix_tokens, not both")
    counts = {"prefix_words": prefix_words, "prefix_tokens": prefix_tokens}
    for name, value in {**counts, "limit": limit}.items():
        if value is not None and value < 1:
            raise UserError(f"{name} should be at least 1, not {value}")
    table = _open(source, split)
    prompts, extra = _read(table, column, extra_columns)
    if prefix_words is not None:
        texts = _write(prompts, table, tokenizer)
        prompts = [_first_words(text, prefix_words) for text in texts]
    if prefix_tokens is not None:
        texts = _write(prompts, table, tokenizer)
        prompts = _first_tokens(texts, prefix_tokens, tokenizer)
    keys = [dialogues.plain_text(prompt or "") for prompt in prompts]
    texts = _write(prompts, table, tokenizer, prompt_template)
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
    if max_tokens is not None:
        _check_lengths(texts, keep, table, tokenizer, max_tokens)
    columns = {name: [values[row] for row in keep] for name, values in extra.items()}
    return Prompts([texts[row] for row in keep], columns)


def load_both(
    data: ConfigDict, tokenizer: Any, *, prompt_tokens: int
) -> tuple[Prompts, Prompts]:
    """Training and held-out prompts of `config.data`, each at most `prompt_tokens`."""
    shape = {
        "column": data.column or None,
        "extra_columns": tuple(data.extra_columns),
        "prompt_template": data.get("prompt_template", ""),
        # All of them now: what does not fit is not to be met in some later phase.
        "max_tokens": prompt_tokens,
        "tokenizer": tokenizer,
    }
    for name in ("prefix_words", "prefix_tokens"):
        shape[name] = data[name] or None

    def load(source, other, split, limit):
        # Two sources without splits are taken whole; one for both is cut.
        same = source.removeprefix("hf:") == other.removeprefix("hf:")
        whole = not same and source != "builtin" and not has_splits(source)
        split = None if whole else split
        limit = limit or None
        return load_prompts(source, split=split, limit=limit, seed=data.seed, **shape)

    train = load(data.train, data.heldout, "train", data.limit)
    return train, load(data.heldout, data.train, "heldout", data.heldout_limit)


def phase_batch(prompts: Prompts, phase: int, *, batch_size: int, seed: int) -> Prompts:
    """The prompts of one phase, counted from 0, as `order.phase_rows` picks them."""
    rows = phase_rows(len(prompts.texts), phase, batch_size=batch_size, seed=seed)
    columns = {name: [v[row] for row in rows] for name, v in prompts.columns.items()}
    return Prompts([prompts.texts[row] for row in rows], columns)


def _read(
    table: Table, column: str | None, extra_columns: Sequence[str]
) -> tuple[list[Prompt | None], dict[str, list[Any]]]:
    """All prompts of the table, None for a row without one, and the extra columns."""
    for name in extra_columns:
        if name not in table.columns:
            raise UserError(
                f"{table.source} has no column {name!r} for the rewards: it has "
                + ", ".join(map(repr, table.columns))
            )
    extra = {name: table.read(name) for name in extra_columns}
    if column is not None:
        return list(read_texts(table, column)), extra
    return read_prompts(table), extra


def _write(
    prompts: Sequence[Prompt | None], table: Table, tokenizer: Any, template: str = ""
) -> list[str | None]:
    """The prompts as strings, None for a row without one."""
    return [
        None
        if prompt is None
        else dialogues.render(prompt, tokenizer, table.place(row), template)
        for row, prompt in enumerate(prompts)
    ]


def _check_lengths(
    texts: Sequence[str | None],
    rows: Sequence[int],
    table: Table,
    tokenizer: Any,
    max_tokens: int,
) -> None:
    """Raises a `UserError` for the first of these rows whose prompt is too long."""
    start = len(start_tokens(tokenizer))
    for row, ids in zip(rows, encode_texts(tokenizer, [texts[row] for row in rows])):
        if start + len(ids) > max_tokens:
            raise UserError(
                f"{table.place(row)}: the prompt has {start + len(ids)} tokens, more "
                f"than the {max_tokens} allowed: {texts[row][:60]!r} (raise "
                "config.rollout.prompt_tokens, or shorten it)"
            )


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
