"""Reward model: a scalar for a prompt and a response, learned from preferences.

One phase is `config.learning.steps_per_phase` optimizer steps:
    1. take the next pairs; both sides go through the model in one forward pass
    2. read r off the last real token of each side (its EOS)
    3. L = −p log σ(r_chosen − r_rejected) − (1−p) log σ(r_rejected − r_chosen)
           + c (r_chosen + r_rejected)²
       p is the raters' probability that chosen is better, 1 for hard labels.

Held-out figures are the loss, the accuracy (r_chosen > r_rejected) and the margin.

References:
    Bradley & Terry 1952; Ouyang et al. 2022, equation 1,
    https://arxiv.org/abs/2203.02155
    Centering: Eisenstein et al. 2023, https://arxiv.org/abs/2312.09244
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlhf_jax import losses, progress, sharding
from rlhf_jax.data.preferences import Pair, load_preferences
from rlhf_jax.data.sequences import encode_sequences
from rlhf_jax.losses import masked
from rlhf_jax.models.transformer import Model
from rlhf_jax.plots import Panel
from rlhf_jax.rewards.model import score_sequences
from rlhf_jax.trainers import common, loading, offline

FIELDS = {
    "loss": "loss {:.3f}",
    "accuracy": "accuracy {:.3f}",
    "heldout/accuracy": "held-out {:.3f}",
    "grad_norm": "grad {:.2f}",
    "time/rows_per_s": "{:,.0f} pairs/s",
}
PANELS = (
    Panel("Loss", "nats a pair", {"training": "loss"}, {"held-out": "heldout/loss"}),
    Panel(
        "Accuracy",
        "fraction of pairs",
        {"training": "accuracy"},
        {"held-out": "heldout/accuracy"},
    ),
    Panel("Margin", "score", {"training": "margin"}, {"held-out": "heldout/margin"}),
    Panel("Gradient norm", "", {"": "grad_norm"}),
    Panel("Learning rate", "", {"": "optimizer/lr"}),
)


class Pairs(NamedTuple):
    """Preference pairs as arrays; side 0 is chosen, side 1 rejected."""

    tokens: np.ndarray  # [N, 2, T] int32, right-padded
    mask: np.ndarray  # [N, 2, T] bool
    probability: np.ndarray  # [N] float32


def encode_pairs(
    tokenizer: Any, pairs: Sequence[Pair], *, length: int, soft_labels: bool
) -> Pairs:
    """Prompt + response + EOS of both sides; a long pair loses its beginning."""
    sides = [
        encode_sequences(
            tokenizer,
            [pair.prompt + getattr(pair, side) for pair in pairs],
            length=length,
            keep_end=True,
        )
        for side in ("chosen", "rejected")
    ]
    tokens, mask = (np.stack(both, axis=1) for both in zip(*sides))
    labels = [pair.probability if soft_labels else 1.0 for pair in pairs]
    return Pairs(tokens, mask, np.array(labels, np.float32))


def score_pairs(
    model: Model, params: Any, pairs: Pairs, dropout_key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(r_chosen, r_rejected), [B] each, in one forward pass over 2·B rows."""
    B, _, T = pairs.tokens.shape
    flat = pairs.tokens.reshape(2 * B, T), pairs.mask.reshape(2 * B, T)
    scores = score_sequences(model, params, *flat, dropout_key).reshape(B, 2)
    return scores[:, 0], scores[:, 1]


def make_loss(model: Model, config: ConfigDict) -> offline.Loss:
    """Builds the training loss and its metrics."""

    def loss(params, pairs: Pairs, key):
        key = key if model.config.dropout else None
        chosen, rejected = score_pairs(model, params, pairs, key)
        value = losses.bradley_terry(
            chosen,
            rejected,
            centering=config.learning.centering,
            targets=pairs.probability,
        ).mean()
        return value, {
            "loss": value,
            "accuracy": (chosen > rejected).mean(),
            "margin": (chosen - rejected).mean(),
            "score_mean": (chosen + rejected).mean() / 2,
        }

    return loss


def make_evaluate(
    model: Model, config: ConfigDict, mesh: Mesh, heldout: Pairs
) -> Callable:
    """Builds `evaluate(state) -> (metrics, [])` on the held-out pairs."""

    @jax.jit
    def sums(params, pairs: Pairs, valid):
        chosen, rejected = score_pairs(model, params, pairs)
        value = losses.bradley_terry(
            chosen, rejected, centering=0.0, targets=pairs.probability
        )
        measured = {
            "loss": value,
            "accuracy": (chosen > rejected).astype(jnp.float32),
            "margin": chosen - rejected,
        }
        return {k: masked.sum_and_count(v, valid) for k, v in measured.items()}

    def evaluate(state: offline.State):
        metrics = offline.evaluate_rows(
            sums, state.policy, heldout, batch=config.learning.batch, mesh=mesh
        )
        return metrics, []

    return evaluate


def run(config: ConfigDict) -> None:
    """Trains a reward model in `config.workdir`, or goes on where that run stopped."""
    console = progress.make_console()
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_batch("config.learning.batch", config.learning.batch, mesh)
    files = common.open_workdir(config)
    with jax.set_mesh(mesh):
        tokenizer = loading.load_run_tokenizer(config, console)
        loaded = loading.load_model(config.model, config, mesh, head=True)

        def load(split, rounds):
            data = config.data
            pairs = load_preferences(
                data.source,
                split=split,
                domains=data.domains,
                rounds=rounds,
                seed=config.seed,
            )
            return encode_pairs(
                tokenizer,
                pairs,
                length=config.sequence_tokens,
                soft_labels=config.learning.soft_labels,
            )

        train, heldout = load("train", config.data.rounds), load("validation", 0)
        state, optimizer = offline.make_state(config, loaded.params, mesh)
        common.print_plan(console, config, mesh, {"reward model": state.policy})
        loss = make_loss(loaded.model, config)
        hooks = common.Hooks(
            run_phase=offline.make_phase(config, mesh, loss, optimizer, train),
            evaluate=make_evaluate(loaded.model, config, mesh, heldout),
            fields=FIELDS,
            panels=PANELS,
            headline=[
                ("held-out accuracy", "heldout/accuracy", None),
                ("held-out loss", "heldout/loss", None),
            ],
        )
        state = common.run_loop(config, files, console, state, hooks)
        loading.export(config, files, loaded, state.policy, tokenizer)
        common.close_run(files, console, hooks, f"Reward model: {config.workdir}")
