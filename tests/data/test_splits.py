"""Splits of files by the hash of the prompt, and of hubs by name."""

import collections
import json

import pytest

from rlhf_jax.data import splits
from rlhf_jax.data.splits import open_split, split_rows, stratified_heldout
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
    asked = []

    def load_table(source, *, split=None):
        asked.append(split)
        if split not in (None, "train", "test"):
            raise UserError(f"{source} has no {split}")
        return Table(source, ("text",), 2, lambda column: ["a", "b"], str)

    monkeypatch.setattr(splits, "load_table", load_table)
    return asked


def test_the_splits_of_a_hub_are_its_own(hub):
    table = open_split("hf:a/b", "train")
    assert split_rows(table, "train", ["a", "b"]) == [0, 1]
    open_split("hf:a/b", "heldout")
    open_split("hf:a/b", "validation")
    assert hub == ["train", "test", "validation", "test"]
    with pytest.raises(UserError, match="hf:a/b has no dev"):
        open_split("hf:a/b", "dev")
    with pytest.raises(UserError, match="has splits of its own: stratify='level' is"):
        split_rows(table, "train", ["a", "b"], stratify="level")


def test_a_hub_without_held_out_rows_names_the_split_that_was_asked(monkeypatch):
    def load_table(source, *, split=None):
        raise UserError(f"no split {split}")

    monkeypatch.setattr(splits, "load_table", load_table)
    with pytest.raises(UserError, match="no split validation"):
        open_split("hf:a/b", "validation")


def test_an_unknown_split_of_a_file(tmp_path):
    source = write(tmp_path, ["x"])
    with pytest.raises(UserError, match="no split 'test': choose from train, valid"):
        open_split(source, "test")
