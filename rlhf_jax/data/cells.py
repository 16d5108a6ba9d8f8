"""The values of a column, each checked, with its place in the error if it is wrong."""

import math
from collections.abc import Callable
from typing import Any

from rlhf_jax.data import dialogues
from rlhf_jax.data.dialogues import Prompt
from rlhf_jax.data.tables import Table
from rlhf_jax.errors import UserError


def each(table: Table, column: str, read: Callable[[Any, str], Any]) -> list[Any]:
    """A column, every value read with its place at hand for errors."""
    return [
        read(value, f"{table.place(row)}: {column!r}")
        for row, value in enumerate(table.read(column))
    ]


def text_or_messages(value: Any, place: str) -> Prompt:
    """One value of a column that may be written either way."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return dialogues.read_messages(value, place)
    found = type(value).__name__
    if isinstance(value, list):
        found = f"a list of {type(value[0]).__name__}" if value else "an empty list"
    raise UserError(
        f"{place} should be a string or a list of chat messages, not {found}; mend the "
        "row, or drop it"
    )


def optional(table: Table, column: str) -> list[Any]:
    """A column, or as many times None."""
    return table.read(column) if column in table.columns else [None] * table.rows


def fraction(table: Table, row: int, column: str, value: Any) -> float:
    """A number from 0 to 1; a CSV file holds it as text."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number <= 1:
        raise wrong_type(table, row, column, "a number from 0 to 1", value)
    return number


def number(table: Table, row: int, column: str, value: Any) -> float | None:
    """A finite number or None; a CSV file holds it as text."""
    if value in (None, ""):
        return None
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise wrong_type(table, row, column, "a number", value)
    return found


def truth(table: Table, row: int, column: str, value: Any) -> bool | None:
    """True, False or None; a CSV file holds them as words."""
    word = str(value).lower()
    if word not in ("true", "false", "1", "0", "none", ""):
        raise wrong_type(table, row, column, "true or false", value)
    return None if word in ("none", "") else word in ("true", "1")


def wrong_type(
    table: Table, row: int, column: str, expected: str, value: Any
) -> UserError:
    """The error of a value that is none of what its column may hold."""
    return UserError(
        f"{table.place(row)}: {column!r} should be {expected}, not {value!r:.60}; mend "
        "the row, or drop it"
    )
