"""Splits of files by the hash of the prompt, and of hubs by name."""

import collections
import json

import pytest

from rlhf_jax.data import splits
from rlhf_jax.data.splits import (
    has_splits,
    open_split,
    split_rows,
    stratified_heldout,
)
from rlhf_jax.data.tables import Table, is_heldout
from rlhf_jax.errors import UserError

KEYS = [f"Prompt {i}" for i in range(400)]


def write(tmp_path, rows):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_prompt_is_on_one_side_whatever_else_the_file_holds(tmp_path):
    source = write(tmp_path, [{"prompt": key} for key in KEYS])
    table = open_split(source, "train")
    train = split_rows(table, "train", KEYS)
    heldout = split_rows(table, "heldout", KEYS)
    assert sorted(train + heldout) == list(range(400))
    assert split_rows(table, "validation", KEYS) == heldout
    assert [is_heldout(KEYS[row]) for row in heldout] == [True] * len(heldout)
    assert 20 < len(heldout) < 60
    assert split_rows(table, None, KEYS) == list(range(400))


def test_each_stratum_loses_one_tenth(tmp_path):
    # 300 easy, 80 hard, 19 odd and a lone one
    strata = ["easy"] * 300 + ["hard"] * 80 + ["odd"] * 19 + ["lone"]
    rows = [{"prompt": k, "level": s} for k, s in zip(KEYS, strata)]
    table = open_split(write(tmp_path, rows), "train")
    heldout = split_rows(table, "validation", KEYS, stratify="level")
    counts = collections.Counter(strata[row] for row in heldout)
    assert counts == {"easy": 30, "hard": 8, "odd": 2}
    train = split_rows(table, "train", KEYS, stratify="level")
    assert sorted(train + heldout) == list(range(400))
    with pytest.raises(
        UserError, match="no column 'mood' to stratify by: it has prompt"
    ):
        split_rows(table, "train", KEYS, stratify="mood")


def test_a_prompt_of_two_strata_is_on_one_side():
    keys, strata = KEYS[:40] + KEYS[:200], [1] * 40 + [2] * 200
    heldout = stratified_heldout(keys, strata)
    # only 160 prompts of the second stratum are its own
    assert len(heldout & set(KEYS[:40])) == 4
    assert len(heldout & set(KEYS[40:200])) == 16
    assert heldout >= stratified_heldout(keys[:40][::-1], strata[:40])
    assert len(stratified_heldout(["a", "b"], [1, 1])) == 1
    assert stratified_heldout(["a", "b"], [1, 2]) == set()


@pytest.fixture
def hub(monkeypatch):
    """`hub(*splits)`: hf:a/b has these, of 400 rows each; returns what was asked."""

    def hub(*names):
        asked = []

        def load_table(source, *, split=None):
            asked.append(split)
            if split not in (None, *names, "train[:50%]"):
                raise UserError(f"{source} has no {split}")
            return Table(source, ("text",), 400, lambda column: KEYS, str)

        monkeypatch.setattr(splits, "load_table", load_table)
        monkeypatch.setattr(splits, "hub_splits", lambda source: names)
        return asked

    return hub


def test_the_splits_of_a_hub_are_its_own(hub):
    asked = hub("train", "validation", "test", "dev")
    for split in ("train", "validation", "heldout", "test", "dev", None, "train[:50%]"):
        table = open_split("hf:a/b", split)
        assert split_rows(table, split, KEYS) == list(range(400))
    assert asked == [
        *("train", "validation", "test", "test", "dev", None, "train[:50%]")
    ]
    with pytest.raises(UserError, match="has splits of its own: stratify='text' is"):
        split_rows(open_split("hf:a/b", "train"), "train", KEYS, stratify="text")
    with pytest.raises(UserError, match="hf:a/b has no tset"):
        open_split("hf:a/b", "tset")


@pytest.mark.parametrize("name", ["validation", "test"])
def test_of_two_names_for_held_out_rows_a_hub_has_one(hub, name):
    asked = hub("train", name)
    for split in ("validation", "heldout"):
        table = open_split("hf:a/b", split)
        assert split_rows(table, split, KEYS) == list(range(400))
    assert asked == [name, name]
    assert has_splits("hf:a/b")


@pytest.mark.parametrize("names", [("train",), ("train", "unsupervised")])
def test_a_hub_without_held_out_rows_is_cut_as_a_file_is(hub, tmp_path, names):
    asked = hub(*names)
    rows = {
        split: split_rows(open_split("hf:a/b", split), split, KEYS)
        for split in ("train", "validation", "heldout")
    }
    assert asked == ["train"] * 3
    assert sorted(rows["train"] + rows["validation"]) == list(range(400))
    assert rows["heldout"] == rows["validation"]
    assert [is_heldout(KEYS[row]) for row in rows["heldout"]] == [True] * len(
        rows["heldout"]
    )
    assert 20 < len(rows["heldout"]) < 60
    # its own words are taken as they are
    table = open_split("hf:a/b", None)
    assert split_rows(table, None, KEYS) == list(range(400))
    assert not has_splits("hf:a/b")


def test_one_split_of_a_hub_can_be_cut_by_a_column(hub):
    hub("train")
    table = open_split("hf:a/b", "validation")
    assert len(split_rows(table, "validation", KEYS, stratify="text")) == 0
    halves = table._replace(read=lambda column: [i % 2 for i in range(400)])
    assert len(split_rows(halves, "validation", KEYS, stratify="text")) == 40


def test_a_hub_without_rows_to_train_on_names_the_split_that_was_asked(hub):
    hub("dev")
    with pytest.raises(UserError, match="has no validation"):
        open_split("hf:a/b", "validation")


def test_an_unknown_split_of_a_file(tmp_path):
    source = write(tmp_path, ["x"])
    with pytest.raises(UserError, match="no split 'test': choose from train, valid"):
        open_split(source, "test")
    assert not has_splits(source)
