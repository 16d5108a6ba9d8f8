"""Advantages, penalties, weights and means of GRPO, on a model of one word's memory."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.grpo import get_config
from rlhf_jax.losses.policy_variants import VARIANTS
from rlhf_jax.rollout.generate import Responses
from rlhf_jax.rollout.logprobs import Transcript
from rlhf_jax.trainers import grpo, online
from rlhf_jax.trainers.grpo_settings import ADVANTAGES
from rlhf_jax.trainers.minibatches import Minibatches

from .one_phase import distance

B, N, G, V, D = 8, 5, 4, 11, 6
LENGTHS = np.array([5, 3, 1, 5, 4, 2, 5, 3])
FINISHED = np.array([False, True, True, True, True, True, False, True])
MASK = np.arange(N) < LENGTHS[:, None]
SCORES = np.array([0.3, 1.7, -0.4, 0.9, 2.0, -1.1, 0.6, 0.1], np.float32)
BETA = 0.3

pytestmark = pytest.mark.usefixtures("quick_compilation")
rng = np.random.default_rng(3)
WEIGHTS = {
    "embedding": rng.normal(size=(V, D)).astype(np.float32),
    "unembedding": rng.normal(size=(V, D)).astype(np.float32),
}
REFERENCE = WEIGHTS | {"unembedding": 0.7 * WEIGHTS["unembedding"]}
TRANSCRIPT = Transcript(
    rng.integers(0, V, (B, 1)),
    np.ones((B, 1), bool),
    rng.integers(0, V, (B, N)),
    MASK,
)
NOISE = rng.normal(0.0, 0.4, (B, N)).astype(np.float32)
EVERY = np.ones(B, bool)

# The next word depends on the last alone.
BIGRAMS = types.SimpleNamespace(
    config=types.SimpleNamespace(logit_softcap=None),
    apply=lambda params, tokens, attended: params["embedding"][tokens],
    unembedding=lambda params: params["unembedding"],
)


def say(params):
    """Log-probabilities and entropies [B, N], with numpy."""
    before = np.concatenate([TRANSCRIPT.prompts, TRANSCRIPT.responses[:, :-1]], axis=1)
    logits = params["embedding"][before] @ params["unembedding"].T
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(logp, TRANSCRIPT.responses[..., None], -1)[..., 0]
    return chosen, -(np.exp(logp) * logp).sum(-1)


SAMPLED = say(WEIGHTS)[0] + NOISE
SAMPLES = Responses(TRANSCRIPT.responses, MASK, SAMPLED, FINISHED)


def make_config(**changes):
    """One step of SGD's size on all rows; `changes` with `__` in the place of dots."""
    config = get_config()
    settings = {
        "rollout.prompts": B // G,
        "rollout.group": G,
        "rollout.max_new_tokens": 7,
        "rollout.temperature": 1.0,
        "grpo.epochs": 1,
        "grpo.minibatches": 1,
        "grpo.kl_coef": BETA,
    }
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    config.update_from_flattened_dict(settings | changes)
    return config


def assess(kept=EVERY, scores=SCORES, **changes):
    config = make_config(**changes)
    measure = online.make_measure(BIGRAMS, config)
    measured = measure(WEIGHTS, REFERENCE, TRANSCRIPT, SAMPLES)
    given = TRANSCRIPT, SAMPLES, jnp.asarray(scores), jnp.asarray(kept)
    return jax.device_get(grpo.make_assess(config)(measured, *given))


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("reuse", [False, True])
def test_measured_part_by_part(parts, reuse):
    changes = {"grpo__accumulation": parts, "rollout__reuse_logprobs": reuse}
    measure = online.make_measure(BIGRAMS, make_config(**changes))
    got = measure(WEIGHTS, REFERENCE, TRANSCRIPT, SAMPLES)
    logprobs, entropy = (SAMPLED, -SAMPLED) if reuse else say(WEIGHTS)
    for found, want in [
        (got.logprobs, logprobs),
        (got.ref_logprobs, say(REFERENCE)[0]),
        (got.entropy, entropy),
    ]:
        np.testing.assert_allclose(
            np.where(MASK, found, 0), np.where(MASK, want, 0), atol=1e-5
        )


def whitened(tokens):
    """Of the real tokens of the batch, in a list of rows."""
    every = [x for row in tokens for x in row]
    mean = sum(every) / len(every)
    std = np.sqrt(sum((x - mean) ** 2 for x in every) / len(every) + 1e-8)
    return [[(x - mean) / std for x in row] for row in tokens]


def expected_advantages(name, scores, kl, kl_in, group=G):
    """[B, N], by loops."""
    beta = BETA if kl_in == "reward" else 0.0
    kls = [[kl[i][t] for t in range(LENGTHS[i])] for i in range(B)]
    if name == "reinforce_plus_plus":
        rewards = [[-beta * x for x in row] for row in kls]
        for i in range(B):
            rewards[i][-1] += scores[i]
        to_go = [[sum(row[t:]) for t in range(len(row))] for row in rewards]
        return spread(whitened(to_go))
    rewards = [scores[i] - beta * sum(kls[i]) for i in range(B)]
    found = []
    for first in range(0, B, group):
        mine = rewards[first : first + group]
        lengths = LENGTHS[first : first + group]
        for i, reward in enumerate(mine):
            others = mine[:i] + mine[i + 1 :]
            mean = sum(mine) / group
            if name == "leave_one_out":
                found.append(reward - sum(others) / (group - 1))
            elif name == "opo":
                weighed = sum(n * r for n, r in zip(lengths, mine)) / sum(lengths)
                found.append(reward - weighed)
            else:
                var = sum((x - mean) ** 2 for x in mine) / (group - 1)
                scale = np.sqrt(var) + 1e-4 if name == "group" else 1.0
                found.append((reward - mean) / scale)
    if name == "batch":
        mean = sum(rewards) / B
        std = np.sqrt(sum((x - mean) ** 2 for x in rewards) / (B - 1))
        found = [x / (std + 1e-4) for x in found]
    tokens = [[found[i]] * LENGTHS[i] for i in range(B)]
    if name == "reinforce_plus_plus_baseline":
        tokens = whitened(tokens)
    return spread(tokens)


def spread(tokens):
    padded = np.zeros((B, N))
    for i, row in enumerate(tokens):
        padded[i, : len(row)] = row
    return padded


@pytest.mark.parametrize("kl_in", ["loss", "reward"])
@pytest.mark.parametrize("name", ADVANTAGES)
def test_each_advantage_is_what_a_loop_gives(name, kl_in):
    config = make_config(grpo__advantage=name, grpo__kl_in=kl_in)
    noise = np.random.default_rng(7).normal(0.2, 0.5, (B, N))
    kl = np.where(MASK, noise, 0.0).astype(np.float32)
    got = grpo.make_advantages(config)(jnp.asarray(SCORES), jnp.asarray(kl), MASK)
    want = expected_advantages(name, SCORES.tolist(), kl, kl_in)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_each_variant_has_its_own_scale():
    kl = jnp.zeros((B, N))
    for variant in VARIANTS:
        config = make_config(grpo__variant=variant)
        got = grpo.make_advantages(config)(jnp.asarray(SCORES), kl, MASK)
        scale = "none" if variant == "dr_grpo" else "group"
        want = expected_advantages(scale, SCORES.tolist(), kl, "loss")
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5, err_msg=variant)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_in_the_reward_is_that_of_the_models(estimator):
    experience, metrics = assess(
        grpo__kl_in="reward",
        grpo__kl_estimator=estimator,
        grpo__advantage="leave_one_out",
    )
    d = np.where(MASK, say(WEIGHTS)[0] - say(REFERENCE)[0], 0.0)
    kl = d if estimator == "k1" else np.exp(-d) - 1 + d
    want = expected_advantages("leave_one_out", SCORES.tolist(), kl, "reward")
    np.testing.assert_allclose(experience.advantages, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(experience.sequence_kl, d.sum(1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(metrics["kl/sequence"], d.sum(1).mean(), rtol=1e-5)


def test_reinforce_plus_plus_needs_no_group():
    """The same in groups of four and alone; alone every reward is a group's."""
    changes = {"grpo__advantage": "reinforce_plus_plus", "grpo__kl_in": "reward"}
    changes["grpo__kl_estimator"] = "k1"
    alone, metrics = assess(**changes, rollout__group=1, rollout__prompts=B)
    in_groups, _ = assess(**changes)
    jax.tree.map(np.testing.assert_array_equal, alone, in_groups)
    d = np.where(MASK, say(WEIGHTS)[0] - say(REFERENCE)[0], 0.0)
    want = expected_advantages("reinforce_plus_plus", SCORES.tolist(), d, "reward", 1)
    np.testing.assert_allclose(alone.advantages, want, rtol=1e-4, atol=1e-5)
    assert metrics["groups/std"] == metrics["groups/informative"] == 0


def test_penalties_go_into_the_score():
    """Clipped at 1.5, less 0.5 where cut off, less 0.8 · (tokens past 4 of 7)/3."""
    experience, metrics = assess(
        grpo__variant="dr_grpo",
        grpo__score_clip=1.5,
        grpo__missing_eos_penalty=0.5,
        grpo__overlong__buffer=3,
        grpo__overlong__factor=0.8,
    )
    overlong = [0.8 * min(max(n - 4, 0) / 3, 1) for n in LENGTHS]
    assert sorted(set(overlong)) == [0, pytest.approx(0.8 / 3)]
    scores = np.clip(SCORES, -1.5, 1.5) - 0.5 * ~FINISHED - overlong
    want = expected_advantages("none", scores.tolist(), np.zeros((B, N)), "loss")
    np.testing.assert_allclose(experience.advantages, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        metrics["groups/std"], scores.reshape(-1, G).std(1).mean(), rtol=1e-5
    )


def test_what_is_filtered_stays_in_its_group():
    """Responses that were cut off are not learned from; the others do not notice."""
    whole, all_kept = assess()
    filtered, metrics = assess(grpo__overlong__filter=True)
    np.testing.assert_array_equal(filtered.mask, MASK & FINISHED[:, None])
    np.testing.assert_array_equal(whole.mask, MASK)
    np.testing.assert_array_equal(filtered.advantages, whole.advantages)
    want = expected_advantages("group", SCORES.tolist(), np.zeros((B, N)), "loss")
    np.testing.assert_allclose(filtered.advantages, want, rtol=1e-5, atol=1e-5)
    assert all_kept["groups/kept"] == 1
    assert metrics["groups/kept"] == 6 / 8

    # rows that only fill up are out as well, together with those
    kept = np.arange(B) < 4
    filtered, metrics = assess(kept, grpo__overlong__filter=True)
    np.testing.assert_array_equal(filtered.mask, MASK & (FINISHED & kept)[:, None])
    assert metrics["groups/kept"] == 3 / 8


def test_groups_that_differ_are_counted():
    scores = np.where(np.arange(B) < 4, 1.0, SCORES)
    experience, metrics = assess(scores=scores)
    assert metrics["groups/informative"] == 0.5
    np.testing.assert_array_equal(experience.advantages[:4], 0.0)
    assert np.abs(experience.advantages[4:][MASK[4:]]).min() > 0


@pytest.mark.parametrize("level", ["", "token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_weights_of_what_the_sampler_was_likelier_to_say(level, mode):
    experience, _ = assess(
        grpo__importance__level=level,
        grpo__importance__mode=mode,
        grpo__importance__low=0.5,
        grpo__importance__high=1.5,
    )
    log_ratio = np.where(MASK, say(WEIGHTS)[0] - SAMPLED, 0.0)
    if level == "sequence":
        log_ratio = np.repeat(log_ratio.sum(1, keepdims=True), N, axis=1)
    ratio = np.exp(log_ratio)
    within = (ratio >= 0.5) & (ratio <= 1.5)
    assert 0 < within[MASK].mean() < 1
    want = np.clip(ratio, 0.5, 1.5) if mode == "truncate" else ratio * within
    want = want if level else np.ones((B, N))
    np.testing.assert_allclose(
        experience.weights[MASK], want[MASK], rtol=1e-5, atol=1e-6
    )


@functools.cache
def experience_of(variant):
    """Ratios that are not 1, and a row without a token that is learned from."""
    rows, _ = assess(np.arange(B) != 5, grpo__variant=variant)
    return rows._replace(
        old_logprobs=rows.old_logprobs + np.where(MASK, NOISE, 0.0),
        weights=np.where(MASK, 1.0 + NOISE, 0.0),
    )


@functools.cache
def compiled(variant, changes):
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)
    config = make_config(grpo__variant=variant, **dict(changes))
    return optimizer, grpo.make_update(BIGRAMS, config, optimizer)


def update(variant, rows, **changes):
    """(weights, metrics) after one step of SGD, with a rate of 1, on these rows."""
    optimizer, run = compiled(variant, tuple(changes.items()))
    weights = jax.tree.map(jnp.array, WEIGHTS)
    state = grpo.State(weights, optimizer.init(weights))
    order = Minibatches(jnp.array(rows, jnp.int32).reshape(1, 1, -1))
    state, metrics = run(state, experience_of(variant), order)
    return jax.device_get((state.policy, metrics))


ORDER = [3, 0, 6, 1, 5, 7, 2, 4]


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "bnpo"])
def test_accumulation_changes_nothing(variant):
    """The micro-batches have 10, 8, 3 and 5 tokens, and one row less in the third."""
    want = update(variant, ORDER)
    got = update(variant, ORDER, grpo__accumulation=4)
    assert want[1]["policy/grad_norm"] > 0.05
    assert distance(got, want) < 1e-5


def test_bnpo_is_a_mean_of_means():
    whole, _ = update("bnpo", ORDER)
    halves = [update("bnpo", half) for half in (ORDER[:4], ORDER[4:])]
    got, metrics = update("bnpo", ORDER, grpo__accumulation=2)
    # with SGD the mean of the gradients is that of the weights after either
    mean = jax.tree.map(lambda a, b: (a + b) / 2, halves[0][0], halves[1][0])
    assert distance(got, mean) < 1e-5
    assert distance(got, whole) > 1e-3
    losses = [half["loss"] for _, half in halves]
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)


def test_the_parts_of_the_loss():
    """Each response alike: the mean of its tokens, and of those that are learned from.

    The entropy and, where it is in the loss, the KL are averaged as the loss is.
    """
    rows = experience_of("grpo")
    mean = lambda x: np.mean([x[i][rows.mask[i]].mean() for i in range(B) if i != 5])
    logprobs, entropy = say(WEIGHTS)
    d = logprobs - say(REFERENCE)[0]
    ratio = np.exp(logprobs - rows.old_logprobs)
    A = rows.advantages
    policy = rows.weights * np.maximum(-A * ratio, -A * np.clip(ratio, 0.8, 1.2))
    _, metrics = update("grpo", ORDER, grpo__entropy_coef=0.1)
    kl = mean(np.exp(-d) - 1 + d)
    want = {
        "policy/loss": mean(policy),
        "policy/kl_loss": kl,
        "loss": mean(policy) + BETA * kl - 0.1 * mean(entropy),
        "policy/entropy_learner": entropy[rows.mask].mean(),
        "policy/ratio_mean": ratio[rows.mask].mean(),
    }
    got = {name: float(metrics[name]) for name in want}
    assert got == pytest.approx(want, rel=1e-5)

    _, metrics = update("grpo", ORDER, grpo__kl_in="reward")
    np.testing.assert_allclose(metrics["loss"], mean(policy), rtol=1e-5)


@pytest.mark.parametrize(
    "mode", ["token_mean", "sequence_mean", "sequence_sum", "constant_norm"]
)
def test_the_aggregation_replaces_the_variants_own(mode):
    """Of a constant loss of 2 a token, with lengths 5, 3, 1, 5 and 4, 5, 3."""
    config = make_config(grpo__aggregation=mode)
    mask = MASK & (np.arange(B) != 5)[:, None]
    total, count = grpo.make_aggregate(config)(jnp.full((B, N), 2.0), mask)
    want = {
        "token_mean": 2.0,
        "sequence_mean": 2.0,
        "sequence_sum": 2 * 26 / 7,
        "constant_norm": 2 * 26 / (7 * 7),
    }
    np.testing.assert_allclose(total / count, want[mode], rtol=1e-6)
