"""What a table holds, told by its columns, and the same rows in one form for all.

                                       columns
  chat                                 messages
  prompt and response                  prompt, response (or completion)
  alpaca                               instruction, output [input]
  dolly                                instruction, response [context]
  preferences, HH-RLHF, UltraFeedback  chosen, rejected [prompt, probability, domain,
    as pairs                           chosen_safe, rejected_safe, margin]
  PKU-SafeRLHF                         prompt, response_0, response_1,
                                       better_response_id or safer_response_id
                                       [is_response_0_safe, is_response_1_safe]
  UltraFeedback as it was rated        instruction, completions
  texts, OpenAssistant-guanaco         text

Columns in brackets may be missing; others are ignored. Prompts and responses are
strings or lists of chat messages. Every reader gives one result a row, in the order of
the table: what the row holds, or `Dropped` and why.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rlhf_jax.data import cells, dialogues, pair_formats
from rlhf_jax.data.dialogues import Prompt
from rlhf_jax.data.rows import Completion, Dropped, Pair
from rlhf_jax.data.tables import Table, header, read_texts
from rlhf_jax.errors import UserError

PREFERENCES = ("better", "safer")

# Taori et al. 2023, https://github.com/tatsu-lab/stanford_alpaca. The line break behind
# "Response:" is that of the column "text" of the published data.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that "
    "appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n" + dialogues.ALPACA_RESPONSE
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides "
    "further context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    + dialogues.ALPACA_RESPONSE
)


class Format(NamedTuple):
    """A name, the columns that it is known by, and its reader."""

    name: str
    columns: tuple[str, ...]
    read: Callable[..., list]


def read_completions(table: Table) -> list[Completion | Dropped]:
    """The completions of a table; of preferences, the chosen ones.

    Raises:
      UserError: unknown or ambiguous columns, or a value of a wrong type.
    """
    form = _recognise(table, COMPLETIONS) or _recognise(table, PAIRS)
    if form in PAIRS:
        return [
            Completion(row.prompt, row.chosen) if isinstance(row, Pair) else row
            for row in form.read(table, "better")
        ]
    if form is None and "text" in table.columns:
        form = TEXT
    if form is None:
        raise _unknown(table, "a response to learn", (*COMPLETIONS, *PAIRS, TEXT))
    return form.read(table)


def read_pairs(table: Table, preference: str = "better") -> list[Pair | Dropped]:
    """The preferences of a table.

    Args:
      table: from `tables.load_table`.
      preference: whose choice counts where raters made two: "better", or "safer".

    Raises:
      UserError: unknown or ambiguous columns, a preference that is none or that these
        data do not have, or a value of a wrong type.
    """
    if preference not in PREFERENCES:
        raise UserError(
            f"unknown preference {preference!r} for {table.source}: choose from "
            + ", ".join(PREFERENCES)
        )
    form = _recognise(table, PAIRS)
    if form is None:
        raise _unknown(table, "preferences", PAIRS)
    if form is not PKU and preference != "better":
        raise UserError(
            f"{table.source} does not say which response is {preference}: only the "
            "columns of PKU-SafeRLHF do; take preference 'better'"
        )
    return form.read(table, preference)


def read_prompts(table: Table) -> list[Prompt | None]:
    """The prompts of a table: "prompt", or what precedes the responses, or "text".

    A row that holds none is None.

    Raises:
      UserError: unknown or ambiguous columns, or a value of a wrong type.
    """
    if "prompt" in table.columns:
        prompts = cells.each(table, "prompt", cells.text_or_messages)
        return [
            p if isinstance(p, str) else dialogues.open_question(p) for p in prompts
        ]
    form = _recognise(table, COMPLETIONS)
    if form is CHAT:
        chats = cells.each(table, "messages", dialogues.read_messages)
        return [dialogues.open_question(messages) for messages in chats]
    if form is None and _recognise(table, PAIRS) is None:
        if "text" not in table.columns:
            raise _unknown(table, "prompts", (*COMPLETIONS, *PAIRS, TEXT), "prompt; ")
        rows = _read_texts(table)
        texts = read_texts(table, "text")
        return [getattr(row, "prompt", "") or text for row, text in zip(rows, texts)]
    rows = read_completions(table)
    return [None if isinstance(row, Dropped) else row.prompt for row in rows]


def _recognise(table: Table, formats: Sequence[Format]) -> Format | None:
    found = [form for form in formats if set(form.columns) <= set(table.columns)]
    if len(found) > 1:
        raise UserError(
            f"{table.source} may be read in more than one way, as "
            + " or as ".join(f"{form.name} ({_listed(form)})" for form in found)
            + f": keep the columns of one of them (it has {', '.join(table.columns)})"
        )
    return found[0] if found else None


def _unknown(
    table: Table, wanted: str, formats: Sequence[Format], more: str = ""
) -> UserError:
    return UserError(
        f"{table.source} has no columns that hold {wanted}: {header(table)} "
        f"{', '.join(table.columns)}; rename them to one of these sets: {more}"
        + "; ".join(f"{_listed(form)} ({form.name})" for form in formats)
    )


def _listed(form: Format) -> str:
    return ", ".join(form.columns)


def _read_chat(table: Table) -> list[Completion | Dropped]:
    return [
        _completion(dialogues.split_response(messages), messages)
        for messages in cells.each(table, "messages", dialogues.read_messages)
    ]


def _read_responses(table: Table, column: str) -> list[Completion | Dropped]:
    rows: list[Completion | Dropped] = []
    prompts = cells.each(table, "prompt", cells.text_or_messages)
    responses = cells.each(table, column, cells.text_or_messages)
    for prompt, response in zip(prompts, responses):
        if isinstance(response, str):
            rows.append(Completion(prompt, response))
        else:
            whole = dialogues.join(prompt, response)
            rows.append(_completion(dialogues.split_response(whole), whole))
    return rows


def _read_instructions(
    table: Table, context: str, response: str
) -> list[Completion | Dropped]:
    instructions = read_texts(table, "instruction")
    inputs = cells.optional(table, context)
    rows: list[Completion | Dropped] = []
    for row, answer in enumerate(read_texts(table, response)):
        given = inputs[row]
        if given is not None and not isinstance(given, str):
            raise cells.wrong_type(table, row, context, "a string", given)
        template = ALPACA_WITH_INPUT if given and given.strip() else ALPACA
        prompt = template.format(instruction=instructions[row], input=given)
        rows.append(Completion(prompt, answer))
    return rows


def _read_texts(table: Table) -> list[Completion | Dropped]:
    return [
        _completion(dialogues.split_guanaco(text), text)
        if dialogues.is_guanaco(text)
        else Completion("", text)
        for text in read_texts(table, "text")
    ]


def _completion(split: tuple[Prompt, str] | str, whole: Prompt) -> Completion | Dropped:
    """The row of a dialogue that was split, or could not be."""
    return Dropped(whole, split) if isinstance(split, str) else Completion(*split)


CHAT = Format("chat", ("messages",), _read_chat)
COMPLETIONS = (
    CHAT,
    Format(
        "prompt and response",
        ("prompt", "response"),
        lambda table: _read_responses(table, "response"),
    ),
    Format(
        "prompt and completion",
        ("prompt", "completion"),
        lambda table: _read_responses(table, "completion"),
    ),
    Format(
        "alpaca",
        ("instruction", "output"),
        lambda table: _read_instructions(table, "input", "output"),
    ),
    Format(
        "dolly",
        ("instruction", "response"),
        lambda table: _read_instructions(table, "context", "response"),
    ),
)
PKU = Format(
    "PKU-SafeRLHF", ("prompt", "response_0", "response_1"), pair_formats.read_pku
)
PAIRS = (
    Format(
        "preferences or HH-RLHF", ("chosen", "rejected"), pair_formats.read_preferences
    ),
    PKU,
    Format(
        "UltraFeedback", ("instruction", "completions"), pair_formats.read_ultrafeedback
    ),
)
TEXT = Format("texts or guanaco", ("text",), _read_texts)
