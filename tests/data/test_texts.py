"""Texts for language modelling."""

import json

import pytest

from rlhf_jax.data import reviews
from rlhf_jax.data.reviews import Review
from rlhf_jax.data.texts import load_texts
from rlhf_jax.errors import UserError


def test_the_builtin_sentences(monkeypatch):
    asked = []

    def load_reviews(split, *, domains):
        asked.append((split, tuple(domains)))
        return [Review("Fine.", "movie", (1,), 1.0)]

    monkeypatch.setattr(reviews, "load_reviews", load_reviews)
    assert load_texts("builtin:reviews", split="test", domains=["movie"]) == ["Fine."]
    assert load_texts("builtin:reviews", split="train") == ["Fine."]
    everything = ("movie", "product", "news", "tweet")
    assert asked == [("test", ("movie",)), ("train", everything)]


def test_a_file_is_split_by_a_hash(tmp_path):
    path = tmp_path / "texts.jsonl"
    texts = [f"Text {i}." for i in range(300)]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    train = load_texts(str(path), split="train")
    heldout = load_texts(str(path), split="validation")
    assert sorted(train + heldout) == sorted(texts)
    assert 15 < len(heldout) < 50
    path.write_text("".join(json.dumps(t) + "\n" for t in reversed(texts)))
    assert load_texts(str(path), split="validation") == heldout[::-1]


def test_bad_files(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("Text 1.\n")
    with pytest.raises(UserError, match=r"has no split 'test': choose from train, val"):
        load_texts(str(path), split="test")
    with pytest.raises(UserError, match=r"no texts are left for \w+ of the 1 rows"):
        for split in ("train", "validation"):
            load_texts(str(path), split=split)
    with pytest.raises(UserError, match="there is no file"):
        load_texts(str(tmp_path / "absent.txt"), split="train")
    other = tmp_path / "texts.csv"
    other.write_text("body\nhello\n")
    with pytest.raises(UserError, match="has no column 'text': it has 'body'"):
        load_texts(str(other), split="train")
