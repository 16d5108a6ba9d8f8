"""Reward and cost models: a scalar for a prompt and a response, from preferences.

One phase is `config.learning.steps_per_phase` optimizer steps:
    1. take the next pairs; both sides go through the model in one forward pass
    2. read r off the last real token of each side, its EOS          (score_pairs)
    3. reward model                                                  (reward_loss)
           x = r_chosen − r_rejected − m
           L = −p log σ(x) − (1−p) log σ(−x) + c (r_chosen + r_rejected)²
       p is the raters' probability that chosen is better, 1 for hard labels; m is by
       how much it should be better, 0 without a margin.
       Cost model, C = r; chosen is the safer one                    (cost_loss)
           L = −log σ(C_rejected − C_chosen) − Σ log σ(s C) + κ mean(C²)
       s is +1 for an unsafe response and −1 for a safe one.

Held-out figures are the loss without c, m and κ, the accuracy (the order of the two)
and the margin. After the last phase the model is compared with rules that know only
words or lengths, and what it gets wrong is written to `report/`. The mean and standard
deviation of its scores are exported with it, for rewards of one scale.

References:
    Bradley & Terry 1952; Ouyang et al. 2022, equation 1,
    https://arxiv.org/abs/2203.02155
    Margin: Llama 2, equation 2, https://arxiv.org/abs/2307.09288
    Centering: Eisenstein et al. 2023, https://arxiv.org/abs/2312.09244
    Cost model: Dai et al. 2023 (Safe RLHF), https://arxiv.org/abs/2310.12773
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console

from rlhf_jax import loading, losses, progress, sharding, trainable
from rlhf_jax.data.cleaning import cleaning_of
from rlhf_jax.data.labelled_pairs import (
    MARGINS,
    Pairs,
    encode_pairs,
    require_labels,
)
from rlhf_jax.data.preferences import load_pairs
from rlhf_jax.data.rows import Pair
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.reward_report import report_pairs
from rlhf_jax.losses import masked
from rlhf_jax.models.transformer import Model
from rlhf_jax.plots import Panel
from rlhf_jax.rewards.model import score_sequences
from rlhf_jax.trainers import common, offline
from rlhf_jax.trees import join

COST = "cost_model"
TITLES = {"reward_model": "Reward model", COST: "Cost model"}
# So many training pairs say what mean and deviation the scores have, to 1 %.
SCORED_PAIRS = 4096
RANGES = {
    "sequence_tokens": (2, math.inf),
    "learning.steps_per_phase": (1, math.inf),
    "learning.accumulation": (1, math.inf),
}
FIELDS = {
    "loss": "loss {:.3f}",
    "accuracy": "accuracy {:.3f}",
    "heldout/accuracy": "held-out {:.3f}",
    "heldout/sign_accuracy": "signs {:.3f}",
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
    Panel(
        "Signs",
        "fraction of responses",
        {"training": "sign_accuracy"},
        {"held-out": "heldout/sign_accuracy"},
    ),
    Panel("Margin", "score", {"training": "margin"}, {"held-out": "heldout/margin"}),
    Panel(
        "Scores",
        "score",
        {"mean": "score_mean", "standard deviation": "score_std"},
        {"held-out deviation": "heldout/score_std"},
    ),
    Panel("Gradient norm", "", {"": "grad_norm"}),
    Panel("Learning rate", "", {"": "optimizer/lr"}),
)


HEADLINE = (
    ("held-out accuracy", "heldout/accuracy", None),
    ("held-out signs", "heldout/sign_accuracy", None),
    ("held-out loss", "heldout/loss", None),
)


def score_pairs(
    model: Model, params: Any, pairs: Pairs, dropout_key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(r_chosen, r_rejected), [B] each, in one forward pass over 2·B rows."""
    B, _, T = pairs.tokens.shape
    flat = pairs.tokens.reshape(2 * B, T), pairs.mask.reshape(2 * B, T)
    scores = score_sequences(model, params, *flat, dropout_key).reshape(B, 2)
    return scores[:, 0], scores[:, 1]


def reward_loss(
    learning: ConfigDict, chosen: jax.Array, rejected: jax.Array, pairs: Pairs
) -> jax.Array:
    """Bradley-Terry, [B]."""
    return losses.bradley_terry(
        chosen,
        rejected,
        centering=learning.centering,
        margin=pairs.margin,
        targets=pairs.probability,
    )


def cost_loss(
    learning: ConfigDict, chosen: jax.Array, rejected: jax.Array, pairs: Pairs
) -> jax.Array:
    """Order and signs, [B]; chosen is the safer one."""
    safe = pairs.safe[:, 0], pairs.safe[:, 1]
    return losses.cost_model_loss(
        chosen, rejected, *safe, regularization=learning.regularization
    )


def measure(
    model: Model,
    config: ConfigDict,
    params: Any,
    pairs: Pairs,
    valid: jax.Array,
    dropout_key: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Loss and metrics, each summed over the pairs where `valid` [B] is true."""
    chosen, rejected = score_pairs(model, params, pairs, dropout_key)
    costs = config.algorithm == COST
    loss = cost_loss if costs else reward_loss
    margin = rejected - chosen if costs else chosen - rejected
    values = {
        "loss": loss(config.learning, chosen, rejected, pairs),
        "accuracy": margin > 0,
        "margin": margin,
        "score_mean": (chosen + rejected) / 2,
        "score_square": (jnp.square(chosen) + jnp.square(rejected)) / 2,
    }
    if costs:
        safe = jnp.stack([chosen, rejected], axis=1) < 0
        values["sign_accuracy"] = (safe == pairs.safe).mean(axis=1)
    return {name: masked.sum(value, valid) for name, value in values.items()}


def everything(pairs: Pairs) -> jax.Array:
    """[B] bool, for a batch in which every pair is real."""
    return jnp.ones(pairs.tokens.shape[0], bool)


def count(pairs: Pairs) -> jax.Array:
    """How many pairs a batch's loss is the mean over."""
    return jnp.float32(pairs.tokens.shape[0])


def make_loss(model: Model, config: ConfigDict) -> offline.Loss:
    """Builds the training loss and its metrics, of a batch or a micro-batch of it."""

    noisy = bool(model.config.dropout or model.config.lora_dropout)

    def loss(params, pairs: Pairs, key, whole: jax.Array | None = None):
        key = key if noisy else None
        sums = measure(model, config, params, pairs, everything(pairs), key)
        whole = count(pairs) if whole is None else whole
        means = {name: value / whole for name, value in sums.items()}
        return means["loss"], means

    return loss


def with_deviation(metrics: dict[str, Any], split: str = "") -> dict[str, Any]:
    """The scores' standard deviation in place of their mean square."""
    mean, square = (metrics[f"{split}score_{name}"] for name in ("mean", "square"))
    others = {k: v for k, v in metrics.items() if k != f"{split}score_square"}
    deviation = jnp.sqrt(jnp.maximum(square - mean * mean, 0.0))
    return others | {f"{split}score_std": deviation}


def make_phase(
    config: ConfigDict,
    mesh: Mesh,
    model: Model,
    optimizer: Any,
    train: Pairs,
    frozen: Any | None = None,
) -> Callable:
    """Builds `run_phase(state, phase) -> (state, metrics, [])`: steps 1 to 3."""
    pieces = config.learning.accumulation
    micro = {"accumulation": pieces, "counts": count} if pieces > 1 else {}
    cut = offline.cut_by_length(config, train, train.mask.sum(axis=2).max(axis=1))
    settings = {"frozen": frozen, "cut": cut, **micro}
    loss = make_loss(model, config)
    learn = offline.make_phase(config, mesh, loss, optimizer, train, **settings)

    def run_phase(state: offline.State, phase: int):
        state, metrics, rows = learn(state, phase)
        return state, with_deviation(metrics), rows

    return run_phase


def make_evaluate(
    model: Model, config: ConfigDict, mesh: Mesh, heldout: Pairs
) -> Callable:
    """Builds `evaluate(params) -> (metrics, [])` on the held-out pairs."""
    plain = ConfigDict(
        config.to_dict(), type_safe=False
    )  # the same figure, whatever is added to it
    plain.learning.update({"centering": 0.0, "regularization": 0.0})

    @jax.jit
    def sums(params, pairs: Pairs, valid):
        found = measure(model, plain, params, pairs, valid)
        return {name: (value, valid.sum()) for name, value in found.items()}

    def evaluate(params: Any):
        metrics = offline.evaluate_rows(
            sums, params, heldout, batch=micro_batch(config), mesh=mesh
        )
        return with_deviation(metrics, "heldout/"), []

    return evaluate


def make_scores(model: Model, config: ConfigDict, mesh: Mesh) -> Callable:
    """Builds `scores(params, pairs) -> [N, 2] float32`, on every host."""

    @jax.jit
    def score(params, pairs: Pairs):
        return jnp.stack(score_pairs(model, params, pairs), axis=1)

    def scores(params, pairs: Pairs):
        total, batch = len(pairs.tokens), micro_batch(config)
        found = [np.zeros((0, 2), np.float32)]
        for start in range(0, total, batch):
            index = np.arange(start, start + batch) % total
            part = sharding.to_devices(
                jax.tree.map(lambda x, i=index: x[i], pairs), sharding.rows(mesh)
            )
            found.append(sharding.to_host(score(params, part)))
        return np.concatenate(found)[:total]

    return scores


def micro_batch(config: ConfigDict) -> int:
    """Pairs that go through the model at once."""
    return config.learning.batch // config.learning.accumulation


def validate(config: ConfigDict, mesh: Mesh) -> None:
    """Raises a `UserError` for settings that cannot work together."""
    learning = config.learning
    own = "regularization" if config.algorithm == COST else "centering"
    common.check_ranges(config, RANGES | {f"learning.{own}": (0, math.inf)})
    sharding.check_batch("config.learning.batch", learning.batch, mesh)
    if learning.batch < 1 or learning.batch % learning.accumulation:
        raise UserError(
            f"config.learning.batch={learning.batch} must be a multiple of "
            f"config.learning.accumulation={learning.accumulation}"
        )
    told = "config.learning.batch / accumulation"
    sharding.check_batch(told, micro_batch(config), mesh)
    if config.algorithm == COST:
        return
    if learning.margin not in MARGINS:
        raise UserError(
            f"config.learning.margin={learning.margin!r} is unknown; take one of "
            + ", ".join(map(repr, MARGINS))
        )
    if learning.margin == "raters" and learning.soft_labels:
        raise UserError(
            "config.learning.soft_labels and config.learning.margin='raters' are two "
            "uses of the same probability: turn one of them off"
        )


def load_data(
    config: ConfigDict, tokenizer: Any, console: Console
) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs; no prompt or text of the one is in the other."""
    data = config.data
    if not data.source:
        raise UserError(
            "config.data.source is empty: give a file or data set of pairs, as "
            "--config.data.source=pairs.jsonl"
        )
    needed = ("chosen_safe", "rejected_safe")  # where the zero of a cost is
    if config.algorithm != COST:
        needed = ("margin",) if config.learning.margin == "column" else ()
    cleaning = cleaning_of(config)

    def load(split, rounds=0, **apart):
        pairs, counts = load_pairs(
            data.source,
            split=split,
            tokenizer=tokenizer,
            preference=data.preference,
            cleaning=cleaning._replace(**apart),
            domains=data.domains,
            rounds=rounds,
            seed=config.seed,
        )
        progress.show_counts(console, f"{data.source}, {split}", counts)
        require_labels(pairs, needed, data.source)
        return pairs

    heldout = load(data.heldout_split)
    return load(data.train_split, data.rounds, apart_from=tuple(heldout)), heldout


def score_statistics(config: ConfigDict, scores: np.ndarray) -> dict[str, float]:
    """What config.json says of the scores [N, 2] of training pairs.

    The zero of a cost means something and stays where it is.
    """
    mean = 0.0 if config.algorithm == COST else float(scores.mean(dtype=np.float64))
    return {
        "score_mean": mean,
        "score_std": float(scores.std(dtype=np.float64)),
    }


def run(config: ConfigDict) -> None:
    """Trains a model in `config.workdir`, or goes on where that run stopped."""
    console = progress.make_console()
    mesh = sharding.make_mesh(**config.mesh)
    validate(config, mesh)
    files = common.open_workdir(config)
    with jax.set_mesh(mesh):
        tokenizer = loading.load_run_tokenizer(config, console)
        texts = load_data(config, tokenizer, console)
        loaded = loading.load_model(config.model, config, mesh, head=True)
        labels = {}
        if config.algorithm != COST:
            labels = {name: config.learning[name] for name in ("soft_labels", "margin")}
        train = encode_pairs(
            tokenizer, texts[0], length=config.sequence_tokens, **labels
        )
        # What is held out has its own labels, but no margin to keep.
        heldout = encode_pairs(
            tokenizer,
            texts[1],
            length=config.sequence_tokens,
            **labels | {"margin": ""},
        )
        trained, frozen = trainable.cut(config, loaded.params, mesh)
        state, optimizer = offline.make_state(config, trained, mesh)
        common.print_plan(console, config, mesh, {"model": state.policy})
        model = loaded.model
        evaluate = make_evaluate(model, config, mesh, heldout)
        hooks = common.Hooks(
            run_phase=make_phase(config, mesh, model, optimizer, train, frozen),
            evaluate=lambda state: evaluate(join(state.policy, frozen)),
            fields=FIELDS,
            panels=PANELS,
            headline=HEADLINE,
        )
        state = common.run_loop(config, files, console, state, hooks)
        params, scores = join(state.policy, frozen), make_scores(model, config, mesh)
        spread = np.unique(np.linspace(0, len(texts[0]) - 1, SCORED_PAIRS).astype(int))
        some = jax.tree.map(lambda x: x[spread], train)
        statistics = score_statistics(config, scores(params, some))
        judged = scores(params, heldout)
        loaded = loaded._replace(hf_config=loaded.hf_config | statistics)
        done = trainable.Parts(state.policy, frozen)
        trainable.export(config, files, loaded, done, tokenizer)
        if jax.process_index() == 0:
            title = f"{TITLES[config.algorithm]}: {config.workdir}"
            figures, facts = report_pairs(
                files.workdir / "report",
                *texts,
                judged,
                costs=config.algorithm == COST,
                title=title,
            )
            common.close_run(files, console, hooks, title, facts, figures | statistics)
