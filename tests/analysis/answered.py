"""Samples of a phase in which every token, probability and score is given."""

import numpy as np

from rlhf_jax.analysis.samples import PhaseSamples


def samples_of(responses, rewards, *, phase=0, rows=None, judges=None, **fields):
    """Answers to "prompt 0", "prompt 1", ...

    Args:
      responses: N texts.
      rewards: N numbers.
      phase: its number.
      rows: N lists of (token, log π, log π_ref), of any length; None: texts alone.
      judges: name -> N numbers.
      **fields: of `PhaseSamples`, in place of those made here.
    """
    N = len(responses)
    arrays = dict.fromkeys(("tokens", "mask", "logprobs", "ref_logprobs"))
    if rows is not None:
        arrays = padded(rows)
    scores = {"reward": rewards} | {f"judge/{n}": x for n, x in (judges or {}).items()}
    made = {
        "phase": phase,
        "prompts": [f"prompt {row}" for row in range(N)],
        "responses": list(responses),
        **arrays,
        "finished": np.ones(N, bool),
        "scores": {name: np.array(x, np.float32) for name, x in scores.items()},
    }
    return PhaseSamples(**made | fields)


def padded(rows):
    """The arrays [N, T] of lists of (token, log π, log π_ref)."""
    shape = len(rows), max(map(len, rows))
    tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    logprobs, ref_logprobs = np.zeros((2, *shape), np.float32)
    for i, row in enumerate(rows):
        for t, (token, own, other) in enumerate(row):
            tokens[i, t], mask[i, t] = token, True
            logprobs[i, t], ref_logprobs[i, t] = own, other
    return {
        "tokens": tokens,
        "mask": mask,
        "logprobs": logprobs,
        "ref_logprobs": ref_logprobs,
    }


def drawn(seed, *, phase=0, N=12, T=9, vocabulary=7):
    """Answers of one to T tokens with any log-probabilities, texts and scores."""
    rng = np.random.default_rng(seed)
    rows = [
        [
            (int(rng.integers(vocabulary)), -rng.exponential(), -rng.exponential())
            for _ in range(rng.integers(1, T + 1))
        ]
        for _ in range(N)
    ]
    texts = [" ".join(f"w{token}" for token, *_ in row) for row in rows]
    judges = {"kind": rng.normal(size=N)}
    rewards = rng.normal(size=N)
    finished = rng.random(N) < 0.5
    return samples_of(
        texts, rewards, phase=phase, rows=rows, judges=judges, finished=finished
    )
