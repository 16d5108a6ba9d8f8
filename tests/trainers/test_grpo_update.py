"""The update of GRPO, against tests/reference/make_grpo_update_fixture.py and itself.

The reference is TRL's own loss on the same rollouts, with ratios that clip.
"""

import functools
import json
from typing import NamedTuple

import jax
import numpy as np
import pytest

from configs.grpo import get_config
from rlhf_jax import loading, sharding
from rlhf_jax.losses.policy_variants import VARIANTS
from rlhf_jax.models.pretrained import load_pretrained
from rlhf_jax.trainers import grpo, online
from rlhf_jax.trainers.minibatches import Minibatches
from rlhf_jax.trainers.optimizer import make_optimizer

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
    return load_fixture("grpo_update")


def make_config(variant):
    """The fixture's settings of one variant."""
    config = get_config()
    config.model, config.remat = str(SOURCE), False
    for name in ("settings", "cases"):
        found = json.loads(str(saved()[name]))
        config.update_from_flattened_dict(found.get(variant, found))
    return config


def assess(config, policy, mesh):
    """(experience, metrics) of the fixture's rollouts."""
    reference = loading.copy(policy.params)
    reference["unembed"]["kernel"] *= saved()["unembedding_scale"]
    rollout = rollout_of(saved(), mesh)
    kept = sharding.to_devices(np.ones(len(rollout[-1]), bool), sharding.rows(mesh))
    measure = online.make_measure(policy.model, config)
    measured = measure(policy.params, reference, *rollout[:2])
    return grpo.make_assess(config)(measured, *rollout, kept)


class Updates(NamedTuple):
    """Updates of one compiled program, each (state, metrics), from the same weights."""

    reference: tuple  # on the fixture's old log-probabilities
    on_policy: tuple  # on those of the policy, as a phase starts
    padded: tuple  # rows 4 to 7 only fill up
    scrambled: tuple  # so they do here, and hold something else
    nothing: tuple  # all rows fill up
    experience: grpo.Experience
    assessed: dict
    pieces: list  # shapes of weights and moments on one device, before and after


@functools.cache
def assessed_rows(split):
    """The experience, with the advantages of "grpo"."""
    mesh = sharding.make_mesh(**SPLIT) if split else single_mesh()
    config = make_config("grpo")
    with jax.set_mesh(mesh):
        policy = loading.load_model(config.model, config, mesh)
        return assess(config, policy, mesh)


@functools.cache
def updates(variant, *, split=False) -> Updates:
    config = make_config(variant)
    mesh = sharding.make_mesh(**SPLIT) if split else single_mesh()
    rows = lambda x: sharding.to_devices(x, sharding.rows(mesh))
    with jax.set_mesh(mesh):
        policy = loading.load_model(config.model, config, mesh)
        optimizer = make_optimizer(config.optimizer, config.optimizer.lr, 1)
        opt_state = loading.init_optimizer(optimizer, policy.params, mesh)
        update = grpo.make_update(policy.model, config, optimizer)
        fresh, assessed = assessed_rows(split)
        scores = rows(saved()["scores"] - 0.5 * ~saved()["finished"])
        kl, mask = np.zeros(fresh.mask.shape), fresh.mask
        fresh = fresh._replace(
            advantages=grpo.make_advantages(config)(scores, kl, mask)
        )
        given = fresh._replace(old_logprobs=rows(saved()["old_logprobs"]))
        filler = np.arange(len(scores))[:, None] >= 4
        padded = given._replace(mask=rows(saved()["mask"] & ~filler))
        scrambled = padded._replace(
            **{
                name: rows(np.where(filler, np.nan, getattr(padded, name)))
                for name in ("old_logprobs", "ref_logprobs", "advantages", "weights")
            }
        )
        nothing = given._replace(mask=rows(np.zeros_like(saved()["mask"])))
        state, order = (
            grpo.State(policy.params, opt_state),
            Minibatches(saved()["order"]),
        )
        pieces, found = [shard_shapes(state)], []
        for experience in (given, fresh, padded, scrambled, nothing):
            found.append(update(loading.copy(state), experience, order))
        pieces.append(shard_shapes(found[0][0]))
        return Updates(*jax.device_get((*found, fresh, assessed)), pieces)


@pytest.mark.parametrize("name", ["old_logprobs", "ref_logprobs"])
def test_log_probabilities_equal_the_reference(name):
    """The old ones are those of the policy itself, whatever the sampler's were."""
    mask = saved()["mask"]
    got = getattr(updates("grpo").experience, name)[mask]
    want = saved()[name.replace("old_logprobs", "logprobs")][mask]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_advantages_equal_the_reference():
    """Also those of `assess`, which takes the penalty off what was cut off itself."""
    mask = saved()["mask"]
    experience, _ = assessed_rows(False)
    for got, scale in (
        (experience, "group"),
        (updates("grpo").experience, "group"),
        (updates("dr_grpo").experience, "none"),
    ):
        want = np.where(mask, saved()[f"advantages/{scale}"][:, None], 0.0)
        np.testing.assert_allclose(got.advantages, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradient_norm_equal_the_reference(variant):
    _, metrics = updates(variant).reference
    for ours, theirs in (
        ("loss", "loss"),
        ("policy/grad_norm", "grad_norm"),
        ("policy/clip_fraction", "clip_fraction"),
    ):
        name = f"{variant}/{theirs}"
        if name in saved():
            np.testing.assert_allclose(
                metrics[ours], saved()[name], rtol=1e-5, atol=1e-6, err_msg=ours
            )


def test_the_fixture_clips_and_drifts():
    """Agreement would show little where nothing is clipped."""
    for variant in VARIANTS:
        _, metrics = updates(variant).reference
        assert metrics["policy/ratio_deviation"] > 0.3
        assert metrics["policy/kl_loss"] > 0.05
        assert metrics["policy/grad_norm"] > 1.0
        # sapo has no clip
        assert (metrics["policy/clip_fraction"] > 0.1) == (variant != "sapo")


@pytest.mark.parametrize("variant", ["grpo", "dr_grpo", "dapo", "gspo"])
def test_updated_weights_equal_the_reference(variant):
    """The largest change is 9e-4; what is left is how the file rounds it."""
    changes = {
        name: change.astype(np.float32)
        for name, change in starting_with(saved(), f"{variant}/change/").items()
    }
    state, _ = updates(variant).reference
    before = jax.device_get(load_pretrained(SOURCE).params)
    moved = jax.tree.map(np.subtract, state.policy, before)
    assert distance(moved, from_hf(changes)) < 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_first_step_is_on_policy(variant):
    _, metrics = updates(variant).on_policy
    assert abs(metrics["policy/ratio_mean"] - 1) < 1e-6
    assert metrics["first_step/ratio_deviation"] < 1e-5
    assert 0 <= metrics["first_step/approx_kl"] < 1e-6
    assert metrics["first_step/clip_fraction"] == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_that_fill_up_have_no_gradient(variant):
    """Whatever they hold, nan too; and where there are no others nothing moves."""
    found = updates(variant)
    jax.tree.map(np.testing.assert_array_equal, found.scrambled, found.padded)
    assert distance(found.padded[0], found.reference[0]) > 1e-5
    state, metrics = found.nothing
    assert metrics["loss"] == metrics["policy/grad_norm"] == 0
    before = jax.device_get(load_pretrained(SOURCE).params)
    jax.tree.map(np.testing.assert_array_equal, state.policy, before)


@pytest.mark.parametrize("part", ["reference", "padded"])
def test_eight_devices_equal_one(part):
    """Though rows that fill up all lie on half of them."""
    got, want = updates("grpo", split=True), updates("grpo")
    assert distance(getattr(got, part), getattr(want, part)) < 1e-5
    assert distance(got.experience[2:], want.experience[2:]) < 1e-5
    far = {k: distance(x, want.assessed[k]) for k, x in got.assessed.items()}
    assert max(far.values()) < 1e-5, far


def test_the_updated_state_keeps_its_sharding():
    before, after = updates("grpo", split=True).pieces
    assert before == after
    query = after.policy["layers"]["attention"]["query"]["kernel"]
    assert query == (2, 16, 16)
    assert after.opt_state[1].mu["layers"]["attention"]["query"]["kernel"] == query
