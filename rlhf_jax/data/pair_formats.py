"""How the pairs of each format are read: one result a row, in the table's order."""

from collections.abc import Iterator
from typing import Any

from rlhf_jax.data import cells, dialogues
from rlhf_jax.data.dialogues import Prompt
from rlhf_jax.data.rows import Dropped, Pair
from rlhf_jax.data.tables import Table, is_file, read_texts
from rlhf_jax.errors import UserError


def read_preferences(table: Table, _: str) -> list[Pair | Dropped]:
    """Chosen and rejected: answers to a prompt, or whole dialogues without one."""
    sides = [
        cells.each(table, name, cells.text_or_messages)
        for name in ("chosen", "rejected")
    ]
    prompts: list[Prompt | None] = [None] * table.rows
    if "prompt" in table.columns:
        prompts = cells.each(table, "prompt", cells.text_or_messages)
    hh = "prompt" not in table.columns and any(
        isinstance(side[0], str) and dialogues.is_hh(side[0]) for side in sides
    )
    labels = list(_labels(table))
    rows: list[Pair | Dropped] = []
    for row, (prompt, chosen, rejected) in enumerate(zip(prompts, *sides)):
        if isinstance(chosen, str) != isinstance(rejected, str):
            raise UserError(
                f"{table.place(row)}: 'chosen' and 'rejected' should be of one kind, "
                "two strings or two lists of messages"
            )
        if not isinstance(chosen, str):
            split = dialogues.split_pair(
                dialogues.join(prompt, chosen), dialogues.join(prompt, rejected)
            )
        elif hh:
            split = _split_hh(table, row, chosen, rejected)
        else:
            split = "" if prompt is None else prompt, chosen, rejected
        if isinstance(split, str):
            rows.append(Dropped(prompt or chosen, split))
        else:
            rows.append(Pair(*split, *labels[row]))
    return rows


def _split_hh(
    table: Table, row: int, chosen: str, rejected: str
) -> tuple[str, str, str] | str:
    """The prompt and both responses, or the reason why there are none."""
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if dialogues.ends_with_assistant(side):
            continue
        if not is_file(table.source):  # nobody can mend a row on a hub
            return dialogues.NO_ANSWER_AT_END
        raise UserError(
            f"{table.place(row)}: the dialogue in {name!r} does not end with a turn of "
            f"the assistant: end it with {dialogues.HH_ASSISTANT + ' ...'!r}, or drop "
            "the row"
        )
    return dialogues.split_hh(chosen, rejected) or "no shared prompt"


def _labels(
    table: Table,
) -> Iterator[tuple[float, str, bool | None, bool | None, float | None]]:
    """What else a file of preferences may say of each pair."""
    names = ("probability", "domain", "chosen_safe", "rejected_safe", "margin")
    for row, (probability, domain, *safe, margin) in enumerate(
        zip(*(cells.optional(table, name) for name in names))
    ):
        yield (
            1.0
            if probability in (None, "")
            else cells.fraction(table, row, names[0], probability),
            "" if domain is None else str(domain),
            *(
                cells.truth(table, row, name, value)
                for name, value in zip(names[2:4], safe)
            ),
            cells.number(table, row, names[4], margin),
        )


def read_pku(table: Table, preference: str) -> list[Pair | Dropped]:
    """PKU-SafeRLHF: the better or the safer response is the chosen one."""
    column = f"{preference}_response_id"
    if column not in table.columns:
        raise UserError(
            f"{table.source} has no column {column!r} for preference {preference!r}: "
            f"it has {', '.join(table.columns)}"
        )
    prompts = read_texts(table, "prompt")
    responses = [read_texts(table, f"response_{side}") for side in (0, 1)]
    safe = [cells.optional(table, f"is_response_{side}_safe") for side in (0, 1)]
    rows: list[Pair | Dropped] = []
    for row, choice in enumerate(table.read(column)):
        if str(choice) not in ("0", "1"):
            raise cells.wrong_type(table, row, column, "0 or 1", choice)
        better = int(choice)
        order = (better, 1 - better)
        rows.append(
            Pair(
                prompts[row],
                *(responses[side][row] for side in order),
                1.0,
                "",
                *(
                    cells.truth(table, row, f"is_response_{side}_safe", safe[side][row])
                    for side in order
                ),
            )
        )
    return rows


def read_ultrafeedback(table: Table, _: str) -> list[Pair | Dropped]:
    """The best rated completion against the worst; other ones are not used."""
    instructions = read_texts(table, "instruction")
    rows: list[Pair | Dropped] = []
    for row, completions in enumerate(table.read("completions")):
        if not isinstance(completions, list):
            raise cells.wrong_type(table, row, "completions", "a list", completions)
        rated = [_rated(table, row, item) for item in completions]
        prompt = instructions[row]
        if len(rated) < 2:
            rows.append(Dropped(prompt, "fewer than two responses"))
            continue
        best, worst = max(rated, key=_score), min(rated, key=_score)
        if best[0] == worst[0]:
            rows.append(Dropped(prompt, "tie"))
        else:
            rows.append(Pair(prompt, best[1], worst[1]))
    return rows


def _score(rated: tuple[float, str]) -> float:
    return rated[0]


def _rated(table: Table, row: int, item: Any) -> tuple[float, str]:
    """(score, response) of one completion of UltraFeedback."""
    fields = item if isinstance(item, dict) else {}
    names = ("overall_score", "fine-grained_score", "score")
    score = next((fields[name] for name in names if fields.get(name) is not None), None)
    if not isinstance(fields.get("response"), str) or not isinstance(
        score, int | float
    ):
        raise UserError(
            f"{table.place(row)}: each of 'completions' should be an object with a "
            f"response (text) and one of {', '.join(names)} (a number)"
        )
    return float(score), fields["response"]
