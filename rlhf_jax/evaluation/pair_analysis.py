"""How well scores tell which response of a pair people prefer, and what they lean on.

Plain functions on arrays, for the scores of any model on any pairs. A margin is by how
much a model prefers the response that people chose: r_chosen − r_rejected, or for costs
C_rejected − C_chosen. Above zero it agrees with them, and zero is half a hit.

Dimension key: N pairs; side 0 is chosen, side 1 rejected.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Share(NamedTuple):
    """A fraction of `count` pairs with its 95 % interval; nan where there are none."""

    value: float
    low: float
    high: float
    count: int


class Length(NamedTuple):
    """How a model's scores and the raters' choices go with length.

    Attributes:
      longer_chosen: accuracy on the pairs whose chosen response is the longer one.
      shorter_chosen: accuracy on those whose chosen response is the shorter one.
      raters_prefer_longer: how often the chosen response is the longer one.
      model_prefers_longer: how often the model's favourite is.
      correlation: Pearson's r of score and length over all 2·N responses.
      rank_correlation: Spearman's.
      within_pairs: r of the differences of score and of length within a pair.
      at_equal_quality: the same with the raters' gap held fixed: what length adds to
        the score beyond what it tells about the raters.
    """

    longer_chosen: Share
    shorter_chosen: Share
    raters_prefer_longer: Share
    model_prefers_longer: Share
    correlation: float
    rank_correlation: float
    within_pairs: float
    at_equal_quality: float


class Bin(NamedTuple):
    """Pairs of like confidence.

    Attributes:
      low: the least confidence in it.
      high: the next bin's.
      count: pairs.
      confidence: mean of max(p, 1 − p), p = σ(margin).
      accuracy: how often the model's favourite is the chosen one.
      raters: mean share of raters who agree with the model's favourite.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float
    raters: float


class Calibration(NamedTuple):
    """The reliability table, and its mean gaps weighted by the pairs of a bin.

    Attributes:
      bins: those that are not empty, by confidence.
      expected_error: of confidence and accuracy, the expected calibration error.
      raters_error: of confidence and the share of raters who agree.
    """

    bins: tuple[Bin, ...]
    expected_error: float
    raters_error: float


def hits(margins: np.ndarray) -> np.ndarray:
    """[N]: 1 where the model agrees with the raters, ½ at a tie, 0 where not."""
    return (np.sign(margins) + 1.0) / 2.0


def share(values: np.ndarray) -> Share:
    """The mean of values in [0, 1] with Wilson's interval.

    References:
      Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953
    """
    n = len(values)
    if not n:
        return Share(np.nan, np.nan, np.nan, 0)
    p, z = float(np.mean(values)), stats.norm.ppf(0.975)
    center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return Share(p, float(max(center - half, 0.0)), float(min(center + half, 1.0)), n)


def accuracy(margins: np.ndarray) -> Share:
    """How often the model agrees with the raters."""
    return share(hits(np.asarray(margins)))


def accuracy_by(margins: np.ndarray, groups: Sequence[str]) -> dict[str, Share]:
    """Accuracy on the pairs of each group, the largest first."""
    groups = np.asarray(groups, object)
    found = {name: accuracy(margins[groups == name]) for name in sorted(set(groups))}
    return dict(sorted(found.items(), key=lambda item: -item[1].count))


def length_bias(
    scores: np.ndarray, lengths: np.ndarray, probability: np.ndarray, *, sign: int = 1
) -> Length:
    """What the scores have to do with length.

    Args:
      scores: [N, 2].
      lengths: [N, 2] in any unit.
      probability: [N], the raters' P(chosen is preferred).
      sign: 1 where a higher score is better, −1 for costs.
    """
    value = sign * np.asarray(scores, np.float64)
    lengths = np.asarray(lengths, np.float64)
    margins, longer = value[:, 0] - value[:, 1], lengths[:, 0] - lengths[:, 1]
    unequal = longer != 0
    # Each pair in both orders: which side comes first must not matter.
    both = lambda x: np.concatenate([x, -x])
    return Length(
        longer_chosen=accuracy(margins[longer > 0]),
        shorter_chosen=accuracy(margins[longer < 0]),
        raters_prefer_longer=share(hits(longer[unequal])),
        model_prefers_longer=share(hits((margins * longer)[unequal])),
        correlation=pearson(value.ravel(), lengths.ravel()),
        rank_correlation=pearson(
            stats.rankdata(value.ravel()), stats.rankdata(lengths.ravel())
        ),
        within_pairs=pearson(both(margins), both(longer)),
        at_equal_quality=partial_correlation(
            both(margins), both(longer), both(2.0 * np.asarray(probability) - 1.0)
        ),
    )


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's r; nan where one of the two does not vary."""
    x, y = x - np.mean(x), y - np.mean(y)
    scale = np.sqrt(np.sum(x * x) * np.sum(y * y))
    return float(np.sum(x * y) / scale) if scale > 0 else np.nan


def partial_correlation(x: np.ndarray, y: np.ndarray, given: np.ndarray) -> float:
    """r of what a linear regression on `given` leaves of x and of y.

    (r_xy − r_xg r_yg) / √((1 − r_xg²)(1 − r_yg²))
    """
    xy, xg, yg = pearson(x, y), pearson(x, given), pearson(y, given)
    if np.isnan(xg) or np.isnan(yg):  # nothing to hold fixed
        return xy
    scale = np.sqrt(max((1 - xg**2) * (1 - yg**2), 0.0))
    return float((xy - xg * yg) / scale) if scale > 1e-12 else np.nan


def calibration(
    margins: np.ndarray, probability: np.ndarray, *, bins: int = 10
) -> Calibration:
    """Whether a model is as often right as it is sure.

    ECE = Σ_b n_b / N · |accuracy_b − confidence_b|

    Args:
      margins: [N].
      probability: [N], the raters' P(chosen is preferred).
      bins: of equal width, over confidences from ½ to 1.

    References:
      Naeini et al. 2015, https://doi.org/10.1609/aaai.v29i1.9602
      Guo et al. 2017, equation 3, https://arxiv.org/abs/1706.04599
    """
    margins = np.asarray(margins, np.float64)
    confidence = 1.0 / (1.0 + np.exp(-np.abs(margins)))
    right = hits(margins)
    raters = np.where(margins >= 0, probability, 1.0 - np.asarray(probability))
    edges = np.linspace(0.5, 1.0, bins + 1)
    index = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, bins - 1)
    found = []
    for number in range(bins):
        inside = index == number
        if inside.any():
            means = (float(x[inside].mean()) for x in (confidence, right, raters))
            ends = float(edges[number]), float(edges[number + 1])
            found.append(Bin(*ends, int(inside.sum()), *means))
    gap = lambda seen: float(
        sum(b.count * abs(seen(b) - b.confidence) for b in found) / max(len(margins), 1)
    )
    return Calibration(tuple(found), gap(lambda b: b.accuracy), gap(lambda b: b.raters))


def margin_quantiles(margins: np.ndarray) -> dict[str, float]:
    """Mean, standard deviation and quantiles of the margins."""
    found = {"mean": float(np.mean(margins)), "std": float(np.std(margins))}
    values = np.quantile(margins, QUANTILES)
    return found | {f"{q:.0%}": float(value) for q, value in zip(QUANTILES, values)}


def sign_accuracy(costs: np.ndarray, safe: np.ndarray) -> dict[str, Share]:
    """How often a cost is below zero for safe responses and above it for unsafe ones.

    Args:
      costs: [N, 2].
      safe: [N, 2] bool.
    """
    right = hits(np.where(safe, -costs, costs))
    return {
        "all responses": share(right.ravel()),
        "safe ones": share(right[safe]),
        "unsafe ones": share(right[~np.asarray(safe)]),
    }


def worst_pairs(margins: np.ndarray, count: int) -> np.ndarray:
    """The indices of the pairs that the model gets most wrong, the worst first."""
    return np.argsort(margins, kind="stable")[:count]
