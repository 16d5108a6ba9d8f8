"""What is in a data set: plain functions on its rows, and one report of them all.

A report is a dict of numbers, texts and lists of them, ready for JSON. Rows that no
reader can use are counted by reason and left out of everything else.

Dimension key: N rows, or pairs of chosen and rejected.
"""

import collections
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data import cleaning, dialogues
from rlhf_jax.data.cleaning import Row
from rlhf_jax.data.rows import Dropped, Pair
from rlhf_jax.evaluation.data_duplicates import (
    exact_duplicates,
    find_near_duplicates,
    overlaps,
)
from rlhf_jax.evaluation.data_lengths import (
    Fields,
    Lengths,
    count_turns,
    length_bias,
    measure,
    summarise_lengths,
    summarise_turns,
)
from rlhf_jax.evaluation.data_source import (
    Source,
    Split,
    fields_of,
    text_columns,
    usable,
)

MAX_LABELS = 20  # more values than that are no label


class Findings(NamedTuple):
    """The report, and the numbers [N] that pictures are drawn from."""

    report: dict[str, Any]
    lengths: Lengths
    turns: np.ndarray


def examine(
    source: Source,
    *,
    tokenizer: Any = None,
    max_tokens: int | None = None,
    samples: int = 3,
    seed: int = 0,
) -> Findings:
    """Everything that is to be told about a source.

    Args:
      source: from `data_source.open_source`.
      tokenizer: counts tokens; None counts none.
      max_tokens: of a whole text with its EOS; None is no limit.
      samples: rows of each choice that are shown in full.
      seed: of the random samples and of the hashes.

    Raises:
      UserError: chat messages that the tokenizer's own template refuses.
    """
    rows, places = usable(source.splits)
    fields = fields_of(rows, source.kind)
    columns = _joined([split.columns for split in source.splits])
    lengths = measure(fields, tokenizer)
    turns = np.array([count_turns(row, source.kind) for row in rows], np.int64)
    report: dict[str, Any] = {
        "source": source.name,
        "kind": source.kind,
        "format": source.format,
        "problem": source.problem,
        "rows": sum(len(split.rows) for split in source.splits),
        "usable": len(rows),
        "splits": {split.name: len(split.rows) for split in source.splits},
        "columns": describe_columns(columns, source.incomplete),
        "cleaning": clean_all(source, tokenizer, max_tokens),
        "lengths": summarise_lengths(lengths, max_tokens),
        "turns": summarise_turns(turns),
        "labels": labels(columns),
        "duplicates": exact_duplicates(fields),
        "near_duplicates": find_near_duplicates(fields, places, seed=seed),
        "overlap": overlaps(source.splits, source.kind),
        "samples": choose_samples(fields, places, count=samples, seed=seed),
    }
    if source.kind == "preferences" and rows:
        report["length_bias"] = {
            unit: length_bias(found["chosen"], found["rejected"])
            for unit, found in lengths.items()
        }
        report["safety"] = safety(rows)
    elif source.problem or source.kind == "texts":
        extra = {name: columns[name] for name in text_columns(columns)}
        texts = {n: [v or "" for v in values] for n, values in extra.items()}
        if len(texts) > 1:  # else that column has been measured already
            told = summarise_lengths(measure(texts, tokenizer), max_tokens)
            report["column_lengths"] = told
    return Findings(report, lengths, turns)


def describe_columns(
    columns: Mapping[str, Sequence[Any]], incomplete: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Each column's types, and how many values are missing or blank."""
    told = []
    for name, values in columns.items():
        types = collections.Counter(type(v).__name__ for v in values if v is not None)
        told.append(
            {
                "column": name,
                "type": ", ".join(kind for kind, _ in types.most_common()) or "none",
                "missing": sum(value is None for value in values),
                "empty": sum(_is_blank(value) for value in values),
                "distinct": len({repr(value) for value in values}),
                "note": _range(values),
            }
        )
    for name, where in incomplete.items():
        told.append({"column": name, "type": "", "note": f"not in every row: {where}"})
    return told


def clean(
    split: Split,
    others: Sequence[Split] = (),
    tokenizer: Any = None,
    max_tokens: int | None = None,
) -> dict[str, int]:
    """What cleaning would do to a split: reason -> rows dropped, then "kept".

    As `data.cleaning` counts them.

    Args:
      split: its rows as they are.
      others: the splits of which the rows of this one must hold nothing.
      tokenizer: writes chat messages if it has a template, and counts tokens.
      max_tokens: of a whole text; None cuts nothing.
    """
    places = split.places
    drafts = cleaning.drop_faulty(split.rows)
    written = [_written(row, tokenizer, at) for row, at in zip(drafts, places)]
    ready = written
    cut = tokenizer is not None and max_tokens is not None
    if cut:
        if not getattr(tokenizer, "chat_template", None):
            drafts = written
        ready = cleaning.cut_prompts(drafts, written, places, tokenizer, max_tokens)
    heldout = [
        _written(row, tokenizer, at)
        for other in others
        for row, at in zip(other.rows, other.places)
        if not isinstance(row, Dropped)
    ]
    ready = cleaning.drop_leaks(ready, heldout)
    both = list(zip(written, ready))
    counts = collections.Counter(r.reason for r in ready if isinstance(r, Dropped))
    told = dict(counts.most_common())
    told["kept"] = len(ready) - sum(told.values())
    if cut:
        kept = [(old, new) for old, new in both if not isinstance(new, Dropped)]
        told["prompts cut"] = sum(old.prompt != new.prompt for old, new in kept)
    return told


def clean_all(
    source: Source, tokenizer: Any = None, max_tokens: int | None = None
) -> dict[str, dict[str, int]]:
    """`clean` for each split; that for training is cleared of all the others.

    The built-in data are not: their splits are apart by whole sentences, though many
    begin alike. Prompts without responses are not cut.
    """
    if source.kind == "prompts":
        max_tokens = None
    told = {}
    for split in source.splits:
        others = [other for other in source.splits if other is not split]
        if split.name != "train" or source.name.startswith("builtin"):
            others = []
        told[split.name] = clean(split, others, tokenizer, max_tokens)
    return told


def safety(pairs: Sequence[Pair]) -> dict[str, int]:
    """How many pairs are safe on which side; {} where nobody said."""
    word = {True: "safe", False: "unsafe", None: "unknown"}
    counts = collections.Counter(
        f"chosen {word[pair.chosen_safe]}, rejected {word[pair.rejected_safe]}"
        for pair in pairs
        if (pair.chosen_safe, pair.rejected_safe) != (None, None)
    )
    return dict(counts.most_common())


def labels(columns: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, int]]:
    """The values of columns that are labels: few of them, and each often.

    Of a column of {label: true or false}, as PKU's harm categories, the true ones.
    """
    told = {}
    for name, values in columns.items():
        known = [value for value in values if value is not None]
        if known and all(
            isinstance(v, dict) and all(isinstance(x, bool) for x in v.values())
            for v in known
        ):
            counts = collections.Counter(k for v in known for k, on in v.items() if on)
            told[name] = dict(counts.most_common())
        elif known and all(isinstance(v, bool | int | str) for v in known):
            counts = collections.Counter(map(str, known))
            if len(counts) <= min(MAX_LABELS, len(known) // 2):
                told[name] = dict(counts.most_common())
    return told


def choose_samples(
    fields: Fields, places: Sequence[str], *, count: int, seed: int
) -> list[dict[str, Any]]:
    """The first rows, random ones, the longest and the shortest, in full."""
    sizes = np.sum([[len(t) for t in texts] for texts in fields.values()], axis=0)
    order = np.argsort(sizes, kind="stable")
    random = np.random.default_rng(seed).permutation(len(places))
    chosen = {
        "first": range(len(places))[:count],
        "random": random[:count],
        "longest": order[::-1][:count],
        "shortest": order[:count],
    }
    return [
        {
            "choice": choice,
            "place": places[row],
            **{name: texts[row] for name, texts in fields.items()},
        }
        for choice, numbers in chosen.items()
        for row in numbers
    ]


def _written(row: Row | Dropped, tokenizer: Any, place: str) -> Row | Dropped:
    """The row with its prompt as a string, by the chat template if there is one."""
    if isinstance(row, Dropped) or isinstance(row.prompt, str):
        return row
    if getattr(tokenizer, "chat_template", None):
        return row._replace(prompt=dialogues.render(row.prompt, tokenizer, place))
    return row._replace(prompt=dialogues.plain_text(row.prompt))


def _joined(parts: Sequence[Mapping[str, Sequence[Any]]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: [v for part in parts for v in part.get(name, ())] for name in names}


def _range(values: Sequence[Any]) -> str:
    """What a column of numbers spans; "" of other columns."""
    known = [value for value in values if value is not None]
    if not known or not all(type(value) in (int, float) for value in known):
        return ""
    mean = statistics.fmean(known)
    return f"{min(known):.4g} to {max(known):.4g}, mean {mean:.4g}"


def _is_blank(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return isinstance(value, list | dict) and not value
