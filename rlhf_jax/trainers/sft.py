"""Supervised fine-tuning: next-token prediction on texts, from any model or none.

Before the first phase texts become rows of tokens: one a row, padded, or several a row,
packed, with attention inside each. Of prompts with responses the response alone is
learned, or all of it.

One phase is `config.learning.steps_per_phase` optimizer steps:
    1. take the next batches of rows; the order is a function of (seed, phase)
    2. L = −Σ_t m_t log π(y_t | y_<t) / Σ_t m_t over the whole batch, or DFT's
    3. one optimizer step a batch; dropout and NEFTune's noise only here

Held-out figures are the loss in nats a token, and texts that the model continues from
the held-out prompts.

References:
    Radford et al. 2018, https://openai.com/index/language-unsupervised/
    Ouyang et al. 2022, section 3.5, https://arxiv.org/abs/2203.02155
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlhf_jax import keys, loading, losses, progress, sharding, trainable
from rlhf_jax.data.cleaning import cleaning_of
from rlhf_jax.data.packing import (
    Rows,
    encode_completions,
    pack_rows,
    pad_rows,
)
from rlhf_jax.data.prompts import load_both
from rlhf_jax.data.rows import Completion
from rlhf_jax.data.texts import load_completions, load_texts
from rlhf_jax.data.tokenizer import special_tokens
from rlhf_jax.errors import UserError
from rlhf_jax.models.transformer import Model
from rlhf_jax.plots import Panel
from rlhf_jax.rollout.sampler import sampler_of
from rlhf_jax.trainers import common, offline
from rlhf_jax.trees import join

FIELDS = {
    "loss": "loss {:.3f}",
    "heldout/loss": "held-out {:.3f}",
    "grad_norm": "grad {:.2f}",
    "time/rows_per_s": "{:,.0f} rows/s",
}
PANELS = (
    Panel(
        "Loss",
        "nats a token",
        {"training": "loss"},
        points={"held-out": "heldout/loss"},
    ),
    Panel("Gradient norm", "", {"": "grad_norm"}),
    Panel("Learning rate", "", {"": "optimizer/lr"}),
)

LOSSES = ("nll", "dft")
RANGES = {
    "learning.accumulation": (1, math.inf),
    "learning.label_smoothing": (0, 1),
    "neftune_alpha": (0, math.inf),
    "sequence_tokens": (2, math.inf),
    "logprob_chunk": (0, math.inf),
}


def loss_sums(
    model: Model,
    config: ConfigDict,
    params: Any,
    rows: Rows,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(Σ −log π, count) over the learned tokens of a batch [B, T]."""
    tokens, segments, learned = rows
    hidden = model.apply(params, tokens, segments, dropout_key=dropout_key)
    logprobs, _ = losses.token_logprobs(
        hidden[:, :-1],
        model.unembedding(params),
        tokens[:, 1:],
        learned[:, 1:],
        temperature=1.0,
        chunk_size=config.logprob_chunk or None,
        logit_softcap=model.config.logit_softcap,
        label_smoothing=config.learning.label_smoothing,
        batch_shards=sharding.batch_shards(),
        gather=sharding.gather_vocabulary,
    )
    loss = {"nll": losses.next_token_loss, "dft": losses.dft}[config.learning.loss]
    return loss(logprobs, learned[:, 1:])


def count_learned(rows: Rows) -> jax.Array:
    """How many tokens a batch's loss is the mean over."""
    return jnp.maximum(rows.learned[:, 1:].sum(), 1)


def make_loss(model: Model, config: ConfigDict) -> offline.Loss:
    """Builds the training loss: the mean over the learned tokens of the whole batch."""
    c = model.config
    noisy = bool(c.dropout or c.neftune_alpha or c.lora_dropout)

    def loss(params, rows: Rows, key, count):
        total, _ = loss_sums(model, config, params, rows, key if noisy else None)
        mean = total / count
        return mean, {"loss": mean}

    return loss


def make_evaluate(
    model: Model,
    config: ConfigDict,
    mesh: Mesh,
    heldout: Rows,
    sample: Callable,
    prompts: Sequence[str],
) -> Callable:
    """Builds `evaluate(params) -> (metrics, rows)`: held-out loss, and sample texts."""
    plain = ConfigDict(config.to_dict())  # the same figure, whatever is minimised
    plain.learning.update({"loss": "nll", "label_smoothing": 0.0})

    @jax.jit
    def sums(params, rows: Rows, valid):
        kept = rows._replace(learned=rows.learned & valid[:, None])
        return {"loss": loss_sums(model, plain, params, kept)}

    key = keys.branch_key(config.seed, keys.HELDOUT, 0)
    spare = -len(prompts) % sharding.batch_shards()
    asked = [prompts[i % len(prompts)] for i in range(len(prompts) + spare)]

    def evaluate(params: Any):
        metrics = offline.evaluate_rows(
            sums, params, heldout, batch=config.learning.batch, mesh=mesh
        )
        rollout = sample(params, asked, key, range(len(asked)))
        pairs = list(zip(rollout.prompts, rollout.responses))[: len(prompts)]
        rows = [{"split": "heldout", "prompt": p, "response": r} for p, r in pairs]
        return metrics, rows

    return evaluate


def load_data(
    config: ConfigDict, tokenizer: Any, console: Any
) -> tuple[list[Completion], list[Completion]]:
    """Training and held-out completions; none of the one is in the other."""
    cleaning = cleaning_of(config)

    def load(split, **apart):
        rows, counts = load_completions(
            config.data.source,
            split=split,
            tokenizer=tokenizer,
            cleaning=cleaning._replace(**apart),
            domains=config.data.domains,
        )
        progress.show_counts(console, f"{config.data.source}, {split}", counts)
        return rows

    heldout = load("validation")
    return load("train", apart_from=tuple(heldout)), heldout


def validate(config: ConfigDict, mesh: Mesh) -> None:
    """Raises a `UserError` for settings that cannot work together."""
    sharding.check_batch("config.learning.batch", config.learning.batch, mesh)
    common.check_ranges(config, RANGES)
    if config.learning.loss not in LOSSES:
        raise UserError(
            f"config.learning.loss={config.learning.loss!r} is unknown; take one of "
            + ", ".join(LOSSES)
        )
    if config.learning.packing and config.learning.buckets:
        raise UserError(
            "config.learning.packing and config.learning.buckets are two ways to save "
            "padding: turn one of them off"
        )


def make_phase(
    config: ConfigDict,
    mesh: Mesh,
    model: Model,
    optimizer: optax.GradientTransformation,
    rows: Rows,
    frozen: Any | None,
) -> Callable:
    """Builds `run_phase(state, phase) -> (state, metrics, [])`: steps 1 to 3."""
    learning = config.learning
    cut = offline.cut_by_length(config, rows, (rows.segments > 0).sum(axis=1))
    loss = make_loss(model, config)
    micro_batches = {"accumulation": learning.accumulation, "counts": count_learned}
    return offline.make_phase(
        config, mesh, loss, optimizer, rows, frozen=frozen, cut=cut, **micro_batches
    )


def run(config: ConfigDict) -> None:
    """Trains a language model in `config.workdir`, or goes on where it stopped."""
    console = progress.make_console()
    mesh = sharding.make_mesh(**config.mesh)
    validate(config, mesh)
    files = common.open_workdir(config)
    with jax.set_mesh(mesh):
        texts = ()
        if config.tokenizer == "train":
            source, domains = config.data.source, config.data.domains
            texts = load_texts(source, split="train", domains=domains)
        tokenizer = loading.load_run_tokenizer(config, console, texts)
        train, heldout = load_data(config, tokenizer, console)
        loaded = loading.load_model(config.model, config, mesh)
        sample = sampler_of(config.rollout, loaded.model, tokenizer, mesh)
        _, prompts = load_both(
            config.prompts, tokenizer, prompt_tokens=config.rollout.prompt_tokens
        )
        trained, frozen = trainable.cut(config, loaded.params, mesh)
        state, optimizer = offline.make_state(config, trained, mesh)
        common.print_plan(console, config, mesh, {"policy": state.policy})

        def rows_of(completions, lay_out):
            encoded = encode_completions(
                tokenizer,
                completions,
                length=config.sequence_tokens,
                completion_only=config.learning.completion_only,
            )
            pad = special_tokens(tokenizer).pad
            return lay_out(encoded, length=config.sequence_tokens, pad=pad)

        rows = rows_of(train, pack_rows if config.learning.packing else pad_rows)
        evaluate = make_evaluate(
            *(loaded.model, config, mesh, rows_of(heldout, pad_rows)),
            *(sample, prompts.texts),
        )
        hooks = common.Hooks(
            run_phase=make_phase(config, mesh, loaded.model, optimizer, rows, frozen),
            evaluate=lambda state: evaluate(join(state.policy, frozen)),
            fields=FIELDS,
            panels=PANELS,
            headline=[("held-out loss", "heldout/loss", None)],
        )
        state = common.run_loop(config, files, console, state, hooks)
        done = trainable.Parts(state.policy, frozen)
        trainable.export(config, files, loaded, done, tokenizer)
        common.close_run(files, console, hooks, f"SFT: {config.workdir}")
