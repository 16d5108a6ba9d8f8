"""Texts for language modelling."""

import json

import pytest

from rlhf_jax.data import reviews
from rlhf_jax.data.reviews import Review
from rlhf_jax.data.rows import Completion
from rlhf_jax.data.texts import load_completions, load_texts
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


def test_the_builtin_sentences_are_completions_without_a_prompt(monkeypatch):
    asked = []

    def load_reviews(split, *, domains):
        asked.append((split, tuple(domains)))
        return [Review("Fine.", "movie", (1,), 1.0)]

    monkeypatch.setattr(reviews, "load_reviews", load_reviews)
    rows, counts = load_completions("builtin:reviews", split="test", domains=["movie"])
    assert rows == [Completion("", "Fine.")]
    assert counts == {"kept": 1}
    assert asked == [("test", ("movie",))]


def test_the_preferred_sentences_follow_their_first_words(monkeypatch):
    rows = [
        Review("The film is fine.", "movie", (3, 3), 3.0),
        Review("The film is dull.", "movie", (-3, -3), -3.0),
        Review("The film is long.", "movie", (-2, -2), -2.0),
        Review("The film is alright.", "movie", (1, 1), 1.0),
    ]
    monkeypatch.setattr(reviews, "load_reviews", lambda split, *, domains: rows)
    got, counts = load_completions("builtin:chosen", split="train")
    # preferred at each length of the beginning, once each
    assert Completion("The film is", " fine.") in got
    assert not any("dull" in row.response for row in got)
    assert len(set(got)) == len(got) == counts["kept"]


def test_plain_texts_are_split_as_for_language_models(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("".join(f"Text {i}.\n" for i in range(300)))
    for split in ("train", "validation"):
        rows, counts = load_completions(str(path), split=split)
        texts = load_texts(str(path), split=split)
        assert rows == [Completion("", text) for text in texts]
        assert counts == {"kept": len(texts)}


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


def test_the_only_split_of_a_data_set_is_cut_in_two(tmp_path, hub_cache):
    folder = tmp_path / "data"
    folder.mkdir()
    texts = [f"Text {i}." for i in range(100)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "train.jsonl").write_text("".join(lines))
    train = load_texts(str(folder), split="train")
    heldout = load_texts(str(folder), split="validation")
    assert sorted(train + heldout) == sorted(texts) and len(heldout) > 3
    # the same rows as of a file, and as those that are learned from
    (tmp_path / "texts.jsonl").write_text("".join(lines))
    assert load_texts(str(tmp_path / "texts.jsonl"), split="validation") == heldout
    rows, _ = load_completions(str(folder), split="validation")
    assert rows == [Completion("", text) for text in heldout]


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
    with pytest.raises(UserError, match=r"'text': line 1, .* header, has 'body'; name"):
        load_texts(str(other), split="train")
