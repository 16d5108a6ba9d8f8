"""A data set opened to be looked at: all of its splits, rows and raw columns.

What a training run would refuse is told here and looked at all the same: columns that
make no known format, or a row that its format cannot hold.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from rlhf_jax.data import dialogues, formats, preferences, reviews
from rlhf_jax.data.cleaning import Row, split_key
from rlhf_jax.data.dialogues import Prompt
from rlhf_jax.data.prompts import BUILTIN, load_prompts
from rlhf_jax.data.rows import Completion, Dropped, Pair
from rlhf_jax.data.splits import open_split, split_rows
from rlhf_jax.data.tables import Table, is_file, load_table, read_texts
from rlhf_jax.errors import UserError

KINDS = ("preferences", "completions", "prompts", "texts")
FILE_SPLITS = ("train", "heldout")
HUB_SPLITS = ("train", "validation", "test")


class Split(NamedTuple):
    """Rows of one split, and where each stands.

    Of texts `response` is the text and `prompt` empty; of prompts `response` is the
    prompt's words, so that the same rules clean them.
    """

    name: str
    rows: list[Row | Dropped]
    places: list[str]
    columns: dict[str, list[Any]]  # as they are in the source


class Source(NamedTuple):
    """What was found.

    Attributes:
      name: the source, one string.
      kind: of KINDS.
      format: how the columns were recognised, in words.
      splits: one at least.
      incomplete: columns that some rows lack -> where the first of those is.
      problem: why the rows were not read as their columns promise; "" if they were.
    """

    name: str
    kind: str
    format: str
    splits: list[Split]
    incomplete: dict[str, str]
    problem: str


class _Reading(NamedTuple):
    kind: str
    format: str
    rows: list[Row | Dropped]
    problem: str = ""


def open_source(
    name: str,
    *,
    kind: str = "",
    column: str = "",
    splits: Sequence[str] = (),
    preference: str = "better",
) -> Source:
    """Opens every split of a source.

    Args:
      name: "builtin:reviews", the prompts "builtin", or as in `data.tables`.
      kind: how to read it, of KINDS; "" is told by the columns.
      column: the texts, of a table with columns of its own.
      splits: of a hub, in its own words; none named is those there are. A file has
        "train" and "heldout", by the hash of the prompt.
      preference: "better", or "safer" of PKU-SafeRLHF.

    Raises:
      UserError: no such source, split or column, rows that are not of the kind asked
        for, or a table without any text.
    """
    if kind and kind not in KINDS:
        raise UserError(f"unknown kind {kind!r}: choose from {', '.join(KINDS)}")
    if name == reviews.SOURCE:
        return _open_reviews(kind, splits or reviews.SPLITS)
    if name == "builtin":
        return _open_builtin_prompts(splits or tuple(BUILTIN))
    found: list[Split] = []
    incomplete: dict[str, str] = {}
    first = None
    for table, split in _tables(name, splits):
        reading = read_table(table, kind=kind, column=column, preference=preference)
        first = first or reading
        columns = _columns(table, incomplete)
        found += _cut(table, split, reading.rows, columns)
    return Source(
        name, first.kind, first.format, found, incomplete, problem=first.problem
    )


def read_table(
    table: Table, *, kind: str = "", column: str = "", preference: str = "better"
) -> _Reading:
    """The rows of a table, read as its columns promise or else as texts.

    Raises:
      UserError: what was asked for by kind or column is not there, or no text is.
    """
    if column:
        texts = [Completion("", text) for text in read_texts(table, column)]
        return _Reading("texts", f"texts in the column {column!r}", texts)
    known = formats.PAIRS + formats.COMPLETIONS
    names = [form.name for form in known if set(form.columns) <= set(table.columns)]
    guess = kind or _kind(table)
    problem = ""
    if guess:
        try:
            rows = _read(table, guess, preference)
            return _Reading(guess, names[0] if names else guess, rows)
        except UserError as error:
            if kind:
                raise
            problem = f"not readable as {guess}: {error}"
    text = longest_column(table)
    if text is None:
        raise UserError(
            f"{table.source} has no column of texts: it has "
            f"{', '.join(map(repr, table.columns))}; name the one that holds them by "
            "--column, or rename it to 'text'"
        )
    if not problem:
        listed = ", ".join(map(repr, table.columns))
        problem = f"no known format has the columns {listed}; see rlhf_jax.data.formats"
    rows = [Completion("", value or "") for value in table.read(text)]
    return _Reading("texts", f"none; texts in the column {text!r}", rows, problem)


def usable(splits: Sequence[Split]) -> tuple[list[Row], list[str]]:
    """The rows of all splits that a reader can use, and their places."""
    both = [
        (row, place)
        for split in splits
        for row, place in zip(split.rows, split.places)
        if not isinstance(row, Dropped)
    ]
    return [row for row, _ in both], [place for _, place in both]


def fields_of(rows: Sequence[Row], kind: str) -> dict[str, list[str]]:
    """What the rows hold by its name, each a text a row."""
    if kind == "prompts":
        return {"prompt": [words_of(row.prompt) for row in rows]}
    if kind == "texts":  # one that is a dialogue was cut in two: it is shown whole
        return {"text": [words_of(row.prompt) + row.response for row in rows]}
    names = ("chosen", "rejected") if kind == "preferences" else ("response",)
    fields = {"prompt": [words_of(row.prompt) for row in rows]}
    return fields | {name: [getattr(row, name) for row in rows] for name in names}


def words_of(prompt: Prompt) -> str:
    """A prompt to read: messages with who speaks."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"[{message.role}] {message.content}" for message in prompt)


def text_columns(columns: dict[str, list[Any]]) -> list[str]:
    """The columns that hold sentences; if none does, all that hold strings."""
    strings = {
        name: [value for value in values if isinstance(value, str)]
        for name, values in columns.items()
        if any(isinstance(value, str) for value in values)
        and all(isinstance(value, str | None) for value in values)
    }
    sentences = [
        name
        for name, values in strings.items()
        if 2 * sum(" " in value.strip() for value in values) > len(values)
    ]
    return sentences or list(strings)


def longest_column(table: Table) -> str | None:
    """The column of texts that holds most; None if no column holds strings."""
    columns = _columns(table, {})
    size = lambda name: sum(len(value or "") for value in columns[name])
    return max(text_columns(columns), key=size, default=None)


def _kind(table: Table) -> str:
    """What the columns promise, "" if nothing."""
    has = lambda form: set(form.columns) <= set(table.columns)
    if any(map(has, formats.PAIRS)):
        return "preferences"
    if any(map(has, formats.COMPLETIONS)):
        return "completions"
    return next(
        (kind for kind in ("prompts", "texts") if kind[:-1] in table.columns), ""
    )


def _read(table: Table, kind: str, preference: str) -> list[Row | Dropped]:
    if kind == "preferences":
        return formats.read_pairs(table, preference)
    if kind in ("completions", "texts"):
        return formats.read_completions(table)
    return [
        Dropped("", "no prompt")
        if prompt is None
        else Completion(prompt, dialogues.plain_text(prompt))
        for prompt in formats.read_prompts(table)
    ]


def _tables(name: str, splits: Sequence[str]) -> list[tuple[Table, str]]:
    """Each table with the split that it is; a file is one table of several splits."""
    if is_file(name):
        if splits:
            raise UserError(
                f"{name} is a file and has no splits to name: all of it is read, and "
                "one prompt in ten is held out"
            )
        return [(load_table(name), "")]
    if splits:
        return [(open_split(name, split), split) for split in splits]
    tables = [(load_table(name), HUB_SPLITS[0])]  # raises where there is nothing
    for split in HUB_SPLITS[1:]:
        with contextlib.suppress(UserError):
            tables.append((load_table(name, split=split), split))
    return tables


def _columns(table: Table, incomplete: dict[str, str]) -> dict[str, list[Any]]:
    columns = {}
    for name in table.columns:
        try:
            columns[name] = table.read(name)
        except UserError as error:  # a JSON row without it
            incomplete.setdefault(name, str(error))
    return columns


def _cut(
    table: Table, split: str, rows: list[Row | Dropped], columns: dict[str, list[Any]]
) -> list[Split]:
    """The table as one split, or as training cuts it: a file, or a hub's only split."""
    keys = [split_key(row) for row in rows]
    parts = {split: split_rows(table, split or None, keys)}
    if not split:
        parts = {part: split_rows(table, part, keys) for part in FILE_SPLITS}
    return [
        Split(
            name,
            [rows[number] for number in numbers],
            [table.place(number) for number in numbers],
            {key: [values[n] for n in numbers] for key, values in columns.items()},
        )
        for name, numbers in parts.items()
        if len(numbers)
    ]


def _open_reviews(kind: str, splits: Sequence[str]) -> Source:
    kind = kind or "preferences"
    if kind not in ("preferences", "texts"):
        raise UserError(f"{reviews.SOURCE} holds preferences and texts, no {kind}")
    unknown = [split for split in splits if split not in reviews.SPLITS]
    if unknown:
        raise UserError(
            f"{reviews.SOURCE} has no split {unknown[0]!r}: choose from "
            + ", ".join(reviews.SPLITS)
        )
    everything = reviews.read_archive(reviews.fetch_archive())  # seconds: once
    found = []
    for split in splits:
        rated = [row for row in everything if reviews.split_of(row.text) == split]
        if kind == "texts":
            rows: list[Any] = [Completion("", row.text) for row in rated]
            columns = {name: [getattr(row, name) for row in rated] for name in _RATED}
        else:
            rows = preferences.preference_pairs(rated)
            columns = {name: [getattr(row, name) for row in rows] for name in _PAIRED}
        places = [f"{reviews.SOURCE} {split} row {row}" for row in range(len(rows))]
        found.append(Split(split, rows, places, columns))
    words = "human-rated sentences"
    form = f"{words}, in pairs that begin alike" if kind == "preferences" else words
    return Source(reviews.SOURCE, kind, form, found, {}, "")


_RATED = ("text", "domain", "rating")
_PAIRED = tuple(
    name for name in Pair._fields if "safe" not in name and name != "margin"
)


def _open_builtin_prompts(splits: Sequence[str]) -> Source:
    found = []
    for split in splits:
        texts = load_prompts("builtin", split=split).texts
        places = [f"builtin {split} line {line}" for line in range(1, len(texts) + 1)]
        rows = [Completion(text, text) for text in texts]
        found.append(Split(split, rows, places, {"text": texts}))
    return Source("builtin", "prompts", "openings of reviews", found, {}, "")
