"""What the algorithms share that sample from their policy: PPO, and those like it."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlhf_jax import sharding
from rlhf_jax.data.prompts import Prompts, load_prompts, phase_batch
from rlhf_jax.data.tables import is_file
from rlhf_jax.data.tokenizer import encode_prompts
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.heldout import make_heldout
from rlhf_jax.models.transformer import Model
from rlhf_jax.plots import Panel
from rlhf_jax.rewards import Reward, build_rewards, name_scores, score_all
from rlhf_jax.rollout import sampler
from rlhf_jax.trainers import keys

FIELDS = {
    "reward/mean": "reward {:+.3f}",
    "heldout/reward_mean": "held-out {:+.3f}",
    "kl/sequence": "kl {:.2f}",
    "response/tokens": "len {:.1f}",
    "time/tokens_per_s": "{:,.0f} tok/s",
}

PANELS = (
    Panel(
        "Reward",
        "score",
        {"training prompts": "reward/mean"},
        points={"held-out prompts": "heldout/reward_mean"},
    ),
    Panel(
        "KL to the reference",
        "nats a response",
        {"training prompts": "kl/sequence"},
        points={"held-out prompts": "heldout/kl"},
    ),
    Panel("Entropy", "nats a token", {"policy": "policy/entropy"}),
    Panel(
        "Policy update",
        "fraction, nats",
        {"clipped": "policy/clip_fraction", "approx. KL": "policy/approx_kl"},
    ),
    Panel(
        "Critic: explained variance", "1 = perfect", {"": "value/explained_variance"}
    ),
    Panel("Response length", "tokens", {"": "response/tokens"}),
)


def check_rollout(config: ConfigDict) -> None:
    """Raises a `UserError` for a rollout that nothing could be learned from."""
    rollout = config.rollout
    for name, value in (
        ("total_phases", config.total_phases),
        ("rollout.prompts", rollout.prompts),
        ("rollout.prompt_tokens", rollout.prompt_tokens),
        ("rollout.max_new_tokens", rollout.max_new_tokens),
    ):
        if value < 1:
            raise UserError(f"config.{name}={value} must be at least 1")
    if rollout.temperature <= 0:
        raise UserError(
            f"config.rollout.temperature={rollout.temperature} must be above 0: "
            f"{config.algorithm} learns from samples, and greedy decoding draws none"
        )
    if not 0 < rollout.top_p <= 1:
        raise UserError(
            f"config.rollout.top_p={rollout.top_p} must be above 0 and at most 1 "
            "(1 keeps every token)"
        )
    if rollout.top_k < 0:
        raise UserError(
            f"config.rollout.top_k={rollout.top_k} must not be negative (0 keeps all)"
        )


def check_minibatches(config: ConfigDict, learning: ConfigDict, mesh: Mesh) -> None:
    """Raises a `UserError` unless a phase's rows divide into equal micro-batches."""
    batch = config.rollout.prompts
    sharding.check_batch("config.rollout.prompts", batch, mesh)
    parts = learning.minibatches * learning.accumulation
    if parts < 1 or batch % parts:
        raise UserError(
            f"config.rollout.prompts={batch} must be a multiple of minibatches="
            f"{learning.minibatches} x accumulation={learning.accumulation}"
        )
    micro = "config.rollout.prompts / (minibatches x accumulation)"
    sharding.check_batch(micro, batch // parts, mesh)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def minibatch_order(
    key: jax.Array, rows: int, epochs: int, minibatches: int
) -> jax.Array:
    """Row numbers [E, M, R] int32: a fresh permutation for each epoch."""
    keys = jax.random.split(key, epochs)
    shuffled = jax.vmap(lambda key: jax.random.permutation(key, rows))(keys)
    return shuffled.reshape(epochs, minibatches, -1)


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


class Collected(NamedTuple):
    """One phase's responses and what they are worth."""

    rollout: sampler.Rollout
    scores: jax.Array  # [B] float32 on the mesh, the weighted sum of the rewards
    total: np.ndarray  # [B] float32, the same on the host
    parts: Mapping[str, np.ndarray]  # each reward alone
    rollout_seconds: float
    reward_seconds: float


def make_collect(
    config: ConfigDict,
    mesh: Mesh,
    sample: sampler.Sampler,
    rewards: Sequence[Reward],
    prompts: Prompts,
) -> Callable[[Any, int], Collected]:
    """Builds `collect(params, phase)`: the phase's prompts, answered and scored."""
    batch = config.rollout.prompts

    def collect(params: Any, phase: int) -> Collected:
        started = time.perf_counter()
        taken = phase_batch(prompts, phase - 1, batch_size=batch, seed=config.seed)
        key = keys.branch_key(config.seed, keys.SAMPLING, phase)
        rollout = sample(params, taken.texts, key, range(batch))
        sampled = time.perf_counter()
        total, parts = score_all(
            rewards, taken.texts, rollout.responses, **taken.columns
        )
        scored = time.perf_counter()
        scores = sharding.to_devices(total, sharding.rows(mesh))
        seconds = sampled - started, scored - sampled
        return Collected(rollout, scores, total, parts, *seconds)

    return collect


def report(
    config: ConfigDict, collected: Collected, sequence_kl: jax.Array
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The samples of a phase as rows, and the metrics of rewards, lengths and speed.

    Args:
      config: the run's.
      collected: the phase's responses.
      sequence_kl: [B] nats, Σ_t (log π − log π_ref).
    """
    total, parts = collected.total, collected.parts
    rows = sampler.records(
        collected.rollout,
        name_scores(total, parts),
        sharding.to_host(sequence_kl),
        split="train",
        seed=config.seed,
    )
    tokens = [row["tokens"] for row in rows]
    metrics = {
        "reward/mean": float(total.mean()),
        "reward/std": float(total.std()),
        "reward/min": float(total.min()),
        "reward/max": float(total.max()),
        "response/tokens": float(np.mean(tokens)),
        "response/finished": float(np.mean([row["finish"] == "eos" for row in rows])),
        "time/rollout_s": collected.rollout_seconds,
        "time/reward_s": collected.reward_seconds,
        "time/tokens_per_s": sum(tokens) / collected.rollout_seconds,
    }
    if len(parts) > 1:
        metrics |= {f"reward/{name}": float(s.mean()) for name, s in parts.items()}
    return rows, metrics


def headline(judges: Sequence[str]) -> list[tuple[str, str, str | None]]:
    """The held-out figures of the closing summary."""
    return [
        ("held-out reward", "heldout/reward_mean", "heldout/reward_std"),
        *(
            (
                f"unseen judge: {name}",
                f"heldout/judge/{name}_mean",
                f"heldout/judge/{name}_std",
            )
            for name in judges
        ),
        ("held-out KL", "heldout/kl", None),
        ("held-out length", "heldout/tokens", None),
    ]


def make_sampler(
    config: ConfigDict, model: Model, tokenizer: Any, mesh: Mesh
) -> sampler.Sampler:
    """The sampler of `config.rollout`."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p")
    return sampler.make_sampler(
        model,
        tokenizer,
        mesh,
        prompt_tokens=config.rollout.prompt_tokens,
        **{name: config.rollout[name] for name in names},
    )


def load_both(
    data: ConfigDict, tokenizer: Any, *, prompt_tokens: int
) -> tuple[Prompts, Prompts]:
    """Training and held-out prompts of `config.data`, each at most `prompt_tokens`."""
    shape = {
        "column": data.column or None,
        "extra_columns": tuple(data.extra_columns),
        "tokenizer": tokenizer,
    }
    for name in ("prefix_words", "prefix_tokens"):
        shape[name] = data[name] or None

    def load(source, other, split, limit):
        # Two files are taken whole; one file for both is split.
        whole = source != other and is_file(source)
        split = None if whole else split
        limit = limit or None
        return load_prompts(source, split=split, limit=limit, seed=data.seed, **shape)

    train = load(data.train, data.heldout, "train", data.limit)
    heldout = load(data.heldout, data.train, "heldout", data.heldout_limit)
    # All of them now: a prompt that does not fit is not to be met in some later phase.
    for prompts in (train, heldout):
        encode_prompts(tokenizer, prompts.texts, length=prompt_tokens)
    return train, heldout


def make_evaluation(
    config: ConfigDict,
    mesh: Mesh,
    model: Model,
    sample: sampler.Sampler,
    rewards: Any,
    heldout: Prompts,
) -> Callable:
    """Builds `evaluate(params, reference) -> (metrics, rows)` on held-out prompts."""
    return make_heldout(
        model,
        sample,
        mesh,
        heldout,
        seed=config.seed,
        key=keys.branch_key(config.seed, keys.HELDOUT, 0),
        batch=config.rollout.prompts,
        temperature=config.rollout.temperature,
        chunk_size=config.logprob_chunk or None,
        rewards=rewards,
        judges=build_rewards(config.judges, mesh=mesh),
    )
