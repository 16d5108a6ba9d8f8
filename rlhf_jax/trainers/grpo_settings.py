"""What `config.grpo` may say: names, ranges, and what does not go together."""

import math
import operator

from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlhf_jax import losses
from rlhf_jax.errors import UserError
from rlhf_jax.losses import group_advantages, importance, policy_variants
from rlhf_jax.trainers import common, online
from rlhf_jax.trainers.minibatches import check_minibatches

RANGES = {
    "rollout.group": (1, math.inf),
    "grpo.epochs": (1, math.inf),
    "grpo.clip_low": (0, 1),
    "grpo.clip_high": (0, math.inf),
    "grpo.ratio_min": (0, 1),
    "grpo.ratio_max": (1, math.inf),
    "grpo.kl_coef": (0, math.inf),
    "grpo.target_kl": (0, math.inf),
    "grpo.score_clip": (0, math.inf),
    "grpo.overlong.factor": (0, math.inf),
    "grpo.dynamic_sampling": (0, math.inf),
    "grpo.importance.low": (0, 1),
    "grpo.importance.high": (1, math.inf),
    "logprob_chunk": (0, math.inf),
}
ADVANTAGES = (
    *group_advantages.SCALES,
    *("leave_one_out", "opo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"),
)
CHOICES = {
    "variant": tuple(policy_variants.VARIANTS),
    "advantage": ("", *ADVANTAGES),
    "aggregation": ("", *losses.aggregation.MODES),
    "kl_in": ("loss", "reward"),
    "kl_estimator": losses.kl.ESTIMATORS,
    "importance.level": ("", *importance.LEVELS),
    "importance.mode": importance.MODES,
}
OWN_BOUNDS = ("gspo", "cispo", "sapo")  # variants whose loss has no dual clip
MAX_GSPO_CLIP = 0.1


def validate(config: ConfigDict, mesh: Mesh) -> None:
    """Raises a `UserError` for settings that have no meaning, alone or together."""
    online.check_rollout(config)
    check_minibatches(config, config.grpo, mesh)
    buffer = {"grpo.overlong.buffer": (0, config.rollout.max_new_tokens)}
    common.check_ranges(config, RANGES | buffer)
    _check_names(config.grpo)
    _check_positive(config.grpo)
    _check_group(config)
    _check_kl(config.grpo)
    _check_dual_clip(config.grpo)


def notes(config: ConfigDict) -> list[str]:
    """What is allowed, and probably not meant: a sentence each, to be shown at start.

    One ratio for a whole response moves far less than those of its tokens, and the
    losses of GSPO's tokens are those of their response.
    """
    grpo, found = config.grpo, []
    if grpo.variant != "gspo":
        return found
    widest = max(grpo.clip_low, grpo.clip_high)
    if widest > MAX_GSPO_CLIP:
        found.append(
            f"config.grpo.clip_low={grpo.clip_low} and clip_high={grpo.clip_high} will "
            "hardly clip anything: gspo's ratio is a mean over the response, and the "
            "paper has 3e-4 and 4e-4"
        )
    if grpo.aggregation not in ("", "sequence_mean"):
        found.append(
            f"config.grpo.aggregation={grpo.aggregation!r} weighs a response by its "
            "length, though gspo has one ratio for it: the paper's is 'sequence_mean'"
        )
    return found


def _check_names(grpo: ConfigDict) -> None:
    for name, known in CHOICES.items():
        given = operator.attrgetter(name)(grpo)
        if given not in known:
            raise UserError(
                f"config.grpo.{name}={given!r} is unknown; take one of "
                + ", ".join(map(repr, known))
            )


def _check_positive(grpo: ConfigDict) -> None:
    for name in ("std_eps", "tau_pos", "tau_neg"):
        if not grpo[name] > 0:
            raise UserError(f"config.grpo.{name}={grpo[name]} must be above 0")


def _check_group(config: ConfigDict) -> None:
    grpo, group = config.grpo, config.rollout.group
    if group > 1:
        return
    if grpo.advantage != "reinforce_plus_plus":
        raise UserError(
            f"config.rollout.group={group} must be at least 2: an advantage is against "
            "the other responses to the same prompt, but for "
            "config.grpo.advantage='reinforce_plus_plus'"
        )
    if grpo.dynamic_sampling:
        raise UserError(
            f"config.grpo.dynamic_sampling={grpo.dynamic_sampling} needs "
            f"config.rollout.group of at least 2, not {group}: the reward of one "
            "response differs from no other, so all would be left out; take 0: off"
        )


def _check_kl(grpo: ConfigDict) -> None:
    given = f"config.grpo.kl_estimator={grpo.kl_estimator!r}"
    where = f"config.grpo.kl_in={grpo.kl_in!r}"
    if grpo.kl_in == "reward" and grpo.kl_estimator.endswith("+"):
        raise UserError(
            f"{given} is for the gradient of a loss, and {where} has none; take "
            f"{grpo.kl_estimator.removesuffix('+')!r}, which is its value"
        )
    if grpo.kl_in == "loss" and grpo.kl_estimator == "k1" and grpo.kl_coef:
        raise UserError(
            f"{given} does not go with {where}: its gradient has mean zero, so nothing "
            "would hold the policy near its reference; take 'k2', 'k3' or 'k1+'"
        )


def _check_dual_clip(grpo: ConfigDict) -> None:
    if not grpo.dual_clip:
        return
    given = f"config.grpo.dual_clip={grpo.dual_clip}"
    if not grpo.dual_clip >= 1:
        raise UserError(f"{given} must be at least 1, or 0: off")
    if grpo.variant in OWN_BOUNDS:
        able = [name for name in policy_variants.VARIANTS if name not in OWN_BOUNDS]
        raise UserError(
            f"{given} does nothing with config.grpo.variant={grpo.variant!r}; take 0: "
            f"off, or one of {', '.join(map(repr, able))}"
        )
