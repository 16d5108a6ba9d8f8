"""One phase in figures, and where each figure goes over the phases."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax.analysis.compared import measures
from rlhf_jax.analysis.drift import token_kl
from rlhf_jax.analysis.samples import PhaseSamples
from rlhf_jax.analysis.signals import surprise
from rlhf_jax.analysis.statistics import Interval, Trend, mean_interval, trend
from rlhf_jax.text_signals import distinct, near_copies, repeated_share

QUANTILES = (5, 25, 50, 75, 95)
SHARES = ("finished", "repeated", "near_copies")
SHOWN = 5  # texts of each phase


def series(samples: PhaseSamples) -> dict[str, np.ndarray]:
    """All that is known of each answer, by name, [N] float64.

    Those of `compared.measures`, and of `signals.signals_of` "repeated", "near_copies"
    and "surprise"; with tokens also "kl_k3", see `drift.token_kl`.
    """
    found = measures(samples)
    found["repeated"] = np.array([repeated_share(r) for r in samples.responses])
    found["near_copies"] = np.asarray(
        near_copies(samples.responses, samples.prompts), np.float64
    )
    if samples.logprobs is not None:
        pair = samples.logprobs, samples.ref_logprobs
        found["kl_k3"] = token_kl(*pair, samples.mask)
        said = surprise(samples.ref_logprobs, samples.mask)
        found["surprise"] = np.nan_to_num(said)  # an answer without a token: none
    return found


def summarize(samples: PhaseSamples, *, seed: int = 0) -> dict[str, Any]:
    """The figures of one phase.

    Returns:
      phase, num_samples, mean_reward, std_reward, min_reward, max_reward; quantiles,
      of the reward by per cent; means, name -> Interval of each of `series`;
      distinct_1 and distinct_2, of all answers together; samples, the first five.
    """
    reward = np.asarray(samples.scores["reward"], np.float64)
    return {
        "phase": samples.phase,
        "num_samples": len(reward),
        "mean_reward": float(reward.mean()),
        "std_reward": float(reward.std()),
        "min_reward": float(reward.min()),
        "max_reward": float(reward.max()),
        "quantiles": {
            q: float(x) for q, x in zip(QUANTILES, np.percentile(reward, QUANTILES))
        },
        "means": {
            name: _bounded(name, mean_interval(values, seed=seed))
            for name, values in series(samples).items()
        },
        "distinct_1": distinct(samples.responses, 1),
        "distinct_2": distinct(samples.responses, 2),
        "samples": [
            {"prompt": prompt, "response": response, "reward": float(score)}
            for prompt, response, score in zip(
                samples.prompts[:SHOWN], samples.responses, reward
            )
        ],
    }


def _bounded(name: str, found: Interval) -> Interval:
    """An interval of a share ends at 0 and 1."""
    if name not in SHARES:
        return found
    return Interval(found.mean, max(found.low, 0.0), min(found.high, 1.0))


def trends(samples: Sequence[PhaseSamples], *, seed: int = 0) -> dict[str, Trend]:
    """Where each of `series` goes over the phases; none for fewer than two phases."""
    if len(samples) < 2:
        return {}
    columns = [series(one) for one in samples]
    phases = [one.phase for one in samples]
    shared = [name for name in columns[0] if all(name in c for c in columns)]
    return {
        name: trend(phases, np.stack([c[name] for c in columns]), seed=seed)
        for name in shared
    }
