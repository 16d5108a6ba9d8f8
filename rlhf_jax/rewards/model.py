"""A reward model as a reward: texts in, the score at the last real token out.

Dimension key: B rows, T tokens of a row, D model width, n labels.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlhf_jax import sharding
from rlhf_jax.data.sequences import encode_sequences
from rlhf_jax.data.tokenizer import check_vocabulary, load_tokenizer, special_tokens
from rlhf_jax.errors import UserError
from rlhf_jax.models.pretrained import load_pretrained
from rlhf_jax.models.transformer import Model, make_model
from rlhf_jax.rewards.labels import (
    DEFAULT,
    Reading,
    check_reading,
    fill_text,
    find_label,
    label_names,
    read_scores,
)

# Rows are padded to a multiple of this, so that few lengths are compiled.
LENGTH_STEP = 16
# More rows than this are scored in several goes, so that memory has a bound.
MAX_ROWS = 256


def score_sequences(
    model: Model,
    params: Any,
    tokens: jax.Array,
    mask: jax.Array,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Scores [B] float32 of right-padded rows [B, T], at the last real token."""
    return model.score(params, _last_hidden(model, params, tokens, mask, dropout_key))


def _last_hidden(model, params, tokens, mask, dropout_key=None):
    """Hidden states [B, D] of each row's last real token."""
    hidden = model.apply(params, tokens, mask, dropout_key=dropout_key)
    last = jnp.maximum(mask.sum(axis=1) - 1, 0)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


class RewardModel(NamedTuple):
    """A decoder with its head, how its texts are written and which label counts."""

    source: str
    model: Model
    params: Any
    hf_config: dict[str, Any]
    tokenizer: Any
    index: int  # of the label


def open_reward_model(
    directory: str | os.PathLike,
    *,
    mesh: Mesh,
    reading: Reading = DEFAULT,
    dtype: str = "float32",
) -> RewardModel:
    """What `load_reward_model` is made of; the same arguments and errors."""
    source = os.fspath(directory)
    found = load_pretrained(source, mesh=mesh, head=True, num_labels=None)
    check_reading(reading, found.hf_config.get("problem_type"))
    labels = label_names(found.hf_config, found.params["score"]["kernel"].shape[1])
    index = find_label(labels, reading.label, source)
    tokenizer = load_tokenizer(directory)
    special_tokens(tokenizer)
    check_vocabulary(tokenizer, found.config.vocab_size, "the reward model beside it")
    model = make_model(found.config, dtype=dtype)
    return RewardModel(source, model, found.params, found.hf_config, tokenizer, index)


def classify_sequences(
    model: Model, params: Any, tokens: jax.Array, mask: jax.Array
) -> jax.Array:
    """All labels' logits [B, n] of right-padded rows [B, T], at the last real token."""
    return model.classify(params, _last_hidden(model, params, tokens, mask))


def make_classifier(
    found: RewardModel, mesh: Mesh, forward: Callable[..., jax.Array]
) -> Callable[[Sequence[str]], np.ndarray]:
    """Builds `classify(texts) -> [B, ...]`, what `forward` says of each text.

    Args:
      found: its tokenizer and context are used.
      mesh: where the rows go.
      forward: a compiled function (tokens, mask) -> [B, ...].
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    longest, rows = found.model.config.max_positions, sharding.rows(mesh)

    def classify_some(texts: Sequence[str], count: int) -> np.ndarray:
        tokens, mask = encode_sequences(
            found.tokenizer, texts, length=longest, keep_end=True
        )
        used = int(mask.sum(axis=1).max(initial=1))
        used = min(-(-used // LENGTH_STEP) * LENGTH_STEP, longest)
        spare = count - len(texts)
        tokens = np.pad(tokens[:, :used], ((0, spare), (0, 0)))
        mask = np.pad(mask[:, :used], ((0, spare), (0, 0)))
        logits = forward(*sharding.to_devices((tokens, mask), rows))
        return sharding.to_host(logits)[: len(texts)]

    def classify(texts: Sequence[str]) -> np.ndarray:
        count = min(len(texts), MAX_ROWS)
        count += -count % ways
        starts = range(0, len(texts), count or 1)
        return np.concatenate(
            [classify_some(texts[start : start + count], count) for start in starts]
        )

    return classify


def score_statistics(found: RewardModel, reading: Reading) -> tuple[float, float]:
    """Mean and deviation of the scores that a model gave its training responses.

    Raises:
      UserError: the model does not say, or another number than its score is read.
    """
    if reading.output != "logit":
        raise UserError(
            f"normalize is for scores, and output={reading.output!r} of {found.source} "
            "is none: leave one of the two out"
        )
    mean, deviation = (found.hf_config.get(f"score_{n}") for n in ("mean", "std"))
    if mean is None or deviation is None:
        raise UserError(
            f"{found.source} cannot be normalised: its config.json has no score_mean "
            "and score_std, as the reward models trained here have; set normalize to "
            "False"
        )
    if not deviation > 0:
        raise UserError(
            f"{found.source} cannot be normalised: it gave all responses the same "
            f"score (score_std={deviation} in its config.json)"
        )
    return float(mean), float(deviation)


def load_reward_model(
    directory: str | os.PathLike,
    *,
    mesh: Mesh,
    reading: Reading = DEFAULT,
    dtype: str = "float32",
    normalize: bool = False,
) -> Callable[..., np.ndarray]:
    """A reward function from a directory with a decoder, its head and its tokenizer.

    Prompt and response are scored as one text, EOS at its end, whether the response
    was cut off or not. A text longer than the model's context loses its beginning.

    Args:
      directory: an export of the reward-model trainer, a transformers
        `...ForSequenceClassification` or a safe-rlhf `...ForScore`, or a hub id.
      mesh: where the model computes.
      reading: which label's score, on which scale, of which text.
      dtype: what matmuls are computed in.
      normalize: (score − mean) / deviation, of the responses it was trained on.

    Raises:
      UserError: no such model there, no such label in it, or no mean and deviation.
    """
    found = open_reward_model(directory, mesh=mesh, reading=reading, dtype=dtype)
    return make_text_score(found, reading, mesh, normalize=normalize)


def make_text_score(
    found: RewardModel, reading: Reading, mesh: Mesh, *, normalize: bool
) -> Callable[..., np.ndarray]:
    """The reward function of `load_reward_model`, of a model that is open."""
    mean, deviation = score_statistics(found, reading) if normalize else (0.0, 1.0)
    compiled = jax.jit(functools.partial(classify_sequences, found.model))
    classify = make_classifier(found, mesh, functools.partial(compiled, found.params))
    problem = found.hf_config.get("problem_type")

    def score(
        prompts: Sequence[str], responses: Sequence[str], **columns: Any
    ) -> np.ndarray:
        del columns
        texts = [fill_text(reading.text, *pair) for pair in zip(prompts, responses)]
        if not texts:
            return np.zeros(0, np.float32)
        scores = read_scores(classify(texts), found.index, reading.output, problem)
        return (scores - np.float32(mean)) / np.float32(deviation)

    return score
