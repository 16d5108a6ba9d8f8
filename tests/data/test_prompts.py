"""Prompts: the shipped ones, files, prefixes, splits, and which a phase takes."""

import collections
import functools
import importlib.resources
import json

import pytest

from rlhf_jax.data import splits
from rlhf_jax.data.order import phase_rows
from rlhf_jax.data.prompts import Prompts, load_prompts, phase_batch
from rlhf_jax.data.tables import Table
from rlhf_jax.data.tokenizer import encode_texts, train_tokenizer
from rlhf_jax.errors import UserError


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def numbered(tmp_path):
    rows = [{"prompt": f"This is prompt {i}", "id": i} for i in range(200)]
    return write(tmp_path / "numbered.jsonl", rows)


def test_the_builtin_prompts():
    train = load_prompts("builtin").texts
    heldout = load_prompts("builtin", split="heldout").texts
    assert train == load_prompts("builtin", split="train").texts
    assert (len(train), len(heldout)) == (400, 128)
    plain = [" ".join(p.casefold().replace(",", "").split()) for p in train + heldout]
    assert collections.Counter(plain).most_common(1)[0][1] == 1
    for prompt in train + heldout:
        assert 2 <= len(prompt.split(" ")) <= 5 and prompt == prompt.strip()
        assert prompt.isascii() and not prompt[0].islower()


def test_the_builtin_prompts_say_nothing_good_or_bad():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    score = SentimentIntensityAnalyzer().polarity_scores
    for split in ("train", "heldout"):
        texts = load_prompts("builtin", split=split).texts
        assert [text for text in texts if score(text)["compound"]] == []


def test_no_builtin_prompt_begins_another_of_the_other_split():
    train = [p + " " for p in load_prompts("builtin").texts]
    heldout = [p + " " for p in load_prompts("builtin", split="heldout").texts]
    assert not [
        (a, b) for a in train for b in heldout if a.startswith(b) or b.startswith(a)
    ]


def test_the_builtin_prompts_are_short_in_tokens():
    folder = importlib.resources.files("rlhf_jax") / "builtin" / "policy"
    from rlhf_jax.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(folder))
    texts = (
        load_prompts("builtin").texts + load_prompts("builtin", split="heldout").texts
    )
    assert max(map(len, encode_texts(tokenizer, texts))) <= 12


def test_columns(tmp_path):
    rows = [{"text": "t1", "prompt": "p1", "label": 3}, {"text": "t2", "prompt": "p2"}]
    source = write(tmp_path / "a.jsonl", rows)
    assert load_prompts(source) == Prompts(["p1", "p2"], {})
    assert load_prompts(source, column="text").texts == ["t1", "t2"]
    first = write(tmp_path / "b.jsonl", rows[:1])
    found = load_prompts(first, extra_columns=("label", "text"))
    assert found == Prompts(["p1"], {"label": [3], "text": ["t1"]})
    text_only = write(tmp_path / "c.jsonl", ["x"])
    assert load_prompts(text_only).texts == ["x"]
    with pytest.raises(UserError, match="has no column 'mood' for the rewards: it has"):
        load_prompts(source, extra_columns=("mood",))
    with pytest.raises(UserError, match=r"a.jsonl line 2 has no 'label'"):
        load_prompts(source, extra_columns=("label",))
    with pytest.raises(UserError, match="has no column 'body'"):
        load_prompts(source, column="body")
    neither = write(tmp_path / "d.jsonl", [{"a": "x"}])
    with pytest.raises(UserError, match="no columns that hold prompts: it has a;"):
        load_prompts(neither)


def test_prompts_of_other_formats(tmp_path):
    dialogue = "\n\nHuman: Why?\n\nAssistant:"
    hh = [{"chosen": dialogue + " So.", "rejected": dialogue + " No.", "id": 3}]
    found = load_prompts(write(tmp_path / "hh.jsonl", hh), extra_columns=("id",))
    assert found == Prompts([dialogue], {"id": [3]})
    tokenizer = train_tokenizer(["x"], 258)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    ask = [{"role": "user", "content": f"Question {i}"} for i in range(60)]
    chats = [{"messages": [turn]} for turn in ask]
    # A row that asks nothing is left out, and its other columns with it.
    chats.append({"messages": [{"role": "assistant", "content": "x"}]})
    rows = [row | {"id": i} for i, row in enumerate(chats)]
    source = write(tmp_path / "chats.jsonl", rows)
    everything = load_prompts(source, tokenizer=tokenizer, extra_columns=("id",))
    assert everything.texts == [f"<Question {i}>" for i in range(60)]
    assert everything.columns == {"id": list(range(60))}
    # The split is of the words, whatever a template writes around them.
    plain = [{"prompt": turn["content"]} for turn in ask]
    words = load_prompts(write(tmp_path / "b.jsonl", plain), split="heldout").texts
    heldout = load_prompts(source, split="heldout", tokenizer=tokenizer).texts
    assert heldout == [f"<{text}>" for text in words] and words
    with pytest.raises(UserError, match=r"chats\.jsonl line 1 holds chat messages"):
        load_prompts(source)


def test_a_file_is_split_by_the_hash_of_the_prompt(numbered):
    train = load_prompts(numbered, split="train", extra_columns=["id"])
    heldout = load_prompts(numbered, split="heldout", extra_columns=["id"])
    assert len(train.texts) + len(heldout.texts) == 200
    assert 8 < len(heldout.texts) < 35
    assert not set(train.texts) & set(heldout.texts)
    for part in (train, heldout):
        assert part.texts == [f"This is prompt {i}" for i in part.columns["id"]]
    assert len(load_prompts(numbered).texts) == 200


def test_the_split_is_of_the_prompt_not_of_the_text(tmp_path):
    # texts with the same beginning are one prompt: it must not be on both sides
    texts = [f"Prompt {i % 40} goes on as {i}" for i in range(400)]
    source = write(tmp_path / "a.jsonl", texts)
    parts = [
        set(load_prompts(source, split=split, prefix_words=2).texts)
        for split in ("train", "heldout")
    ]
    assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == 40


def test_limit_and_shuffle(numbered):
    everything = load_prompts(numbered).texts
    assert load_prompts(numbered, limit=5).texts == everything[:5]
    shuffled = load_prompts(numbered, seed=3, extra_columns=["id"])
    assert shuffled.texts != everything and sorted(shuffled.texts) == sorted(everything)
    assert shuffled.texts == [f"This is prompt {i}" for i in shuffled.columns["id"]]
    assert load_prompts(numbered, seed=3, limit=5).texts == shuffled.texts[:5]
    assert load_prompts(numbered, seed=4).texts != shuffled.texts


def test_prefix_words(tmp_path):
    source = write(
        tmp_path / "a.jsonl", ["One<br /><br />two  three four", "too short", "a b c"]
    )
    assert load_prompts(source, prefix_words=3).texts == ["One two three", "a b c"]
    with pytest.raises(UserError, match="no prompts are left of the 3 rows"):
        load_prompts(source, prefix_words=9)


def test_prefix_tokens(tmp_path):
    tokenizer = train_tokenizer([], 258)  # one token a byte
    source = write(tmp_path / "a.jsonl", ["abcdef", "abc", "ab"])
    found = load_prompts(source, prefix_tokens=3, tokenizer=tokenizer)
    assert found.texts == ["abc", "abc"]
    with pytest.raises(UserError, match="prefix_tokens needs the tokenizer"):
        load_prompts(source, prefix_tokens=3)


def test_a_template_of_plain_prompts(tmp_path, numbered):
    template = "USER: {prompt} ASSISTANT:"
    plain = load_prompts(numbered, split="heldout").texts
    found = load_prompts(numbered, split="heldout", prompt_template=template).texts
    assert found == [f"USER: {text} ASSISTANT:" for text in plain] and plain
    # the prefix is of the text, the template around it
    source = write(tmp_path / "a.jsonl", ["One two three four", "short"])
    for column in (None, "text"):
        found = load_prompts(
            source, column=column, prefix_words=2, prompt_template=template
        )
        assert found.texts == ["USER: One two ASSISTANT:"]
    tokenizer = train_tokenizer(["x"], 258)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    chat = [{"prompt": [{"role": "user", "content": "Why?"}]}, {"prompt": "Why?"}]
    source = write(tmp_path / "b.jsonl", chat)
    found = load_prompts(source, tokenizer=tokenizer, prompt_template=template)
    assert found.texts == ["<Why?>", "USER: Why? ASSISTANT:"]
    with pytest.raises(UserError, match=r"prompt_template=.* has no "):
        load_prompts(numbered, prompt_template="USER:")


def test_a_prompt_that_is_too_long_is_told_by_its_place(tmp_path):
    tokenizer = train_tokenizer([], 258)  # one token a byte
    source = write(tmp_path / "a.jsonl", ["short", "ten letter", "fine"])
    load = functools.partial(load_prompts, source, tokenizer=tokenizer)
    assert len(load(max_tokens=10).texts) == 3
    with pytest.raises(UserError) as caught:
        load(max_tokens=9, seed=1)
    assert str(caught.value) == (
        f"{source} line 2: the prompt has 10 tokens, more than the 9 allowed: 'ten "
        "letter' (raise config.rollout.prompt_tokens, or shorten it)"
    )
    assert load(max_tokens=5, limit=1).texts == ["short"]


def test_bad_arguments(numbered):
    with pytest.raises(UserError, match="prefix_words or prefix_tokens, not both"):
        load_prompts(numbered, prefix_words=1, prefix_tokens=1)
    for name in ("limit", "prefix_words", "prefix_tokens"):
        with pytest.raises(UserError, match=f"{name} should be at least 1, not 0"):
            load_prompts(numbered, **{name: 0})
    with pytest.raises(UserError, match="builtin prompts have no split 'test'"):
        load_prompts("builtin", split="test")
    with pytest.raises(UserError, match="is a file and has no split 'test'"):
        load_prompts(numbered, split="test")
    with pytest.raises(UserError, match=r"there is no file /no/such\.jsonl"):
        load_prompts("/no/such.jsonl")


def test_too_few_rows_to_hold_a_tenth_out(tmp_path):
    source = write(tmp_path / "a.jsonl", ["x"])
    with pytest.raises(UserError, match="too few to hold a tenth out"):
        for split in ("train", "heldout"):
            load_prompts(source, split=split)


@pytest.mark.parametrize(
    ("split", "asked"), [(None, None), ("train", "train"), ("heldout", "test")]
)
def test_the_splits_of_a_hub(monkeypatch, split, asked):
    seen = []

    def load_table(source, *, split=None):
        seen.append((source, split))
        return Table(source, ("text",), 2, lambda column: ["a b", "c d"], str)

    monkeypatch.setattr(splits, "load_table", load_table)
    monkeypatch.setattr(splits, "hub_splits", lambda source: ("train", "test"))
    # all of it: a hub's data set has splits of its own
    assert load_prompts("tfds:imdb_reviews", split=split).texts == ["a b", "c d"]
    assert seen == [("tfds:imdb_reviews", asked)]


def test_phase_batch_takes_the_rows_of_the_phase():
    prompts = Prompts([f"p{i}" for i in range(6)], {"id": list(range(6))})
    for phase in range(4):
        batch = phase_batch(prompts, phase, batch_size=4, seed=7)
        rows = phase_rows(6, phase, batch_size=4, seed=7).tolist()
        assert batch == Prompts([f"p{i}" for i in rows], {"id": rows})
