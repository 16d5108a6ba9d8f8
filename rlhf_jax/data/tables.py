"""Rows with named columns from a file, a folder of files, or a hub.

A source is one string:
  path.jsonl  path.jsonl.gz   one JSON object (or string) a line
  path.json                   a list of objects or strings
  path.csv  path.parquet      columns by their header
  path.txt                    one text a line, as the column "text"
  hf:owner/name               a Hugging Face data set (hf:owner/name:config for one of
                              its configurations); `owner/name` alone means the same
  hf:folder                   a folder of data files, read by the same library
  tfds:name                   a TensorFlow Datasets name, read without TensorFlow
Single strings in JSON files are the column "text" too.
"""

import contextlib
import csv
import gzip
import hashlib
import importlib.util
import io
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from rlhf_jax.errors import UserError, first_line

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet", ".txt")


class Table(NamedTuple):
    """What was read: its columns, how many rows, and where a row stands."""

    source: str
    columns: tuple[str, ...]
    rows: int
    read: Callable[[str], list[Any]]  # a column by its name
    place: Callable[[int], str]  # "prompts.jsonl line 3" for row 2
    unsplit: bool = False  # the only split of a hub's data set: to be cut as a file is


def load_table(source: str, *, split: str | None = None) -> Table:
    """Open a source; see the module's docstring for what it may be.

    Args:
      source: one string.
      split: of a hub's data set, in its own words ("train", "test", "train[:5%]");
        None is "train". Files have no splits.

    Raises:
      UserError: nothing there, an unreadable or empty file (with the line), an unknown
        data set or split, or a hub that cannot be reached.
    """
    if source.startswith("tfds:"):
        return _from_tfds(source, split or "train")
    if is_file(source):
        path = pathlib.Path(source).expanduser()
        if not path.is_file():
            raise UserError(f"there is no file {source}")
        if split is not None:
            raise UserError(f"{source} is a file and has no split {split!r}")
        return _from_file(source, path)
    return _from_hub(source, split or "train")


def hub_splits(source: str) -> tuple[str, ...]:
    """The names of the splits that a hub's data set has.

    Raises:
      UserError: an unknown data set, or a hub that cannot be reached.
    """
    if source.startswith("tfds:"):
        return tuple(_load_tfds(source, None))
    return tuple(_load_hub(source, None))


def read_texts(table: Table, column: str) -> list[str]:
    """A column whose every value must be a string.

    Raises:
      UserError: no such column, or a value of another type, with its place.
    """
    if column not in table.columns:
        raise UserError(
            f"{table.source} has no column {column!r}: {header(table)} "
            f"{', '.join(map(repr, table.columns))}; name one of these"
        )
    values = table.read(column)
    for row, value in enumerate(values):
        if not isinstance(value, str):
            raise UserError(
                f"{table.place(row)}: {column!r} should be a string, "
                f"not {type(value).__name__}; mend the row, or drop it"
            )
    return values


def header(table: Table) -> str:
    """How an error begins to tell a table's columns: a CSV file may lack its header."""
    if table.source.endswith(".csv"):
        return "line 1, which should be the header, has"
    return "it has"


def is_file(source: str) -> bool:
    """Whether the source is a single file by its name; such have no splits."""
    return source.endswith(SUFFIXES) and not source.startswith(("hf:", "tfds:"))


def is_heldout(text: str) -> bool:
    """Whether a file's text is held out: one in ten, by its hash."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 10 == 0


def _from_file(source: str, path: pathlib.Path) -> Table:
    try:
        if source.endswith(".parquet"):
            return _from_parquet(source, path)
        text = _read_text(source, path)
        if source.endswith(".csv"):
            rows = _csv_rows(source, text)
        elif source.endswith(".json"):
            rows = _json_rows(source, text)
        else:
            lines = enumerate(io.StringIO(text, newline=None), 1)
            lines = [(n, line) for n, line in lines if line.strip()]
            if source.endswith(".txt"):
                rows = [(n, {"text": line.rstrip("\n")}) for n, line in lines]
            else:
                rows = [(n, _json_line(source, n, line)) for n, line in lines]
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise UserError(
            f"cannot read {source}: {error}: write it again, or give another file"
        ) from error
    if not rows:
        raise _is_empty(source)
    return _from_rows(source, rows, "item" if source.endswith(".json") else "line")


def _read_text(source: str, path: pathlib.Path) -> str:
    with gzip.open(path) if source.endswith(".gz") else path.open("rb") as file:
        data = file.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{source} line {line} is not text in UTF-8, for it has the byte "
            f"{error.object[error.start]:#04x}: save it in UTF-8, or, if it is no text "
            f"at all, give one of {', '.join(SUFFIXES)}"
        ) from error


def _is_empty(source: str) -> UserError:
    return UserError(f"{source} is empty: no rows in it; give a file with one at least")


def _csv_rows(source: str, text: str) -> list[tuple[int, dict]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    names = reader.fieldnames or []
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"{source} line 1 calls several columns {name!r}: give each a name of "
                "its own"
            )
    rows = []
    for row in reader:
        if None in row:  # where DictReader keeps what has no name
            raise UserError(
                f"{source} line {reader.line_num} has {len(names) + len(row[None])} "
                f"cells for {len(names)} names in line 1: put quotation marks around "
                "texts with commas in them"
            )
        rows.append((reader.line_num, row))
    return rows


def _from_rows(source: str, rows: list[tuple[int, dict]], unit: str) -> Table:
    def place(row: int) -> str:
        return f"{source} {unit} {rows[row][0]}"

    def read(column: str) -> list[Any]:
        for row, (_, fields) in enumerate(rows):
            if column not in fields:
                raise UserError(
                    f"{place(row)} has no {column!r}: it has "
                    f"{', '.join(map(repr, fields))}; add it, or drop the row"
                )
        return [fields[column] for _, fields in rows]

    columns = tuple(dict.fromkeys(name for _, fields in rows for name in fields))
    return Table(source, columns, len(rows), read, place)


def _json_line(source: str, number: int, line: str) -> dict:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{source} line {number} is not valid JSON: {error.msg} at column "
            f"{error.colno}; mend that line, or delete it"
        ) from error
    return _as_fields(value, f"{source} line {number}")


def _json_rows(source: str, text: str) -> list[tuple[int, dict]]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        lines = error.msg == "Extra data"
        cure = "one object a line is .jsonl" if lines else "mend the file there"
        raise UserError(
            f"{source} line {error.lineno} is not valid JSON: {error.msg}; {cure}"
        ) from error
    if not isinstance(values, list):
        raise UserError(
            f"{source} should hold a JSON list, not {_json_name(values)}: a list of "
            "strings or of objects"
        )
    return [
        (number, _as_fields(value, f"{source} item {number}"))
        for number, value in enumerate(values, 1)
    ]


def _as_fields(value: Any, place: str) -> dict:
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise UserError(
            f"{place} should be a JSON object or string, not {_json_name(value)}: mend "
            "it, or delete it"
        )
    return value


def _json_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return names.get(type(value), "a number or true/false")


def _from_parquet(source: str, path: pathlib.Path) -> Table:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(
            f"{source} is not a readable Parquet file ({first_line(error)}): write it "
            "again, or call it after what it is"
        ) from error
    if not table.num_rows:
        raise _is_empty(source)
    return Table(
        source,
        tuple(table.column_names),
        table.num_rows,
        lambda column: table.column(column).to_pylist(),
        lambda row: f"{source} row {row}",
    )


def _load_hub(source: str, split: str | None) -> Any:
    """A split as the datasets library reads it; None: all of them by their names."""
    import datasets

    name = source.removeprefix("hf:")
    folder = pathlib.Path(name).expanduser()
    local = folder.exists() or source.startswith((".", "/", "~"))
    if local and name == source and not folder.is_dir():
        raise UserError(
            f"cannot read {source}: expected a folder or a file that ends with one of "
            + ", ".join(SUFFIXES)
        )
    name, _, config = (str(folder), "", "") if folder.is_dir() else name.partition(":")
    try:
        return datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # the hub, its cache and the files each raise their own
        which = repr(source) if split is None else f"{source!r}, split {split!r}"
        raise UserError(
            f"no data set for {which}: it is neither a file or "
            "folder here nor one that the Hugging Face hub gave (check the spelling, "
            f"or the network; {first_line(error)})"
        ) from error


def _from_hub(source: str, split: str) -> Table:
    data = _load_hub(source, split)
    if not len(data):
        raise UserError(f"{source} has no rows in its split {split!r}")
    return Table(
        source,
        tuple(data.column_names),
        len(data),
        lambda column: list(data[column]),
        lambda row: f"{source} {split} row {row}",
    )


def _load_tfds(source: str, split: str | None) -> Any:
    """A split as TensorFlow Datasets reads it; None: all of them by their names."""
    import tensorflow_datasets as tfds

    try:
        with _archives_without_tensorflow():
            return tfds.data_source(source.removeprefix("tfds:"), split=split)
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(
            f"TensorFlow Datasets has no {source.removeprefix('tfds:')!r}: see its "
            "catalog for the names"
        ) from error
    except Exception as error:  # downloads, splits and files each raise their own
        which = source if split is None else f"{source}, split {split!r},"
        raise UserError(
            f"{which} cannot be read: {first_line(error)} (check "
            "the split and the network, or prepare it once and set TFDS_DATA_DIR)"
        ) from error


def _from_tfds(source: str, split: str) -> Table:
    data = _load_tfds(source, split)
    if not len(data):
        raise UserError(f"{source} has no rows in its split {split!r}")

    def read(column: str) -> list[Any]:
        return [_plain(row[column]) for row in data]

    return Table(
        source,
        tuple(data[0]),
        len(data),
        read,
        lambda row: f"{source} {split} row {row}",
    )


@contextlib.contextmanager
def _archives_without_tensorflow() -> Iterator[None]:
    """Lets TFDS read a downloaded archive where TensorFlow is not installed.

    It opens the archive through tf.io.gfile, which is all that preparing IMDb needs
    TensorFlow for; a file on this disk opens as well without.
    """
    from tensorflow_datasets.core.download import extractor

    theirs = getattr(extractor, "_open_or_pass", None)
    if theirs is None or importlib.util.find_spec("tensorflow"):
        yield
        return
    extractor._open_or_pass = _open_archive
    try:
        yield
    finally:
        extractor._open_or_pass = theirs


def _open_archive(archive: Any) -> contextlib.AbstractContextManager[Any]:
    if isinstance(archive, str | os.PathLike):
        return open(archive, "rb")
    return contextlib.nullcontext(archive)


def _plain(value: Any) -> Any:
    """A TFDS value as Python's own: bytes are text, numpy scalars are numbers."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    return value.item() if getattr(value, "ndim", None) == 0 else value
