"""How long the texts of a data set are, and what choices have to do with length.

Dimension key: N rows, or pairs of chosen and rejected.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from rlhf_jax.data import dialogues
from rlhf_jax.data.cleaning import Row
from rlhf_jax.data.tokenizer import encode_texts
from rlhf_jax.evaluation import pair_analysis

Fields = dict[str, list[str]]  # what rows hold by its name: a text a row
Lengths = dict[str, dict[str, np.ndarray]]  # unit -> field -> [N]


def measure(fields: Fields, tokenizer: Any = None) -> Lengths:
    """Lengths in characters, words and, with a tokenizer, tokens (no BOS, no EOS).

    Of rows with several texts, "whole" is the prompt with its longest response.
    """
    count: dict[str, Callable[[list[str]], list[int]]] = {
        "characters": lambda texts: [len(text) for text in texts],
        "words": lambda texts: [len(text.split()) for text in texts],
    }
    if tokenizer is not None:
        count["tokens"] = lambda texts: [
            len(ids) for ids in encode_texts(tokenizer, texts)
        ]
    lengths: Lengths = {}
    for unit, measured in count.items():
        lengths[unit] = {n: np.array(measured(t), np.int64) for n, t in fields.items()}
        responses = [v for name, v in lengths[unit].items() if name != "prompt"]
        if "prompt" in fields and responses:
            whole = lengths[unit]["prompt"] + np.max(responses, axis=0)
            lengths[unit]["whole"] = whole
    return lengths


def summarise_lengths(lengths: Lengths, max_tokens: int | None) -> dict[str, Any]:
    """Mean, median, ends and, of tokens, the share with EOS beyond the limit."""
    told: dict[str, Any] = {}
    for unit, fields in lengths.items():
        for name, values in fields.items():
            if not len(values):
                continue
            low, median, high = np.quantile(values, (0.05, 0.5, 0.95))
            found = {
                "mean": float(values.mean()),
                "5%": float(low),
                "median": float(median),
                "95%": float(high),
                "max": int(values.max()),
            }
            if unit == "tokens" and max_tokens is not None:
                found["beyond"] = float(np.mean(values + 1 > max_tokens))
            told.setdefault(unit, {})[name] = found
    return told


def count_turns(row: Row, kind: str = "") -> int:
    """The turns of a dialogue, its response among them; 0 of a row that is none."""
    answered = 0 if kind == "prompts" else 1
    if not isinstance(row.prompt, str):
        said = [m for m in row.prompt if m.role not in ("system", "developer")]
        return len(said) + answered
    marks: tuple[str, ...] = ()
    if dialogues.is_hh(row.prompt):
        marks = dialogues.HH_HUMAN, dialogues.HH_ASSISTANT
    elif dialogues.is_guanaco(row.prompt):
        marks = dialogues.GUANACO_HUMAN, dialogues.GUANACO_ASSISTANT
    # such a prompt ends with "Assistant:", the start of the response's turn
    open_turn = bool(marks) and not answered and row.prompt.rstrip().endswith(marks[1])
    return sum(row.prompt.count(mark) for mark in marks) - open_turn


def summarise_turns(turns: np.ndarray) -> dict[str, Any]:
    """Of the rows that are dialogues: how many, and how many turns they have."""
    found = turns[turns > 0]
    if not len(found):
        return {"dialogues": 0}
    numbers, counts = np.unique(found, return_counts=True)
    return {
        "dialogues": len(found),
        "mean": float(found.mean()),
        "median": float(np.median(found)),
        "max": int(found.max()),
        "rows_by_turns": {int(n): int(c) for n, c in zip(numbers, counts)},
    }


def length_bias(chosen: np.ndarray, rejected: np.ndarray) -> dict[str, Any]:
    """What the choices have to do with length.

    point_biserial is Pearson's correlation of length with being chosen (1 or 0) over
    all 2·N responses.

    Args:
      chosen: [N] lengths.
      rejected: [N] lengths.

    Returns:
      longer_wins: accuracy of that rule, equal lengths half, with Wilson's interval;
      mean_difference with its 95 % interval, and the counts behind them.
    """
    difference = np.asarray(chosen, np.float64) - rejected
    rule = pair_analysis.accuracy(difference)
    mean = float(difference.mean())
    n = len(difference)
    error = float(difference.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    is_chosen = np.repeat([1.0, 0.0], len(difference))
    r = pair_analysis.pearson(is_chosen, np.concatenate([chosen, rejected]))
    return {
        "pairs": len(difference),
        "chosen_longer": int((difference > 0).sum()),
        "chosen_shorter": int((difference < 0).sum()),
        "equal": int((difference == 0).sum()),
        "longer_wins": {"value": rule.value, "low": rule.low, "high": rule.high},
        "mean_difference": {
            "value": mean,
            "low": finite(mean - 1.96 * error),
            "high": finite(mean + 1.96 * error),
        },
        "median_difference": float(np.median(difference)),
        "point_biserial": finite(r),
    }


def finite(value: float) -> float | None:
    """A number as JSON takes it, which knows no nan."""
    return float(value) if math.isfinite(value) else None
