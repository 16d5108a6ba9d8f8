"""What is done to rows before anyone learns from them, with every loss counted.

In this order: the rows of the split are taken; unusable ones, ties, empty and short
responses and duplicates go; prompts are written by the chat template, or the template
of plain ones, and lose their beginning if they do not fit; what is also in the held-out
split goes.

Counts are a dict of reason -> rows dropped, then "kept", and last "prompts cut": how
many of those kept had their prompt shortened. Where a data set has a single split, the
rows that the other side has of it are counted too.
"""

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from rlhf_jax.data import dialogues
from rlhf_jax.data.dialogues import Prompt
from rlhf_jax.data.rows import Completion, Dropped, Pair
from rlhf_jax.data.splits import split_rows
from rlhf_jax.data.tables import Table
from rlhf_jax.data.tokenizer import encode_texts, start_tokens
from rlhf_jax.errors import UserError

Row = Completion | Pair
Counts = dict[str, int]


class Cleaning(NamedTuple):
    """What to do to the rows of a source; as it stands, only what is always done."""

    min_characters: int = 0  # of each response, without the spaces around it
    max_tokens: int | None = None  # of prompt + response + EOS; None cuts nothing
    prompt_template: str = ""  # around plain prompts: "USER: {prompt} ASSISTANT:"
    stratify: str = ""  # a column: a file holds out one tenth of its every value
    apart_from: Sequence[Row] = ()  # held-out rows; what is among them is dropped


AS_IT_IS = Cleaning()

# What helps where all rows were dropped for one reason.
CURES = {
    "tie": "give pairs whose two responses differ",
    "empty response": "give responses that say something",
    dialogues.NO_ANSWER: "give dialogues with a turn of the assistant",
    dialogues.NO_ANSWER_AT_END: "give dialogues that end with the assistant's turn",
    dialogues.NO_QUESTION: "give dialogues in which the user says something",
}


def cleaning_of(config: ConfigDict) -> Cleaning:
    """What a run's `data` and `sequence_tokens` ask for."""
    return Cleaning(
        min_characters=config.data.min_characters,
        max_tokens=config.sequence_tokens,
        prompt_template=config.data.get("prompt_template", ""),
    )


def prepare_rows(
    rows: Sequence[Row | Dropped],
    table: Table,
    split: str | None,
    tokenizer: Any,
    cleaning: Cleaning,
) -> tuple[list[Row], Counts]:
    """The rows of a split, ready to be encoded: their prompts are strings.

    Args:
      rows: one for each row of the table, from `formats`.
      table: where they come from.
      split: as in `splits.open_split`.
      tokenizer: for chat messages and for `max_tokens`; None will do without them.
      cleaning: what to do.

    Raises:
      UserError: nothing is left, or chat messages that no template writes.
    """
    keys = [split_key(row) for row in rows]
    numbers = split_rows(table, split, keys, stratify=cleaning.stratify)
    places = [table.place(number) for number in numbers]
    drafts = drop_faulty([rows[number] for number in numbers], cleaning.min_characters)
    template = cleaning.prompt_template
    written = [
        row if isinstance(row, Dropped) else _write(row, tokenizer, place, template)
        for row, place in zip(drafts, places)
    ]
    fitting = written
    if cleaning.max_tokens is not None:
        fitting = cut_prompts(
            *(drafts, written, places, tokenizer, cleaning.max_tokens),
            template=template,
        )
    ready = drop_leaks(fitting, cleaning.apart_from)
    kept = [row for row in ready if not isinstance(row, Dropped)]
    counts = collections.Counter(r.reason for r in ready if isinstance(r, Dropped))
    if not kept:
        raise _nothing_left(table, split, places, counts)
    if table.unsplit and split is not None:
        other = "held-out" if split == "train" else "training"
        counts[f"in the {other} part of its only split"] = table.rows - len(numbers)
    counts["kept"] = len(kept)
    if cleaning.max_tokens is not None:
        counts["prompts cut"] = sum(
            old.prompt != new.prompt
            for old, new in zip(written, ready)
            if not isinstance(new, Dropped)
        )
    return kept, dict(counts)


def split_key(row: Row | Dropped) -> str:
    """What tells the split of a row: its prompt, or its response if it has none."""
    prompt = dialogues.plain_text(row.prompt)
    if prompt.strip() or isinstance(row, Dropped):
        return prompt
    return responses(row)[0]


def responses(row: Row) -> tuple[str, ...]:
    """The response of a completion, or both of a pair."""
    if isinstance(row, Pair):
        return row.chosen, row.rejected
    return (row.response,)


def drop_faulty(
    rows: Sequence[Row | Dropped], min_characters: int = 0
) -> list[Row | Dropped]:
    """Drops ties, empty and short responses, and rows that came before.

    Spaces around a text count for nothing. Two pairs are the same if their three texts
    are, and two completions if their two are.
    """
    seen: set[tuple] = set()
    result: list[Row | Dropped] = []
    for row in rows:
        if not isinstance(row, Dropped):
            texts = [text.strip() for text in responses(row)]
            same = (dialogues.plain_text(row.prompt).strip(), *texts)
            reason = _fault(texts, min_characters)
            if not reason and same in seen:
                reason = "duplicate"
            seen.add(same)
            row = Dropped(row.prompt, reason) if reason else row
        result.append(row)
    return result


def cut_prompts(
    drafts: Sequence[Row | Dropped],
    written: Sequence[Row | Dropped],
    places: Sequence[str],
    tokenizer: Any,
    max_tokens: int,
    *,
    template: str = "",
) -> list[Row | Dropped]:
    """Shortens the prompts that do not fit with their longest response and EOS.

    A dialogue loses whole turns from its start, as many as it must; what is still too
    long loses the first tokens of what is said first. A template stays whole. A row
    whose responses leave no room for a prompt is dropped. A row without a prompt stays
    as it is: there is nothing to cut.

    Args:
      drafts: rows as `formats` gives them, with messages.
      written: the same rows with their prompts as strings.
      places: of each row, for errors.
      tokenizer: a transformers tokenizer.
      max_tokens: at most so many tokens.
      template: what the strings were written with.
    """
    live = [row for row in written if not isinstance(row, Dropped)]
    texts = [text for row in live for text in (row.prompt, *responses(row))]
    counted = iter(map(len, encode_texts(tokenizer, texts)))
    spare = max_tokens - len(start_tokens(tokenizer)) - 1  # 1 for EOS
    result: list[Row | Dropped] = []
    for draft, row, place in zip(drafts, written, places):
        if not isinstance(row, Dropped):
            size = next(counted)
            room = spare - max(next(counted) for _ in responses(row))
            if row.prompt and size > room:
                prompt = shorten_prompt(draft.prompt, room, tokenizer, place, template)
                row = (
                    row._replace(prompt=prompt)
                    if prompt
                    else Dropped(row.prompt, "response too long")
                )
        result.append(row)
    return result


def shorten_prompt(
    prompt: Prompt, room: int, tokenizer: Any, place: str = "", template: str = ""
) -> str | None:
    """The prompt as a string of at most `room` tokens; None if that leaves no word."""

    def excess() -> int:
        text = dialogues.render(prompt, tokenizer, place, template)
        return len(encode_texts(tokenizer, [text])[0]) - room

    while (over := excess()) > 0:
        shorter = dialogues.drop_first_turns(prompt)
        if shorter is None:
            break
        prompt = shorter
    while over > 0:
        words = dialogues.first_words(prompt)
        ids = encode_texts(tokenizer, [words])[0]
        if over >= len(ids):
            return None
        tail = tokenizer.decode(ids[over:], clean_up_tokenization_spaces=False)
        tail = tail.lstrip("\ufffd")  # the cut may go through a character
        # Some tokenizers add to what they decode; it must get shorter all the same.
        words = tail if len(tail) < len(words) else words[1:]
        prompt = dialogues.with_first_words(prompt, words)
        over = excess()
    return dialogues.render(prompt, tokenizer, place, template)


def drop_leaks(
    rows: Sequence[Row | Dropped], heldout: Sequence[Row]
) -> list[Row | Dropped]:
    """Drops the rows whose prompt, or a whole text of theirs, is in the held-out rows.

    Prompts are strings. Empty ones have nothing in common.
    """
    prompts = {row.prompt.strip() for row in heldout} - {""}
    texts = {text for row in heldout for text in _whole_texts(row)}
    return [
        Dropped(row.prompt, "in the held-out split")
        if not isinstance(row, Dropped)
        and (row.prompt.strip() in prompts or not texts.isdisjoint(_whole_texts(row)))
        else row
        for row in rows
    ]


def _whole_texts(row: Row) -> set[str]:
    return {(row.prompt + response).strip() for response in responses(row)}


def _fault(texts: Sequence[str], min_characters: int) -> str:
    """What is wrong with the responses of a row, "" if nothing is."""
    if not all(texts):
        return "empty response"
    if len(texts) > 1 and texts[0] == texts[1]:
        return "tie"
    if min(map(len, texts)) < min_characters:
        return "response too short"
    return ""


def _write(row: Row, tokenizer: Any, place: str, template: str) -> Row:
    text = dialogues.render(row.prompt, tokenizer, place, template)
    return row._replace(prompt=text)


def _nothing_left(
    table: Table, split: str | None, places: Sequence[str], reasons: Counts
) -> UserError:
    """The error of a split all of whose rows were dropped, or that has none."""
    found, cure = "too few prompts to hold a tenth out", ""
    if places:
        found = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        found += f", from {places[0]} on"
    if len(reasons) == 1:
        cure = CURES.get(*reasons, "")
    return UserError(
        f"nothing is left for {split or 'training'} of the {table.rows} rows of "
        f"{table.source} ({found}): {cure or 'give it more rows, or ask less of them'}"
    )
