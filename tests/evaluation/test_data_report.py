"""The report of a data set: each part by hand."""

import json

from rlhf_jax.data.rows import Completion, Dropped, Pair
from rlhf_jax.evaluation import data_report
from rlhf_jax.evaluation.data_source import Source, Split


def make_split(rows, name="train", columns=None):
    places = [f"{name} line {number}" for number in range(1, len(rows) + 1)]
    return Split(name, rows, places, columns or {})


def test_missing_and_empty_values():
    columns = {"a": ["x", " ", None, "x"], "n": [1, 2, None, 3]}
    first, second, third = data_report.describe_columns(columns, {"b": "line 3"})
    assert (first["type"], first["missing"], first["empty"]) == ("str", 1, 1)
    assert second["note"] == "1 to 3, mean 2"
    assert third["note"] == "not in every row: line 3"


def test_cleaning_by_reason():
    rows = [
        Pair("q", "a", "b"),
        Pair("q", "a", "b"),
        Pair("q", "a", "a"),
        Pair("q", "", "a"),
        Dropped("q", "no shared prompt"),
        Pair("leak", "a", "b"),
    ]
    heldout = make_split([Pair("leak", "c", "d")], "heldout")
    assert data_report.clean(make_split(rows), [heldout]) == {
        "duplicate": 1,
        "tie": 1,
        "empty response": 1,
        "no shared prompt": 1,
        "in the held-out split": 1,
        "kept": 1,
    }


def test_labels_are_few_and_often():
    columns = {
        "label": ["a", "b", "a", "a"],
        "id": ["1", "2", "3", "4"],
        "score": [0.5, 0.5, 0.5, 0.5],
        "harm": [{"x": True, "y": False}, {"x": True, "y": True}, None, None],
    }
    assert data_report.labels(columns) == {
        "label": {"a": 3, "b": 1},
        "harm": {"x": 2, "y": 1},
    }


def test_safety_of_both_sides():
    pairs = [
        Pair("q", "a", "b", chosen_safe=True, rejected_safe=False),
        Pair("q", "a", "b", chosen_safe=True, rejected_safe=None),
        Pair("q", "a", "b"),
    ]
    assert data_report.safety(pairs) == {
        "chosen safe, rejected unsafe": 1,
        "chosen safe, rejected unknown": 1,
    }


def test_samples():
    fields = {"text": ["aa", "a", "aaaa", "aaa"]}
    choose = lambda seed: data_report.choose_samples(
        fields, ["0", "1", "2", "3"], count=2, seed=seed
    )
    told = {}
    for sample in choose(0):
        told.setdefault(sample["choice"], []).append(sample["place"])
    assert told["first"] == ["0", "1"]
    assert told["longest"] == ["2", "3"]
    assert told["shortest"] == ["1", "0"]
    assert choose(0) == choose(0)
    assert any(choose(0) != choose(seed) for seed in range(1, 9))


def test_unusable_rows_are_counted_and_left_out():
    rows = [Completion("q", "an answer"), Dropped("q", "no user turn")]
    source = Source("x", "completions", "chat", [make_split(rows)], {}, "")
    report = data_report.examine(source).report
    assert (report["rows"], report["usable"]) == (2, 1)
    assert report["cleaning"] == {"train": {"no user turn": 1, "kept": 1}}
    assert report["lengths"]["words"]["response"]["max"] == 2
    assert "length_bias" not in report
    json.dumps(report, allow_nan=False)


def test_no_usable_row_at_all():
    rows = [Dropped("q", "no user turn")]
    source = Source("x", "preferences", "", [make_split(rows)], {}, "")
    report = data_report.examine(source).report
    assert report["usable"] == 0
    assert report["samples"] == []
    json.dumps(report, allow_nan=False)
