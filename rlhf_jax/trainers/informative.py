"""Dynamic sampling: go on asking until enough groups have rewards that differ.

A group whose responses all have the same reward says nothing about what is better, and
its advantages are zero. With `config.grpo.dynamic_sampling` a phase draws that many
times at most, each time with new prompts, and keeps the first groups that differ; what
is still missing then is filled up with groups that do not, which are left out of the
loss. The reward is that of `config.rewards`, before any penalty for length.

References:
    DAPO, section 3.2, https://arxiv.org/abs/2503.14476
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlhf_jax import sharding
from rlhf_jax.data.prompts import Prompts
from rlhf_jax.rewards import Reward
from rlhf_jax.rollout.sampler import Rollout, Sampler
from rlhf_jax.trainers import online


def make_collect(
    config: ConfigDict,
    mesh: Mesh,
    sample: Sampler,
    rewards: Sequence[Reward],
    prompts: Prompts,
) -> Callable[..., tuple[online.Collected, jax.Array, int]]:
    """Builds `collect(params, phase, meanwhile) -> (collected, kept, draws)`.

    `meanwhile` is that of `online.make_collect`; with dynamic sampling it is asked of
    the rows that were picked, when they are. `kept` [B] bool on the mesh is false on
    rows that only fill up the phase; `draws` is how often prompts were drawn.
    """
    collect = online.make_collect(config, mesh, sample, rewards, prompts)
    most = max(1, config.grpo.dynamic_sampling)
    groups, group = config.rollout.prompts, config.rollout.group
    rows = sharding.rows(mesh)
    everything = np.ones(groups * group, bool)

    def collect_informative(params, phase, meanwhile):
        if not config.grpo.dynamic_sampling:
            collected = collect(params, phase, meanwhile)
            return collected, sharding.to_devices(everything, rows), 1
        found = []
        for draw in range(most):
            found.append(collect(params, phase, lambda *_: None, draw, most))
            differ = np.concatenate(
                [differing(online.on_host(one.total), group) for one in found]
            )
            if differ.sum() >= groups:
                break
        # Those that differ come first, in the order they were drawn.
        order = np.argsort(~differ, kind="stable")[:groups]
        index = (order[:, None] * group + np.arange(group)).reshape(-1)
        kept = sharding.to_devices(differ[order].repeat(group), rows)
        picked = pick(found, index, rows)
        measured = meanwhile(picked.rollout.transcript, picked.rollout.samples)
        return picked._replace(measured=measured), kept, len(found)

    return collect_informative


def differing(scores: np.ndarray, group: int) -> np.ndarray:
    """[groups] bool: whether the scores [groups x group] of a group are not all one."""
    scores = scores.reshape(-1, group)
    return (scores != scores[:, :1]).any(axis=1)


def joined_on_host(arrays: Sequence[Any]) -> np.ndarray:
    """Arrays of several draws, one after the other."""
    return np.concatenate(online.on_host(list(arrays)))


def pick(
    draws: Sequence[online.Collected], index: np.ndarray, rows: jax.sharding.Sharding
) -> online.Collected:
    """The rows `index` of all draws, one after the other, as if drawn at once."""
    arrays = [
        sharding.to_host((one.rollout.transcript, one.rollout.samples, one.scores))
        for one in draws
    ]
    joined = jax.tree.map(lambda *x: np.concatenate(x)[index], *arrays)
    transcript, samples, scores = sharding.to_devices(joined, rows)
    prompts = [text for one in draws for text in one.rollout.prompts]
    responses = [text for one in draws for text in one.rollout.responses]
    rollout = Rollout(
        [prompts[i] for i in index], [responses[i] for i in index], transcript, samples
    )
    names, unsafe, seconds = draws[0].parts, None, None
    if draws[0].seconds:
        unsafe = np.concatenate([one.unsafe for one in draws])[index]
        waited = zip(*(one.seconds for one in draws))
        seconds = online.Seconds(*map(sum, waited))
    return online.Collected(
        rollout,
        scores,
        joined_on_host([one.total for one in draws])[index],
        {n: joined_on_host([one.parts[n] for one in draws])[index] for n in names},
        unsafe,
        None,
        seconds,
    )
