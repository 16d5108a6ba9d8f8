"""Heads that score a sequence: how checkpoints keep them.

Two kinds are read into one, `{kernel: [D, n]}` with `bias: [n]` where there is one:
transformers' ...ForSequenceClassification, `score.weight` [n, D], and the score models
of safe-rlhf (PKU-Alignment's beaver reward and cost models), `score_head.weight` and
perhaps `score_head.bias`.

Dimensions: D model width, n labels (1 for reward, cost and value models).

References:
    Dai et al., Safe RLHF, https://arxiv.org/abs/2310.12773; its score models,
    https://github.com/PKU-Alignment/safe-rlhf.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.models.model_files import Tensor
from rlhf_jax.models.weight_names import AS_IS, TRANSPOSED, Row

TRANSFORMERS, SAFE_RLHF = "score", "score_head"
# What safe-rlhf does with a score by `score_type`, where `do_normalize` says so:
# whether the running mean is taken off, and whether it is divided by the deviation.
NORMALIZES = {"reward": (True, True), "cost": (False, True), "critic": (False, False)}
NORMALIZER_EPS = 1e-8


class Head(NamedTuple):
    """A head as a checkpoint holds it.

    Attributes:
        name: what stands before ".weight".
        num_labels: n.
        bias: whether it has one.
    """

    name: str
    num_labels: int
    bias: bool


def find_head(tensors: Mapping[str, Tensor]) -> Head | None:
    """The head among a checkpoint's tensors; None for a language model."""
    for name in (TRANSFORMERS, SAFE_RLHF):
        weight = tensors.get(f"{name}.weight")
        if weight is not None:
            return Head(name, weight.shape[0], f"{name}.bias" in tensors)
    return None


def head_to_write(params: Any) -> Head | None:
    """The head that `params` are to be written with; None for a language model."""
    if "score" not in params:
        return None
    # Only safe-rlhf's models have room for a bias.
    bias = "bias" in params["score"]
    name = SAFE_RLHF if bias else TRANSFORMERS
    return Head(name, params["score"]["kernel"].shape[1], bias)


def head_rows(head: Head) -> list[Row]:
    """The rows of a head's tensors."""
    rows = [Row(f"{head.name}.weight", ("score/kernel",), TRANSPOSED)]
    if head.bias:
        rows.append(Row(f"{head.name}.bias", ("score/bias",), AS_IS))
    return rows


def abstract_head(head: Head, width: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a head on hidden states of this width."""
    shapes = {"kernel": (width, head.num_labels)}
    if head.bias:
        shapes["bias"] = (head.num_labels,)
    return {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}


def fold_normalizer(
    score: Mapping[str, jax.Array],
    hf_config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> dict[str, jax.Array]:
    """A safe-rlhf head whose scores come out normalised: (s - mean) / (std + 1e-8).

    Mean and variance of the training scores lie in the checkpoint, or in config.json.
    Without `do_normalize` the head comes back as it is.

    Raises:
        UserError: an unknown `score_type`.
    """
    if not hf_config.get("do_normalize"):
        return dict(score)
    kind = hf_config.get("score_type", "reward")
    if kind not in NORMALIZES:
        raise UserError(
            f"Unsupported score_type {kind!r} in config.json; "
            f"supported are {', '.join(NORMALIZES)}."
        )
    shifts, scales = NORMALIZES[kind]
    n = score["kernel"].shape[1]
    mean = _statistic("mean", 0.0, n, hf_config, tensors) if shifts else np.zeros(n)
    deviation = np.ones(n)
    if scales:
        variance = _statistic("var", 1.0, n, hf_config, tensors)
        deviation = np.sqrt(variance) + NORMALIZER_EPS
    folded = {"kernel": score["kernel"] / np.float32(deviation)[None]}
    if "bias" in score or shifts:
        bias = score["bias"] if "bias" in score else jnp.zeros_like(score["kernel"][0])
        folded["bias"] = (bias - np.float32(mean)) / np.float32(deviation)
    return folded


def _statistic(name, default, n, hf_config, tensors):
    tensor = tensors.get(f"normalizer.{name}")
    if tensor is not None:
        return np.asarray(tensor.file.get_tensor(tensor.name), np.float64).reshape(n)
    value = hf_config.get(name)
    return np.broadcast_to(np.float64(default if value is None else value), (n,))
