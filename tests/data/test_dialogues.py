"""Dialogues: their split in prompt and response, chat templates, shortening."""

import gzip
import json
import os

import pytest

from rlhf_jax.data import dialogues
from rlhf_jax.data.dialogues import Message
from rlhf_jax.data.formats import ALPACA, ALPACA_WITH_INPUT
from rlhf_jax.data.tokenizer import train_tokenizer
from rlhf_jax.errors import UserError

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ASK = {"role": "user", "content": "Why?"}
REPLY = {"role": "assistant", "content": "So."}
TURNS = (
    Message("system", "Be brief."),
    Message("user", "One?"),
    Message("assistant", "1."),
    Message("user", "Two?"),
)


def make_tokenizer(template=CHATML):
    tokenizer = train_tokenizer(["Why? So. Be brief."] * 3, 300)
    tokenizer.chat_template = template
    return tokenizer


def test_messages_are_read():
    found = dialogues.read_messages([ASK, REPLY | {"id": 7}], "f line 1: 'messages'")
    assert found == (Message("user", "Why?"), Message("assistant", "So."))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("Why?", "'messages' should be a list of messages .*, not str"),
        (["Why?"], "message 1, should be an object with role and content, not str"),
        ([ASK, {"content": "x"}], "message 2, has no 'role': write each as"),
        ([{"role": "user"}], "message 1, has no 'content': write each as"),
        ([{"role": "user", "content": ["x"]}], "'content' that is not text but list"),
        ([{"role": "gpt", "content": "x"}], "unknown role 'gpt': choose from system"),
    ],
)
def test_bad_messages_are_one_sentence_with_their_place(value, message):
    with pytest.raises(UserError, match="^f line 3: .*" + message) as caught:
        dialogues.read_messages(value, "f line 3: 'messages'")
    assert "\n" not in str(caught.value)


def test_the_last_answer_is_the_response():
    whole = (*TURNS, Message("assistant", "2."))
    assert dialogues.split_response(whole) == (TURNS, "2.")
    # a question behind it that nobody answered is left out
    assert dialogues.split_response((*whole, Message("user", "3?"))) == (TURNS, "2.")
    assert dialogues.split_response(TURNS[:2]) == "no assistant turn"
    assert dialogues.split_response(()) == "no assistant turn"
    assert dialogues.split_response((TURNS[0], TURNS[2])) == "no user turn"


def test_what_is_to_be_answered():
    assert dialogues.open_question(TURNS) == TURNS
    assert dialogues.open_question((*TURNS, Message("assistant", "2."))) == TURNS
    assert dialogues.open_question(TURNS[:1]) is None
    assert dialogues.open_question(()) is None


def test_pairs_of_messages():
    chosen, rejected = Message("assistant", "2."), Message("assistant", "Two.")
    found = dialogues.split_pair((*TURNS, chosen), (*TURNS, rejected))
    assert found == (TURNS, "2.", "Two.")
    early = (TURNS[1], Message("assistant", "I."), *TURNS[3:], rejected)
    why = dialogues.split_pair((*TURNS[1:], chosen), early)
    assert why == "turns differ before the last"
    assert dialogues.split_pair(TURNS, TURNS) == "no assistant turn at the end"
    assert dialogues.split_pair((chosen,), (rejected,)) == "no user turn"


def test_an_answer_joins_its_prompt_unless_it_holds_it():
    answer = (Message("assistant", "So."),)
    asked = (Message("user", "Why?"),)
    assert dialogues.join("Why?", answer) == asked + answer
    assert dialogues.join(asked, answer) == asked + answer
    assert dialogues.join("Why?", asked + answer) == asked + answer
    assert dialogues.join(None, answer) == answer


HH_SHARED = (
    "\n\nHuman: Can dogs eat grapes?\n\nAssistant: No, they are poisonous to dogs."
    "\n\nHuman: And cats?\n\nAssistant:"
)


def test_a_multi_turn_hh_dialogue_as_its_readme_says():
    # Two turns are shared; so is the first word of the answers, which is no prompt.
    chosen, rejected = " Cats should not, either.", " Cats love grapes."
    found = dialogues.split_hh(HH_SHARED + chosen, HH_SHARED + rejected)
    assert found == (HH_SHARED, chosen, rejected)


def test_hh_dialogues_that_part_early_keep_the_rest():
    first = "\n\nHuman: Hi\n\nAssistant:"
    chosen = " Hello.\n\nHuman: Bye\n\nAssistant: Bye."
    rejected = " Yes?\n\nHuman: Bye\n\nAssistant: Bye."
    found = dialogues.split_hh(first + chosen, first + rejected)
    assert found == (first, chosen, rejected)
    assert dialogues.split_hh(first + " a", first + " a") == (first, " a", " a")
    # one side ends where the other goes on
    longer = dialogues.split_hh(first + " a", first + " a\n\nHuman: b\n\nAssistant: c")
    assert longer == (first, " a", " a\n\nHuman: b\n\nAssistant: c")
    other = "\n\nHuman: Ho\n\nAssistant: x"
    assert dialogues.split_hh(first + " x", other) is None


def test_who_has_the_last_word():
    assert dialogues.ends_with_assistant(HH_SHARED + " No.")
    assert not dialogues.ends_with_assistant(HH_SHARED + " No.\n\nHuman: Why?")
    assert not dialogues.ends_with_assistant("No dialogue.")
    assert dialogues.is_hh(HH_SHARED) and not dialogues.is_hh("Human: x")


def test_every_real_hh_dialogue_is_whole():
    path = os.environ.get("RLHF_JAX_HH")
    if not path:
        pytest.skip("RLHF_JAX_HH does not name a file of hh-rlhf")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    last = 0
    for row in rows:
        prompt, chosen, rejected = dialogues.split_hh(row["chosen"], row["rejected"])
        assert prompt + chosen == row["chosen"]
        assert prompt + rejected == row["rejected"]
        assert prompt.endswith("\n\nAssistant:")
        last += "\n\nAssistant:" not in chosen + rejected
    assert len(rows) > 1000 and last > 0.99 * len(rows)


def test_guanaco():
    asked = "### Human: Hi### Assistant: Hello.### Human: What is RL?### Assistant:"
    assert dialogues.split_guanaco(asked + " Trial.") == (asked, " Trial.")
    # as in the published data, a last question may have no answer
    found = dialogues.split_guanaco(asked + " Trial.### Human: To a dog")
    assert found == (asked, " Trial.")
    assert dialogues.split_guanaco("### Human: Hi") == "no assistant turn"
    assert dialogues.is_guanaco(asked) and not dialogues.is_guanaco("x " + asked)


@pytest.mark.parametrize("human", ["\n\nHuman:", "### Human:"])
def test_written_dialogues_lose_whole_turns(human):
    tail = f"{human} Two?\n\nAssistant:"
    assert dialogues.drop_first_turns(f"{human} One? 1.{tail}") == tail
    assert dialogues.drop_first_turns(tail) is None
    assert dialogues.drop_first_turns(f"Said {human} One?") is None


def test_messages_lose_whole_turns_and_keep_the_system():
    assert dialogues.drop_first_turns(TURNS) == (TURNS[0], TURNS[3])
    assert dialogues.drop_first_turns((TURNS[0], TURNS[3])) is None
    assert dialogues.drop_first_turns(TURNS[1:]) == TURNS[3:]


def test_first_words():
    assert dialogues.first_words(TURNS) == "One?"
    assert dialogues.with_first_words(TURNS, "?")[:2] == (
        TURNS[0],
        Message("user", "?"),
    )
    hh = "\n\nHuman: One?\n\nAssistant:"
    assert dialogues.first_words(hh) == " One?\n\nAssistant:"
    assert dialogues.with_first_words(hh, "?\n\nAssistant:") == (
        "\n\nHuman:?\n\nAssistant:"
    )
    assert dialogues.first_words("plain") == "plain"
    assert dialogues.with_first_words("plain", "ain") == "ain"


def test_the_chat_template_writes_the_prompt():
    text = dialogues.render(TURNS, make_tokenizer(), "f line 1")
    assert text == (
        "<|system|>Be brief.\n<|user|>One?\n<|assistant|>1.\n<|user|>Two?\n"
        "<|assistant|>"
    )
    assert dialogues.render("as it is", None, "") == "as it is"


SAFE_RLHF = "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:"


def test_a_template_of_plain_prompts():
    whole = "BEGINNING OF CONVERSATION: USER: Why? ASSISTANT:"
    assert dialogues.fill_template("Why?", SAFE_RLHF) == whole
    assert dialogues.render("Why?", None, "", SAFE_RLHF) == whole
    assert dialogues.fill_template("Why?", "") == "Why?"
    # braces mean nothing but where the prompt goes
    assert dialogues.fill_template("{x}", "{0} {prompt}: {x}") == "{0} {x}: {x}"
    # messages have a template of their own
    written = dialogues.render(TURNS[3:], make_tokenizer(), "", SAFE_RLHF)
    assert written == "<|user|>Two?\n<|assistant|>"


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "\n\nHuman: Why?\n\nAssistant:",
        "### Human: Why?### Assistant:",
        ALPACA.format(instruction="Why?"),
        ALPACA_WITH_INPUT.format(instruction="Why?", input="x"),
    ],
)
def test_what_asks_for_an_answer_needs_no_template(prompt):
    assert dialogues.fill_template(prompt, SAFE_RLHF) == prompt


def test_a_template_without_a_prompt():
    with pytest.raises(
        UserError, match=r"^prompt_template='USER: \{\}' has no \{prompt"
    ):
        dialogues.fill_template("Why?", "USER: {}")


def test_a_bos_that_the_tokenizer_adds_is_not_written_twice():
    from tokenizers import processors

    tokenizer = make_tokenizer("{{ bos_token }}" + CHATML)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    # The encoder puts no bos of its own: the template's stays.
    written = "<s><|user|>Two?\n<|assistant|>"
    assert dialogues.render(TURNS[3:], tokenizer, "") == written
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    text = dialogues.render(TURNS[3:], tokenizer, "")
    assert text == written.removeprefix("<s>")
    ids = tokenizer(text)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1


def test_messages_without_a_template():
    for tokenizer in (None, make_tokenizer(None)):
        with pytest.raises(UserError, match=r"^f line 1 .*no chat template: give one "):
            dialogues.render(TURNS, tokenizer, "f line 1")


def test_a_template_that_refuses():
    tokenizer = make_tokenizer("{{ raise_exception('no system role') }}")
    with pytest.raises(UserError, match=r"^f line 1: .*\(no system role\): mend"):
        dialogues.render(TURNS, tokenizer, "f line 1")


def test_a_template_from_a_file(tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(CHATML)
    tokenizer = make_tokenizer(None)
    dialogues.set_chat_template(tokenizer, path)
    expected = "<|user|>Two?\n<|assistant|>"
    assert dialogues.render(TURNS[3:], tokenizer, "") == expected
    path.write_text("fine\n{% for m in messages %}\n{% endif %}")
    with pytest.raises(UserError, match=r"chat\.jinja line 3 cannot write one quest"):
        dialogues.set_chat_template(tokenizer, path)
    assert tokenizer.chat_template == CHATML
    with pytest.raises(UserError, match=r"should be the path of a Jinja file"):
        dialogues.set_chat_template(tokenizer, tmp_path / "absent.jinja")
