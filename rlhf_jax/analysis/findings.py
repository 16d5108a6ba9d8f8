"""All that the analysis of a run found, in one value: what reports are made of."""

import json
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from rlhf_jax.analysis import drift
from rlhf_jax.analysis.anomalies import Anomaly, harmed_phases, onset
from rlhf_jax.analysis.compared import Comparison, compare
from rlhf_jax.analysis.evidence import Evidence
from rlhf_jax.analysis.overoptimization import (
    Best,
    Curve,
    Parting,
    best_phase,
    find_parting,
    fit_curve,
)
from rlhf_jax.analysis.samples import PhaseSamples
from rlhf_jax.analysis.statistics import Interval, Trend, mean_interval
from rlhf_jax.analysis.summary import summarize, trends

COLORED = 6  # answers shown token by token


class ColoredAnswer(NamedTuple):
    """An answer of the last phase, token by token.

    Attributes:
      prompt: its text.
      reward: the total.
      tokens: (text, log π − log π_ref in nats) of each.
    """

    prompt: str
    reward: float
    tokens: list[tuple[str, float]]


class Recommendation(NamedTuple):
    """The checkpoint to take.

    Attributes:
      phase: the best by `by`, before anything went wrong.
      low, high: 95 % of the bootstrap's choices lie between these phases.
      by: "judge/<name>", or "reward" where no judge was asked.
      reason: a sentence.
    """

    phase: int
    low: int
    high: int
    by: str
    reason: str


class Findings(NamedTuple):
    """What `AlignmentAnalyzer.findings` gives.

    Attributes:
      workdir, algorithm: of the run.
      num_samples: answers of each phase.
      summaries: phase -> `summary.summarize`, in the order of the phases.
      trends: name of a measure -> where it goes over the phases.
      steps: phase -> KL(π_phase ‖ π_next), nats a response, to the next phase here.
      comparisons: phase -> the baseline, the first phase, against it.
      weights: phase -> part -> relative change, see `weights.relative_change`.
      states: phase -> linear CKA of each layer with the reference.
      moves: the tokens that make the KL of the last phase.
      colored: answers of the last phase, token by token.
      anomalies: what is odd, all phases.
      onset: the first phase from which on something is wrong, or None.
      curves: "reward" and "judge/<name>" -> its fitted curve over √KL, where it could
        be fitted.
      partings: "judge/<name>" -> where it parts from the reward, if it does.
      best: "reward" and "judge/<name>" -> its best phase.
      recommendation: which checkpoint to take.
      skipped: phase -> why it could not be read.
    """

    workdir: str
    algorithm: str
    num_samples: int
    summaries: dict[int, dict[str, Any]]
    trends: dict[str, Trend]
    steps: dict[int, Interval]
    comparisons: dict[int, Comparison]
    weights: dict[int, dict[str, float]]
    states: dict[int, list[float]]
    moves: list[drift.TokenMove]
    colored: list[ColoredAnswer]
    anomalies: list[Anomaly]
    onset: int | None
    curves: dict[str, Curve]
    partings: dict[str, Parting]
    best: dict[str, Best]
    recommendation: Recommendation
    skipped: dict[int, str]


def make_findings(
    workdir: str | os.PathLike,
    config: ConfigDict,
    evidence: Evidence,
    anomalies: Sequence[Anomaly],
    decode: Callable[[Sequence[int]], str] | None,
    *,
    seed: int = 0,
) -> Findings:
    """Puts together what the evidence says.

    Args:
      workdir: the run's folder.
      config: its settings.
      evidence: of the phases looked at.
      anomalies: of the same phases.
      decode: token numbers to text; None where tokens are not known.
      seed: of the bootstrap and the permutation tests.
    """
    every = list(evidence.samples.values())
    first, last = every[0], every[-1]
    phases = [one.phase for one in every]
    names = [n for n in first.scores if n == "reward" or n.startswith("judge/")]
    values = {
        name: np.stack([one.scores[name] for one in every]).astype(np.float64)
        for name in names
    }
    partings = {
        name: find_parting(phases, values["reward"], gold, seed=seed)
        for name, gold in values.items()
        if name != "reward"
    }
    best = {name: best_phase(phases, x, seed=seed) for name, x in values.items()}
    wrong_from = onset(anomalies, phases)
    known = decode is not None and last.tokens is not None
    return Findings(
        workdir=str(workdir),
        algorithm=config.algorithm,
        num_samples=len(first.prompts),
        summaries={one.phase: summarize(one, seed=seed) for one in every},
        trends=trends(every, seed=seed),
        steps=_steps(evidence, seed),
        comparisons={one.phase: compare(first, one, seed=seed) for one in every[1:]},
        weights=evidence.weights,
        states={phase: x.tolist() for phase, x in evidence.states.items()},
        moves=drift.token_moves(last, lambda t: decode([t])) if known else [],
        colored=_colored(last, decode) if known else [],
        anomalies=list(anomalies),
        onset=wrong_from,
        curves=_curves(every, values),
        partings={name: found for name, found in partings.items() if found},
        best=best,
        recommendation=recommend(
            phases, values, wrong_from, harmed=harmed_phases(anomalies), seed=seed
        ),
        skipped=evidence.skipped,
    )


def recommend(
    phases: Sequence[int],
    values: Mapping[str, np.ndarray],
    wrong_from: int | None,
    *,
    harmed: Collection[int] = (),
    seed: int = 0,
) -> Recommendation:
    """The best phase by the first judge, or by the reward, before anything went wrong.

    Args:
      phases: K of them.
      values: "reward" and "judge/<name>" -> [K, N].
      wrong_from: the phase from which on something is wrong; it and later ones are
        never recommended.
      harmed: phases with harm of their own, which are not recommended either.
    """
    judges = [name for name in values if name != "reward"]
    by = judges[0] if judges else "reward"
    ends = max(phases) + 1 if wrong_from is None else wrong_from
    healthy = [k for k, p in enumerate(phases) if p < ends and p not in harmed] or [0]
    found = best_phase([phases[k] for k in healthy], values[by][healthy], seed=seed)
    what = f"the mean of the {by.replace('/', ' ')} is greatest there, {found.mean:.3f}"
    if found.earliest < found.phase:
        what += f", and from phase {found.earliest} on not measurably less"
    if wrong_from is not None:
        what += f"; phases from {wrong_from} on have gone wrong"
    return Recommendation(found.phase, found.low, found.high, by, what)


def as_json(value: Any) -> str:
    """Findings, or a part of them, as JSON; numbers that are not become null."""
    return json.dumps(plain(value), ensure_ascii=False, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """Named tuples, arrays and numpy's numbers as what JSON knows."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _steps(evidence: Evidence, seed: int) -> dict[int, Interval]:
    found = {}
    for phase, said in evidence.next_logprobs.items():
        kl = drift.sequence_kl(evidence.samples[phase].logprobs, said)
        found[phase] = mean_interval(kl, seed=seed)
    return found


def _curves(
    every: Sequence[PhaseSamples], values: Mapping[str, np.ndarray]
) -> dict[str, Curve]:
    if any(one.logprobs is None for one in every):
        return {}
    kl = [drift.sequence_kl(one.logprobs, one.ref_logprobs).mean() for one in every]
    distances = np.sqrt(np.maximum(kl, 0.0))
    fitted = {name: fit_curve(distances, x.mean(axis=1)) for name, x in values.items()}
    return {name: curve for name, curve in fitted.items() if curve}


def _colored(
    samples: PhaseSamples, decode: Callable[[Sequence[int]], str]
) -> list[ColoredAnswer]:
    """The answers that are farthest from the reference."""
    kl = drift.sequence_kl(samples.logprobs, samples.ref_logprobs)
    rows = np.argsort(-kl, kind="stable")[:COLORED].tolist()
    return [
        ColoredAnswer(
            samples.prompts[row],
            float(samples.scores["reward"][row]),
            drift.colored_tokens(samples, row, decode),
        )
        for row in rows
    ]
