"""Rewards that are Python functions, on many hosts: each scores its share of the rows.

A model's scores are computed on the whole mesh already.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rlhf_jax import hosts
from rlhf_jax.errors import UserError
from rlhf_jax.rewards.ensemble import Detailed

PROBLEM, SCORES, DETAIL = "problem", "scores", "detail/"  # of what is sent


def score_share(
    score: Callable[..., Detailed],
    prompts: Sequence[str],
    responses: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> Detailed:
    """Scores B rows, those of each process by that process.

    Shares are next to each other and differ by one row at most; a process without rows
    calls nothing.

    Args:
      score: `(prompts, responses, columns) -> Detailed`, checked: [n] for n rows.
      prompts: B prompts.
      responses: B responses.
      columns: B values each.

    Returns:
      The scores [B] and details [B] of all rows, on every process.

    Raises:
      UserError: on every process, what was wrong on one of them.
    """
    count, number = jax.process_count(), jax.process_index()
    if count == 1:
        return score(prompts, responses, columns)
    # All of them: what is decoded when it is asked for is fetched by all processes.
    responses = list(responses)
    rows = slice(*(len(prompts) * i // count for i in (number, number + 1)))
    mine = {name: values[rows] for name, values in columns.items()}
    message = {}
    try:
        if rows.start < rows.stop:
            message = _named(score(prompts[rows], responses[rows], mine))
    except UserError as error:
        where = f"process {number} of {count}, rows {rows.start} to {rows.stop - 1}"
        message = {PROBLEM: np.array(f"{error} ({where})")}
    parts = [_unpack(part) for part in hosts.exchange(_pack(message))]
    for part in parts:
        if PROBLEM in part:
            raise UserError(str(part[PROBLEM]))
    return _joined([part for part in parts if part])


def _named(found: Detailed) -> dict[str, np.ndarray]:
    details = {DETAIL + name: np.asarray(x) for name, x in found.details.items()}
    return {SCORES: found.scores} | details


def _joined(parts: Sequence[Mapping[str, np.ndarray]]) -> Detailed:
    """All rows in order, of the processes that have some."""
    if not parts:
        return Detailed(np.zeros(0, np.float32), {})
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    scores = whole.pop(SCORES)
    return Detailed(scores, {k.removeprefix(DETAIL): v for k, v in whole.items()})


def _pack(message: Mapping[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **message)
    return file.getvalue()


def _unpack(message: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(message)) as arrays:  # arrays alone, nothing that can run
        return dict(arrays)
