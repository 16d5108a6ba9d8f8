"""Which rows are for training and which are held out.

A file has no splits: one prompt in ten is held out, told by its hash, so that a prompt
is on the same side in every file, for every model, whatever else the file holds. A data
set of a hub has its own.
"""

import contextlib
import hashlib
from collections.abc import Sequence
from typing import Any

from rlhf_jax.data.tables import Table, is_file, is_heldout, load_table
from rlhf_jax.errors import UserError

FILE_SPLITS = {"train": False, "validation": True, "heldout": True}
SHARE = 10  # one prompt in so many is held out


def open_split(source: str, split: str | None) -> Table:
    """A source's table: the rows of the split of a hub's data set, all of a file.

    Args:
      source: as in `tables.load_table`.
      split: of a file one of `FILE_SPLITS`, or None for the whole file. Of a hub, in
        its own words ("train[:90%]" is a part); "heldout" means its "test", and so
        does "validation" where it has none.

    Raises:
      UserError: a split that is none, or whatever is wrong with the source.
    """
    if not is_file(source):
        try:
            return load_table(source, split="test" if split == "heldout" else split)
        except UserError as error:
            if split != "validation":
                raise
            with contextlib.suppress(UserError):
                return load_table(source, split="test")
            raise error
    if split is not None and split not in FILE_SPLITS:
        raise UserError(
            f"{source} is a file and has no split {split!r}: choose from "
            + ", ".join(FILE_SPLITS)
        )
    return load_table(source)


def split_rows(
    table: Table, split: str | None, keys: Sequence[str], *, stratify: str = ""
) -> list[int]:
    """The numbers of the rows of the split.

    Args:
      table: from `open_split`.
      split: the same as there.
      keys: the prompt of each row, of which the hash is taken.
      stratify: a column, of whose every value one tenth of the prompts is held out, one
        at least; "" leaves the share of each to chance. Only files are split here.
    """
    if stratify and not is_file(table.source):
        raise UserError(
            f"{table.source} has splits of its own: stratify={stratify!r} is for files"
        )
    if split is None or not is_file(table.source):
        return list(range(table.rows))
    wanted = FILE_SPLITS[split]
    if not stratify:
        return [row for row, key in enumerate(keys) if is_heldout(key) == wanted]
    if stratify not in table.columns:
        raise UserError(
            f"{table.source} has no column {stratify!r} to stratify by: it has "
            + ", ".join(table.columns)
        )
    heldout = stratified_heldout(keys, table.read(stratify))
    return [row for row, key in enumerate(keys) if (key in heldout) == wanted]


def stratified_heldout(keys: Sequence[str], strata: Sequence[Any]) -> set[str]:
    """A tenth of the keys of each stratum, those of the lowest hashes.

    A key of several strata counts in the one where it is first. A stratum of one key
    holds out none.
    """
    groups: dict[str, dict[str, str]] = {}
    seen = set()
    for key, stratum in zip(keys, strata):
        if key not in seen:
            seen.add(key)
            group = groups.setdefault(str(stratum), {})
            group[key] = hashlib.sha256(key.encode()).hexdigest()
    heldout: set[str] = set()
    for group in groups.values():
        count = max(1, round(len(group) / SHARE)) if len(group) > 1 else 0
        heldout.update(sorted(group, key=group.__getitem__)[:count])
    return heldout
