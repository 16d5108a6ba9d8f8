"""Numbers that are not finite: what went bad first, and a step that leaves it out.

`guard` puts the check into the compiled update: a step whose gradient, or its sum of
squares, is not finite changes neither weights nor moments. It counts such steps and
notes the first weight, in the order of the forward pass, whose gradient went bad. What
happens to the run then is `config.nonfinite`:

    stop      it ends, with a sentence
    skip      it goes on without those steps; after `PATIENCE` in a row it ends
    rollback  it goes on from the newest checkpoint and leaves the bad phase out
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.errors import UserError
from rlhf_jax.trees import weight_name

ACTIONS = ("stop", "skip", "rollback")
PATIENCE = 10  # optimizer steps in a row that may be left out
ROLLBACKS = 3  # phases of a run that may be left out
ADVICE = (
    "nothing past the last checkpoint was saved: lower the learning rate, clip "
    "gradients with config.optimizer.clip_norm, or go on without what went bad by "
    "--config.nonfinite=skip or rollback"
)

# What a phase computes, in order: the metrics that tell of it, and what it is.
TENSORS = (
    (r"reward/(?!kl_penalty$|with_kl$)", "a reward"),
    (r"rollout/logprob|policy/entropy$|kl/|logps/", "a log-probability"),
    (r"value/mean$", "a value"),
    (r"reward/|value/(return|explained)|advantage|groups/", "an advantage"),
    (r"first_step/|policy/(?!grad_norm)|value/(?!grad_norm)", "the loss"),
    (r"loss$|rewards/", "the loss"),
)
# The order of weights in the forward pass; the others come after these.
WEIGHTS = (
    *("embed", "layers/attention_norm", "layers/attention/query"),
    *("layers/attention/key", "layers/attention/value", "layers/attention/out"),
    *("layers/attention", "layers/post_attention_norm", "layers/mlp_norm"),
    *("layers/mlp/gate", "layers/mlp/up", "layers/mlp/down", "layers", "final_norm"),
)


class Guarded(NamedTuple):
    """The state of a guarded optimizer."""

    inner: Any
    skipped: jax.Array  # [] int32, steps left out so far
    in_row: jax.Array  # [] int32, of which the newest without one between them
    first: jax.Array  # [] int32, the weight that went bad first in that row


class Counts(NamedTuple):
    """The last three of `Guarded`."""

    skipped: Any
    in_row: Any
    first: Any


class BadPhaseError(Exception):
    """A phase is to be left out; the message says what in it was not finite."""

    def __init__(self, phase: int, reason: str):
        super().__init__(reason)
        self.phase = phase


class Judge:
    """Sees the metrics of every phase, and does what `config.nonfinite` says."""

    def __init__(
        self, action: str, say: Callable[[str], None], state: Any, left_out: Sequence
    ):
        """Takes the state to start from, and the phases that are left out already.

        Raises:
          UserError: there is no such action.
        """
        if action not in ACTIONS:
            raise UserError(
                f"config.nonfinite={action!r} is unknown; "
                f"take one of {', '.join(ACTIONS)}"
            )
        self._action, self._say, self._left_out = action, say, left_out
        self._names = weight_names(state)
        counts = counts_of(state)
        self._skipped = int(counts.skipped) if counts else 0

    def see(
        self, phase: int, metrics: Mapping[str, float], counts: Counts | None
    ) -> dict[str, float]:
        """Returns the metrics to write down: the finite ones, if it is to go on.

        Raises:
          UserError: the run is to end.
          BadPhaseError: it is to go on without this phase.
        """
        skipped = int(counts.skipped) - self._skipped if counts else 0
        self._skipped += skipped
        told = {"optimizer/skipped": skipped} if self._action == "skip" else {}
        weight = self._names[int(counts.first)] if skipped else None
        what = first_tensor(metrics, weight)
        if what is None:
            return dict(metrics) | told
        reason = f"phase {phase}: {what} is not finite"
        if not phase:
            raise UserError(
                f"{reason} before anything was learned, so training does not begin: "
                "look at the model, its dtype and the rewards"
            )
        if self._action == "rollback":
            again = phase in self._left_out
            if not again and len(self._left_out) < ROLLBACKS:
                raise BadPhaseError(phase, reason)
            reason += f", and {len(self._left_out)} phases are left out already"
        if self._action == "skip" and counts.in_row < PATIENCE:
            self._say(f"{reason}; optimizer steps left out: {skipped}")
            finite = {k: x for k, x in metrics.items() if math.isfinite(x)}
            return finite | told
        if self._action == "skip":
            reason += f", {int(counts.in_row)} optimizer steps in a row"
        raise UserError(f"{reason}, so training stops; {ADVICE}")


def guard(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer, but for steps whose gradient is not finite: they change nothing.

    Nothing is fetched from the device. The choice is made by `where` and not by
    branches, so that it fuses with the update.
    """

    def init(params: Any) -> Guarded:
        zero = jnp.int32(0)
        return Guarded(optimizer.init(params), zero, zero, zero)

    def update(grads: Any, state: Guarded, params: Any = None):
        # The sums of squares are those of the norm, which is computed anyway.
        good = jnp.stack(
            [jnp.isfinite(jnp.square(g).sum()) for g in jax.tree.leaves(grads)]
        )
        whole = good.all()
        updates, inner = optimizer.update(grads, state.inner, params)
        updates = jax.tree.map(
            lambda u: jnp.where(whole, u, jnp.zeros_like(u)), updates
        )
        inner = jax.tree.map(
            lambda new, old: jnp.where(whole, new, old), inner, state[0]
        )
        order = jnp.array(forward_order(grads))
        first = order[jnp.argmin(good[order])]
        return updates, Guarded(
            inner,
            state.skipped + ~whole,
            jnp.where(whole, 0, state.in_row + 1),
            jnp.where(whole | (state.in_row > 0), state.first, first),
        )

    return optax.GradientTransformation(init, update)


def forward_order(tree: Any) -> list[int]:
    """The numbers of a tree's leaves in the order of the forward pass."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    networks = list(dict.fromkeys(map(_network, paths)))

    def place(number: int) -> tuple[int, int]:
        name = weight_name(paths[number])
        found = (i for i, start in enumerate(WEIGHTS) if name.startswith(start))
        # A network is whole before the next one: PPO has a policy and a critic.
        return networks.index(_network(paths[number])), next(found, len(WEIGHTS))

    return sorted(range(len(paths)), key=place)


def weight_names(state: Any) -> list[str]:
    """The names of the trained weights, in the order of the optimizer's leaves."""
    networks = {"policy": state.policy}
    if hasattr(state, "critic"):
        networks["critic"] = state.critic
    return [
        f"{network} {weight_name(path)}" if len(networks) > 1 else weight_name(path)
        for network, tree in networks.items()
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


def counts_of(state: Any) -> Counts | None:
    """A copy of what the guard has counted, which outlives the donated state."""
    guarded = getattr(state, "opt_state", None)
    if not isinstance(guarded, Guarded):
        return None
    return Counts(*map(jnp.copy, guarded[1:]))


def first_tensor(metrics: Mapping[str, float], weight: str | None) -> str | None:
    """What went bad first, with the metric that tells; None if nothing did.

    Args:
      metrics: of a phase.
      weight: the one whose gradient was the first that was not finite, if any was.
    """
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    for pattern, noun in TENSORS:
        for name in bad:
            if re.match(pattern, name):
                return f"{noun} ({name})"
    if weight is not None:
        return f"the gradient of {weight}"
    return bad[0] if bad else None


def _network(path: tuple) -> str:
    return getattr(path[0], "name", "") if path else ""
