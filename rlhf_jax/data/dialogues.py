"""Dialogues: which turn is the response, and how a tokenizer writes what precedes it.

Three ways to write one down:
  messages   a list of {"role", "content"}, as chat models take it
  HH         "\\n\\nHuman: ...\\n\\nAssistant: ...", as in Anthropic's hh-rlhf
  guanaco    "### Human: ...### Assistant: ...", as in OpenAssistant-guanaco

The last turn of the assistant is the response, all before it is the prompt. HH and
guanaco prompts are plain strings that end with "Assistant:", so that prompt + response
is the text as it was. Messages stay a tuple until `render` writes them as the chat
template of a tokenizer says.

References:
  Bai et al. 2022, https://github.com/anthropics/hh-rlhf
  https://huggingface.co/docs/transformers/chat_templating
"""

import os
import pathlib
from typing import Any, NamedTuple

from rlhf_jax.data.tokenizer import start_tokens
from rlhf_jax.errors import UserError, first_line

ROLES = ("system", "developer", "user", "assistant", "tool")
HH_HUMAN, HH_ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
GUANACO_HUMAN, GUANACO_ASSISTANT = "### Human:", "### Assistant:"
ALPACA_RESPONSE = "### Response:\n"
NO_ANSWER, NO_ANSWER_AT_END = "no assistant turn", "no assistant turn at the end"
NO_QUESTION = "no user turn"


class Message(NamedTuple):
    """One turn."""

    role: str  # one of ROLES
    content: str


Messages = tuple[Message, ...]
Prompt = str | Messages


def read_messages(value: Any, place: str) -> Messages:
    """Messages from a list of {"role", "content"} objects.

    Args:
      value: what the data holds.
      place: for errors, as "a.jsonl line 3: 'messages'".

    Raises:
      UserError: another shape, a role that is none, or a content that is no text.
    """
    if not isinstance(value, list | tuple):
        raise UserError(
            f"{place} should be a list of messages with role and content, "
            f"not {type(value).__name__}"
        )
    return tuple(
        _read_message(item, f"{place}, message {number},")
        for number, item in enumerate(value, 1)
    )


def _read_message(item: Any, place: str) -> Message:
    if not isinstance(item, dict):
        raise UserError(
            f"{place} should be an object with role and content, "
            f"not {type(item).__name__}"
        )
    for name in ("role", "content"):
        if name not in item:
            raise UserError(
                f"{place} has no {name!r}: write each as "
                '{"role": "user", "content": "..."}'
            )
        if not isinstance(item[name], str):
            raise UserError(
                f"{place} has a {name!r} that is not text but "
                f"{type(item[name]).__name__}: give one string"
            )
    if item["role"] not in ROLES:
        raise UserError(
            f"{place} has the unknown role {item['role']!r}: choose from "
            + ", ".join(ROLES)
        )
    return Message(item["role"], item["content"])


def split_response(messages: Messages) -> tuple[Messages, str] | str:
    """(what precedes the assistant's last turn, that turn), or why there is no such."""
    turns = [at for at, turn in enumerate(messages) if turn.role == "assistant"]
    if not turns:
        return NO_ANSWER
    at = turns[-1]
    return (messages[:at], messages[at].content) if asks(messages[:at]) else NO_QUESTION


def open_question(messages: Messages) -> Messages | None:
    """What the assistant is to answer: all, or all but its turn at the very end.

    None if nobody asks.
    """
    if messages and messages[-1].role == "assistant":
        messages = messages[:-1]
    return messages if asks(messages) else None


def asks(messages: Messages) -> bool:
    """Whether the user has a turn."""
    return any(message.role == "user" for message in messages)


def join(prompt: Prompt | None, answer: Messages) -> Messages:
    """A dialogue from its prompt and its end, which may hold the prompt already."""
    if prompt is None or (answer and answer[0].role != "assistant"):
        return answer
    if isinstance(prompt, str):
        prompt = (Message("user", prompt),)
    return prompt + answer


def split_pair(chosen: Messages, rejected: Messages) -> tuple[Messages, str, str] | str:
    """(prompt, chosen, rejected) of two dialogues that part at their last turn.

    Otherwise the reason why they are no pair.
    """
    if not all(side and side[-1].role == "assistant" for side in (chosen, rejected)):
        return NO_ANSWER_AT_END
    if chosen[:-1] != rejected[:-1]:
        return "turns differ before the last"
    if not asks(chosen[:-1]):
        return NO_QUESTION
    return chosen[:-1], chosen[-1].content, rejected[-1].content


def is_hh(text: str) -> bool:
    """Whether a text is a dialogue as hh-rlhf writes it."""
    return text.startswith(HH_HUMAN) or HH_ASSISTANT in text


def ends_with_assistant(text: str) -> bool:
    """Whether the last turn of an HH dialogue is the assistant's."""
    return text.rfind(HH_ASSISTANT) > text.rfind(HH_HUMAN)


def split_hh(chosen: str, rejected: str) -> tuple[str, str, str] | None:
    """(prompt, chosen, rejected) of two HH dialogues, None if they share no prompt.

    The prompt ends with the last "\\n\\nAssistant:" that is in what both share; the
    responses are the rest, with the space they start with. Where the dialogues part
    before their last turn, a response holds the later turns too.
    """
    differ = (at for at, (a, b) in enumerate(zip(chosen, rejected)) if a != b)
    shared = next(differ, min(len(chosen), len(rejected)))
    at = chosen.rfind(HH_ASSISTANT, 0, shared)
    if at < 0:
        return None
    at += len(HH_ASSISTANT)
    return chosen[:at], chosen[at:], rejected[at:]


def is_guanaco(text: str) -> bool:
    """Whether a text is a dialogue as OpenAssistant-guanaco writes it."""
    return text.lstrip().startswith(GUANACO_HUMAN)


def split_guanaco(text: str) -> tuple[str, str] | str:
    """(prompt, response), the response up to any question after it that has no answer.

    Otherwise the reason why there is none.
    """
    at = text.rfind(GUANACO_ASSISTANT)
    if at < 0:
        return NO_ANSWER
    at += len(GUANACO_ASSISTANT)
    return text[:at], text[at:].partition(GUANACO_HUMAN)[0]


def drop_first_turns(prompt: Prompt) -> Prompt | None:
    """The prompt from its second question on; None if it has only one.

    What the system says at the start stays.
    """
    if isinstance(prompt, str):
        human = _speaker(prompt)
        at = prompt.find(human, len(human)) if human else -1
        return prompt[at:] if at > 0 else None
    first = _first_turn(prompt)
    for at in range(first + 1, len(prompt)):
        if prompt[at].role == "user":
            return prompt[:first] + prompt[at:]
    return None


def first_words(prompt: Prompt) -> str:
    """What a prompt that is too long may lose: the first turn without its speaker."""
    if isinstance(prompt, str):
        return prompt.removeprefix(_speaker(prompt))
    return prompt[_first_turn(prompt)].content


def with_first_words(prompt: Prompt, words: str) -> Prompt:
    """The prompt with other `first_words`; who speaks stays, so it is a dialogue."""
    if isinstance(prompt, str):
        return _speaker(prompt) + words
    at = _first_turn(prompt)
    return (*prompt[:at], Message(prompt[at].role, words), *prompt[at + 1 :])


def _speaker(prompt: str) -> str:
    """The name that an HH or guanaco prompt starts with, "" for other texts."""
    return next((n for n in (HH_HUMAN, GUANACO_HUMAN) if prompt.startswith(n)), "")


def _first_turn(messages: Messages) -> int:
    """Where the dialogue starts, behind what the system says."""
    for at, message in enumerate(messages[:-1]):
        if message.role not in ("system", "developer"):
            return at
    return len(messages) - 1


def plain_text(prompt: Prompt) -> str:
    """A prompt's words without any template: the same for every tokenizer."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(message.content for message in prompt)


def fill_template(prompt: str, template: str) -> str:
    """A plain prompt with words around it, "USER: {prompt} ASSISTANT:" for example.

    Without them nothing tells where the prompt ends and the response starts. What ends
    as a question to an assistant already (HH, guanaco, Alpaca's) stays as it is, and so
    does an empty prompt.

    Raises:
      UserError: a template without {prompt}.
    """
    if template and "{prompt}" not in template:
        raise UserError(
            f"prompt_template={template!r} has no {{prompt}} in it: say where the "
            'prompt goes, as in "USER: {prompt} ASSISTANT:", or give ""'
        )
    asked = prompt.endswith((HH_ASSISTANT, GUANACO_ASSISTANT, ALPACA_RESPONSE))
    if not template or not prompt or asked:
        return prompt
    return template.replace("{prompt}", prompt)


def render(prompt: Prompt, tokenizer: Any, place: str, template: str = "") -> str:
    """The prompt as a string that ends where the assistant's turn starts.

    Messages are written by the tokenizer's chat template. A bos at the start is left
    out if the tokenizer itself puts one before every text: else there would be two.

    Args:
      prompt: messages or a string.
      tokenizer: a transformers tokenizer; None will do for strings.
      place: of the row, for errors.
      template: what is around strings, as `fill_template` takes it.

    Raises:
      UserError: no chat template, or one that does not take these messages.
    """
    if isinstance(prompt, str):
        return fill_template(prompt, template)
    import jinja2

    if not getattr(tokenizer, "chat_template", None):
        name = getattr(tokenizer, "name_or_path", "") or "at hand"
        raise UserError(
            f"{place} holds chat messages, and the tokenizer {name} has no chat "
            "template: give one by chat_template, the path of a Jinja file"
        )
    try:
        text = tokenizer.apply_chat_template(
            [message._asdict() for message in prompt],
            tokenize=False,
            add_generation_prompt=True,
        )
    except jinja2.TemplateError as error:
        raise UserError(
            f"{place}: the tokenizer's chat template does not take these messages "
            f"({first_line(error)}): mend the row, or give another chat_template"
        ) from error
    if tokenizer.bos_token and start_tokens(tokenizer):
        text = text.removeprefix(tokenizer.bos_token)
    return text


def set_chat_template(tokenizer: Any, path: str | os.PathLike) -> None:
    """Gives the tokenizer the chat template of a Jinja file.

    Raises:
      UserError: no such file, or a template with a mistake, with its line.
    """
    import jinja2

    try:
        template = pathlib.Path(path).expanduser().read_text("utf-8")
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"chat_template={os.fspath(path)!r} should be the path of a Jinja file "
            f"({error})"
        ) from error
    before, tokenizer.chat_template = tokenizer.chat_template, template
    question = [{"role": "user", "content": "Hello"}]
    try:
        tokenizer.apply_chat_template(question, tokenize=False)
    except jinja2.TemplateError as error:
        tokenizer.chat_template = before
        line = getattr(error, "lineno", None)
        raise UserError(
            f"chat_template {path}{f' line {line}' if line else ''} cannot write one "
            f"question of a user: {first_line(error)}"
        ) from error
