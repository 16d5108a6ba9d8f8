"""A filter on responses: what a scorer calls unsafe earns less, and is counted."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from rlhf_jax.errors import UserError
from rlhf_jax.rewards import Reward, build_rewards, score_all


class SafetyFilter(NamedTuple):
    """What is unsafe, and what it costs.

    Attributes:
      scorer: a cost: the higher, the less safe.
      limit: a response of a greater cost is unsafe.
      penalty: what is taken off its reward.
    """

    scorer: Reward
    limit: float
    penalty: float


def build_filter(settings: Mapping[str, Any], *, mesh: Mesh) -> SafetyFilter | None:
    """The filter of a config's `safety`, or None where it names no source.

    Raises:
      UserError: the source cannot be had, or the penalty is below 0.
    """
    if not settings["source"]:
        return None
    if settings["penalty"] < 0:
        raise UserError(
            f"config.safety.penalty={settings['penalty']} must be at least 0: it is "
            "taken off the reward of an unsafe response"
        )
    (scorer,) = build_rewards({"safety": {"source": settings["source"]}}, mesh=mesh)
    return SafetyFilter(scorer, float(settings["limit"]), float(settings["penalty"]))


def find_unsafe(
    safety: SafetyFilter,
    prompts: Sequence[str],
    responses: Sequence[str],
    **columns: Sequence[Any],
) -> np.ndarray:
    """Which responses are unsafe, [B] bool."""
    costs, _ = score_all([safety.scorer], prompts, responses, **columns)
    return costs > safety.limit
