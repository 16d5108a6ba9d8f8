"""Cleaning: what is dropped and cut, each counted; and what nothing is left of."""

import json

import pytest

from rlhf_jax.data import cleaning as cl
from rlhf_jax.data.cleaning import Cleaning
from rlhf_jax.data.dialogues import Message
from rlhf_jax.data.preferences import load_pairs
from rlhf_jax.data.rows import Completion, Dropped, Pair
from rlhf_jax.data.texts import load_completions
from rlhf_jax.data.tokenizer import encode_texts, train_tokenizer
from rlhf_jax.errors import UserError

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    # No merges: a token is a byte, so that lengths are counted by hand.
    made = train_tokenizer(["x"], 258)
    made.chat_template = CHATML
    return made


def write(tmp_path, rows, name="a.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def reasons(rows):
    return [row.reason if isinstance(row, Dropped) else None for row in rows]


def test_faulty_pairs():
    rows = [
        Pair("p", " good", " bad"),
        Pair("p", " same", "same "),
        Pair("p", " good", "  "),
        Pair("p", "", ""),
        Pair("p", " good ", "bad"),
        Pair("p", "bad", "good"),
        Pair("q", " good", " bad"),
        Dropped("p", "no shared prompt"),
        Pair("p", " good", "ok"),
    ]
    found = cl.drop_faulty(rows, min_characters=3)
    assert reasons(found) == [
        None,
        "tie",
        "empty response",
        "empty response",
        "duplicate",
        None,  # the other way round is another judgement
        None,
        "no shared prompt",
        "response too short",
    ]
    assert found[0] == rows[0]
    assert reasons(cl.drop_faulty(rows))[-1] is None


def test_faulty_completions():
    rows = [
        Completion("", "text"),
        Completion("", " text\n"),
        Completion("p", "text"),
        Completion((Message("user", "p"),), "\n"),
    ]
    found = reasons(cl.drop_faulty(rows))
    assert found == [None, "duplicate", None, "empty response"]


def test_leaks_of_prompts_and_of_texts():
    heldout = [Pair("Why?", " So.", " No."), Pair("", "A text.", "Another.")]
    rows = [
        Pair("Why? ", " x", " y"),  # the prompt
        Pair("", "Another.", "z"),  # one side
        Pair("Why", "? No.", "u"),  # the same text, cut elsewhere
        Pair("", "x", "y"),  # empty prompts have nothing in common
        Pair("When?", " So.", " No."),
        Dropped("Why?", "tie"),
    ]
    leak = "in the held-out split"
    expected = [leak, leak, leak, None, None, "tie"]
    assert reasons(cl.drop_leaks(rows, heldout)) == expected
    assert cl.drop_leaks(rows, ()) == rows


def test_what_tells_the_split():
    messages = (Message("user", "One?"), Message("assistant", "1."))
    assert cl.split_key(Completion("p", "r")) == "p"
    assert cl.split_key(Completion(messages, "r")) == "One?\n\n1."
    assert cl.split_key(Completion("", "r")) == "r"
    assert cl.split_key(Pair(" ", "c", "r")) == "c"
    assert cl.split_key(Dropped("", "tie")) == ""


def test_a_plain_prompt_loses_its_first_tokens(tokenizer):
    assert cl.shorten_prompt("0123456789", 4, tokenizer) == "6789"
    assert cl.shorten_prompt("0123", 4, tokenizer) == "0123"
    assert cl.shorten_prompt("0123", 0, tokenizer) is None
    # é is two bytes: the cut falls between them, and no half of it is kept
    assert cl.shorten_prompt("é12", 3, tokenizer) == "12"
    assert cl.shorten_prompt("aaaé😀12", 5, tokenizer) == "12"


def test_a_dialogue_loses_whole_turns_before_tokens(tokenizer):
    turn = "\n\nHuman: 345\n\nAssistant:"  # 8 + 4 + 12 = 24 bytes
    prompt = "\n\nHuman: 12\n\nAssistant: a" + turn
    assert cl.shorten_prompt(prompt, len(prompt), tokenizer) == prompt
    assert cl.shorten_prompt(prompt, len(prompt) - 1, tokenizer) == turn
    # 1 too long: " 345" loses its space, and who speaks stays
    assert cl.shorten_prompt(prompt, 23, tokenizer) == "\n\nHuman:345\n\nAssistant:"


def test_messages_lose_whole_turns_and_keep_the_system(tokenizer):
    turns = (
        Message("system", "S"),
        Message("user", "abc"),
        Message("assistant", "x"),
        Message("user", "defg"),
    )
    # <|system|>S\n is 12 bytes, <|user|>defg\n is 13, <|assistant|> is 13
    short = "<|system|>S\n<|user|>defg\n<|assistant|>"
    assert len(short) == 38
    whole = cl.shorten_prompt(turns, 99, tokenizer)
    assert whole == (
        "<|system|>S\n<|user|>abc\n<|assistant|>x\n<|user|>defg\n<|assistant|>"
    )
    assert cl.shorten_prompt(turns, len(whole) - 1, tokenizer) == short
    assert cl.shorten_prompt(turns, 36, tokenizer) == short.replace("defg", "fg")
    # the template alone is 34: no word would be left
    assert cl.shorten_prompt(turns, 34, tokenizer) is None


def test_prompts_are_cut_to_the_longest_response_and_eos(tokenizer):
    rows = [
        Pair("0123456789", "ab", "cde"),  # 10 + 3 + EOS = 14
        Pair("0123456789", "ab", "c"),  # 13
        Pair("0123456789", "abcdefghijklm", "c"),  # 13 + EOS leave nothing
        Completion("", "abcdefghijklmnopq"),  # nothing to cut
        Dropped("p", "tie"),
    ]
    found = cl.cut_prompts(rows, rows, [""] * 5, tokenizer, 13)
    assert found == [
        Pair("123456789", "ab", "cde"),
        rows[1],
        Dropped("0123456789", "response too long"),
        rows[3],
        rows[4],
    ]
    ids = encode_texts(tokenizer, [found[0].prompt + found[0].rejected])[0]
    assert len(ids) + 1 == 13


def test_the_bos_of_a_tokenizer_takes_a_place():
    from tokenizers import processors

    tokenizer = train_tokenizer(["x"], 258)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    rows = [Completion("0123456789", "ab")]
    (found,) = cl.cut_prompts(rows, rows, [""], tokenizer, 13)
    assert found.prompt == "123456789"


def test_every_row_of_a_file_is_counted(tmp_path, tokenizer):
    rows = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": "r"} for i in range(60)]
    rows += [
        {"prompt": "long" * 9, "chosen": "c", "rejected": "r"},
        {"prompt": "p0", "chosen": "x", "rejected": " x"},
        {"prompt": "p1", "chosen": "", "rejected": " x"},
        {"prompt": "p0", "chosen": "c0", "rejected": "r"},
    ]
    source = write(tmp_path, rows)
    pairs, counts = load_pairs(
        source, split=None, tokenizer=tokenizer, cleaning=Cleaning(max_tokens=8)
    )
    assert counts == {
        "tie": 1,
        "empty response": 1,
        "duplicate": 1,
        "kept": 61,
        "prompts cut": 1,
    }
    assert list(counts)[-2:] == ["kept", "prompts cut"]
    assert pairs[-1] == Pair("nglong", "c", "r")
    heldout, _ = load_pairs(source, split="validation")
    train, counts = load_pairs(
        source, split="train", cleaning=Cleaning(apart_from=heldout)
    )
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in heldout}
    assert "in the held-out split" not in counts
    # all of the file, and what was held out is found again
    train, counts = load_pairs(
        source, split=None, cleaning=Cleaning(apart_from=heldout)
    )
    assert counts["in the held-out split"] == len(heldout)
    assert counts["kept"] == len(train) == 61 - len(heldout)


def test_the_split_of_a_chat_does_not_depend_on_the_template(tmp_path, tokenizer):
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"Question {i}?"},
                {"role": "assistant", "content": f"Answer {i}."},
            ]
        }
        for i in range(80)
    ]
    source = write(tmp_path, chats)
    plain = [
        {"prompt": f"Question {i}?", "response": f"Answer {i}."} for i in range(80)
    ]
    other = write(tmp_path, plain, "b.jsonl")
    found, _ = load_completions(source, split="heldout", tokenizer=tokenizer)
    same, _ = load_completions(other, split="heldout")
    assert [row.response for row in found] == [row.response for row in same]
    first = same[0]
    assert found[0].prompt == f"<|user|>{first.prompt}\n<|assistant|>"


def test_chat_data_without_a_template(tmp_path):
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    source = write(tmp_path, [{"messages": chat}])
    with pytest.raises(
        UserError, match=r"a\.jsonl line 1 holds chat .*give one by chat"
    ):
        load_completions(source, split=None, tokenizer=train_tokenizer(["x"], 258))


@pytest.mark.parametrize(
    ("row", "cleaning", "why"),
    [
        ({"chosen": "x", "rejected": "x "}, Cleaning(), "1 tie"),
        ({"chosen": "", "rejected": "x"}, Cleaning(), "1 empty response"),
        (
            {"chosen": "x", "rejected": "y"},
            Cleaning(min_characters=9),
            "1 response too short",
        ),
    ],
)
def test_nothing_left(tmp_path, row, cleaning, why):
    source = write(tmp_path, [row])
    with pytest.raises(UserError) as caught:
        load_pairs(source, split=None, cleaning=cleaning)
    assert str(caught.value) == (
        f"nothing is left for training of the 1 rows of {source} ({why}): give it more "
        "rows, or ask less of them"
    )


def test_a_file_too_small_to_hold_a_tenth_out(tmp_path):
    source = write(tmp_path, [{"chosen": "x", "rejected": "y"}])
    with pytest.raises(UserError, match="too few prompts to hold a tenth out"):
        for split in ("train", "validation"):
            load_pairs(source, split=split)
