"""One PPO phase, against tests/reference/make_ppo_update_fixture.py and itself."""

import dataclasses
import functools
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.ppo import get_config
from rlhf_jax import loading, sharding
from rlhf_jax.trainers import ppo
from rlhf_jax.trainers.minibatches import Minibatches

from .one_phase import (
    SOURCE,
    SPLIT,
    distance,
    from_hf,
    load_fixture,
    rollout_of,
    shard_shapes,
    single_mesh,
    starting_with,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def saved():
    return load_fixture("ppo_update")


def make_config(**changes):
    """The fixture's settings, and `changes` with `__` in the place of dots."""
    config = get_config()
    config.model = str(SOURCE)
    config.update_from_flattened_dict(json.loads(str(saved()["settings"])))
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in changes.items()}
    )
    return config


class Setup(NamedTuple):
    """Everything of one phase, ready to run; `state` is donated by `update`."""

    state: ppo.State
    reference: Any
    rollout: tuple  # transcript, samples, scores
    measure: Any
    assess: Any
    update: Any


def make_setup(config, mesh) -> Setup:
    arrays = saved()
    policy = loading.load_model(config.model, config, mesh)
    models, state, optimizer = ppo.make_state(config, policy, policy.params, mesh)
    if not config.critic.shared:
        old = state.critic["score"]["kernel"]
        kernel = sharding.to_devices(arrays["score_kernel"], old.sharding)
        critic = state.critic | {"score": {"kernel": kernel}}
        state = dataclasses.replace(state, critic=critic)
    reference = jax.tree.map(jnp.copy, policy.params)
    reference["unembed"]["kernel"] *= arrays["unembedding_scale"]
    rollout = rollout_of(arrays, mesh)
    measure = ppo.online.make_measure(
        models.policy, config, functools.partial(ppo.values_of, models)
    )
    assess = ppo.make_assess(config)
    update = ppo.make_update(models, config, optimizer)
    return Setup(state, reference, rollout, measure, assess, update)


class Phase(NamedTuple):
    """What one phase leaves."""

    experience: ppo.Experience
    assessed: dict  # metrics of `assess`
    history: list  # metrics of each call of `update`
    state: ppo.State
    pieces: list  # shapes of weights and moments on one device, before and after


def run(*, calls: int = 1, split: bool = False, **changes):
    """Assesses and updates, in one call or in four of one step each.

    Returns:
      A Phase, its arrays as numpy.
    """
    return _run(calls, split, tuple(sorted(changes.items())))


@functools.cache
def _run(calls, split, changes):
    config = make_config(**dict(changes))
    mesh = sharding.make_mesh(**SPLIT) if split else single_mesh()
    with jax.set_mesh(mesh):
        setup = make_setup(config, mesh)
        state = setup.state
        measured = setup.measure(
            *(state.policy, setup.reference, *setup.rollout[:2], state.critic)
        )
        experience, assessed = setup.assess(measured, state.kl_coef, *setup.rollout)
        whole = saved()["order"]
        state, history, pieces = setup.state, [], [pieces_of(setup.state)]
        for part in whole.reshape(4, 1, 1, -1) if calls == 4 else [whole]:
            order = Minibatches(jnp.asarray(part))
            state, metrics = setup.update(state, experience, order)
            history.append(jax.device_get(metrics))
        pieces.append(pieces_of(state))
        return Phase(*jax.device_get((experience, assessed, history, state)), pieces)


def pieces_of(state):
    """The shape of each weight and moment as it lies on one device."""
    return shard_shapes((networks(state), state.opt_state))


def expected_weights():
    """The fixture's updated weights."""
    return {
        part: from_hf(starting_with(saved(), f"{part}/"))
        for part in ("policy", "critic")
    }


def networks(state):
    return {"policy": state.policy, "critic": state.critic}


def start():
    """The weights before the update, to see that it does something."""
    config = make_config()
    mesh = single_mesh()
    with jax.set_mesh(mesh):
        return jax.device_get(networks(make_setup(config, mesh).state))


@pytest.mark.parametrize("name", ["old_logprobs", "values", "advantages", "returns"])
def test_experience_equals_the_reference(name):
    mask = saved()["mask"]  # what values stand under it does not matter
    got, want = getattr(run(calls=4).experience, name)[mask], saved()[name][mask]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


LOSSES = {
    "loss": "loss",
    "policy/loss": "policy",
    "policy/entropy_learner": "entropy",
    "policy/approx_kl": "approx_kl",
    "policy/clip_fraction": "clipped",
    "policy/grad_norm": "policy_grad_norm",
    "value/loss": "value",
    "value/clip_fraction": "value_clipped",
    "value/grad_norm": "value_grad_norm",
    "optimizer/policy_lr": "lr",
}


@pytest.mark.parametrize(("ours", "theirs"), LOSSES.items())
def test_each_step_equals_the_reference(ours, theirs):
    got = [metrics[ours] for metrics in run(calls=4).history]
    want = saved()[f"steps/{theirs}"]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_the_fixture_clips_and_moves():
    """Agreement would show little where nothing is clipped."""
    arrays = saved()
    assert arrays["steps/clipped"].max() > 0.1
    assert arrays["steps/value_clipped"].max() > 0.1
    assert arrays["steps/policy_grad_norm"].min() > 1.0
    assert distance(start(), expected_weights()) > 1e-3


def test_updated_weights_equal_the_reference():
    assert distance(networks(run(calls=4).state), expected_weights()) < 1e-5


def test_the_first_step_is_on_policy():
    first, *_ = run(calls=4).history
    assert abs(first["policy/ratio_mean"] - 1) < 1e-6
    assert first["first_step/ratio_deviation"] < 1e-5
    assert 0 <= first["first_step/approx_kl"] < 1e-6
    assert first["first_step/clip_fraction"] == 0


def test_kl_and_reward_metrics():
    """From the arrays of the reference: β Σ_t k1 is a reward that scores lose."""
    arrays, (experience, metrics, *_) = saved(), run(calls=4)
    scores = arrays["scores"] - 0.5 * ~arrays["finished"]
    penalty = 0.1 * experience.sequence_kl.mean()
    assert abs(experience.sequence_kl).max() > 0.1
    np.testing.assert_allclose(
        metrics["kl/sequence"], experience.sequence_kl.mean(), rtol=1e-6
    )
    np.testing.assert_allclose(metrics["reward/kl_penalty"], -penalty, rtol=1e-5)
    np.testing.assert_allclose(
        metrics["reward/with_kl"], scores.mean() - penalty, rtol=1e-5
    )
    assert metrics["rollout/logprob_gap_max"] < 1e-5


def assert_same_phase(phase):
    """One call of four steps equals four calls, and its metrics are their means."""
    want = run(calls=4)
    assert distance(networks(phase.state), networks(want.state)) < 1e-5
    (metrics,), steps = phase.history, want.history
    means = {name: np.mean([step[name] for step in steps]) for name in steps[0]}
    means |= {name: x for name, x in steps[0].items() if name.startswith("first_step/")}
    means |= {name: x for name, x in steps[-1].items() if name.endswith("_lr")}
    means["optimizer/steps"] = 4
    for ours, theirs in ((metrics, means), (phase.assessed, want.assessed)):
        assert ours.keys() == theirs.keys()
        far = {name: distance(ours[name], theirs[name]) for name in ours}
        assert max(far.values()) < 1e-5, far


def test_accumulation_changes_nothing():
    """In two micro-batches, with a target of the KL that is never reached."""
    assert_same_phase(run(ppo__accumulation=2, ppo__target_kl=100.0))


def test_more_accumulation_and_an_adaptive_coefficient():
    """The KL is far below its target: β·(1 − 0.2·8/64)."""
    phase = run(
        ppo__accumulation=4,
        ppo__adaptive_kl__target=50.0,
        ppo__adaptive_kl__horizon=64.0,
        rollout__prompts=8,
    )
    assert_same_phase(phase)
    np.testing.assert_allclose(phase.state.kl_coef, 0.1 * 0.975, rtol=1e-6)
    np.testing.assert_allclose(run(calls=4).state.kl_coef, 0.1, rtol=1e-6)


def test_eight_devices_equal_one():
    phase, want = run(split=True), run(calls=4)
    assert distance(phase.experience[1:], want.experience[1:]) < 1e-5
    assert_same_phase(phase)


def test_the_updated_state_keeps_its_sharding():
    before, after = run(split=True).pieces
    assert before == after
    weights, moments = after
    assert weights["policy"]["layers"]["attention"]["query"]["kernel"] == (2, 16, 16)
    mu = moments.inner.inner_states["critic"].inner_state[1].mu
    assert mu.critic["layers"]["attention"]["query"]["kernel"] == (2, 16, 16)


def test_target_kl_stops_the_phase():
    """The reference's KL before its steps: 0, 0.0008, 0.0104, 0.191."""
    kl = saved()["steps/approx_kl"]
    assert kl[1] < 0.005 < kl[2]
    _, _, (metrics,), state, _ = run(ppo__target_kl=0.005)
    assert metrics["optimizer/steps"] == 2
    # Two steps were taken, and the metrics are means over these two alone.
    np.testing.assert_allclose(metrics["policy/approx_kl"], kl[:2].mean(), rtol=1e-4)
    counts = {
        int(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if getattr(path[-1], "name", "") == "count"
    }
    assert counts == {2}
    assert distance(networks(state), networks(run(calls=4).state)) > 1e-4


def test_shared_trunk_learns_in_bfloat16():
    """The head starts at 0; layers are rematerialized, masters stay float32."""
    experience, assessed, history, state, _ = run(
        calls=4, critic__shared=True, ppo__value_clip=0.0, dtype="bfloat16", remat=True
    )
    assert set(state.critic) == {"score"}
    np.testing.assert_array_equal(experience.values, 0.0)
    assert np.abs(state.critic["score"]["kernel"]).max() > 0
    # Steps 1 and 3, and 2 and 4, see other rows: compare whole epochs.
    errors = [metrics["value/error"] for metrics in history]
    assert sum(errors[2:]) < 0.99 * sum(errors[:2])

    assert {x.dtype for x in jax.tree.leaves(networks(state))} == {np.dtype("float32")}
    assert all(np.isfinite(x) for x in (assessed | history[-1]).values())
    assert history[0]["first_step/ratio_deviation"] < 1e-2
    mask = saved()["mask"]
    gap = np.abs(experience.old_logprobs - saved()["old_logprobs"])[mask]
    assert 0 < gap.mean() < 0.1
