"""Group relative policy optimization, its variants, RLOO and REINFORCE++.

One phase, from top to bottom:
    1. sample G responses y_1…y_G to each prompt x from the policy π     (make_sampler)
    2. score them: R_i = R(x, y_i), from any mix of rewards              (score_all)
       with dynamic sampling, go on with new prompts until enough groups
       have rewards that differ                                       (informative.py)
    3. advantages A_it: R_i against its group, no critic                 (make_assess)
    4. for each epoch and minibatch, one optimizer step on               (make_update)
           E[ℓ(ρ, A) + β·KL̂(π‖π_ref) − c_h · H[π]]                      ρ = π/π_old
       ℓ and the mean E are those of the variant.

What `config.grpo.variant` names is a loss, a scale of the advantages and a mean:
grpo, dr_grpo, bnpo, dapo, gspo, cispo, sapo (`losses.policy_variants`). `advantage` and
`aggregation` replace the latter two, and with `kl_in: "reward"`
    RLOO                 is advantage "leave_one_out", aggregation "sequence_sum",
    REINFORCE++          is advantage "reinforce_plus_plus", and needs no group,
    REINFORCE++-baseline is advantage "reinforce_plus_plus_baseline", KL in the loss.

A response that was cut off can be punished (`missing_eos_penalty`, `overlong`), or left
out of the loss but not out of its group (`overlong.filter`).

References:
    Shao et al. 2024 (GRPO), https://arxiv.org/abs/2402.03300
    Liu et al. 2025 (Dr. GRPO), https://arxiv.org/abs/2503.20783
    Yu et al. 2025 (DAPO: token mean, dynamic sampling, overlong responses),
    https://arxiv.org/abs/2503.14476
    Ahmadian et al. 2024 (RLOO), https://arxiv.org/abs/2402.14740
    Hu et al. 2025 (REINFORCE++), https://arxiv.org/abs/2501.03262
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlhf_jax import keys, loading, losses, nonfinite, progress, sharding, trainable
from rlhf_jax.data.prompts import Prompts, load_both
from rlhf_jax.losses import masked, policy_variants
from rlhf_jax.models.transformer import Model
from rlhf_jax.plots import Panel
from rlhf_jax.rewards import Reward
from rlhf_jax.rollout.logprobs import Transcript
from rlhf_jax.rollout.sampler import Sampler, sampler_of
from rlhf_jax.trainers import common, informative, online
from rlhf_jax.trainers.grpo_settings import notes, validate
from rlhf_jax.trainers.minibatches import (
    Minibatches,
    make_learn,
    make_order,
    rows_per_phase,
)
from rlhf_jax.trainers.optimizer import learning_rate, make_optimizer
from rlhf_jax.trees import join

GROUP_PANEL = Panel(
    "Groups whose rewards differ", "fraction", {"": "groups/informative"}
)


class Experience(NamedTuple):
    """One phase's rollouts, as the update needs them (B rows, P prompt, N response)."""

    transcript: Transcript  # prompts [B, P], responses [B, N] and their masks
    mask: jax.Array  # [B, N] the tokens that are learned from
    old_logprobs: jax.Array  # [B, N] of the policy that sampled
    ref_logprobs: jax.Array  # [B, N]
    advantages: jax.Array  # [B, N]
    weights: jax.Array  # [B, N] of importance, 1 without correction
    sequence_kl: jax.Array  # [B] Σ_t (log π − log π_ref), nats


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """All that changes from phase to phase; the randomness is (seed, phase)."""

    policy: Any
    opt_state: Any


def make_advantages(config: ConfigDict) -> Callable:
    """Builds `advantages(scores [B], kl [B, N], mask) -> [B, N]` (step 3)."""
    grpo, group = config.grpo, config.rollout.group
    name = grpo.advantage or policy_variants.variant(grpo.variant).scale
    kl_coef = grpo.kl_coef if grpo.kl_in == "reward" else 0.0

    def advantages(scores, kl, mask):
        if name == "reinforce_plus_plus":
            rewards = losses.kl_shaped_rewards(scores, kl, mask, kl_coef=kl_coef)
            return losses.reinforce_plus_plus(rewards, mask, gamma=1.0)
        rewards, answered = scores - kl_coef * kl.sum(axis=1), mask.any(axis=1)
        if name == "reinforce_plus_plus_baseline":
            return losses.reinforce_plus_plus_baseline(rewards, mask, group_size=group)
        if name == "leave_one_out":
            of_rows = losses.leave_one_out(rewards, answered, group_size=group)
        elif name == "opo":
            of_rows = losses.opo(rewards, mask, group_size=group)
        else:
            of_rows = losses.group_relative(
                rewards, answered, group_size=group, scale=name, eps=grpo.std_eps
            )
        return losses.over_tokens(of_rows, mask)

    return advantages


def make_assess(config: ConfigDict) -> Callable:
    """Builds `assess(measured, transcript, samples, scores, kept)`.

    Step 3: advantages, and which tokens are learned from. `kept` [B] bool leaves rows
    out of the loss, not out of their group. Returns (Experience, metrics).
    """
    grpo = config.grpo
    advantages_of = make_advantages(config)

    @jax.jit
    def assess(
        measured: online.Measured, transcript: Transcript, samples, scores, kept
    ):
        mask = transcript.mask
        old_logprobs, ref_logprobs = measured.logprobs, measured.ref_logprobs
        pair = (old_logprobs, ref_logprobs, mask)
        scores = online.shape_scores(scores, samples, grpo)
        if grpo.overlong.buffer:
            scores += losses.overlong_penalty(
                mask.sum(axis=1),
                max_length=config.rollout.max_new_tokens,
                buffer=grpo.overlong.buffer,
                factor=grpo.overlong.factor,
            )
        kl = losses.kl.estimate(*pair, estimator=grpo.kl_estimator)
        advantages = advantages_of(scores, kl, mask)
        if grpo.overlong.filter:
            kept &= samples.finished
        weights = jnp.ones_like(old_logprobs)
        if grpo.importance.level:
            weights = losses.importance_weights(
                old_logprobs, samples.logprobs, mask, **grpo.importance
            )
        experience = Experience(
            transcript=transcript._replace(layout=None),
            mask=mask & kept[:, None],
            old_logprobs=old_logprobs,
            ref_logprobs=ref_logprobs,
            advantages=advantages,
            weights=weights,
            sequence_kl=losses.kl.k1(*pair).sum(axis=1),
        )
        groups = scores.reshape(-1, config.rollout.group)
        differ = (groups != groups[:, :1]).any(axis=1)
        metrics = online.policy_metrics(measured, samples) | {
            "groups/informative": differ.mean(),
            "groups/std": groups.std(axis=1).mean(),
            "groups/kept": kept.mean(),
            "advantage/std": jnp.sqrt(masked.var(advantages, mask)),
        }
        return experience, metrics

    return assess


def make_surrogate(config: ConfigDict) -> Callable:
    """The variant's ℓ: (logprobs, old_logprobs, advantages, mask) -> (loss, ...)."""
    grpo = config.grpo
    clip = {"clip_low": grpo.clip_low, "clip_high": grpo.clip_high}
    settings = {
        "gspo": clip,
        "cispo": {"ratio_min": grpo.ratio_min, "ratio_max": grpo.ratio_max},
        "sapo": {"tau_pos": grpo.tau_pos, "tau_neg": grpo.tau_neg},
    }
    others = clip | {"dual_clip": grpo.dual_clip or None}
    loss = policy_variants.variant(grpo.variant).loss
    return functools.partial(loss, **settings.get(grpo.variant, others))


def make_aggregate(config: ConfigDict) -> Callable:
    """The variant's mean: (loss [B, N], mask) -> (sum, count)."""
    grpo = config.grpo
    return functools.partial(
        losses.aggregation.aggregate,
        mode=grpo.aggregation or policy_variants.variant(grpo.variant).aggregation,
        max_length=config.rollout.max_new_tokens,
    )


class Counts(NamedTuple):
    """What a minibatch's sums are divided by."""

    loss: jax.Array  # the variant's
    tokens: jax.Array  # that are learned from


def make_counts(config: ConfigDict) -> Callable[[Experience], Counts]:
    """Builds `counts(rows)` of a whole minibatch."""
    aggregate = make_aggregate(config)

    def counts(rows: Experience) -> Counts:
        _, count = aggregate(jnp.zeros(rows.mask.shape), rows.mask)
        return Counts(jnp.maximum(count, 1), jnp.maximum(rows.mask.sum(), 1))

    return counts


def make_loss(model: Model, config: ConfigDict) -> Callable:
    """Builds `loss(policy, rows, counts, frozen)` of one micro-batch (step 4).

    The losses of a minibatch's micro-batches add up to that of the minibatch, but for
    "bnpo", which is a mean of means.
    """
    grpo = config.grpo
    policy_logprobs = online.make_policy_logprobs(model, config)
    surrogate, aggregate = make_surrogate(config), make_aggregate(config)
    local_counts = make_counts(config)

    def loss(policy, rows: Experience, counts: Counts, frozen):
        mask = rows.mask
        learner = policy_logprobs(join(policy, frozen), rows.transcript)
        policy_loss, told = surrogate(
            learner.logprobs, rows.old_logprobs, rows.advantages, mask
        )
        policy_loss = policy_loss * rows.weights
        kl = losses.kl.estimate(
            learner.logprobs, rows.ref_logprobs, mask, estimator=grpo.kl_estimator
        )
        entropy = jnp.where(mask, learner.entropy, 0.0)
        of_tokens = policy_loss - grpo.entropy_coef * entropy
        if grpo.kl_in == "loss":
            of_tokens = of_tokens + grpo.kl_coef * kl
        divisor = counts.loss
        if grpo.variant == "bnpo":
            divisor = local_counts(rows).loss * grpo.accumulation
        objective = aggregate(of_tokens, mask)[0] / divisor

        mean = lambda x: masked.sum(x, mask) / counts.tokens
        sums = {
            "loss": objective,
            "policy/loss": aggregate(policy_loss, mask)[0] / divisor,
            "policy/kl_loss": aggregate(kl, mask)[0] / divisor,
            "policy/approx_kl": mean(told.approx_kl),
            "policy/clip_fraction": mean(told.clipped),
            "policy/ratio_mean": mean(told.ratio),
            "policy/entropy_learner": mean(learner.entropy),
        }
        deviation = jnp.abs(told.ratio - 1.0).max()
        return objective, (sums, {"policy/ratio_deviation": deviation})

    return loss


def make_update(
    model: Model, config: ConfigDict, optimizer: optax.GradientTransformation
) -> Callable:
    """Builds `update(state, experience, order, frozen) -> (state, metrics)` (step 4).

    `order` says which rows each optimizer step learns from. The state is donated.
    """
    learn = make_learn(
        make_loss(model, config),
        optimizer,
        config.grpo,
        counts=make_counts(config),
        norms=lambda grads: {"policy/grad_norm": optax.tree.norm(grads)},
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: State, experience: Experience, order: Minibatches, frozen=None):
        policy, opt_state, metrics = learn(
            state.policy, state.opt_state, experience, order, frozen
        )
        lr = {"optimizer/lr": learning_rate(opt_state)}
        return State(policy, opt_state), metrics | lr

    return update


def make_phase(
    config: ConfigDict,
    mesh: Mesh,
    model: Model,
    optimizer: optax.GradientTransformation,
    sample: Sampler,
    rewards: Sequence[Reward],
    prompts: Prompts,
    reference: Any,
    frozen: Any | None,
) -> Callable:
    """Builds `run_phase(state, phase) -> (state, metrics, rows)`: steps 1 to 4."""
    collect = informative.make_collect(config, mesh, sample, rewards, prompts)
    measure = online.make_measure(model, config)
    assess = make_assess(config)
    update = make_update(model, config, optimizer)
    order_of = make_order(config, config.grpo, mesh)
    lay_out = functools.partial(online.lay_out, config, mesh)
    batch = rows_per_phase(config)

    def run_phase(state: State, phase: int):
        jax.block_until_ready(state)  # the last update is not this rollout's time
        policy = join(state.policy, frozen)
        collected, kept, drawn = collect(
            *(policy, phase),
            lambda transcript, samples: measure(
                policy, reference, lay_out(transcript), samples
            ),
        )
        _, _, transcript, samples = collected.rollout
        experience, metrics = assess(
            collected.measured, transcript, samples, collected.scores, kept
        )
        key = keys.branch_key(config.seed, keys.ORDER, phase)
        order = order_of(key, transcript)
        state, learned = update(state, experience, order, frozen)
        rows, measured = online.report(config, collected, experience.sequence_kl)
        counts = {"episodes": phase * batch, "groups/draws": drawn}
        return state, metrics | learned | measured | counts, rows

    return run_phase


def run(config: ConfigDict) -> None:
    """Trains a policy in `config.workdir`, or goes on where that run stopped."""
    console = progress.make_console()
    mesh = sharding.make_mesh(**config.mesh)
    validate(config, mesh)
    for note in notes(config):
        progress.say(console, note)
    files = common.open_workdir(config)
    with jax.set_mesh(mesh):
        policy = loading.load_model(config.model, config, mesh)
        tokenizer = loading.load_run_tokenizer(config, console)
        rewards = online.find_rewards(config, tokenizer, mesh)
        sample = sampler_of(config.rollout, policy.model, tokenizer, mesh)
        prompts, heldout = load_both(
            config.data, tokenizer, prompt_tokens=config.rollout.prompt_tokens
        )
        steps = config.total_phases * config.grpo.epochs * config.grpo.minibatches
        optimizer = make_optimizer(config.optimizer, config.optimizer.lr, steps)
        optimizer = nonfinite.guard(optimizer)
        trained, frozen = parts = trainable.cut(config, policy.params, mesh)
        reference = trainable.reference_of(config, parts)
        state = State(trained, loading.init_optimizer(optimizer, trained, mesh))
        common.print_plan(console, config, mesh, {"policy": state.policy})
        evaluate = online.make_evaluation(
            config, mesh, policy.model, sample, rewards, heldout
        )
        hooks = common.Hooks(
            run_phase=make_phase(
                config,
                *(mesh, policy.model, optimizer, sample, rewards, prompts),
                *(reference, frozen),
            ),
            evaluate=lambda state: evaluate(join(state.policy, frozen), reference),
            fields=online.FIELDS,
            panels=(*online.PANELS, GROUP_PANEL),
            headline=online.headline(config.judges),
        )
        state = common.run_loop(config, files, console, state, hooks)
        done = trainable.Parts(state.policy, frozen)
        trainable.export(config, files, policy, done, tokenizer)
        common.close_run(files, console, hooks, f"GRPO: {config.workdir}")
