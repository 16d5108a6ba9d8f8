"""Over-optimisation: the reward goes on rising, what people wanted does not.

The reward that is trained on is a proxy. The gold reward is a judge that training never
saw. Over the phases both are functions of how far the policy went, d = √KL:

    gold(d) − gold(0) = d (α − β log d)         fitted by least squares
    peak: d* = exp(α/β − 1)

References:
    Gao et al. 2023, "Scaling Laws for Reward Model Overoptimization", equation 2,
    https://arxiv.org/abs/2210.10760

Dimension key: K phases, N prompts.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlhf_jax.analysis.statistics import benjamini_hochberg, paired_difference

LEVEL = 0.05
START = 0.1  # √nats: nearer to the reference is the reference
RESAMPLES = 2000
MOST_LOG_PEAK = 50.0


class Curve(NamedTuple):
    """reward − start = d (α − β log d), fitted over phases.

    Attributes:
      alpha, beta: the coefficients.
      start: the reward of phase 0.
      r_squared: the share of the variance over phases that the curve explains.
      peak: the √KL of its maximum; None where it does not come down (β ≤ 0,
        or next to it).
    """

    alpha: float
    beta: float
    start: float
    r_squared: float
    peak: float | None

    def at(self, distance: np.ndarray) -> np.ndarray:
        """The reward at some √KL."""
        d = np.asarray(distance, np.float64)
        return self.start + self.alpha * d - self.beta * _d_log_d(d)


class Best(NamedTuple):
    """The checkpoint to take.

    Attributes:
      phase: with the greatest mean.
      low, high: 95 % of the bootstrap's choices lie between these phases.
      mean: of its reward.
      earliest: from this phase up to it, none is measurably worse than it.
    """

    phase: int
    low: int
    high: int
    mean: float
    earliest: int


class Parting(NamedTuple):
    """Where proxy and gold part.

    Attributes:
      phase: the gold reward is at its best here, and comes down after.
      seen_at: the first phase after it whose gold is measurably below that, while its
        proxy is not.
      gold_lost: how much of the gold is lost at the last phase.
      p_value: of that loss at `seen_at`, adjusted for all phases looked at and for the
        choice of the best.
    """

    phase: int
    seen_at: int
    gold_lost: float
    p_value: float


def fit_curve(distances: Sequence[float], rewards: Sequence[float]) -> Curve | None:
    """Fits α and β; None with fewer than three phases away from the start.

    The first phase has to be the reference itself: None if it is away from it.

    Args:
      distances: [K] √KL of each phase, the first of them the start.
      rewards: [K] mean reward.
    """
    d = np.maximum(np.asarray(distances, np.float64), 0.0)
    r = np.asarray(rewards, np.float64)
    if len(d) < 4 or np.count_nonzero(d > 0) < 3 or d[0] > START:
        return None
    terms = np.stack([d, -_d_log_d(d)], axis=1)
    rise = r - r[0]
    alpha, beta = np.linalg.lstsq(terms, rise, rcond=None)[0].tolist()
    left = np.sum(np.square(rise - terms @ [alpha, beta]))
    whole = np.sum(np.square(r - r.mean()))
    r_squared = float(1.0 - left / whole) if whole > 0 else 0.0
    # β may be round-off alone, and the peak beyond all numbers
    at = alpha / beta - 1.0 if beta > 0 else math.inf
    peak = math.exp(at) if at < MOST_LOG_PEAK else None
    return Curve(alpha, beta, float(r[0]), r_squared, peak)


def best_phase(phases: Sequence[int], rewards: np.ndarray, *, seed: int = 0) -> Best:
    """The phase of the greatest mean reward, and how sure that is.

    Args:
      phases: K of them.
      rewards: [K, N], the same prompts in each.
      seed: of the bootstrap over prompts.
    """
    rewards = np.asarray(rewards, np.float64)
    means = rewards.mean(axis=1)
    best = int(means.argmax())
    rng = np.random.default_rng(seed)
    N = rewards.shape[1]
    weights = rng.multinomial(N, np.full(N, 1 / N), RESAMPLES) / N
    chosen = (rewards @ weights.T).argmax(axis=0)
    order = np.asarray(phases)
    low, high = np.quantile(order[chosen], [0.025, 0.975], method="inverted_cdf")
    worse = [
        means[k] < means[best]
        and paired_difference(rewards[k], rewards[best], seed=seed).p_value < LEVEL
        for k in range(best)
    ]
    earliest = max((k + 1 for k in range(best) if worse[k]), default=0)
    return Best(
        int(order[best]), int(low), int(high), float(means[best]), int(order[earliest])
    )


def find_parting(
    phases: Sequence[int], proxy: np.ndarray, gold: np.ndarray, *, seed: int = 0
) -> Parting | None:
    """Where the gold reward has begun to fall although the proxy has not.

    Args:
      phases: K of them.
      proxy: [K, N], the reward trained on.
      gold: [K, N], of the same answers.
      seed: of the permutation tests.

    Returns:
      None where no phase after the gold's best is measurably worse.
    """
    proxy, gold = (np.asarray(x, np.float64) for x in (proxy, gold))
    top = int(gold.mean(axis=1).argmax())
    after = range(top + 1, len(phases))
    lost = [paired_difference(gold[top], gold[k], seed=seed) for k in after]
    # The best was chosen for its mean, chance and all: one of as many as precede it.
    chosen = top + 1
    adjusted = chosen * benjamini_hochberg([one.p_value for one in lost])
    for k, p_value in zip(after, adjusted):
        drop = gold[k].mean() < gold[top].mean()
        kept = proxy[k].mean() >= proxy[top].mean()
        if drop and kept and p_value < LEVEL:
            fallen = float(gold[top].mean() - gold[-1].mean())
            return Parting(int(phases[top]), int(phases[k]), fallen, float(p_value))
    return None


def _d_log_d(d: np.ndarray) -> np.ndarray:
    """d log d, 0 at 0."""
    return d * np.log(np.where(d > 0, d, 1.0))
