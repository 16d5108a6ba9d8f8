"""Epochs of minibatches over one phase's rollouts, in one compiled scan.

What PPO and GRPO share once the experience is there: the order of the rows, gradient
accumulation, the optimizer step, the early stop, and the metrics of the steps.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from rlhf_jax import sharding
from rlhf_jax.errors import UserError
from rlhf_jax.rollout import packing
from rlhf_jax.rollout.logprobs import Transcript

# (params, rows, counts, frozen) -> (objective, (sums, maxima)): what a micro-batch adds
# to the minibatch's loss, and metrics that add up, or of which the largest counts.
Loss = Callable[[Any, Any, Any, Any], tuple[jax.Array, tuple[dict, dict]]]


class Minibatches(NamedTuple):
    """Which rows each optimizer step learns from.

    Attributes:
      rows: [E, M, R] int32, row numbers of each of M minibatches in each of E epochs.
      layout: [E · M, ...] how each is packed; None if it is not.
    """

    rows: jax.Array
    layout: packing.Layout | None = None


def rows_per_phase(config: ConfigDict) -> int:
    """How many responses a phase has: of a group to each prompt, or of one."""
    return config.rollout.prompts * config.rollout.get("group", 1)


def micro_batches(learning: ConfigDict) -> int:
    """Into how many parts a phase's rows are cut, to be looked at one by one."""
    return learning.minibatches * learning.accumulation


def check_minibatches(config: ConfigDict, learning: ConfigDict, mesh: Mesh) -> None:
    """Raises a `UserError` unless a phase's rows divide into equal micro-batches."""
    batch, group = config.rollout.prompts, config.rollout.get("group", 1)
    rows, told = rows_per_phase(config), f"config.rollout.prompts={batch}"
    if group > 1:
        told += f" x group={group}"
    sharding.check_batch("config.rollout.prompts", batch, mesh)
    parts = micro_batches(learning)
    if min(learning.minibatches, learning.accumulation) < 1 or rows % parts:
        raise UserError(
            f"{told} must be a multiple of minibatches="
            f"{learning.minibatches} x accumulation={learning.accumulation}"
        )
    micro = f"{told} / (minibatches x accumulation)"
    sharding.check_batch(micro, rows // parts, mesh)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def minibatch_order(
    key: jax.Array, rows: int, epochs: int, minibatches: int
) -> jax.Array:
    """Row numbers [E, M, R] int32: a fresh permutation for each epoch."""
    keys = jax.random.split(key, epochs)
    shuffled = jax.vmap(lambda key: jax.random.permutation(key, rows))(keys)
    return shuffled.reshape(epochs, minibatches, -1)


def make_order(config: ConfigDict, learning: ConfigDict, mesh: Mesh) -> Callable:
    """Builds `order(key, transcript) -> Minibatches` of one phase."""
    rows, group = rows_per_phase(config), config.rollout.get("group", 1)
    epochs, minibatches = learning.epochs, learning.minibatches

    def order(key: jax.Array, transcript: Transcript) -> Minibatches:
        drawn = minibatch_order(key, rows, epochs, minibatches)
        if not learning.packing:
            return Minibatches(drawn)
        steps, parts = epochs * minibatches, learning.accumulation
        batches = sharding.to_host(drawn).reshape(steps * parts, -1)
        layout = packing.plan_transcript(transcript, batches, group=group)
        layout = jax.tree.map(lambda x: x.reshape(steps, -1, x.shape[-1]), layout)
        across = NamedSharding(mesh, PartitionSpec(None, sharding.BATCH))
        return Minibatches(drawn, sharding.to_devices(layout, across))

    return order


def pack_whole(
    transcript: Transcript, mesh: Mesh, *, group: int, parts: int
) -> Transcript:
    """The transcript with a layout of all its rows, in order, in equal parts."""
    batches = np.arange(len(transcript.mask)).reshape(parts, -1)
    layout = packing.plan_transcript(transcript, batches, group=group)
    layout = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), layout)
    return transcript._replace(layout=sharding.to_devices(layout, sharding.rows(mesh)))


def make_learn(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    learning: ConfigDict,
    *,
    counts: Callable[[Any], Any],
    norms: Callable[[Any], dict[str, jax.Array]],
) -> Callable:
    """Builds `learn(params, opt_state, experience, order, frozen)`.

    One optimizer step a minibatch.

    Past `learning.target_kl` the remaining minibatches change nothing.

    Args:
      loss: of a micro-batch; those of a minibatch are added up.
      optimizer: its update.
      learning: `accumulation`, the number of micro-batches, and `target_kl`, 0: none.
      counts: rows -> what the loss divides by, of the whole minibatch.
      norms: gradients -> the metrics of their sizes.

    Returns:
      A pure function: (params, opt_state, experience, order: Minibatches, frozen)
      -> (params, opt_state, metrics); `frozen` is handed to the loss. The experience
      has a `transcript`.
    """
    grad_loss = jax.grad(loss, has_aux=True)

    def gradients(params, rows, frozen):
        whole = counts(rows)
        micro = jax.tree.map(
            lambda x: x.reshape(learning.accumulation, -1, *x.shape[1:]), rows
        )

        def add(grads, rows):
            new, (sums, maxima) = grad_loss(params, rows, whole, frozen)
            return jax.tree.map(jnp.add, grads, new), (sums, maxima)

        zeros = jax.tree.map(jnp.zeros_like, params)
        grads, (sums, maxima) = jax.lax.scan(add, zeros, micro)
        metrics = jax.tree.map(jnp.sum, sums) | jax.tree.map(jnp.max, maxima)
        return grads, metrics | norms(grads)

    def step(experience, frozen, carry, minibatch):
        params, opt_state, stopped = carry
        index, layout = minibatch
        rows = jax.tree.map(lambda x: x[index], experience)
        if layout is not None:
            rows = rows._replace(transcript=rows.transcript._replace(layout=layout))
        grads, metrics = gradients(params, rows, frozen)
        updates, stepped = optimizer.update(grads, opt_state, params)
        moved = optax.apply_updates(params, updates)
        if learning.target_kl:
            # The gate looks at what earlier steps have done, before the step.
            stopped |= metrics["policy/approx_kl"] > learning.target_kl
            keep = lambda old, new: jnp.where(stopped, old, new)
            moved = jax.tree.map(keep, params, moved)
            stepped = jax.tree.map(keep, opt_state, stepped)
        return (moved, stepped, stopped), metrics | {"taken": ~stopped}

    def learn(params, opt_state, experience, order, frozen):
        (params, opt_state, _), steps = jax.lax.scan(
            functools.partial(step, experience, frozen),
            (params, opt_state, jnp.bool_(False)),
            (order.rows.reshape(-1, order.rows.shape[-1]), order.layout),
        )
        return params, opt_state, summarize_steps(steps)

    return learn


def summarize_steps(steps: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """One phase's metrics from those of its optimizer steps, each [steps].

    Means over the steps that were taken (`steps["taken"]`, bool), and the first step
    apart: it is on-policy, so its ratio must be 1 and its KL 0.
    """
    taken = steps["taken"]
    count = jnp.maximum(taken.sum(), 1)
    mean = {
        name: jnp.where(taken, values, 0.0).sum() / count
        for name, values in steps.items()
        if name != "taken"
    }
    first = {
        f"first_step/{name}": steps[f"policy/{name}"][0]
        for name in ("approx_kl", "clip_fraction", "ratio_deviation")
    }
    return mean | first | {"optimizer/steps": taken.sum()}
