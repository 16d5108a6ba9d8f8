"""Opening a data set: kinds, splits, and what a training run would refuse."""

import json

import pytest

from rlhf_jax.data.rows import Completion, Dropped, Pair
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.data_source import fields_of, open_source, text_columns


@pytest.fixture
def write(tmp_path):
    def write(rows, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return str(path)

    return write


def rows_of(source):
    return [row for split in source.splits for row in split.rows]


@pytest.mark.parametrize(
    ("row", "kind", "expected"),
    [
        (
            {"prompt": "q?", "chosen": "a", "rejected": "b"},
            "preferences",
            Pair("q?", "a", "b"),
        ),
        ({"prompt": "q?", "response": "a"}, "completions", Completion("q?", "a")),
        ({"prompt": "q?"}, "prompts", Completion("q?", "q?")),
        ({"text": "a text"}, "texts", Completion("", "a text")),
        ({"review": "so good"}, "texts", Completion("", "so good")),
    ],
)
def test_the_kind_is_told_by_the_columns(write, row, kind, expected):
    source = open_source(write([row, row]))
    assert source.kind == kind
    assert rows_of(source) == [expected, expected]
    assert ("review" in row) == bool(source.problem)


def test_a_file_has_the_splits_that_training_makes(write):
    source = open_source(write([{"prompt": f"question {i}"} for i in range(60)]))
    assert [split.name for split in source.splits] == ["train", "heldout"]
    assert sum(len(split.rows) for split in source.splits) == 60
    for split in source.splits:
        prompts = [row.prompt for row in split.rows]
        assert split.columns == {"prompt": prompts}
        line = int(prompts[0].removeprefix("question ")) + 1
        assert split.places[0].endswith(f"data.jsonl line {line}")


def test_rows_that_their_format_cannot_hold_are_looked_at_as_texts(write):
    path = write(
        [
            {"prompt": "a long question", "response": "yes"},
            {"prompt": "another one", "response": None},
        ]
    )
    source = open_source(path)
    assert source.kind == "texts"
    assert "line 2" in source.problem
    assert "'response' should be a string" in source.problem
    with pytest.raises(UserError, match="line 2"):
        open_source(path, kind="completions")


def test_a_column_that_some_rows_lack_is_told(write):
    path = write([{"text": "one text", "label": 1}, {"text": "another text"}])
    source = open_source(path)
    assert "line 2 has no 'label'" in source.incomplete["label"]
    assert set(source.splits[0].columns) == {"text"}


def test_a_column_by_its_name(write):
    path = write([{"a": "first text here", "b": "second"}])
    assert rows_of(open_source(path, column="b")) == [Completion("", "second")]
    assert rows_of(open_source(path)) == [Completion("", "first text here")]
    with pytest.raises(UserError, match="no column 'c': it has 'a', 'b'"):
        open_source(path, column="c")


def test_bad_input(write, tmp_path):
    with pytest.raises(UserError, match="no column of texts: it has 'x', 'y'"):
        open_source(write([{"x": 1, "y": 2.0}]))
    with pytest.raises(UserError, match="no file"):
        open_source(str(tmp_path / "absent.jsonl"))
    with pytest.raises(UserError, match="unknown kind"):
        open_source("builtin", kind="poems")
    with pytest.raises(UserError, match="has no splits to name"):
        open_source(write([{"text": "a b"}]), splits=["test"])
    with pytest.raises(UserError, match="no split 'dev'"):
        open_source("builtin:reviews", splits=["dev"])


def test_builtin_prompts():
    source = open_source("builtin")
    assert source.kind == "prompts"
    assert [split.name for split in source.splits] == ["train", "heldout"]


def test_chats_that_are_no_dialogue_are_dropped_with_the_reason(write):
    ask = {"role": "user", "content": "Why?"}
    answer = {"role": "assistant", "content": "So."}
    source = open_source(write([{"messages": [ask, answer]}, {"messages": [ask]}]))
    good, bad = sorted(rows_of(source), key=lambda row: isinstance(row, Dropped))
    assert bad.reason == "no assistant turn"
    assert fields_of([good], "completions") == {
        "prompt": ["[user] Why?"],
        "response": ["So."],
    }


def test_columns_of_sentences_and_of_labels():
    columns = {"id": ["a1", "b2"], "text": ["so good", "so bad"], "n": [1, 2]}
    assert text_columns(columns) == ["text"]
    assert text_columns({"id": ["a1", None], "n": [1, 2]}) == ["id"]
    assert text_columns({"n": [1, 2]}) == []
