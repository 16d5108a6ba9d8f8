"""The report of a data set as tables of text, for a terminal and for a page."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Table(NamedTuple):
    """A title, the names of the columns, and rows of as many texts."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Everything but samples and pictures, without tables that would be empty."""
    found = [
        _overview(report),
        _columns(report),
        _cleaning(report),
        *_lengths("Length", report["lengths"]),
        *_lengths("Columns of text", report.get("column_lengths", {})),
        _turns(report),
        _length_bias(report),
        _duplicates(report),
        _overlap(report),
        _labels(report),
    ]
    return [table for table in found if table.rows]


def _overview(report: Mapping[str, Any]) -> Table:
    rows = [
        ("kind", report["kind"]),
        ("format", report["format"]),
        ("rows", f"{report['rows']:,} ({report['usable']:,} usable)"),
        *((f"split {k}", f"{v:,}") for k, v in report["splits"].items()),
    ]
    if report["problem"]:
        rows.append(("note", report["problem"]))
    return Table("The data", ("", report["source"]), rows)


def _columns(report: Mapping[str, Any]) -> Table:
    rows = [
        (
            column["column"],
            column["type"],
            *(_count(column.get(key)) for key in ("missing", "empty", "distinct")),
            column["note"],
        )
        for column in report["columns"]
    ]
    header = ("column", "type", "missing", "empty", "distinct", "note")
    return Table("Columns", header, rows)


def _cleaning(report: Mapping[str, Any]) -> Table:
    splits = report["cleaning"]
    reasons = list(dict.fromkeys(key for found in splits.values() for key in found))
    last = [key for key in ("kept", "prompts cut") if key in reasons]
    reasons = [key for key in reasons if key not in last] + last
    rows = [
        (reason, *(_count(found.get(reason, 0)) for found in splits.values()))
        for reason in reasons
    ]
    return Table("What cleaning drops and keeps", ("rows", *splits), rows)


def _lengths(title: str, lengths: Mapping[str, Any]) -> list[Table]:
    found = []
    for unit, fields in lengths.items():
        keys = list(next(iter(fields.values())))
        header = tuple("beyond max_tokens" if k == "beyond" else k for k in keys)
        rows = [
            (
                name,
                *(
                    f"{stats[key]:.1%}" if key == "beyond" else f"{stats[key]:,.0f}"
                    for key in keys
                ),
            )
            for name, stats in fields.items()
        ]
        found.append(Table(f"{title} in {unit}", ("", *header), rows))
    return found


def _turns(report: Mapping[str, Any]) -> Table:
    turns = report["turns"]
    if not turns["dialogues"]:
        return Table("Turns", (), [])
    rows = [
        (str(number), f"{count:,}", f"{count / turns['dialogues']:.1%}")
        for number, count in turns["rows_by_turns"].items()
    ]
    rows.append(("mean", f"{turns['mean']:.1f}", ""))
    return Table("Turns", ("turns", "dialogues", "share"), rows)


def _length_bias(report: Mapping[str, Any]) -> Table:
    units = report.get("length_bias", {})
    lines = {
        "chosen longer": lambda b: f"{b['chosen_longer']:,}",
        "chosen shorter": lambda b: f"{b['chosen_shorter']:,}",
        "equal": lambda b: f"{b['equal']:,}",
        '"longer wins", accuracy (95 %)': lambda b: _interval(b["longer_wins"], ".3f"),
        "mean difference (95 %)": lambda b: _interval(b["mean_difference"], "+.1f"),
        "median difference": lambda b: f"{b['median_difference']:+.1f}",
        "point-biserial correlation": lambda b: _value(b["point_biserial"], "+.3f"),
    }
    rows = [
        (name, *(show(bias) for bias in units.values()))
        for name, show in lines.items()
        if units
    ]
    return Table("Length and choice, chosen less rejected", ("", *units), rows)


def _duplicates(report: Mapping[str, Any]) -> Table:
    found = report["duplicates"]
    rows = [
        (f"{name} that came before", _count(count))
        for name, count in found["repeated"].items()
    ]
    if report["kind"] == "preferences":
        rows.append(("pairs that contradict another", _count(found["contradictions"])))
    near = report["near_duplicates"]
    for name in ("row", "prompt"):
        if name in near:
            what = f"{name}s alike above {near['threshold']:.0%}"
            told = f"{near[name]['pairs']:,} pairs of {near[name]['compared']:,}"
            rows.append((what, told))
    return Table("Duplicates", ("", "count"), rows)


def _overlap(report: Mapping[str, Any]) -> Table:
    rows = [
        (
            f"{row['text']} of {row['second']} also in {row['first']}",
            f"{row['shared']:,} of {row['of']:,}",
            f"{row['shared'] / row['of']:.1%}" if row["of"] else "",
        )
        for row in report["overlap"]
    ]
    return Table("Overlap of splits", ("", "texts", "share"), rows)


def _labels(report: Mapping[str, Any]) -> Table:
    labels = dict(report["labels"])
    if report.get("safety"):
        labels = {"safety of the pairs": report["safety"]} | labels
    rows = [
        ("" if number else name, value, f"{count:,}", f"{count / report['rows']:.1%}")
        for name, counts in labels.items()
        for number, (value, count) in enumerate(counts.items())
    ]
    return Table("Labels", ("column", "value", "rows", "share"), rows)


def _interval(found: Mapping[str, float | None], form: str) -> str:
    low, high = (_value(found[end], form) for end in ("low", "high"))
    return f"{_value(found['value'], form)} ({low} to {high})"


def _value(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"
