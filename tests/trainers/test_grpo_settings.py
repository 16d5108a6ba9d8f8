"""What `config.grpo` must not say, each told in one sentence that names the setting."""

import re

import pytest

from configs import grpo as shipped
from rlhf_jax import sharding
from rlhf_jax.errors import UserError
from rlhf_jax.trainers import grpo_settings

from .one_phase import single_mesh


def make_config(**changes):
    """configs/grpo.py with `changes`, `__` in the place of dots."""
    config = shipped.get_config()
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in changes.items()}
    )
    return config


def sentence(mesh=None, **changes):
    with pytest.raises(UserError) as caught:
        grpo_settings.validate(make_config(**changes), mesh or single_mesh())
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    return message


def test_the_shipped_config_is_valid_and_quiet():
    grpo_settings.validate(make_config(), single_mesh())
    assert grpo_settings.notes(make_config()) == []


def commands():
    """Name -> the settings that the docstring of configs/grpo.py gives for it."""
    found, name = {}, None
    for line in shipped.__doc__.splitlines():
        if "--config." in line:
            title = line.split("--config.")[0].strip()
            name = title or name
            found.setdefault(name, {}).update(
                re.findall(r"--config\.(\S+)=(\S+)", line)
            )
    return found


def test_the_relatives_in_the_docstring():
    relatives = commands()
    assert set(relatives) >= {"Dr. GRPO", "DAPO", "GSPO", "RLOO", "REINFORCE++"}
    for settings in relatives.values():
        config = shipped.get_config()
        for name, value in settings.items():
            now = config.to_dict()
            for part in name.split("."):
                now = now[part]
            config.update_from_flattened_dict({name: type(now)(value)})
        grpo_settings.validate(config, single_mesh())
        assert grpo_settings.notes(config) == []


@pytest.mark.parametrize("name", grpo_settings.CHOICES)
def test_unknown_name(name):
    message = sentence(**{f"grpo__{name.replace('.', '__')}": "k9"})
    assert message.startswith(f"config.grpo.{name}='k9' is unknown; take one of ")
    for known in grpo_settings.CHOICES[name]:
        assert repr(known) in message


def test_each_known_name_is_taken():
    for name, known in grpo_settings.CHOICES.items():
        for value in known:
            # neither k1 in the loss nor k1+ in the reward: see below
            changes = {f"grpo__{name.replace('.', '__')}": value, "grpo__kl_coef": 0.0}
            grpo_settings.validate(make_config(**changes), single_mesh())


@pytest.mark.parametrize(
    ("name", "value", "possible"),
    [
        ("rollout.group", 0, "at least 1"),
        ("rollout.group", -8, "at least 1"),
        ("grpo.epochs", 0, "at least 1"),
        ("grpo.clip_low", 1.5, "in 0..1"),
        ("grpo.clip_low", float("nan"), "in 0..1"),
        ("grpo.clip_high", -0.2, "at least 0"),
        ("grpo.ratio_min", 1.2, "in 0..1"),
        ("grpo.ratio_max", 0.2, "at least 1"),
        ("grpo.kl_coef", -0.1, "at least 0"),
        ("grpo.target_kl", -0.1, "at least 0"),
        ("grpo.score_clip", -1.0, "at least 0"),
        ("grpo.overlong.buffer", 33, "in 0..32"),
        ("grpo.overlong.factor", -1.0, "at least 0"),
        ("grpo.dynamic_sampling", -1, "at least 0"),
        ("grpo.importance.low", 2.0, "in 0..1"),
        ("grpo.importance.high", 0.5, "at least 1"),
        ("grpo.std_eps", 0.0, "above 0"),
        ("grpo.tau_pos", 0.0, "above 0"),
        ("grpo.tau_neg", -1.0, "above 0"),
        ("grpo.dual_clip", 0.5, "at least 1, or 0: off"),
        ("grpo.dual_clip", -3.0, "at least 1, or 0: off"),
        ("logprob_chunk", -1, "at least 0"),
    ],
)
def test_out_of_range(name, value, possible):
    message = sentence(**{name.replace(".", "__"): value})
    assert message == f"config.{name}={value} must be {possible}"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"rollout__prompts": 9, "grpo__minibatches": 5},
            "config.rollout.prompts=9 x group=8 must be a multiple of minibatches=5 x "
            "accumulation=1",
        ),
        (
            {"grpo__minibatches": -2, "grpo__accumulation": -1},
            "must be a multiple of minibatches=-2 x accumulation=-1",
        ),
        (
            {"grpo__accumulation": 0},
            "must be a multiple of minibatches=2 x accumulation=0",
        ),
    ],
)
def test_rows_that_do_not_divide(changes, told):
    assert told in sentence(**changes)


def test_rows_that_do_not_divide_the_mesh():
    mesh = sharding.make_mesh(data=8)
    assert "config.rollout.prompts=12 does not divide over the 8 rows" in sentence(
        mesh, rollout__prompts=12
    )
    told = sentence(mesh, grpo__accumulation=8)
    assert "config.rollout.prompts=8 x group=8 / (minibatches x accumulation)=4" in told


def test_a_group_of_one():
    told = sentence(rollout__group=1)
    assert told.startswith("config.rollout.group=1 must be at least 2")
    assert "config.grpo.advantage='reinforce_plus_plus'" in told
    alone = {"rollout__group": 1, "grpo__advantage": "reinforce_plus_plus"}
    grpo_settings.validate(make_config(**alone), single_mesh())

    told = sentence(**alone, grpo__dynamic_sampling=3)
    assert told.startswith("config.grpo.dynamic_sampling=3 needs config.rollout.group")
    assert "take 0: off" in told


@pytest.mark.parametrize(("given", "value"), [("k1+", "k1"), ("k3+", "k3")])
def test_an_estimators_gradient_in_the_reward(given, value):
    told = sentence(grpo__kl_in="reward", grpo__kl_estimator=given)
    assert told.startswith(f"config.grpo.kl_estimator={given!r} is for the gradient")
    assert f"take {value!r}, which is its value" in told


def test_an_estimator_without_gradient_in_the_loss():
    told = sentence(grpo__kl_estimator="k1")
    assert told.startswith("config.grpo.kl_estimator='k1' does not go with ")
    assert "config.grpo.kl_in='loss'" in told
    assert "take 'k2', 'k3' or 'k1+'" in told
    unused = make_config(grpo__kl_estimator="k1", grpo__kl_coef=0.0)
    grpo_settings.validate(unused, single_mesh())


@pytest.mark.parametrize("variant", ["gspo", "cispo", "sapo"])
def test_a_dual_clip_that_does_nothing(variant):
    told = sentence(grpo__variant=variant, grpo__dual_clip=3.0)
    assert told == (
        f"config.grpo.dual_clip=3.0 does nothing with config.grpo.variant={variant!r}; "
        "take 0: off, or one of 'grpo', 'dr_grpo', 'bnpo', 'dapo'"
    )


def test_notes_on_gspo():
    """Both are allowed: a run shows the sentence and goes on."""
    config = make_config(grpo__variant="gspo", grpo__clip_low=3e-4)
    grpo_settings.validate(config, single_mesh())
    (note,) = grpo_settings.notes(config)
    assert note.startswith("config.grpo.clip_low=0.0003 and clip_high=0.2 will hardly")

    config = make_config(
        grpo__variant="gspo",
        grpo__clip_low=3e-4,
        grpo__clip_high=4e-4,
        grpo__aggregation="token_mean",
    )
    (note,) = grpo_settings.notes(config)
    assert note.startswith("config.grpo.aggregation='token_mean' weighs a response by")
    assert grpo_settings.notes(make_config(grpo__aggregation="token_mean")) == []
