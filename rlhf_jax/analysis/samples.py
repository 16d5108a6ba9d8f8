"""What the policy of one phase answers, as everything else of the analysis takes it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class PhaseSamples(NamedTuple):
    """One phase's answers: the same prompts and keys in every phase, so rows are pairs.

    The arrays of tokens are None where only the texts of a run are left.

    Attributes:
      phase: after which the policy was saved; 0 is before training.
      prompts: N texts.
      responses: N texts, without EOS.
      tokens: [N, T] int32.
      mask: [N, T] bool, true on the tokens of a response, its EOS included.
      logprobs: [N, T] float32, nats, of the policy on its own tokens; 0 under the mask.
      ref_logprobs: [N, T] float32, nats, of the reference on the same tokens.
      finished: [N] bool, ended with EOS.
      scores: "reward", the total, "reward/<name>" where there are several, and
        "judge/<name>" -> [N] float32.
    """

    phase: int
    prompts: list[str]
    responses: list[str]
    tokens: np.ndarray | None
    mask: np.ndarray | None
    logprobs: np.ndarray | None
    ref_logprobs: np.ndarray | None
    finished: np.ndarray
    scores: dict[str, np.ndarray]


def from_rows(
    phase: int, rows: Sequence[Mapping[str, Any]], *, count: int
) -> PhaseSamples | None:
    """The first held-out responses of a phase, as `run_files.read_responses` has them.

    None where the phase has none, or they were not scored.
    """
    rows = [row for row in rows if row["split"] == "heldout"][:count]
    if not rows or not {"reward", "finish"} <= set(rows[0]):
        return None
    names = [n for n in rows[0] if n.partition("/")[0] in ("reward", "judge")]
    return PhaseSamples(
        phase,
        [row["prompt"] for row in rows],
        [row["response"] for row in rows],
        *(None, None, None, None),
        np.array([row["finish"] == "eos" for row in rows]),
        {name: np.array([row[name] for row in rows], np.float32) for name in names},
    )
