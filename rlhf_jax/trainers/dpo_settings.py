"""The settings of DPO: which options a loss type has, and what cannot go together."""

import math
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlhf_jax import losses, sharding
from rlhf_jax.errors import UserError
from rlhf_jax.losses.dpo_types import LOSS_TYPES
from rlhf_jax.trainers import common

RANGES = {
    "total_phases": (1, math.inf),
    "sequence_tokens": (2, math.inf),
    "learning.steps_per_phase": (1, math.inf),
    "learning.accumulation": (1, math.inf),
    "dpo.rpo_alpha": (0, math.inf),
    "dpo.ld_alpha": (0, 1),
    "rollout.temperature": (0, math.inf),
    "logprob_chunk": (0, math.inf),
}


def loss_types(dpo: ConfigDict) -> dict[str, tuple[float, dict[str, Any]]]:
    """Name -> weight and options of each loss type of `config.dpo`.

    An option goes to the types that have it; one that none of them has goes to all,
    and `losses.dpo` raises.
    """
    mix = dict(dpo.loss_types) or {dpo.loss_type: 1.0}
    diverges = {k for k in mix if k in LOSS_TYPES and LOSS_TYPES[k].diverges}
    smooths = {k for k in mix if k in LOSS_TYPES and LOSS_TYPES[k].smooths}
    given = (
        ("label_smoothing", dpo.label_smoothing, smooths),
        ("divergence", dpo.divergence, diverges),
        ("alpha", dpo.alpha or None, diverges),
        ("tau", dpo.tau or None, {"discopop"} & mix.keys()),
    )
    return {
        kind: (
            weight,
            {n: v for n, v, having in given if kind in having or (v and not having)},
        )
        for kind, weight in mix.items()
    }


def micro_batch(config: ConfigDict) -> int:
    """Pairs that go through the model at once, in training and elsewhere."""
    return config.learning.batch // config.learning.accumulation


def validate(config: ConfigDict, mesh: Mesh) -> None:
    """Raises a `UserError` for settings that cannot work together."""
    common.check_ranges(config, RANGES)
    learning, dpo = config.learning, config.dpo
    sharding.check_batch("config.learning.batch", learning.batch, mesh)
    sharding.check_batch("config.rollout.prompts", config.rollout.prompts, mesh)
    if learning.batch < 1 or learning.batch % learning.accumulation:
        raise UserError(
            f"config.learning.batch={learning.batch} must be a multiple of "
            f"config.learning.accumulation={learning.accumulation}"
        )
    told = "config.learning.batch / accumulation"
    sharding.check_batch(told, micro_batch(config), mesh)
    zeros, ones = np.zeros((4, 1), np.float32), np.ones(1, np.float32)
    for kind, (weight, options) in loss_types(dpo).items():
        if not 0 < weight < math.inf:
            raise UserError(f"config.dpo.loss_types.{kind}={weight} must be above 0")
        try:
            losses.dpo(
                *zeros,
                beta=dpo.beta,
                loss_type=kind,
                chosen_lengths=ones,
                rejected_lengths=ones,
                weights=ones if dpo.wpo else None,
                **options,
            )
        except ValueError as error:
            sentence = str(error).replace("weights is given", "wpo is True")
            raise UserError(f"config.dpo.{sentence}") from error
        if LOSS_TYPES[kind].sorts and learning.accumulation > 1:
            raise UserError(
                f"config.learning.accumulation={learning.accumulation} cannot go with "
                f"the loss type {kind!r}, which sorts over the whole batch; set it to 1"
            )
