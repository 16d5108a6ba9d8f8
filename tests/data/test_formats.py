"""Formats told by their columns: completions and prompts, by hand in full."""

import json

import pytest

from rlhf_jax.data.dialogues import Message
from rlhf_jax.data.formats import read_completions, read_pairs, read_prompts
from rlhf_jax.data.rows import Completion, Dropped
from rlhf_jax.data.tables import load_table
from rlhf_jax.errors import UserError

ASK = {"role": "user", "content": "Why?"}
REPLY = {"role": "assistant", "content": "So."}
ASKED = (Message("user", "Why?"),)
HH = {
    "chosen": "\n\nHuman: Why?\n\nAssistant: So.",
    "rejected": "\n\nHuman: Why?\n\nAssistant: No.",
}


def table(tmp_path, *rows, name="a.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_table(str(path))


@pytest.mark.parametrize(
    ("row", "prompt", "response"),
    [
        ("Just text.", "", "Just text."),
        ({"text": "Just text.", "label": 1}, "", "Just text."),
        ({"prompt": "Why?", "response": " So."}, "Why?", " So."),
        ({"prompt": "Why?", "completion": " So."}, "Why?", " So."),
        ({"prompt": [ASK], "response": "So."}, ASKED, "So."),
        ({"prompt": [ASK], "completion": [REPLY]}, ASKED, "So."),
        ({"prompt": "Why?", "completion": [REPLY]}, ASKED, "So."),
        ({"messages": [ASK, REPLY]}, ASKED, "So."),
        (
            {"messages": [ASK, REPLY, ASK, REPLY, ASK]},
            (*ASKED, Message("assistant", "So."), *ASKED),
            "So.",
        ),
        (
            {"text": "### Human: Hi### Assistant: Ho.### Human: Why?### Assistant: S"},
            "### Human: Hi### Assistant: Ho.### Human: Why?### Assistant:",
            " S",
        ),
        (
            {
                "instruction": "Add {these}.",
                "input": "1, 2",
                "output": "3",
                "text": "x",
            },
            "Below is an instruction that describes a task, paired with an input that "
            "provides further context. Write a response that appropriately completes "
            "the request.\n\n### Instruction:\nAdd {these}.\n\n### Input:\n1, 2\n\n"
            "### Response:\n",
            "3",
        ),
        (
            {"instruction": "Say hi.", "input": "", "output": "Hi."},
            "Below is an instruction that describes a task. Write a response that "
            "appropriately completes the request.\n\n### Instruction:\nSay hi.\n\n"
            "### Response:\n",
            "Hi.",
        ),
        (
            {"instruction": "Who?", "context": "Ada ran.", "response": "Ada."},
            "Below is an instruction that describes a task, paired with an input that "
            "provides further context. Write a response that appropriately completes "
            "the request.\n\n### Instruction:\nWho?\n\n### Input:\nAda ran.\n\n"
            "### Response:\n",
            "Ada.",
        ),
        (
            {"instruction": "Who?", "response": "Ada.", "category": "qa"},
            "Below is an instruction that describes a task. Write a response that "
            "appropriately completes the request.\n\n### Instruction:\nWho?\n\n"
            "### Response:\n",
            "Ada.",
        ),
        # of preferences, the chosen side
        ({"prompt": "Why?", "chosen": " So.", "rejected": " No."}, "Why?", " So."),
        (HH, "\n\nHuman: Why?\n\nAssistant:", " So."),
        (
            {
                "prompt": "Why?",
                "response_0": "No.",
                "response_1": "So.",
                "better_response_id": 1,
            },
            "Why?",
            "So.",
        ),
        # UltraFeedback's pairs also come as messages to learn from
        (
            {"prompt": "x", "chosen": [], "rejected": [], "messages": [ASK, REPLY]},
            ASKED,
            "So.",
        ),
    ],
)
def test_completions(tmp_path, row, prompt, response):
    assert read_completions(table(tmp_path, row)) == [Completion(prompt, response)]


def test_rows_without_an_answer_are_dropped_not_lost(tmp_path):
    chats = table(tmp_path, {"messages": [ASK]}, {"messages": [ASK, REPLY]})
    assert read_completions(chats) == [
        Dropped(ASKED, "no assistant turn"),
        Completion(ASKED, "So."),
    ]
    texts = table(tmp_path, "### Human: Hi", "plain")
    assert read_completions(texts) == [
        Dropped("### Human: Hi", "no assistant turn"),
        Completion("", "plain"),
    ]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ("Why", "Why"),
        ({"prompt": "Why?", "text": "x", "response": "So."}, "Why?"),
        ({"prompt": [ASK]}, ASKED),
        ({"prompt": [ASK, REPLY]}, ASKED),
        ({"messages": [ASK]}, ASKED),
        ({"messages": [ASK, REPLY]}, ASKED),
        (
            {"messages": [ASK, REPLY, ASK]},
            (*ASKED, Message("assistant", "So."), *ASKED),
        ),
        ({"messages": [REPLY]}, None),
        (HH, "\n\nHuman: Why?\n\nAssistant:"),
        ({"text": "### Human: Hi### Assistant: Ho"}, "### Human: Hi### Assistant:"),
        ({"text": "### Human: Hi"}, "### Human: Hi"),
        (
            {"instruction": "Say hi.", "output": "Hi."},
            "Below is an instruction that describes a task. Write a response that "
            "appropriately completes the request.\n\n### Instruction:\nSay hi.\n\n"
            "### Response:\n",
        ),
    ],
)
def test_prompts(tmp_path, row, prompt):
    assert read_prompts(table(tmp_path, row)) == [prompt]


@pytest.mark.parametrize("read", [read_completions, read_pairs, read_prompts])
def test_unknown_columns_list_what_is_there_and_what_is_known(tmp_path, read):
    with pytest.raises(UserError) as caught:
        read(table(tmp_path, {"question": "x", "answer": "y"}))
    said = str(caught.value)
    assert "a.jsonl has no columns that hold " in said
    assert "it has question, answer; rename them" in said
    assert "chosen, rejected" in said and "response_0, response_1" in said
    assert ("messages (chat)" in said) == (read is not read_pairs)
    assert "\n" not in said


def test_prompts_alone_are_nothing_to_learn(tmp_path):
    with pytest.raises(UserError, match="hold a response to learn: it has prompt;"):
        read_completions(table(tmp_path, {"prompt": "Why?"}))
    with pytest.raises(UserError, match="hold preferences: it has prompt, response;"):
        read_pairs(table(tmp_path, {"prompt": "Why?", "response": "So."}))


def test_ambiguous_columns(tmp_path):
    both = {"messages": [ASK, REPLY], "prompt": "Why?", "response": "So."}
    with pytest.raises(UserError) as caught:
        read_completions(table(tmp_path, both))
    assert str(caught.value).endswith(
        "a.jsonl may be read in more than one way, as chat (messages) or as prompt and "
        "response (prompt, response): keep the columns of one of them (it has "
        "messages, prompt, response)"
    )
    assert read_prompts(table(tmp_path, both)) == ["Why?"]
    more = {**HH, "instruction": "Why?", "completions": []}
    with pytest.raises(UserError, match=r"HH-RLHF .* or as UltraFeedback"):
        read_pairs(table(tmp_path, more))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": 3, "response": "x"},
            "'prompt' should be a string or a list of chat",
        ),
        ({"prompt": "x", "response": ["y"]}, "'response' should .*, not a list of str"),
        ({"prompt": [], "response": "y"}, "'prompt' should .*, not an empty list"),
        ({"prompt": [["x"]], "response": "y"}, "'prompt' .*, not a list of list"),
        ({"prompt": "x", "response": None}, "'response' .*, not NoneType"),
        ({"text": ["x"]}, "'text' should be a string, not list"),
        ({"messages": [{"content": "x"}]}, "'messages', message 1, has no 'role'"),
        ({"instruction": "x", "input": 3, "output": "y"}, "'input' should be a string"),
        ({"prompt": "x"}, " has no 'response': it has 'prompt'"),
    ],
)
def test_wrong_types_name_the_line(tmp_path, row, message):
    good = {"prompt": "x", "response": "y"}
    if "prompt" not in row:
        good = {
            "text": "x",
            "messages": [ASK, REPLY],
            "instruction": "x",
            "input": "",
            "output": "y",
        }
        good = {name: good[name] for name in row}
    with pytest.raises(UserError, match=r"a\.jsonl line 2.*" + message) as caught:
        read_completions(table(tmp_path, good, row))
    assert "\n" not in str(caught.value)
