"""Which rows are for training and which are held out.

A file has no splits: one prompt in ten is held out, told by its hash, so that a prompt
is on the same side in every file, for every model, whatever else the file holds. A data
set of a hub has its own; where it has rows of training alone, they are cut as a file's.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

from rlhf_jax.data.tables import Table, hub_splits, is_file, is_heldout, load_table
from rlhf_jax.errors import UserError

FILE_SPLITS = {"train": False, "validation": True, "heldout": True}
# What a hub may call its held-out rows, the first that it has.
HUB_NAMES = {"validation": ("validation", "test"), "heldout": ("test", "validation")}
SHARE = 10  # one prompt in so many is held out


def open_split(source: str, split: str | None) -> Table:
    """A source's table: the rows of the split of a hub's data set, all of a file.

    Args:
      source: as in `tables.load_table`.
      split: of a file one of `FILE_SPLITS`, or None for the whole file. Of a hub, in
        its own words ("train[:90%]" is a part); "heldout" means its "test" and
        "validation" the split of that name, and where it lacks the one it means the
        other. Where it has neither, all three of `FILE_SPLITS` are its "train", of
        which `split_rows` takes a part.

    Raises:
      UserError: a split that is none, or whatever is wrong with the source.
    """
    if is_file(source):
        if split is not None and split not in FILE_SPLITS:
            raise UserError(
                f"{source} is a file and has no split {split!r}: choose from "
                + ", ".join(FILE_SPLITS)
            )
        return load_table(source)
    if split not in FILE_SPLITS:
        return load_table(source, split=split)
    names = hub_splits(source)
    if "train" in names and not _heldout_names(names):
        return load_table(source, split="train")._replace(unsplit=True)
    own = [name for name in HUB_NAMES.get(split, ()) if name in names]
    return load_table(source, split=own[0] if own else split)


def has_splits(source: str) -> bool:
    """Whether a source has held-out rows of its own; a file has not."""
    return not is_file(source) and bool(_heldout_names(hub_splits(source)))


def _heldout_names(names: Sequence[str]) -> set[str]:
    return set(names) & {"validation", "test"}


def split_rows(
    table: Table, split: str | None, keys: Sequence[str], *, stratify: str = ""
) -> list[int]:
    """The numbers of the rows of the split.

    Args:
      table: from `open_split`.
      split: the same as there.
      keys: the prompt of each row, of which the hash is taken.
      stratify: a column, of whose every value one tenth of the prompts is held out, one
        at least; "" leaves the share of each to chance. Only files, and data sets that
        have a single split, are cut here.
    """
    whole = is_file(table.source) or table.unsplit
    if stratify and not whole:
        raise UserError(
            f"{table.source} has splits of its own: stratify={stratify!r} is for files"
        )
    if split is None or not whole:
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
