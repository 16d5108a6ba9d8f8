"""Several reward models as one reward, which is lower where they disagree.

Members of one architecture lie stacked in memory and score a text in one forward pass.
What a policy gains by pleasing one member alone, the others do not grant.

Dimension key: M members, B texts, n labels.

References:
    Coste et al. 2023, https://arxiv.org/abs/2310.02743
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax import sharding
from rlhf_jax.errors import UserError
from rlhf_jax.rewards.labels import DEFAULT, Reading, fill_text, read_scores
from rlhf_jax.rewards.model import (
    RewardModel,
    classify_sequences,
    make_classifier,
    open_reward_model,
    score_statistics,
)

WAYS = ("mean", "min", "uncertainty")


class Detailed(NamedTuple):
    """A reward, and what else is worth logging of it."""

    scores: np.ndarray  # [B] float32
    details: dict[str, np.ndarray]  # [B] float32 each


def combine_scores(scores: np.ndarray, way: str, penalty: float) -> np.ndarray:
    """One reward of the members' scores.

    mean          μ
    min           min over the members, "worst-case optimization"
    uncertainty   μ − penalty · σ, "uncertainty-weighted optimization", there with σ²

    Args:
      scores: [M, B].
      way: one of `WAYS`.
      penalty: in deviations.

    Returns:
      [B].
    """
    if way == "mean":
        return scores.mean(axis=0)
    if way == "min":
        return scores.min(axis=0)
    return scores.mean(axis=0) - penalty * scores.std(axis=0)


def load_ensemble(
    sources: Sequence[str | os.PathLike],
    *,
    mesh: Mesh,
    combine: str = "mean",
    penalty: float = 1.0,
    normalize: bool = True,
    reading: Reading = DEFAULT,
    dtype: str = "float32",
) -> Callable[..., Detailed]:
    """A reward function from reward models of one architecture and one tokenizer.

    Args:
      sources: as the `directory` of `load_reward_model`, two at least.
      mesh: where they compute.
      combine: "mean", "min" or "uncertainty".
      penalty: of "uncertainty": how many deviations are taken off the mean.
      normalize: each member's scores get mean 0 and deviation 1 of its training
        responses before they are combined: no member counts more for its scale.
      reading: which label's score, on which scale, of which text.
      dtype: what matmuls are computed in.

    Returns:
      The function; its `Detailed` has the members' deviation as "std".

    Raises:
      UserError: members that are not alike, or whatever is wrong with one of them.
    """
    if combine not in WAYS:
        raise UserError(
            f"unknown combine {combine!r} of an ensemble; choose from {', '.join(WAYS)}"
        )
    if not 0 <= penalty < math.inf:
        raise UserError(f"the penalty of an ensemble is {penalty}, expected 0 or more")
    if len(sources) < 2:
        raise UserError(
            f"an ensemble has several members, and {list(sources)} are {len(sources)}"
        )
    members = [
        open_reward_model(source, mesh=mesh, reading=reading, dtype=dtype)
        for source in sources
    ]
    for member in members[1:]:
        _check_alike(members[0], member)
    scales = [
        score_statistics(member, reading) if normalize else (0.0, 1.0)
        for member in members
    ]
    classify = _make_classifier(members, mesh)
    members = [member._replace(params=None) for member in members]  # held stacked

    def score(
        prompts: Sequence[str], responses: Sequence[str], **columns: Any
    ) -> Detailed:
        del columns
        texts = [fill_text(reading.text, *pair) for pair in zip(prompts, responses)]
        if not texts:
            return Detailed(np.zeros(0, np.float32), {"std": np.zeros(0, np.float32)})
        logits = classify(texts)
        scores = np.stack(
            [
                (_read(member, logits[:, number], reading) - mean) / deviation
                for number, (member, (mean, deviation)) in enumerate(
                    zip(members, scales)
                )
            ]
        )
        combined = combine_scores(scores, combine, penalty)
        spread = scores.std(axis=0)
        return Detailed(combined.astype(np.float32), {"std": spread.astype(np.float32)})

    return score


def _make_classifier(members: Sequence[RewardModel], mesh: Mesh) -> Callable:
    """`classify(texts) -> [B, M, n]`, all members in one forward pass."""
    first = members[0]._replace(params=None)

    def stack(*trees):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    # A member lies as it would alone; whoever holds a part of one holds it of all.
    shardings = jax.tree.map(
        lambda alone: NamedSharding(mesh, P(None, *alone.spec)),
        sharding.param_shardings(members[0].params, mesh),
    )
    stacked = jax.jit(stack, out_shardings=shardings)(*(m.params for m in members))

    @jax.jit
    def forward(params, tokens, mask):
        one = lambda params: classify_sequences(first.model, params, tokens, mask)
        return jax.vmap(one, out_axes=1)(params)

    return make_classifier(first, mesh, functools.partial(forward, stacked))


def _read(member: RewardModel, logits: np.ndarray, reading: Reading) -> np.ndarray:
    problem = member.hf_config.get("problem_type")
    return read_scores(logits, member.index, reading.output, problem).astype(np.float64)


def _check_alike(first: RewardModel, other: RewardModel) -> None:
    """Raises a `UserError` unless one program and one tokenizer serve both."""
    mine, others = first.model.config, other.model.config
    for field in dataclasses.fields(mine):
        here, there = (getattr(config, field.name) for config in (mine, others))
        if here != there:
            raise UserError(
                f"{other.source} and {first.source} are no ensemble: {field.name} is "
                f"{there!r} and {here!r}, and members must be of one architecture"
            )
    shapes = [jax.tree.map(jnp.shape, member.params) for member in (first, other)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"{other.source} and {first.source} are no ensemble: their heads differ, "
            "and members must be of one architecture"
        )
    if first.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise UserError(
            f"{other.source} and {first.source} are no ensemble: their tokenizers "
            "differ, and members must read the same tokens"
        )
