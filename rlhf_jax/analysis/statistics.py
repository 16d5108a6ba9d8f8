"""What can be said of a few prompts: intervals, paired tests, trends and rare values.

Every phase answers the same prompts from the same keys, so prompts are the independent
units and two phases are N pairs. Tests are by sign flips and intervals by resampled
prompts; neither assumes a distribution, and a seed makes both deterministic.

Dimension key: N prompts, K phases or series, M values, R resamples.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

RESAMPLES = 9_999
EXACT = 13  # 2¹³ = 8192 ways to set the signs: no more than there are resamples
# A resample of few different values may have next to no spread of its own, and a
# t of any size; it counts with this share of the sample's at least.
LEAST_SPREAD = 0.25
TAIL = 0.2  # of a baseline: what the tail is fitted to
HEAVIER = 0.03  # added to the tail's Pareto index, see `tail_p_value`


class Interval(NamedTuple):
    """A mean, or another statistic, with its interval."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """What changed from one phase to another, over the same prompts.

    Attributes:
      change: mean of after − before, with its 95 % interval.
      p_value: of no change, two-sided.
      effect: Cohen's d_z, the mean change over the standard deviation of the changes;
        0 for no change, infinite where every prompt changed by the same.
      probability: that a prompt's value is greater after than before, ties half.
    """

    change: Interval
    p_value: float
    effect: float
    probability: float


class Trend(NamedTuple):
    """Where a value goes over the phases.

    Attributes:
      slope: mean over prompts of the change a phase, with its 95 % interval.
      p_value: of no trend, two-sided.
      direction: "rising" or "falling" where p is below 5 %, else "none".
    """

    slope: Interval
    p_value: float
    direction: str


def mean_interval(
    values: np.ndarray, *, level: float = 0.95, seed: int = 0, resamples: int = 2_000
) -> Interval:
    """A mean over prompts, with its symmetric studentised bootstrap interval.

        x̄ ± q s/√N,   q the `level` quantile of |x̄* − x̄| / (s*/√N)

    How often 95 % intervals held the true mean, in per cent of 4000, beside BCa's and
    Student's; the tests measure it again:

                        N = 16                         N = 64
                  here   BCa   Student           here   BCa   Student
    normal        95.1   91.6    94.7            94.9   94.2    94.8
    exponential   93.2   89.5    90.7            94.8   93.9    93.8
    Student t₃    96.6   87.9    95.9            96.6   92.1    96.3

    Args:
      values: [..., N], finite; N at least 2. Leading axes are as many means.
      level: how often the interval should hold the true mean.
      seed: of the resamples.
      resamples: R.

    Returns:
      In the unit of the values, each [...]; without width where all values are equal.

    Raises:
      ValueError: too few values, or one that is not finite.

    References:
      Hall 1988, https://doi.org/10.1214/aos/1176350933
    """
    values = _finite("values", values, least=2)
    N = values.shape[-1]
    mean = values.mean(axis=-1)
    centred = values - mean[..., None]
    error = centred.std(axis=-1, ddof=1) / math.sqrt(N)
    counts = _resampled_counts(N, resamples, seed)  # [R, N]
    means = np.einsum("...n,rn->...r", centred, counts, optimize=True) / N
    squares = np.einsum("...n,rn->...r", centred**2, counts, optimize=True) / N
    errors = np.sqrt(np.maximum(squares - means**2, 0.0) / (N - 1))
    errors = np.maximum(errors, LEAST_SPREAD * error[..., None])
    t = np.abs(means) / np.where(errors > 0, errors, 1.0)
    half = np.quantile(t, level, axis=-1) * error
    found = Interval(mean, mean - half, mean + half)
    return Interval(*map(float, found)) if values.ndim == 1 else found


def paired_difference(
    before: np.ndarray, after: np.ndarray, *, seed: int = 0
) -> Difference:
    """What changed between two phases over the same N prompts.

    Args:
      before: [N], finite; N at least 2.
      after: [N], finite.
      seed: of the resamples.

    Raises:
      ValueError: too few values, one that is not finite, or unlike lengths.
    """
    before, after = _finite("before", before, least=2), _finite("after", after, least=2)
    if before.shape != after.shape or before.ndim != 1:
        raise ValueError(
            "before and after must be [N] of the same prompts, not "
            f"{before.shape} and {after.shape}"
        )
    change = after - before
    mean, spread = change.mean(), change.std(ddof=1)
    # equal changes may differ in their last bit
    spread = spread if spread > 1e-12 * np.abs(change).max() else 0.0
    effect = mean / spread if spread else math.copysign(math.inf, mean) if mean else 0.0
    return Difference(
        change=mean_interval(change, seed=seed),
        p_value=float(sign_flip_p_values(change[:, None], seed=seed)[0]),
        effect=float(effect),
        probability=float(np.mean((np.sign(change) + 1.0) / 2.0)),
    )


def trend(phases: Sequence[int], values: np.ndarray, *, seed: int = 0) -> Trend:
    """Whether a value rises or falls over the phases, prompts being the units.

        bᵢ = Σₖ (k − k̄) xₖᵢ / Σₖ (k − k̄)²

    Each prompt has its least-squares slope; whether their mean is zero is asked by
    flipping signs. A prompt's level does not count, only where it goes.

    Args:
      phases: K numbers, two different ones at least.
      values: [K, N], finite; N at least 2.
      seed: of the resamples.

    Returns:
      The slope in units of the values a phase.

    Raises:
      ValueError: fewer than two different phases, or values of another shape.
    """
    values = _finite("values", values, least=2)
    at = np.asarray(phases, np.float64)
    if len(np.unique(at)) < 2:
        raise ValueError(f"a trend needs two different phases, not {list(phases)}")
    if values.ndim != 2 or len(values) != len(at):
        raise ValueError(
            f"values must be [K, N] for the {len(at)} phases, not {values.shape}"
        )
    at = at - at.mean()
    slopes = at @ values / np.sum(at**2)
    p = float(sign_flip_p_values(slopes[:, None], seed=seed)[0])
    slope = mean_interval(slopes, seed=seed)
    ways = "rising" if slope.mean > 0 else "falling"
    return Trend(slope, p, ways if p < 0.05 else "none")


def sign_flip_p_values(
    differences: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """P-values [K] of series of paired differences [N, K], each of a mean of zero.

        p = P(|Σᵢ σᵢ dᵢ| ≥ |Σᵢ dᵢ|),   σᵢ = ±1 with probability ½

    All signs are tried for up to 13 prompts; else so many are drawn, and what was seen
    counts as one more, so that no p is below 1 / (resamples + 1). All series see the
    same signs. A series of zeros has p = 1.

    Raises:
      ValueError: a difference is not finite, or they are not [N, K].

    References:
      Fisher 1935, The Design of Experiments, section 21.
      Phipson & Smyth 2010, https://doi.org/10.2202/1544-6115.1585
    """
    differences = _finite("differences", differences, least=0)
    if differences.ndim != 2 or not len(differences):
        raise ValueError(f"differences must be [N, K], not {differences.shape}")
    N = len(differences)
    # sums that are equal on paper may differ in their last bits
    seen = np.abs(differences.sum(axis=0)) - 1e-9 * np.abs(differences).sum(axis=0)
    if N <= EXACT:
        signs = 1.0 - 2.0 * (np.arange(2**N)[:, None] >> np.arange(N) & 1)
        return np.mean(np.abs(signs @ differences) >= seen, axis=0)
    rng = np.random.default_rng(seed)
    extreme = np.ones(differences.shape[1])
    for start in range(0, resamples, 4_096):
        rows = min(4_096, resamples - start)
        signs = 2.0 * rng.integers(0, 2, (rows, N)) - 1.0
        extreme += np.sum(np.abs(signs @ differences) >= seen, axis=0)
    return extreme / (resamples + 1)


def benjamini_hochberg(p_values: np.ndarray) -> np.ndarray:
    """Adjusted p-values [M]: those below a rate hold that share of false ones at most.

    Raises:
      ValueError: one is not between 0 and 1.

    References:
      Benjamini & Hochberg 1995, https://doi.org/10.1111/j.2517-6161.1995.tb02031.x
    """
    p_values = np.asarray(p_values, np.float64)
    return stats.false_discovery_control(p_values) if p_values.size else p_values


def tail_p_value(
    baseline: np.ndarray, x: np.ndarray, *, resolution: float
) -> np.ndarray:
    """How rare values are beside a baseline: P(a new value of it ≥ x).

        up to the greatest   (1 + #{baseline ≥ x}) / (N + 1)
        beyond it            (k + 1)/(N + 1) · (1 + (x − u) / (m κ))^(−κ),
                             κ = 1 / (1/k + 0.03)

    Beyond the greatest, the k values above the 80 % quantile u are taken for an
    exponential tail, to which the excess over a high threshold tends for most data. Its
    scale is their mean excess m, at least `resolution`. As m is known from k values
    only, a new excess over m has the F distribution of 2 and 2k degrees, whose tail is
    the power with κ = k; the 0.03 is for data with heavier tails than that.

    Measured, how often a new value has p ≤ 1e-3, in units of 1e-3, and so for 1e-2:

                           N = 16         N = 64         N = 256
                        1e-3   1e-2    1e-3   1e-2    1e-3   1e-2
        normal           0.2    0.4     0.1    0.4     0.0    0.8
        exponential      0.9    0.9     0.6    0.8     0.6    0.8
        lognormal, σ=½   0.8    0.9     0.9    0.8     0.9    0.8
        lognormal, σ=1   3.0    1.6     3.1    1.1     2.4    0.8
        Student t₃       1.5    1.1     2.6    1.1     2.2    0.8

    Data with a light tail are seldom called rare. Of lognormal (σ = 1) and t₃ data
    values of a nominal 1e-5 come up to 40 times as often: where data are lognormal,
    give their logarithm.

    Args:
      baseline: [N] finite values, N at least 2.
      x: [M] values; nan is not rare, 1.
      resolution: the least scale, so that a step beside a constant baseline is only
        rare if it is many times this.

    Returns:
      [M] in (0, 1]; about 1/N for the baseline's own greatest value.

    Raises:
      ValueError: too few values, one that is not finite, a resolution that is not
        above zero.

    References:
      Pickands 1975, https://doi.org/10.1214/aos/1176343003
      Coles 2001, An Introduction to Statistical Modeling of Extreme Values, chapter 4.
    """
    if not resolution > 0:
        raise ValueError(f"resolution must be above 0, not {resolution}")
    baseline = np.sort(_finite("baseline", baseline, least=2))
    x = np.asarray(x, np.float64)
    N = len(baseline)
    k = min(math.ceil(TAIL * N), N - 1)
    threshold = baseline[-k - 1]
    scale = max(float(np.mean(baseline[-k:] - threshold)), resolution)
    shape = 1.0 / (1.0 / k + HEAVIER)
    excess = np.maximum(np.nan_to_num(x, nan=-np.inf) - threshold, 0.0) / scale
    beyond = (k + 1) / (N + 1) * (1.0 + excess / shape) ** -shape
    inside = (1.0 + N - np.searchsorted(baseline, x, side="left")) / (N + 1)
    p = np.where(x > baseline[-1], np.minimum(inside, beyond), inside)
    return np.where(np.isnan(x), 1.0, p)


def _resampled_counts(N: int, resamples: int, seed: int) -> np.ndarray:
    """[R, N]: how often each of N prompts is in each resample."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, N, (resamples, N)) + N * np.arange(resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=resamples * N)
    return counts.reshape(resamples, N).astype(np.float64)


def _finite(name: str, values: np.ndarray, *, least: int) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if not values.ndim or values.shape[-1] < least:
        raise ValueError(f"{name} must be {least} or more, not {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} must be finite, but some are not")
    return values
