"""Optimizers and learning-rate schedules from `config.optimizer`.

Two conventions of Adam are in use, and PPO on language models feels the difference:
PyTorch's (optax's) adds eps to the bias-corrected √v̂, TensorFlow's, which the first
RLHF results were made with, adds it to the raw √v, so that early steps are smaller.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from rlhf_jax.errors import UserError
from rlhf_jax.trees import weight_name

SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adam", "adam_tf")


def scale_by_adam_tf(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam in TensorFlow's convention.

    u = √(1−β₂ᵗ)/(1−β₁ᵗ) · m / (√v + ε)

    References:
      Kingma & Ba 2015, the remark after algorithm 1, https://arxiv.org/abs/1412.6980;
      Huang et al. 2023, "The N Implementation Details of RLHF with PPO",
      https://huggingface.co/blog/the_n_implementation_details_of_rlhf_with_ppo
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        zeros = optax.tree.zeros_like
        return optax.ScaleByAdamState(jnp.int32(0), zeros(params), zeros(params))

    def update(grads: Any, state: optax.ScaleByAdamState, params: Any = None):
        del params
        mu = optax.tree.update_moment(grads, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2)
        count = optax.safe_increment(state.count)
        scale = jnp.sqrt(1 - b2**count) / (1 - b1**count)
        updates = jax.tree.map(lambda m, v: scale * m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def scale_by_name(
    scales: Sequence[tuple[str, float]],
) -> optax.GradientTransformation:
    """Updates times the factor of the first pattern found in the weight's name.

    Raises:
      UserError: a factor that is negative, or, at `init`, a pattern that is in no name.
    """
    for pattern, factor in scales:
        if factor < 0:
            raise UserError(
                f"config.optimizer.lr_scales has {factor} for {pattern!r}: it must be "
                "at least 0"
            )

    def factor_of(name: str) -> float:
        found = (factor for pattern, factor in scales if re.search(pattern, name))
        return next(found, 1.0)

    def init(params: Any) -> optax.EmptyState:
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        # optax also asks with a placeholder in place of the whole tree.
        names = sorted({weight_name(path) for path in paths} - {""})
        for pattern, _ in scales:
            if names and not any(re.search(pattern, name) for name in names):
                raise UserError(
                    f"config.optimizer.lr_scales has the pattern {pattern!r}, which is "
                    f"in none of the weights' names: they are {', '.join(names)}"
                )
        return optax.EmptyState()

    def update(updates: Any, state: optax.EmptyState, params: Any = None):
        del params
        scaled = jax.tree_util.tree_map_with_path(
            lambda path, u: factor_of(weight_name(path)) * u, updates
        )
        return scaled, state

    return optax.GradientTransformation(init, update)


def make_schedule(
    schedule: str, lr: float, warmup_steps: int, total_steps: int
) -> optax.Schedule:
    """Learning rate over update steps: linear warm-up, then the named decay to zero."""
    if schedule not in SCHEDULES:
        raise UserError(
            f"config.optimizer.schedule={schedule!r} is unknown; "
            f"take one of {', '.join(SCHEDULES)}"
        )
    if not 0 <= warmup_steps < total_steps:
        raise UserError(
            f"config.optimizer.warmup_steps={warmup_steps} must be at least 0 and "
            f"less than the run's {total_steps} optimizer steps"
        )
    decay_steps = total_steps - warmup_steps
    decay = {
        "constant": optax.constant_schedule(lr),
        "linear": optax.linear_schedule(lr, 0.0, decay_steps),
        "cosine": optax.cosine_decay_schedule(lr, decay_steps),
    }[schedule]
    if not warmup_steps:
        return decay
    # Step 0 already learns: the ramp is 1/w, 2/w, ..., 1.
    ramp = optax.linear_schedule(lr / warmup_steps, lr, max(warmup_steps - 1, 1))
    return optax.join_schedules([ramp, decay], [warmup_steps])


def make_optimizer(
    config: ConfigDict, lr: float, total_steps: int
) -> optax.GradientTransformation:
    """Clip by global norm, Adam, decoupled weight decay on matrices, schedule.

    Args:
      config: `config.optimizer`: name, b1, b2, eps, weight_decay, clip_norm (0: off),
        schedule, warmup_steps, and lr_scales: (pattern, factor) pairs for weights that
        learn at another rate, of which the first that is found in a name counts.
      lr: peak learning rate.
      total_steps: optimizer steps of the whole run; the schedule ends there.

    Returns:
      An optax transformation; its `init` and `update` are pure.
    """
    if config.name not in OPTIMIZERS:
        raise UserError(
            f"config.optimizer.name={config.name!r} is unknown; "
            f"take one of {', '.join(OPTIMIZERS)}"
        )
    adam = {"adam": optax.scale_by_adam, "adam_tf": scale_by_adam_tf}[config.name]
    steps = [adam(config.b1, config.b2, config.eps)]
    if config.clip_norm:
        steps.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.weight_decay:
        steps.append(optax.add_decayed_weights(config.weight_decay, _decays))
    schedule = make_schedule(config.schedule, lr, config.warmup_steps, total_steps)
    # Injected, so that the rate of each step stands in the state and can be logged.
    scale = optax.inject_hyperparams(optax.scale_by_learning_rate)
    steps.append(scale(learning_rate=schedule))
    if config.lr_scales:
        steps.append(scale_by_name(config.lr_scales))
    return optax.chain(*steps)


def learning_rate(opt_state: Any) -> jax.Array:
    """The learning rate of the last step, read from the optimizer's state."""
    return optax.tree.get(opt_state, "hyperparams")["learning_rate"]


def _decays(params: Any) -> Any:
    """True on matrices and embeddings, false on norm scales and biases."""

    def matrix(path: tuple, _) -> bool:
        return path[-1].key not in ("scale", "bias")

    return jax.tree_util.tree_map_with_path(matrix, params)
