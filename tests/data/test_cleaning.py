"""Cleaning: what is dropped and cut, each counted; and what nothing is left of."""

import functools
import json

import pytest
from ml_collections import ConfigDict

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


def test_a_template_is_not_cut(tokenizer):
    shorten = functools.partial(cl.shorten_prompt, template="Q: {prompt} A:")
    assert shorten("0123456789", 16, tokenizer) == "Q: 0123456789 A:"
    assert shorten("0123456789", 10, tokenizer) == "Q: 6789 A:"
    assert shorten("0123456789", 6, tokenizer) is None


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


def test_what_a_config_asks_for():
    config = ConfigDict({"data": {"min_characters": 3}, "sequence_tokens": 9})
    assert cl.cleaning_of(config) == Cleaning(min_characters=3, max_tokens=9)
    config.data["prompt_template"] = "{prompt}!"
    assert cl.cleaning_of(config).prompt_template == "{prompt}!"


def test_chat_data_without_a_template(tmp_path):
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    source = write(tmp_path, [{"messages": chat}])
    with pytest.raises(
        UserError, match=r"a\.jsonl line 1 holds chat .*give one by chat"
    ):
        load_completions(source, split=None, tokenizer=train_tokenizer(["x"], 258))


def test_plain_prompts_are_written_by_the_template(tmp_path, tokenizer):
    """Which does not move them to another split; answers follow it at once."""
    rows = [
        {
            "prompt": f"Why {i}?",
            "response_0": "No.",
            "response_1": f"So {i}.",
            "better_response_id": 1,
        }
        for i in range(60)
    ]
    rows[0]["prompt"] = "long" * 9 + "?"
    source = write(tmp_path, rows)
    template = "USER: {prompt} ASSISTANT:"
    given = Cleaning(max_tokens=40, prompt_template=template)
    load = functools.partial(load_pairs, source, tokenizer=tokenizer, cleaning=given)
    plain, _ = load_pairs(source, split="validation")
    pairs, _ = load(split="validation")
    assert [pair.prompt for pair in pairs] == [
        f"USER: {pair.prompt} ASSISTANT:" for pair in plain
    ]
    pairs, counts = load(split=None)
    # 17 bytes of template, 6 of the answer and EOS leave 16 of the prompt
    cut = ("long" * 9 + "?")[-17:]
    assert pairs[0] == Pair(f"USER: {cut} ASSISTANT:", "So 0.", "No.")
    assert len(pairs[0].prompt + pairs[0].chosen) + 1 == 40
    assert counts["prompts cut"] == 1
    learned, _ = load_completions(
        source, split=None, cleaning=given._replace(max_tokens=None)
    )
    assert learned[1] == Completion("USER: Why 1? ASSISTANT:", "So 1.")


def test_the_only_split_of_a_data_set_is_cut_in_two(tmp_path, hub_cache):
    """And both sides say so: no row of the one is on the other."""
    rows = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": "r"} for i in range(80)]
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder, rows, "train.jsonl")
    source = f"hf:{folder}"
    train, counts = load_pairs(source, split="train")
    heldout, other = load_pairs(source, split="validation")
    assert sorted(train + heldout) == sorted(load_pairs(source, split=None)[0])
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in heldout}
    held, left = len(heldout), len(train)
    assert counts == {"in the held-out part of its only split": held, "kept": left}
    assert other == {"in the training part of its only split": left, "kept": held}
    assert (len(train), len(heldout)) == (80 - held, held) and 2 < held < 20


MORE = "give it more rows, or ask less of them"


@pytest.mark.parametrize(
    ("rows", "cleaning", "why", "cure"),
    [
        (
            [("x", "x ")] * 2,
            Cleaning(),
            "2 tie",
            "give pairs whose two responses differ",
        ),
        (
            [("", "x")],
            Cleaning(),
            "1 empty response",
            "give responses that say somethi",
        ),
        ([("x", "y")], Cleaning(min_characters=9), "1 response too short", MORE),
        ([("", "x"), ("x", "x")], Cleaning(), "1 empty response, 1 tie", MORE),
    ],
)
def test_nothing_left(tmp_path, rows, cleaning, why, cure):
    rows = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in rows]
    source = write(tmp_path, rows)
    with pytest.raises(UserError) as caught:
        load_pairs(source, split=None, cleaning=cleaning)
    said = f"the {len(rows)} rows of {source} ({why}, from {source} line 1 on): {cure}"
    assert str(caught.value).startswith(f"nothing is left for training of {said}")


def test_a_file_too_small_to_hold_a_tenth_out(tmp_path):
    source = write(tmp_path, [{"chosen": "x", "rejected": "y"}])
    with pytest.raises(UserError, match="too few prompts to hold a tenth out"):
        for split in ("train", "validation"):
            load_pairs(source, split=split)
