"""Direct preference optimization: learning from pairs, without a reward model.

Before the first phase:
    1. tokens of prompt + response + EOS, both sides of a pair    (encode_pairs)
    2. log π_ref(y_w), log π_ref(y_l) of all pairs, once; kept in the run's folder
       (reference.py), so that the reference is no second copy of the weights
One phase is `config.learning.steps_per_phase` optimizer steps:
    3. both sides through the policy in one forward pass          (response_logprobs)
    4. s = log π(y) − log π_ref(y),  z = β (s_w − s_l)
       ℓ = −log σ(z), or any mix of the loss types of `losses.dpo` (measure)
    5. L = mean of ℓ over pairs − c · mean over tokens of log π(y_w)   (total_loss)

The loss is on response tokens, EOS included. Means are over the whole batch, however
it is cut into micro-batches and over devices. The policy starts as the reference.

Held-out figures are the same of held-out pairs, and responses to held-out prompts with
reward, judges and KL, as PPO reports them. The KL needs the reference's weights: a copy
of them is kept only for `config.evaluate_kl`, and without it no KL is reported. With
LoRA the reference is the model without its adapter, and no copy.

References:
    Rafailov et al. 2023, https://arxiv.org/abs/2305.18290
    The SFT term (c): Pang et al. 2024, equation 2, https://arxiv.org/abs/2404.19733
    Mixes of loss types (MPO): Wang et al. 2024, https://arxiv.org/abs/2411.10442
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console

from rlhf_jax import loading, losses, progress, sharding, trainable
from rlhf_jax.data.cleaning import cleaning_of
from rlhf_jax.data.pairs import encode_pairs
from rlhf_jax.data.preferences import load_pairs
from rlhf_jax.data.prompts import load_both
from rlhf_jax.losses import masked
from rlhf_jax.models.transformer import Model
from rlhf_jax.plots import Panel
from rlhf_jax.rewards import build_rewards
from rlhf_jax.rollout import packing
from rlhf_jax.rollout.sampler import sampler_of
from rlhf_jax.trainers import common, offline, online
from rlhf_jax.trainers.dpo_settings import loss_types, micro_batch, validate
from rlhf_jax.trainers.reference import reference_logprobs
from rlhf_jax.trees import join

FIELDS = {
    "loss": "loss {:.3f}",
    "rewards/accuracy": "accuracy {:.2f}",
    "heldout/rewards/accuracy": "held-out {:.3f}",
    "heldout/reward_mean": "reward {:+.3f}",
    "heldout/kl": "kl {:.2f}",
    "time/rows_per_s": "{:,.0f} pairs/s",
}
PANELS = (
    Panel("Loss", "", {"training": "loss"}, {"held-out": "heldout/loss"}),
    Panel("Reward", "score", {}, {"held-out prompts": "heldout/reward_mean"}),
    Panel("KL to the reference", "nats", {}, {"held-out prompts": "heldout/kl"}),
    Panel(
        "Pairs told right",
        "fraction",
        {"training": "rewards/accuracy"},
        {"held-out": "heldout/rewards/accuracy"},
    ),
    Panel(
        "Implicit rewards",
        "β (log π − log π_ref)",
        {"chosen": "rewards/chosen", "rejected": "rewards/rejected"},
    ),
    Panel(
        "Log-probability",
        "nats a token",
        {"chosen": "logps/chosen_token", "rejected": "logps/rejected_token"},
    ),
)


class Pairs(NamedTuple):
    """Preference pairs as arrays; side 0 is chosen, side 1 rejected."""

    tokens: np.ndarray  # [N, 2, T] int32, right-padded
    mask: np.ndarray  # [N, 2, T] bool, real tokens: what attention sees
    response: np.ndarray  # [N, 2, T] bool, those of the response: what is learned
    ref_logprobs: np.ndarray  # [N, 2] float32, log π_ref(y)
    layout: packing.Layout | None = None  # how a forward pass packs the 2·N rows


class Scored(NamedTuple):
    """What a model says of a batch, chosen then rejected on axis 0."""

    logprobs: jax.Array  # [2, B] float32, log π(y), as the loss takes it
    token_sums: jax.Array  # [2, B] float32, Σ_t log π(y_t), whatever `ld_alpha`
    lengths: jax.Array  # [2, B] float32, tokens
    weights: jax.Array | None  # [B] float32, of WPO


def response_logprobs(
    model: Model, config: ConfigDict, params: Any, pairs: Pairs, dropout_key=None
) -> Scored:
    """Log-probabilities of both responses, in one forward pass over 2·B rows."""
    B, _, T = pairs.tokens.shape
    tokens, mask, response = (x.reshape(2 * B, T) for x in pairs[:3])
    spoken, layout = response[:, 1:], pairs.layout
    read = functools.partial(model.apply, params, dropout_key=dropout_key)
    if layout is None:
        hidden = read(tokens, mask)[:, :-1]
        targets, real = tokens[:, 1:], spoken
    else:
        hidden = packing.predict(layout, tokens, read)
        targets, real = packing.targets(layout, tokens[:, 1:])
    spread = lambda values: packing.spread(layout, values, spoken)
    options = {
        "temperature": 1.0,
        "chunk_size": packing.chunk_size(layout, config.logprob_chunk or None, 2 * B),
        "logit_softcap": model.config.logit_softcap,
    }
    unembedding = model.unembedding(params)
    logprobs, _ = losses.token_logprobs(
        *(hidden, unembedding, targets, real),
        batch_shards=sharding.batch_shards(),
        gather=sharding.gather_vocabulary,
        **options,
    )
    logprobs = spread(logprobs)
    weights = None
    if config.dpo.wpo:
        squares = losses.log_sum_squares(
            *jax.lax.stop_gradient((hidden, unembedding)), real, **options
        )
        weights = losses.wpo_weights(logprobs, spoken, log_sum_squares=spread(squares))
        weights = weights.reshape(B, 2).prod(axis=1)
    sums, lengths = losses.sequence_logprobs(logprobs, spoken)
    sums, lengths = sums.reshape(B, 2).T, lengths.reshape(B, 2).T
    by_side = (x.reshape(B, 2, T - 1).swapaxes(0, 1) for x in (logprobs, spoken))
    used = losses.ld_logprobs(*itertools.chain(*by_side), alpha=config.dpo.ld_alpha)
    return Scored(jnp.stack(used), sums, lengths, weights)


def lay_out(pairs: Pairs, *, accumulation: int) -> Pairs:
    """Pairs [S, B, ...] with a layout for each micro-batch of each of S steps.

    Rows begin with their first token, and end with the response and then padding, as
    `encode_pairs` makes them. Both responses share their prompt where its tokens are
    the same.
    """
    S, T = len(pairs.tokens), pairs.tokens.shape[-1]
    tokens, mask, response = (x.reshape(-1, T) for x in pairs[:3])
    ends = mask.sum(axis=1)
    begins = ends - response.sum(axis=1)
    prompts = np.where(np.arange(T) < begins[:, None], tokens, -1)
    same = (prompts[::2] == prompts[1::2]).all(axis=1)
    numbers = np.arange(len(mask)).reshape(-1, 2)
    numbers[same, 1] = numbers[same, 0]
    layout = packing.plan(
        packing.Spans(np.zeros_like(ends), begins, ends),
        np.arange(len(mask)).reshape(S * accumulation, -1),
        width=T,
        responses=T - 1,
        shards=sharding.batch_shards(),
        prompts=numbers.reshape(-1),
    )
    by_step = jax.tree.map(lambda x: x.reshape(S, -1, x.shape[-1]), layout)
    return pairs._replace(layout=by_step)


def measure(
    model: Model,
    config: ConfigDict,
    params: Any,
    pairs: Pairs,
    valid: jax.Array,
    dropout_key: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Loss and metrics, each summed over the pairs where `valid` [B] is true."""
    dpo = config.dpo
    scored = response_logprobs(model, config, params, pairs, dropout_key)
    arrays = (*scored.logprobs, *pairs.ref_logprobs.T, valid)
    chosen_lengths, rejected_lengths = scored.lengths
    loss = sum(
        weight
        * losses.dpo(
            *arrays,
            beta=dpo.beta,
            loss_type=kind,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            weights=scored.weights,
            **options,
        )
        for kind, (weight, options) in loss_types(dpo).items()
    )
    rewards = losses.implicit_rewards(*arrays, beta=dpo.beta)
    chosen, rejected = scored.token_sums
    values = {
        "loss": loss,
        "rewards/chosen": rewards.chosen,
        "rewards/rejected": rewards.rejected,
        "rewards/margin": rewards.margin,
        "rewards/accuracy": rewards.correct,
        "logps/chosen": chosen,
        "logps/rejected": rejected,
        "logps/chosen_token": chosen,
        "logps/rejected_token": rejected,
    }
    return {name: masked.sum(x, valid) for name, x in values.items()}


def count(pairs: Pairs, valid: jax.Array | None = None) -> dict[str, jax.Array]:
    """What sums over a batch are divided by: its pairs, or the tokens of a side."""
    valid = jnp.ones(pairs.tokens.shape[0], bool) if valid is None else valid
    tokens = (pairs.response[:, :, 1:] & valid[:, None, None]).sum(axis=(0, 2))
    return {"pairs": valid.sum(), "chosen": tokens[0], "rejected": tokens[1]}


def divisor(counts: dict[str, jax.Array], name: str) -> jax.Array:
    """What a metric's sum is divided by: "logps/chosen_token" is per token."""
    side = name.removeprefix("logps/").removesuffix("_token")
    return jnp.maximum(counts[side if name.endswith("_token") else "pairs"], 1)


def total_loss(dpo: ConfigDict, means: dict[str, Any], split: str = "") -> Any:
    """The mean over pairs and the SFT term: c times the cross-entropy of y_w."""
    log_likelihood = means[f"{split}logps/chosen_token"]
    return means[f"{split}loss"] - dpo.rpo_alpha * log_likelihood


def make_loss(model: Model, config: ConfigDict) -> offline.Loss:
    """Builds `loss(params, pairs, key, counts)`, the part of a micro-batch."""

    noisy = bool(model.config.dropout or model.config.lora_dropout)

    def loss(params, pairs: Pairs, key, counts):
        valid = jnp.ones(pairs.tokens.shape[0], bool)
        noise = key if noisy else None
        sums = measure(model, config, params, pairs, valid, noise)
        means = {name: x / divisor(counts, name) for name, x in sums.items()}
        means["loss"] = total_loss(config.dpo, means)
        return means["loss"], means

    return loss


def make_evaluate(
    model: Model,
    config: ConfigDict,
    mesh: Mesh,
    heldout: Pairs,
    answer: Callable,
    reference: Any | None,
) -> Callable:
    """Builds `evaluate(params) -> (metrics, rows)` on held-out pairs and prompts.

    `answer(params, reference)` is of `online.make_evaluation`.
    """

    @jax.jit
    def sums(params, pairs: Pairs, valid):
        counts = count(pairs, valid)
        found = measure(model, config, params, pairs, valid)
        return {name: (x, divisor(counts, name)) for name, x in found.items()}

    def evaluate(params):
        metrics = offline.evaluate_rows(
            sums, params, heldout, batch=micro_batch(config), mesh=mesh
        )
        metrics["heldout/loss"] = total_loss(config.dpo, metrics, "heldout/")
        kept = params if reference is None else reference
        answered, rows = answer(params, kept)
        if reference is None:  # compared with itself: that says nothing
            answered.pop("heldout/kl")
            rows = [{k: v for k, v in row.items() if k != "kl"} for row in rows]
        return metrics | answered, rows

    return evaluate


def load_data(
    config: ConfigDict, tokenizer: Any, console: Console, ask: Callable
) -> tuple[Pairs, Pairs]:
    """Training and held-out pairs; `ask(split, pairs)` asks the reference, [N, 2]."""
    cleaning = cleaning_of(config)

    def load(split, **apart):
        found, counts = load_pairs(
            config.data.source,
            split=split,
            tokenizer=tokenizer,
            cleaning=cleaning._replace(**apart),
            domains=config.data.domains,
        )
        encoded = encode_pairs(tokenizer, found, length=config.sequence_tokens)
        counts["cut to fit"] = int(encoded.cut.sum())
        progress.show_counts(console, f"{config.data.source}, {split}", counts)
        zeros = np.zeros((len(found), 2), np.float32)
        pairs = Pairs(*encoded[:3], zeros)
        if config.dpo.reference_free:  # as if every response were as likely
            return found, pairs
        return found, pairs._replace(ref_logprobs=ask(split, pairs))

    kept_apart, heldout = load("validation")
    _, train = load("train", apart_from=tuple(kept_apart))
    return train, heldout


def run(config: ConfigDict) -> None:
    """Trains a policy in `config.workdir`, or goes on where that run stopped."""
    console = progress.make_console()
    mesh = sharding.make_mesh(**config.mesh)
    validate(config, mesh)
    files = common.open_workdir(config)
    with jax.set_mesh(mesh):
        policy = loading.load_model(config.model, config, mesh)
        model = policy.model
        tokenizer = loading.load_run_tokenizer(config, console)
        rewards = build_rewards(config.rewards, mesh=mesh)
        sample = sampler_of(config.rollout, model, tokenizer, mesh)
        _, prompts = load_both(
            config.prompts, tokenizer, prompt_tokens=config.rollout.prompt_tokens
        )

        @jax.jit
        def score(params, pairs: Pairs):
            return response_logprobs(model, config, params, pairs).logprobs.T

        parts = trainable.cut(config, policy.params, mesh)
        ask = functools.partial(
            reference_logprobs,
            score,
            trainable.start_of(config, parts),
            folder=files.workdir / "reference",
            settings={"dtype": config.dtype, "ld_alpha": config.dpo.ld_alpha},
            batch=micro_batch(config),
            mesh=mesh,
            console=console,
        )
        train, heldout = load_data(config, tokenizer, console, ask)
        state, optimizer = offline.make_state(config, parts.trained, mesh)
        keep = config.evaluate_kl or config.lora.rank  # an adapter's copy is small
        reference = trainable.reference_of(config, parts) if keep else None
        evaluate = make_evaluate(
            *(model, config, mesh, heldout),
            online.make_evaluation(config, mesh, model, sample, rewards, prompts),
            reference,
        )
        common.print_plan(console, config, mesh, {"policy": state.policy})
        accumulation = config.learning.accumulation
        pack = functools.partial(lay_out, accumulation=accumulation)
        hooks = common.Hooks(
            run_phase=offline.make_phase(
                *(config, mesh, make_loss(model, config), optimizer, train),
                frozen=parts.frozen,
                pack=pack if config.learning.packing else None,
                accumulation=accumulation,
                counts=count,
            ),
            evaluate=lambda state: evaluate(join(state.policy, parts.frozen)),
            fields=FIELDS,
            panels=PANELS,
            headline=[
                *online.headline(config.judges),
                ("held-out margin", "heldout/rewards/margin", None),
            ],
        )
        state = common.run_loop(config, files, console, state, hooks)
        done = parts._replace(trained=state.policy)
        trainable.export(config, files, policy, done, tokenizer)
        common.close_run(files, console, hooks, f"DPO: {config.workdir}")
