"""What the algorithms share that learn from fixed rows: SFT, reward models, DPO.

One phase is `steps_per_phase` optimizer steps in one compiled program; the order of
the rows is a function of (seed, phase).
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from rlhf_jax import keys, loading, nonfinite, sharding
from rlhf_jax.data.order import phase_rows
from rlhf_jax.data.packing import length_batches
from rlhf_jax.trainers.optimizer import learning_rate, make_optimizer
from rlhf_jax.trees import join

# (params, batch, key) -> (loss, metrics); the key is for dropout. With micro-batches,
# (params, rows, key, counts) -> their part in the loss and the metrics of the batch.
Loss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """All that changes from phase to phase; `policy` is whatever model is trained."""

    policy: Any
    opt_state: Any


def make_state(
    config: ConfigDict, params: Any, mesh: Mesh
) -> tuple[State, optax.GradientTransformation]:
    """The optimizer of `config.optimizer`, and the state to start from."""
    steps = config.total_phases * config.learning.steps_per_phase
    optimizer = make_optimizer(config.optimizer, config.optimizer.lr, steps)
    optimizer = nonfinite.guard(optimizer)
    return State(params, loading.init_optimizer(optimizer, params, mesh)), optimizer


def make_update(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    accumulation: int = 1,
    counts: Callable[[Any], Any] | None = None,
) -> Callable:
    """Builds `update(state, batches, key, frozen) -> (state, metrics)`.

    `batches` is a pytree of [S, B, ...], one optimizer step for each of S, and `frozen`
    what of the model is not trained. The state is donated, and the metrics are means
    over the steps.

    Args:
      loss: of a batch; with `counts`, of one of its micro-batches.
      optimizer: its update.
      accumulation: micro-batches of a batch.
      counts: batch -> what the loss divides by, so that the parts add up to the whole.
    """

    def loss_of(trained, frozen, *arguments):
        return loss(join(trained, frozen), *arguments)

    value_and_grad = jax.value_and_grad(loss_of, has_aux=True)

    def gradients(params, frozen, batch, key):
        if counts is None:
            (_, metrics), grads = value_and_grad(params, frozen, batch, key)
            return grads, metrics
        whole = counts(batch)
        micro = jax.tree.map(lambda x: x.reshape(accumulation, -1, *x.shape[1:]), batch)

        def add(grads, rows_and_key):
            (_, metrics), new = value_and_grad(params, frozen, *rows_and_key, whole)
            return jax.tree.map(jnp.add, grads, new), metrics

        zeros = jax.tree.map(jnp.zeros_like, params)
        grads, parts = jax.lax.scan(
            add, zeros, (micro, jax.random.split(key, accumulation))
        )
        return grads, jax.tree.map(lambda x: x.sum(axis=0), parts)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: State, batches, key, frozen=None):
        def step(state, batch_and_key):
            grads, metrics = gradients(state.policy, frozen, *batch_and_key)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.policy)
            policy = optax.apply_updates(state.policy, updates)
            metrics |= {"grad_norm": optax.tree.norm(grads)}
            return State(policy, opt_state), metrics

        count = jax.tree.leaves(batches)[0].shape[0]
        state, steps = jax.lax.scan(
            step, state, (batches, jax.random.split(key, count))
        )
        metrics = jax.tree.map(jnp.mean, steps)
        return state, metrics | {"optimizer/lr": learning_rate(state.opt_state)}

    return update


def make_phase(
    config: ConfigDict,
    mesh: Mesh,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    rows: Any,
    *,
    frozen: Any | None = None,
    cut: Callable[[np.ndarray, int], Sequence[Any]] | None = None,
    pack: Callable[[Any], Any] | None = None,
    **micro_batches: Any,
) -> Callable:
    """Builds `run_phase(state, phase) -> (state, metrics, [])`.

    Args:
      config: the run's; `learning.batch` and `learning.steps_per_phase`.
      mesh: where the batches go.
      loss: of a batch or a micro-batch, see `make_update`.
      optimizer: its update.
      rows: a pytree of NumPy arrays [N, ...], on every host.
      frozen: what of the model is not trained.
      cut: (the phase's row numbers, phase) -> one batch [B, ...] for each step; None
        takes them in order, in one compiled scan.
      pack: batches [S, B, ...] of that scan -> the same, packed; only without `cut`.
      **micro_batches: the `accumulation` and `counts` of `make_update`.
    """
    update = make_update(loss, optimizer, **micro_batches)
    steps, batch = config.learning.steps_per_phase, config.learning.batch
    across = NamedSharding(mesh, P(None, sharding.BATCH))
    count = len(jax.tree.leaves(rows)[0])

    def scans(phase: int):
        """Batches [S, B, ...] of the phase, S steps in one scan."""
        order = phase_rows(count, phase - 1, batch_size=steps * batch, seed=config.seed)
        if cut is not None:
            return [jax.tree.map(lambda x: x[None], part) for part in cut(order, phase)]
        shape = steps, batch
        whole = jax.tree.map(lambda x: x[order].reshape(*shape, *x.shape[1:]), rows)
        return [whole if pack is None else pack(whole)]

    def run_phase(state: State, phase: int):
        started = time.perf_counter()
        key, found = keys.branch_key(config.seed, keys.DROPOUT, phase), []
        for number, batches in enumerate(scans(phase)):
            # One scan draws from the phase's key itself, as all runs before did.
            scan_key = jax.random.fold_in(key, number) if cut is not None else key
            batches = sharding.to_devices(batches, across)
            state, metrics = update(state, batches, scan_key, frozen)
            found.append(metrics)
        metrics = jax.tree.map(lambda *x: sum(x) / len(x), *found)
        jax.block_until_ready(metrics)
        seconds = time.perf_counter() - started
        return state, metrics | {"time/rows_per_s": steps * batch / seconds}, []

    return run_phase


def cut_by_length(
    config: ConfigDict, rows: Any, lengths: np.ndarray
) -> Callable[[np.ndarray, int], Sequence[Any]] | None:
    """The `cut` of `make_phase` that `config.learning.buckets` asks for, or None.

    Args:
      config: the run's.
      rows: a pytree of arrays [N, ...].
      lengths: [N] tokens of each row.
    """
    learning = config.learning
    if not learning.buckets:
        return None
    return lambda order, phase: length_batches(
        rows,
        lengths,
        order,
        batch=learning.batch,
        widths=tuple(learning.buckets),
        seed=config.seed + phase,
    )


def evaluate_rows(
    sums: Callable, params: Any, rows: Any, *, batch: int, mesh: Mesh
) -> dict[str, float]:
    """Means over held-out rows of what `sums(params, batch, valid)` adds up.

    `sums` returns {name: (sum, count)} over the rows where `valid` [B] is true; the
    last batch is filled up with rows that are not.
    """
    count = len(jax.tree.leaves(rows)[0])
    totals: dict[str, np.ndarray] = {}
    for start in range(0, count, batch):
        index = np.arange(start, start + batch)
        valid = index < count
        part = jax.tree.map(lambda x, i=index % count: x[i], rows)
        part, valid = sharding.to_devices((part, valid), sharding.rows(mesh))
        for name, pair in sharding.to_host(sums(params, part, valid)).items():
            totals[name] = totals.get(name, 0.0) + np.array(pair, np.float64)
    return {f"heldout/{n}": float(s / max(c, 1.0)) for n, (s, c) in totals.items()}
