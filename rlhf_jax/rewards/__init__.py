"""Rewards: what a response is worth, from a function, a lexicon or a model.

One signature: `(prompts, responses, **columns) -> [B] float32`. A config names each
reward's source and weight, and `build_rewards` finds it:

    "vader"                     sentiment of the response, by lexicon
    "package.module:function"   a Python function of that signature
    "builtin:reward"            the reward model that ships with the package
    "runs/rm", a directory      a run's exported reward model, a Hugging Face classifier
                                (BERT, DistilBERT, RoBERTa or a decoder) or a score
                                model of safe-rlhf
    "owner/name"                the same from the Hugging Face hub
    ["runs/rm0", "runs/rm1"]    an ensemble of reward models

The entry of a model may also say which `label` counts, by name or number, the `output`
("logit", "probability", "log_probability", "log_odds"), the `text` that it reads
("{prompt}{response}") and its `dtype`: {"source": "runs/imdb", "label": "POSITIVE"}.
A reward model trained here may be asked to `normalize` its scores, to mean 0 and
deviation 1 of the responses it was trained on; members of an ensemble do so unless
told not to. An ensemble has `combine` ("mean", "min", "uncertainty") and `penalty`.
A single reward model with {"on": "tokens"} reads the policy's tokens on the devices
while training, if both have one tokenizer; elsewhere it reads texts.

A function scores each row by itself: of many processes each gives it a share of them.
"""

import functools
import importlib
import math
import os
import pathlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from rlhf_jax.errors import UserError, first_line
from rlhf_jax.models.encoder_weights import ENCODERS
from rlhf_jax.models.families import FAMILIES
from rlhf_jax.models.model_files import find_model, is_hub_id, read_config
from rlhf_jax.rewards import functions
from rlhf_jax.rewards.by_host import score_share
from rlhf_jax.rewards.classifier import load_classifier
from rlhf_jax.rewards.ensemble import Detailed, load_ensemble
from rlhf_jax.rewards.labels import Reading
from rlhf_jax.rewards.model import (
    load_reward_model,
    make_text_score,
    open_reward_model,
)
from rlhf_jax.rewards.on_tokens import TokenScore, make_token_score
from rlhf_jax.run_files import exported

BUILTIN = {
    "builtin:reward": pathlib.Path(__file__).parents[1] / "builtin" / "reward",
}
FUNCTIONS = {"vader": functions.vader}
KNOWN = (
    f"take {', '.join([*FUNCTIONS, *BUILTIN])}, the directory or hub id of a reward "
    'model or classifier, or "package.module:function"'
)
ENSEMBLE_OPTIONS = ("combine", "penalty")
MODEL_OPTIONS = (*Reading._fields, "dtype", "normalize")

Score = Callable[..., np.ndarray | Detailed]


class Reward(NamedTuple):
    """One reward: how the config calls it, where it is from, and what it counts."""

    name: str
    source: str
    weight: float
    score: Score
    by_host: bool = False  # a Python function: each process scores a share of the rows
    on_tokens: TokenScore | None = None  # a model that may read the policy's tokens


def build_rewards(
    config: Mapping[str, Mapping[str, Any]], *, mesh: Mesh
) -> list[Reward]:
    """Finds the rewards of a config: `{name: {"source": ..., "weight": ...}}`.

    Raises:
      UserError: a source that does not exist or cannot be loaded.
    """
    return [_build(name, entry, mesh) for name, entry in config.items()]


def load_model(
    source: str | os.PathLike,
    *,
    mesh: Mesh,
    dtype: str = "float32",
    normalize: bool = False,
    **reading: Any,
) -> Score:
    """A reward function from a reward model or classifier of any known architecture.

    Args:
      source: a directory or hub id.
      mesh: where the model computes.
      dtype: "float32" or "bfloat16", what its matmuls are computed in.
      normalize: of a reward model trained here, see `load_reward_model`.
      **reading: fields of `labels.Reading`.

    Raises:
      UserError: no such model, or an option that is not for it.
    """
    _check_dtype(dtype)
    kind = read_config(find_model(source)).get("model_type")
    if kind not in {*ENCODERS, *FAMILIES}:
        raise UserError(
            f"{source} has the unsupported model_type {kind!r}; supported are the "
            f"classifiers {', '.join(ENCODERS)} and the decoders {', '.join(FAMILIES)}"
        )
    options = {"mesh": mesh, "reading": Reading(**reading), "dtype": dtype}
    if kind in FAMILIES:
        return load_reward_model(source, normalize=normalize, **options)
    if normalize:
        raise UserError(
            f"{source} cannot be normalised: it is a classifier ({kind}), and only "
            "reward models trained here know the mean and deviation of their scores"
        )
    return load_classifier(source, **options)


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
      The weighted sum [B] float32, and each reward alone, unweighted, by its name; of
      an ensemble also the deviation of its members, as "<name>_std".

    Raises:
      UserError: a reward raised, or gave anything but B finite numbers.
    """
    total = np.zeros(len(prompts), np.float32)
    parts: dict[str, np.ndarray] = {}
    for reward in rewards:
        score = functools.partial(_checked, reward)
        score = functools.partial(score_share, score) if reward.by_host else score
        found = score(prompts, responses, columns)
        total += np.float32(reward.weight) * found.scores
        parts[reward.name] = found.scores
        for detail, values in found.details.items():
            parts.setdefault(f"{reward.name}_{detail}", values)
    return total, parts


def name_scores(
    total: np.ndarray, parts: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The scores as columns: "reward", and each part where there are several."""
    if len(parts) < 2:
        return {"reward": total}
    return {"reward": total} | {f"reward/{name}": part for name, part in parts.items()}


def judge_scores(
    judges: Sequence[Reward],
    prompts: Sequence[str],
    responses: Sequence[str],
    **columns: Sequence[Any],
) -> dict[str, np.ndarray]:
    """Each judge alone, as the column "judge/<name>"; details are left out."""
    _, parts = score_all(judges, prompts, responses, **columns)
    return {f"judge/{judge.name}": parts[judge.name] for judge in judges}


def _build(name: str, entry: Mapping[str, Any], mesh: Mesh) -> Reward:
    source, weight = entry.get("source"), entry.get("weight", 1.0)
    several = isinstance(source, list | tuple) and source
    if entry.get("on", "text") not in ("text", "tokens"):
        raise UserError(
            f'reward {name!r} has "on": {entry["on"]!r}; take "text" or "tokens"'
        )
    if entry.get("on") == "tokens" and several:
        raise UserError(
            f'reward {name!r} is an ensemble and has "on": "tokens"; only a single '
            'reward model reads tokens: take "text"'
        )
    if not source or not all(
        isinstance(one, str) and one for one in (source if several else [source])
    ):
        raise UserError(f"reward {name!r} has no source; {KNOWN}")
    if not isinstance(weight, int | float) or not math.isfinite(weight):
        raise UserError(f"reward {name!r} has the weight {weight!r}, expected a number")
    known = (*MODEL_OPTIONS, *ENSEMBLE_OPTIONS) if several else MODEL_OPTIONS
    options = {k: entry[k] for k in known if entry.get(k) is not None}
    if several:
        score = _find_ensemble(source, mesh, options)
        return Reward(name, " + ".join(source), float(weight), score)
    if entry.get("on") == "tokens":
        return _on_tokens(name, source, float(weight), mesh, options)
    model = _find_model(name, source, mesh, options)
    if model is not None:
        return Reward(name, source, float(weight), model)
    score = _find_function(name, source, options)
    return Reward(name, source, float(weight), score, by_host=True)


def _on_tokens(
    name: str, source: str, weight: float, mesh: Mesh, options: Mapping[str, Any]
) -> Reward:
    """A reward model in memory once, that reads texts and tokens."""
    if source in FUNCTIONS or (":" in source and source not in BUILTIN):
        raise UserError(
            f'reward {name!r} has "on": "tokens", and {source} is a function of texts: '
            'take "text"'
        )
    path = BUILTIN.get(source) or exported(source)
    if read_config(find_model(path)).get("model_type") not in FAMILIES:
        raise UserError(
            f'reward {name!r} has "on": "tokens", and {source} is no decoder with a '
            'score head: take "text"'
        )
    options = dict(options)
    normalize, dtype = options.pop("normalize", False), options.pop("dtype", "float32")
    _check_dtype(dtype)
    reading = Reading(**options)
    found = open_reward_model(path, mesh=mesh, reading=reading, dtype=dtype)
    return Reward(
        *(name, source, weight),
        make_text_score(found, reading, mesh, normalize=normalize),
        on_tokens=make_token_score(found, reading, normalize=normalize),
    )


def _find_ensemble(
    sources: Sequence[str], mesh: Mesh, options: Mapping[str, Any]
) -> Score:
    found = [str(BUILTIN.get(source) or exported(source)) for source in sources]
    _check_dtype(options.get("dtype", "float32"))
    reading = {k: v for k, v in options.items() if k in Reading._fields}
    others = {k: v for k, v in options.items() if k not in Reading._fields}
    return load_ensemble(found, mesh=mesh, reading=Reading(**reading), **others)


def _check_dtype(dtype: str) -> None:
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"unknown dtype {dtype!r}: choose from float32, bfloat16")


def _find_model(
    name: str, source: str, mesh: Mesh, options: Mapping[str, Any]
) -> Score | None:
    """The score function of a model; None if the source names none."""
    path = BUILTIN.get(source) or pathlib.Path(exported(source)).expanduser()
    if path.is_dir():
        return load_model(path, mesh=mesh, **options)
    if is_hub_id(source):
        try:
            find_model(source)
        except UserError as error:
            what = str(error).removesuffix(".")
            raise UserError(f"reward {name!r}: {what}; {KNOWN}") from error
        return load_model(source, mesh=mesh, **options)
    return None


def _find_function(name: str, source: str, options: Mapping[str, Any]) -> Score:
    if options:
        raise UserError(
            f"reward {name!r} ({source}) is no model, and only models have "
            f"{', '.join(options)}"
        )
    if source in FUNCTIONS:
        return FUNCTIONS[source]
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


def _place_of(error: Exception) -> str:
    """Where a reward went wrong: the last line in the file of its function."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is ours
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    return f", in line {own[-1].lineno} of {own[-1].filename}" if own else ""


def _checked(
    reward: Reward,
    prompts: Sequence[str],
    responses: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> Detailed:
    """The scores [B] float32 of one reward, or a sentence about what is wrong."""
    who = f"reward {reward.name!r} ({reward.source})"
    try:
        scores = reward.score(list(prompts), list(responses), **columns)
    except UserError:
        raise
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        raise UserError(f"{who} raised {told}{_place_of(error)}") from error
    details = {}
    if isinstance(scores, Detailed):
        scores, details = scores
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
    return Detailed(scores, details)
