"""What the algorithms share that sample from their policy: PPO, GRPO."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlhf_jax import keys, losses, sharding
from rlhf_jax.data.prompts import Prompts, phase_batch
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.heldout import make_heldout
from rlhf_jax.losses import masked
from rlhf_jax.models.transformer import Model
from rlhf_jax.plots import Panel
from rlhf_jax.rewards import Reward, build_rewards, name_scores, score_all
from rlhf_jax.rewards.on_tokens import check_token_score
from rlhf_jax.rewards.safety import build_filter, find_unsafe
from rlhf_jax.rollout import sampler
from rlhf_jax.rollout.generate import Responses
from rlhf_jax.rollout.logprobs import Scored, Transcript, score_responses
from rlhf_jax.trainers.minibatches import micro_batches, pack_whole, rows_per_phase

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
    if rollout.reuse_logprobs and narrower(rollout):
        raise UserError(
            "config.rollout.reuse_logprobs takes the sampler's log-probabilities for "
            f"the learner's, and with {', '.join(narrower(rollout))} they are another "
            "distribution's: turn one of the two off"
        )
    if rollout.top_k < 0:
        raise UserError(
            f"config.rollout.top_k={rollout.top_k} must not be negative (0 keeps all)"
        )
    if not 0 <= rollout.min_p < 1:
        raise UserError(
            f"config.rollout.min_p={rollout.min_p} must be at least 0 (keeps all) and "
            "below 1"
        )
    if rollout.repetition_penalty <= 0:
        raise UserError(
            f"config.rollout.repetition_penalty={rollout.repetition_penalty} must be "
            "above 0 (1 is none)"
        )


def narrower(rollout: ConfigDict) -> list[str]:
    """The settings with which responses are drawn otherwise than the learner thinks."""
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    return [name for name, value in off.items() if rollout[name] != value]


def find_rewards(config: ConfigDict, tokenizer: Any, mesh: Mesh) -> list[Reward]:
    """The rewards of a run whose policy has this tokenizer."""
    if not config.rewards:
        raise UserError(
            "config.rewards is empty: name one, as "
            '{"human": {"source": "builtin:reward", "weight": 1.0}}'
        )
    rewards = build_rewards(config.rewards, mesh=mesh)
    most = config.rollout.prompt_tokens + config.rollout.max_new_tokens
    for reward in rewards:
        if reward.on_tokens:
            check_token_score(reward.name, reward.on_tokens, tokenizer, most)
    return rewards


def make_policy_logprobs(model: Model, config: ConfigDict) -> Callable:
    """Builds `policy_logprobs(params, transcript) -> Scored`, as it was sampled."""
    return functools.partial(
        score_responses,
        model,
        temperature=config.rollout.temperature,
        chunk_size=config.logprob_chunk or None,
    )


def shape_scores(
    scores: jax.Array, samples: Responses, learning: ConfigDict
) -> jax.Array:
    """Scores [B] clipped, and less the penalty where a response was cut off."""
    if learning.score_clip:
        scores = jnp.clip(scores, -learning.score_clip, learning.score_clip)
    return losses.missing_eos_penalty(
        scores, samples.finished, penalty=learning.missing_eos_penalty
    )


class Measured(NamedTuple):
    """What the models say of a phase's responses, before they are scored."""

    logprobs: jax.Array  # [B, N] of the policy that sampled
    ref_logprobs: jax.Array  # [B, N]
    entropy: jax.Array  # [B, N] nats
    values: jax.Array | None = None  # [B, N] of the critic, where there is one


def make_measure(
    model: Model,
    config: ConfigDict,
    values_of: Callable[[Any, Transcript, Scored | None], jax.Array] | None = None,
) -> Callable:
    """Builds `measure(policy, reference, transcript, samples, critic) -> Measured`.

    With `rollout.reuse_logprobs` the sampler's log-probabilities are taken for the
    policy's, which saves a forward pass, and their mean for the entropy. `values_of`
    gets the critic, the transcript and the policy's forward pass, if there is one.

    As many rows are measured at a time as the update learns from at a time.
    """
    policy_logprobs = make_policy_logprobs(model, config)
    reuse = config.rollout.reuse_logprobs
    parts = micro_batches(config[config.algorithm])

    @jax.jit
    def measure(policy, reference, transcript: Transcript, samples, critic=None):
        def measure_part(rows):
            transcript, sampled = rows
            learner = None if reuse else policy_logprobs(policy, transcript)
            ref_logprobs = policy_logprobs(reference, transcript).logprobs
            values = values_of and values_of(critic, transcript, learner)
            if learner is None:
                return Measured(sampled, ref_logprobs, -sampled, values)
            return Measured(learner.logprobs, ref_logprobs, learner.entropy, values)

        rows = transcript, samples.logprobs
        return sharding.by_parts(measure_part, rows, parts)

    return measure


def policy_metrics(measured: Measured, samples: Responses) -> dict[str, jax.Array]:
    """KL to the reference, entropy, and how far the sampler is from the learner.

    Where the sampler's log-probabilities are reused, that gap is zero, and
    `first_step/ratio_deviation` tells it.
    """
    mask = samples.mask
    pair = (measured.logprobs, measured.ref_logprobs, mask)
    log_ratio = losses.kl.k1(*pair)
    gap = losses.kl.absolute(measured.logprobs, samples.logprobs, mask)
    return {
        "kl/sequence": log_ratio.sum(axis=1).mean(),
        "kl/token": masked.mean(log_ratio, mask),
        "kl/token_k3": masked.mean(losses.kl.k3(*pair), mask),
        "policy/entropy": masked.mean(measured.entropy, mask),
        "rollout/logprob_gap_mean": masked.mean(gap, mask),
        "rollout/logprob_gap_max": gap.max(),
    }


def lay_out(config: ConfigDict, mesh: Mesh, transcript: Transcript) -> Transcript:
    """The transcript, packed if the algorithm's `packing` asks for it."""
    learning = config[config.algorithm]
    if not learning.packing:
        return transcript
    parts, group = micro_batches(learning), config.rollout.get("group", 1)
    return pack_whole(transcript, mesh, group=group, parts=parts)


class Seconds(NamedTuple):
    """How long the host waited."""

    rollout: float
    reward: float


class Collected(NamedTuple):
    """One phase's responses and what they are worth."""

    rollout: sampler.Rollout
    scores: jax.Array  # [B] float32 on the mesh, the rewards' weighted sum, filtered
    total: Any  # [B] float32, the same, on the host if it was there first
    parts: Mapping[str, Any]  # each reward alone, likewise
    unsafe: np.ndarray | None  # [B] bool, by the safety filter; None: nobody looked
    measured: Any  # what `meanwhile` gave
    seconds: Seconds | None  # None: the host waited for nothing


def make_collect(
    config: ConfigDict,
    mesh: Mesh,
    sample: sampler.Sampler,
    rewards: Sequence[Reward],
    prompts: Prompts,
) -> Callable[..., Collected]:
    """Builds `collect(params, phase, meanwhile)`: prompts, answered and scored.

    `meanwhile(transcript, samples)` is called before the rewards, so that what it asks
    of the devices is computed while the host scores. A phase that may draw several
    times says how often, `draws`, and which this is, so that each has prompts and
    samples of its own.
    """
    batch, group = config.rollout.prompts, config.rollout.get("group", 1)
    safety = build_filter(config.safety, mesh=mesh)
    read_tokens = [reward for reward in rewards if reward.on_tokens]
    read_texts = [reward for reward in rewards if not reward.on_tokens]

    def collect(
        params: Any,
        phase: int,
        meanwhile: Callable[..., Any],
        draw: int = 0,
        draws: int = 1,
    ) -> Collected:
        started = time.perf_counter()
        turn = (phase - 1) * draws + draw
        taken = phase_batch(prompts, turn, batch_size=batch, seed=config.seed)
        key = keys.branch_key(config.seed, keys.SAMPLING, phase)
        first = draw * batch * group
        index = range(first, first + batch * group)
        rollout = sample(params, taken.texts, key, index)
        transcript, samples = rollout.transcript, rollout.samples
        parts = {
            reward.name: reward.on_tokens.score(transcript, samples.finished)
            for reward in read_tokens
        }
        scores = sum(reward.weight * parts[reward.name] for reward in read_tokens)
        measured = meanwhile(transcript, samples)
        if not read_texts and not safety:
            return Collected(rollout, scores, scores, parts, None, measured, None)
        jax.block_until_ready(samples)
        sampled = time.perf_counter()
        columns = {
            name: [value for value in values for _ in range(group)]
            for name, values in taken.columns.items()
        }
        texts = rollout.prompts, rollout.responses
        total, more = score_all(read_texts, *texts, **columns)
        unsafe = np.zeros(len(total), bool)
        if safety:
            unsafe = find_unsafe(safety, *texts, **columns)
            total = total - np.float32(safety.penalty) * unsafe
        seconds = Seconds(sampled - started, time.perf_counter() - sampled)
        of_texts = sharding.to_devices(total, sharding.rows(mesh))
        if read_tokens:
            scores = total = scores + of_texts
        else:
            scores = of_texts
        return Collected(
            rollout, scores, total, parts | more, unsafe, measured, seconds
        )

    return collect


def on_host(tree: Any) -> Any:
    """The arrays as NumPy, those that are already as they are."""
    fetch = lambda x: x if isinstance(x, np.ndarray) else sharding.to_host(x)
    return jax.tree.map(fetch, tree)


def report(
    config: ConfigDict, collected: Collected, sequence_kl: jax.Array
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The samples of a phase as rows, and the metrics of rewards, lengths and speed.

    Args:
      config: the run's.
      collected: the phase's responses.
      sequence_kl: [B] nats, Σ_t (log π − log π_ref).
    """
    total, parts = on_host((collected.total, collected.parts))
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
    }
    if collected.seconds:
        metrics |= {
            "time/rollout_s": collected.seconds.rollout,
            "time/reward_s": collected.seconds.reward,
            "time/tokens_per_s": sum(tokens) / collected.seconds.rollout,
        }
    if config.safety.source:
        metrics["response/unsafe"] = float(collected.unsafe.mean())
        rows = [
            row | {"unsafe": bool(unsafe)}
            for row, unsafe in zip(rows, collected.unsafe, strict=True)
        ]
    metrics |= sampler.text_metrics("response", collected.rollout.responses)
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


def make_evaluation(
    config: ConfigDict,
    mesh: Mesh,
    model: Model,
    sample: sampler.Sampler,
    rewards: Any,
    heldout: Prompts,
) -> Callable:
    """Builds `evaluate(params, reference) -> (metrics, rows)` on held-out prompts."""
    learning = config.get(config.algorithm, {})
    return make_heldout(
        model,
        sample,
        mesh,
        heldout,
        seed=config.seed,
        key=keys.branch_key(config.seed, keys.HELDOUT, 0),
        batch=rows_per_phase(config),
        parts=micro_batches(learning) if "minibatches" in learning else 1,
        temperature=config.rollout.temperature,
        chunk_size=config.logprob_chunk or None,
        rewards=rewards,
        judges=build_rewards(config.judges, mesh=mesh),
    )
