"""A reward model as a reward: texts in, the score at the last real token out.

Dimension key: B rows, T tokens of a row, D model width, n labels.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlhf_jax import sharding
from rlhf_jax.data.sequences import encode_sequences
from rlhf_jax.data.tokenizer import check_vocabulary, load_tokenizer, special_tokens
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


def load_reward_model(
    directory: str | os.PathLike,
    *,
    mesh: Mesh,
    reading: Reading = DEFAULT,
    dtype: str = "float32",
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

    Raises:
      UserError: no such model there, or no such label in it.
    """
    source = os.fspath(directory)
    found = load_pretrained(source, mesh=mesh, head=True, num_labels=None)
    problem = found.hf_config.get("problem_type")
    check_reading(reading, problem)
    labels = label_names(found.hf_config, found.params["score"]["kernel"].shape[1])
    index = find_label(labels, reading.label, source)
    tokenizer = load_tokenizer(directory)
    special_tokens(tokenizer)
    check_vocabulary(tokenizer, found.config.vocab_size, "the reward model beside it")
    model, params = make_model(found.config, dtype=dtype), found.params
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = sharding.rows(mesh)

    @jax.jit
    def forward(params, tokens, mask):
        return model.classify(params, _last_hidden(model, params, tokens, mask))

    def classify_texts(texts: list[str], count: int) -> np.ndarray:
        longest = found.config.max_positions
        tokens, mask = encode_sequences(tokenizer, texts, length=longest, keep_end=True)
        used = int(mask.sum(axis=1).max(initial=1))
        used = min(-(-used // LENGTH_STEP) * LENGTH_STEP, longest)
        spare = count - len(texts)
        tokens = np.pad(tokens[:, :used], ((0, spare), (0, 0)))
        mask = np.pad(mask[:, :used], ((0, spare), (0, 0)))
        logits = forward(params, *sharding.to_devices((tokens, mask), rows))
        return sharding.to_host(logits)[: len(texts)]

    def score(
        prompts: Sequence[str], responses: Sequence[str], **columns: Any
    ) -> np.ndarray:
        del columns
        texts = [fill_text(reading.text, *pair) for pair in zip(prompts, responses)]
        count = min(len(texts), MAX_ROWS)
        count += -count % ways
        parts = [
            classify_texts(texts[start : start + count], count)
            for start in range(0, len(texts), count or 1)
        ]
        logits = np.concatenate([np.zeros((0, len(labels)), np.float32), *parts])
        return read_scores(logits, index, reading.output, problem)

    return score
