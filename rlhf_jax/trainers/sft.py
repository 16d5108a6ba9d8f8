"""Supervised fine-tuning: next-token prediction on texts, from any model or none.

One phase is `config.learning.steps_per_phase` optimizer steps in one compiled program:
    1. take the next batches of texts; the order is a function of (seed, phase)
    2. L = −Σ_t m_t log π(y_t | y_<t) / Σ_t m_t over the whole batch
    3. one optimizer step a batch; dropout only here, and only if the config asks

Held-out figures are the loss in nats a token, and texts that the model continues from
the held-out prompts.

References:
    Radford et al. 2018, https://openai.com/index/language-unsupervised/
    Ouyang et al. 2022, section 3.5, https://arxiv.org/abs/2203.02155
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlhf_jax import losses, progress, sharding
from rlhf_jax.data.sequences import encode_sequences
from rlhf_jax.data.texts import load_texts
from rlhf_jax.models.transformer import Model
from rlhf_jax.plots import Panel
from rlhf_jax.trainers import common, keys, loading, offline, online

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


class Texts(NamedTuple):
    """Right-padded rows that end with EOS."""

    tokens: np.ndarray  # [N, T] int32
    mask: np.ndarray  # [N, T] bool


def loss_sums(
    model: Model,
    config: ConfigDict,
    params: Any,
    texts: Texts,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(Σ −log π, count) over the predicted tokens of a batch [B, T]."""
    tokens, mask = texts
    hidden = model.apply(params, tokens, mask, dropout_key=dropout_key)
    logprobs, _ = losses.token_logprobs(
        hidden[:, :-1],
        model.unembedding(params),
        tokens[:, 1:],
        mask[:, 1:],
        temperature=1.0,
        chunk_size=config.logprob_chunk or None,
        logit_softcap=model.config.logit_softcap,
        batch_shards=sharding.batch_shards(),
    )
    return losses.next_token_loss(logprobs, mask[:, 1:])


def make_loss(model: Model, config: ConfigDict) -> offline.Loss:
    """Builds the training loss: the mean over the real tokens of the whole batch."""

    def loss(params, texts: Texts, key):
        key = key if model.config.dropout else None
        total, count = loss_sums(model, config, params, texts, key)
        mean = total / jnp.maximum(count, 1)
        return mean, {"loss": mean}

    return loss


def make_evaluate(
    model: Model,
    config: ConfigDict,
    mesh: Mesh,
    heldout: Texts,
    sample: Callable,
    prompts: Sequence[str],
) -> Callable:
    """Builds `evaluate(state) -> (metrics, rows)`: held-out loss, and sample texts."""

    @jax.jit
    def sums(params, texts: Texts, valid):
        kept = texts._replace(mask=texts.mask & valid[:, None])
        return {"loss": loss_sums(model, config, params, kept)}

    key = keys.branch_key(config.seed, keys.HELDOUT, 0)
    spare = -len(prompts) % sharding.batch_shards()
    asked = [prompts[i % len(prompts)] for i in range(len(prompts) + spare)]

    def evaluate(state: offline.State):
        metrics = offline.evaluate_rows(
            sums, state.policy, heldout, batch=config.learning.batch, mesh=mesh
        )
        rollout = sample(state.policy, asked, key, range(len(asked)))
        pairs = list(zip(rollout.prompts, rollout.responses))[: len(prompts)]
        rows = [{"split": "heldout", "prompt": p, "response": r} for p, r in pairs]
        return metrics, rows

    return evaluate


def run(config: ConfigDict) -> None:
    """Trains a language model in `config.workdir`, or goes on where it stopped."""
    console = progress.make_console()
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_batch("config.learning.batch", config.learning.batch, mesh)
    files = common.open_workdir(config)
    with jax.set_mesh(mesh):
        train, heldout = (
            load_texts(config.data.source, split=split, domains=config.data.domains)
            for split in ("train", "validation")
        )
        tokenizer = loading.load_run_tokenizer(config, console, train)
        loaded = loading.load_model(config.model, config, mesh)
        sample = online.make_sampler(config, loaded.model, tokenizer, mesh)
        _, prompts = online.load_both(
            config.prompts, tokenizer, prompt_tokens=config.rollout.prompt_tokens
        )
        state, optimizer = offline.make_state(config, loaded.params, mesh)
        common.print_plan(console, config, mesh, {"policy": state.policy})

        def encode(texts):
            length = config.sequence_tokens
            return Texts(
                *encode_sequences(tokenizer, texts, length=length, keep_end=False)
            )

        loss = make_loss(loaded.model, config)
        hooks = common.Hooks(
            run_phase=offline.make_phase(config, mesh, loss, optimizer, encode(train)),
            evaluate=make_evaluate(
                loaded.model, config, mesh, encode(heldout), sample, prompts.texts
            ),
            fields=FIELDS,
            panels=PANELS,
            headline=[("held-out loss", "heldout/loss", None)],
        )
        state = common.run_loop(config, files, console, state, hooks)
        loading.export(config, files, loaded, state.policy, tokenizer)
        common.close_run(files, console, hooks, f"SFT: {config.workdir}")
