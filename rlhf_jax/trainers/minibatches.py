"""Epochs of minibatches over one phase's rollouts, in one compiled scan.

What PPO and GRPO share once the experience is there: the order of the rows, gradient
accumulation, the optimizer step, the early stop, and the metrics of the steps.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlhf_jax import sharding
from rlhf_jax.errors import UserError

# (params, rows, counts, frozen) -> (objective, (sums, maxima)): what a micro-batch adds
# to the minibatch's loss, and metrics that add up, or of which the largest counts.
Loss = Callable[[Any, Any, Any, Any], tuple[jax.Array, tuple[dict, dict]]]


def check_minibatches(config: ConfigDict, learning: ConfigDict, mesh: Mesh) -> None:
    """Raises a `UserError` unless a phase's rows divide into equal micro-batches."""
    batch, group = config.rollout.prompts, config.rollout.get("group", 1)
    rows, told = batch * group, f"config.rollout.prompts={batch}"
    if group > 1:
        told += f" x group={group}"
    sharding.check_batch("config.rollout.prompts", batch, mesh)
    parts = learning.minibatches * learning.accumulation
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
      A pure function: (params, opt_state, experience, order [E, M, R] int32, frozen)
      -> (params, opt_state, metrics); `frozen` is handed to the loss.
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

    def step(experience, frozen, carry, index):
        params, opt_state, stopped = carry
        rows = jax.tree.map(lambda x: x[index], experience)
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
            order.reshape(-1, order.shape[-1]),
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
