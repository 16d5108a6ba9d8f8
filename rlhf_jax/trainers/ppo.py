"""Proximal policy optimization for language models.

One phase, from top to bottom:
    1. sample a response y to each prompt x from the policy π           (make_sampler)
    2. score it: R(x, y), from any mix of rewards                       (score_all)
    3. r_t = −β·KL̂(π‖π_ref)_t, with R added at the last token            (make_assess)
    4. advantages A_t by GAE from the critic's values V_t               (make_assess)
    5. for each epoch and minibatch, one optimizer step on              (make_update)
           E[max(−A ρ, −A clip(ρ, 1−ε_low, 1+ε_high))]                  ρ = π/π_old
           + c_v · ½ E[max((V−G)², (clip(V, V_old ± ε_v)−G)²)] − c_h · H[π]
    6. β follows the measured KL if it is adaptive

Every mean is over the real tokens of the whole minibatch, however it is split over
devices and gradient accumulation. The temperature of the sampler is in every
log-probability; top-k and top-p are not: with them the learner's distribution is
wider than the sampler's. A missing EOS subtracts from the score.

References:
    Schulman et al. 2017, https://arxiv.org/abs/1707.06347
    Ziegler et al. 2019 (KL shaping, adaptive β), https://arxiv.org/abs/1909.08593
    Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO",
    https://arxiv.org/abs/2403.17031. Deviations: the score stands on the last real
    token, not on the first pad after it; means leave padding out.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlhf_jax import keys, loading, losses, nonfinite, progress, sharding, trainable
from rlhf_jax.data.prompts import Prompts, load_both
from rlhf_jax.errors import UserError
from rlhf_jax.losses import masked
from rlhf_jax.models.transformer import Model
from rlhf_jax.plots import Panel
from rlhf_jax.rewards import Reward
from rlhf_jax.rollout import packing
from rlhf_jax.rollout.logprobs import Scored, Transcript, response_hidden
from rlhf_jax.rollout.sampler import Sampler, sampler_of
from rlhf_jax.trainers import common, online
from rlhf_jax.trainers.minibatches import (
    Minibatches,
    check_minibatches,
    make_learn,
    make_order,
)
from rlhf_jax.trainers.optimizer import learning_rate, make_optimizer
from rlhf_jax.trees import join

RANGES = {
    "ppo.epochs": (1, math.inf),
    "ppo.clip_low": (0, 1),
    "ppo.clip_high": (0, math.inf),
    "ppo.value_clip": (0, math.inf),
    "ppo.gamma": (0, 1),
    "ppo.lam": (0, 1),
    "ppo.target_kl": (0, math.inf),
    "ppo.adaptive_kl.target": (0, math.inf),
    "logprob_chunk": (0, math.inf),
}

CRITIC_PANEL = Panel(
    "Critic: explained variance", "1 = perfect", {"": "value/explained_variance"}
)


class Experience(NamedTuple):
    """One phase's rollouts, as the update needs them (B rows, P prompt, N response)."""

    transcript: Transcript  # prompts [B, P], responses [B, N] and their masks
    old_logprobs: jax.Array  # [B, N] of the policy that sampled
    values: jax.Array  # [B, N] of the critic before the update
    advantages: jax.Array  # [B, N]
    returns: jax.Array  # [B, N]
    sequence_kl: jax.Array  # [B] Σ_t (log π − log π_ref), nats


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """All that changes from phase to phase; the randomness is (seed, phase)."""

    policy: Any
    critic: Any  # a model with a scalar head, or that head alone on a shared trunk
    opt_state: Any
    kl_coef: jax.Array  # [] float32, β


class Networks(NamedTuple):
    """The trained weights, as the optimizer and the loss see them."""

    policy: Any
    critic: Any


class Models(NamedTuple):
    """The functions of the two networks; `critic` is None on a shared trunk."""

    policy: Model
    critic: Model | None


def values_of(
    models: Models, critic: Any, transcript: Transcript, learner: Scored | None
) -> jax.Array:
    """The critic's values [B, N] float32; a shared trunk uses the policy's states."""
    if models.critic is None:
        values = models.policy.score(critic, learner.hidden)
    else:
        hidden = response_hidden(models.critic, critic, transcript)
        values = models.critic.score(critic, hidden)
    return packing.spread(transcript.layout, values, transcript.mask)


def make_assess(config: ConfigDict) -> Callable:
    """Builds `assess(measured, kl_coef, transcript, samples, scores)`.

    Steps 3 and 4: shaped rewards, GAE. Returns (Experience, metrics).
    """
    ppo = config.ppo

    @jax.jit
    def assess(
        measured: online.Measured, kl_coef, transcript: Transcript, samples, scores
    ):
        mask = transcript.mask
        old_logprobs, ref_logprobs, _, values = measured
        scores = online.shape_scores(scores, samples, ppo)
        pair = (old_logprobs, ref_logprobs, mask)
        kl = losses.kl.estimate(*pair, estimator=ppo.kl_estimator)
        rewards = losses.kl_shaped_rewards(scores, kl, mask, kl_coef=kl_coef)
        if ppo.whiten_rewards:
            rewards = masked.whiten(rewards, mask, shift_mean=False)
        advantages, returns = losses.gae(
            rewards, values, mask, gamma=ppo.gamma, lam=ppo.lam
        )
        if ppo.whiten_advantages:
            advantages = masked.whiten(advantages, mask, shift_mean=True)

        experience = Experience(
            transcript=transcript._replace(layout=None),
            old_logprobs=old_logprobs,
            values=values,
            advantages=advantages,
            returns=returns,
            sequence_kl=losses.kl.k1(*pair).sum(axis=1),
        )
        penalty = -kl_coef * masked.sum(kl, mask, axis=1)
        metrics = online.policy_metrics(measured, samples) | {
            "reward/kl_penalty": penalty.mean(),
            "reward/with_kl": (scores + penalty).mean(),
            "kl/coef": kl_coef,
            "value/mean": masked.mean(values, mask),
            "value/return_mean": masked.mean(returns, mask),
            "value/return_std": jnp.sqrt(masked.var(returns, mask)),
            "value/explained_variance": 1.0
            - masked.var(returns - values, mask)
            / jnp.maximum(masked.var(returns, mask), 1e-8),
        }
        return experience, metrics

    return assess


def make_loss(models: Models, config: ConfigDict) -> Callable:
    """Builds `loss(params, rows, count, frozen)` of one micro-batch (step 5).

    `count` is the number of real tokens of the whole minibatch, so that the losses of
    its micro-batches add up to the loss of the minibatch.
    """
    ppo = config.ppo
    policy_logprobs = online.make_policy_logprobs(models.policy, config)

    def loss(params: Networks, rows: Experience, count, frozen):
        mask = rows.transcript.mask
        learner = policy_logprobs(join(params.policy, frozen), rows.transcript)
        values = values_of(models, params.critic, rows.transcript, learner)
        policy_loss, policy = losses.clipped_surrogate(
            learner.logprobs,
            rows.old_logprobs,
            rows.advantages,
            mask,
            clip_low=ppo.clip_low,
            clip_high=ppo.clip_high,
            dual_clip=ppo.dual_clip or None,
        )
        value_loss, value_clipped = losses.clipped_value_loss(
            values, rows.values, rows.returns, mask, clip_range=ppo.value_clip or None
        )
        total = lambda x: masked.sum(x, mask) / count
        sums = {
            "policy/loss": total(policy_loss),
            "policy/approx_kl": total(policy.approx_kl),
            "policy/clip_fraction": total(policy.clipped),
            "policy/ratio_mean": total(policy.ratio),
            "policy/ratio_mse": total(jnp.square(policy.ratio - 1.0)),
            "policy/entropy_learner": total(learner.entropy),
            "value/loss": total(value_loss),
            "value/clip_fraction": total(value_clipped),
            "value/error": total(jnp.square(values - rows.returns)),
        }
        objective = (
            sums["policy/loss"]
            + ppo.value_coef * sums["value/loss"]
            - ppo.entropy_coef * sums["policy/entropy_learner"]
        )
        sums["loss"] = objective
        deviation = jnp.abs(policy.ratio - 1.0).max()
        return objective, (sums, {"policy/ratio_deviation": deviation})

    return loss


def make_update(
    models: Models, config: ConfigDict, optimizer: optax.GradientTransformation
) -> Callable:
    """Builds `update(state, experience, order, frozen)` (steps 5 and 6).

    `order` says which rows each optimizer step learns from, `frozen` is what of the
    policy is not trained. Returns (state, metrics); the state is donated.
    """
    ppo = config.ppo
    learn = make_learn(
        make_loss(models, config),
        optimizer,
        ppo,
        counts=lambda rows: jnp.maximum(rows.transcript.mask.sum(), 1),
        norms=lambda grads: {
            "policy/grad_norm": optax.tree.norm(grads.policy),
            "value/grad_norm": optax.tree.norm(grads.critic),
        },
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: State, experience: Experience, order: Minibatches, frozen=None):
        networks = Networks(state.policy, state.critic)
        params, opt_state, metrics = learn(
            networks, state.opt_state, experience, order, frozen
        )
        kl_coef = state.kl_coef
        if ppo.adaptive_kl.target:
            measured = experience.sequence_kl.mean()
            followed = losses.adaptive_kl_coef(
                kl_coef,
                measured,
                target=ppo.adaptive_kl.target,
                horizon=ppo.adaptive_kl.horizon,
                num_samples=config.rollout.prompts,
            )
            kl_coef = jnp.where(jnp.isfinite(measured), followed, kl_coef)
        state = State(params.policy, params.critic, opt_state, kl_coef)
        return state, metrics | {
            f"optimizer/{part}_lr": learning_rate(opt_state.inner.inner_states[part])
            for part in Networks._fields
        }

    return update


def validate(config: ConfigDict, mesh: Mesh) -> None:
    """Raises a `UserError` for settings that cannot work together."""
    online.check_rollout(config)
    check_minibatches(config, config.ppo, mesh)
    # A shorter horizon could turn the coefficient's sign.
    horizon = {"ppo.adaptive_kl.horizon": (config.rollout.prompts / 5, math.inf)}
    common.check_ranges(config, RANGES | horizon)
    if config.critic.shared and config.rollout.reuse_logprobs:
        raise UserError(
            "config.rollout.reuse_logprobs saves the policy's forward pass, which "
            "config.critic.shared needs for its values: turn one of the two off"
        )
    if 0 < config.ppo.dual_clip < 1:
        raise UserError(
            f"config.ppo.dual_clip={config.ppo.dual_clip} must be at least 1, or 0: off"
        )
    if config.ppo.kl_estimator not in losses.kl.ESTIMATORS:
        raise UserError(
            f"config.ppo.kl_estimator={config.ppo.kl_estimator!r} is unknown; take one "
            f"of {', '.join(losses.kl.ESTIMATORS)}"
        )


def make_state(
    config: ConfigDict, policy: loading.Loaded, trained: Any, mesh: Mesh
) -> tuple[Models, State, optax.GradientTransformation]:
    """The two networks, and the optimizer with its fresh state."""
    critic_model, critic = loading.load_critic(config, policy, mesh)
    params = Networks(trained, critic)
    steps = config.total_phases * config.ppo.epochs * config.ppo.minibatches
    lrs = {"policy": config.optimizer.lr, "critic": config.optimizer.critic_lr}
    optimizer = optax.multi_transform(
        {part: make_optimizer(config.optimizer, lr, steps) for part, lr in lrs.items()},
        Networks("policy", "critic"),
    )
    optimizer = nonfinite.guard(optimizer)
    opt_state = loading.init_optimizer(optimizer, params, mesh)
    kl_coef = np.float32(config.ppo.kl_coef)
    kl_coef = sharding.to_devices(kl_coef, sharding.replicated(mesh))
    state = State(trained, critic, opt_state, kl_coef)
    return Models(policy.model, critic_model), state, optimizer


def make_phase(
    config: ConfigDict,
    mesh: Mesh,
    models: Models,
    optimizer: optax.GradientTransformation,
    sample: Sampler,
    rewards: Sequence[Reward],
    prompts: Prompts,
    reference: Any,
    frozen: Any | None,
) -> Callable:
    """Builds `run_phase(state, phase) -> (state, metrics, rows)`: steps 1 to 6."""
    collect = online.make_collect(config, mesh, sample, rewards, prompts)
    measure = online.make_measure(
        models.policy, config, functools.partial(values_of, models)
    )
    assess = make_assess(config)
    update = make_update(models, config, optimizer)
    order_of = make_order(config, config.ppo, mesh)
    lay_out = functools.partial(online.lay_out, config, mesh)

    def run_phase(state, phase):
        jax.block_until_ready(state)  # the last update is not this rollout's time
        policy = join(state.policy, frozen)

        def meanwhile(transcript, samples):
            return measure(
                policy, reference, lay_out(transcript), samples, state.critic
            )

        collected = collect(policy, phase, meanwhile)
        _, _, transcript, samples = collected.rollout
        experience, metrics = assess(
            collected.measured, state.kl_coef, transcript, samples, collected.scores
        )
        key = keys.branch_key(config.seed, keys.ORDER, phase)
        order = order_of(key, transcript)
        state, learned = update(state, experience, order, frozen)
        rows, measured = online.report(config, collected, experience.sequence_kl)
        return (
            state,
            metrics | learned | measured | {"episodes": phase * config.rollout.prompts},
            rows,
        )

    return run_phase


def run(config: ConfigDict) -> None:
    """Trains a policy in `config.workdir`, or goes on where that run stopped."""
    console = progress.make_console()
    mesh = sharding.make_mesh(**config.mesh)
    validate(config, mesh)
    files = common.open_workdir(config)
    with jax.set_mesh(mesh):
        policy = loading.load_model(config.model, config, mesh)
        tokenizer = loading.load_run_tokenizer(config, console)
        rewards = online.find_rewards(config, tokenizer, mesh)
        sample = sampler_of(config.rollout, policy.model, tokenizer, mesh)
        prompts, heldout = load_both(
            config.data, tokenizer, prompt_tokens=config.rollout.prompt_tokens
        )
        trained, frozen = parts = trainable.cut(config, policy.params, mesh)
        reference = trainable.reference_of(config, parts)
        models, state, optimizer = make_state(config, policy, trained, mesh)
        shown = {"policy": state.policy, "critic": state.critic}
        common.print_plan(console, config, mesh, shown)
        evaluate = online.make_evaluation(
            config, mesh, policy.model, sample, rewards, heldout
        )
        run_phase = make_phase(
            config,
            *(mesh, models, optimizer, sample, rewards, prompts, reference, frozen),
        )
        hooks = common.Hooks(
            run_phase=run_phase,
            evaluate=lambda state: evaluate(join(state.policy, frozen), reference),
            fields=online.FIELDS,
            panels=(*online.PANELS, CRITIC_PANEL),
            headline=online.headline(config.judges),
        )
        state = common.run_loop(config, files, console, state, hooks)
        done = trainable.Parts(state.policy, frozen)
        trainable.export(config, files, policy, done, tokenizer)
        common.close_run(files, console, hooks, f"PPO: {config.workdir}")
