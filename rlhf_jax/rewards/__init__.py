"""Rewards: what a response is worth, from a function, a lexicon or a model.

One signature: `(prompts, responses, **columns) -> [B] float32`. A config names each
reward's source and weight, and `build_rewards` finds it:

    "vader"                     sentiment of the response, by lexicon
    "package.module:function"   a Python function of that signature
    "builtin:reward"            the reward model that ships with the package
    "runs/rm", a directory      a run's exported reward model, or an HF classifier
"""

import importlib
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from rlhf_jax.errors import UserError, first_line
from rlhf_jax.rewards import functions
from rlhf_jax.rewards.model import load_reward_model
from rlhf_jax.run_files import exported

BUILTIN = {
    "builtin:reward": pathlib.Path(__file__).parents[1] / "builtin" / "reward",
}
FUNCTIONS = {"vader": functions.vader}
KNOWN = (
    f"take {', '.join([*FUNCTIONS, *BUILTIN])}, the directory of a reward model, or "
    '"package.module:function"'
)

Score = Callable[..., np.ndarray]


class Reward(NamedTuple):
    """One reward: how the config calls it, where it is from, and what it counts."""

    name: str
    source: str
    weight: float
    score: Score


def build_rewards(
    config: Mapping[str, Mapping[str, Any]], *, mesh: Mesh
) -> list[Reward]:
    """Finds the rewards of a config: `{name: {"source": ..., "weight": ...}}`.

    Raises:
      UserError: a source that does not exist or cannot be loaded.
    """
    return [_build(name, entry, mesh) for name, entry in config.items()]


def score_all(
    rewards: Sequence[Reward],
    prompts: Sequence[str],
    responses: Sequence[str],
    **columns: Sequence[Any],
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Scores responses with every reward.

    Args:
      rewards: from `build_rewards`.
      prompts: B prompts.
      responses: B responses.
      **columns: further columns of the prompts' rows, B values each.

    Returns:
      The weighted sum [B] float32, and each reward alone, unweighted, by its name.

    Raises:
      UserError: a reward raised, or gave anything but B finite numbers.
    """
    parts = {
        reward.name: _checked(reward, prompts, responses, columns) for reward in rewards
    }
    total = np.zeros(len(prompts), np.float32)
    for reward in rewards:
        total += np.float32(reward.weight) * parts[reward.name]
    return total, parts


def name_scores(
    total: np.ndarray, parts: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The scores as columns: "reward", and each part where there are several."""
    if len(parts) < 2:
        return {"reward": total}
    return {"reward": total} | {f"reward/{name}": part for name, part in parts.items()}


def _build(name: str, entry: Mapping[str, Any], mesh: Mesh) -> Reward:
    source, weight = entry.get("source"), entry.get("weight", 1.0)
    if not isinstance(source, str) or not source:
        raise UserError(f"reward {name!r} has no source; {KNOWN}")
    if not isinstance(weight, int | float) or not math.isfinite(weight):
        raise UserError(f"reward {name!r} has the weight {weight!r}, expected a number")
    return Reward(name, source, float(weight), _find(name, source, mesh))


def _find(name: str, source: str, mesh: Mesh) -> Score:
    if source in FUNCTIONS:
        return FUNCTIONS[source]
    if source in BUILTIN:
        return load_reward_model(BUILTIN[source], mesh=mesh)
    path = pathlib.Path(exported(source)).expanduser()
    if path.is_dir():
        return load_reward_model(path, mesh=mesh)
    module, _, function = source.partition(":")
    if not function or not all(part.isidentifier() for part in module.split(".")):
        raise UserError(
            f"reward {name!r} has the source {source!r}, which is no directory and no "
            f"import path; {KNOWN}"
        )
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the user's module raises
        raise UserError(
            f"reward {name!r}: {source!r} cannot be imported ({type(error).__name__}: "
            f"{first_line(error)}); is its folder on PYTHONPATH?"
        ) from error
    if not callable(found):
        raise UserError(f"reward {name!r}: {source!r} is not a function")
    return found


def _checked(
    reward: Reward,
    prompts: Sequence[str],
    responses: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> np.ndarray:
    """The scores [B] float32 of one reward, or a sentence about what is wrong."""
    who = f"reward {reward.name!r} ({reward.source})"
    try:
        scores = reward.score(list(prompts), list(responses), **columns)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{who} raised {type(error).__name__}: {error}") from error
    try:
        with np.errstate(over="ignore"):  # an overflow is inf, and reported below
            scores = np.asarray(scores, np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"{who} gave no array of numbers: {error}") from error
    if scores.shape != (len(prompts),):
        raise UserError(
            f"{who} gave scores of shape {scores.shape} for {len(prompts)} responses; "
            f"expected ({len(prompts)},), one number a response"
        )
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        row = int(bad[0])
        raise UserError(
            f"{who} gave {scores[row]} for response {row} of {len(prompts)} "
            f"({bad.size} not finite): {responses[row][:80]!r}"
        )
    return scores
