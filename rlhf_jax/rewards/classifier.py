"""An encoder that classifies texts (BERT, DistilBERT, RoBERTa) as a reward.

Texts are scored in batches of one number of rows and of few lengths, so that whatever
texts come, few programs are compiled; texts of like length share a batch.

Dimension key: B texts, T tokens of a row, n labels.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax import sharding
from rlhf_jax.data.tokenizer import check_vocabulary, load_tokenizer
from rlhf_jax.models.encoder import make_encoder
from rlhf_jax.models.encoder_weights import load_encoder
from rlhf_jax.rewards.labels import (
    DEFAULT,
    Reading,
    check_reading,
    fill_text,
    find_label,
    label_names,
    read_scores,
)

# Rows of a batch; the last one of a call is filled up.
ROWS = 32
SHORTEST = 32


def load_classifier(
    source: str | os.PathLike,
    *,
    mesh: Mesh,
    reading: Reading = DEFAULT,
    dtype: str = "float32",
) -> Callable[..., np.ndarray]:
    """A reward function from an encoder's checkpoint and its tokenizer.

    A text longer than the encoder's context loses its beginning; the special tokens
    around it stay.

    Args:
      source: a directory or hub id of a `...ForSequenceClassification`.
      mesh: where the encoder computes.
      reading: which label's score, on which scale, of which text.
      dtype: what matmuls are computed in.

    Raises:
      UserError: no such model or tokenizer there, or no such label in it.
    """
    found = load_encoder(source, mesh=mesh)
    problem = found.hf_config.get("problem_type")
    check_reading(reading, problem)
    tokenizer = load_tokenizer(source)
    check_vocabulary(tokenizer, found.config.trunk.vocab_size, "the classifier")
    tokenizer.truncation_side = "left"
    labels = label_names(found.hf_config, found.config.num_labels)
    index = find_label(labels, reading.label, str(source))
    longest = found.config.trunk.max_positions
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = sharding.rows(mesh)
    forward = jax.jit(make_encoder(found.config, dtype=dtype).apply)

    def score(
        prompts: Sequence[str], responses: Sequence[str], **columns: Any
    ) -> np.ndarray:
        del columns
        texts = [fill_text(reading.text, *pair) for pair in zip(prompts, responses)]
        ids = encode_whole(tokenizer, texts, longest)
        logits = np.zeros((len(texts), found.config.num_labels), np.float32)
        for batch, tokens, mask in batches(ids, ROWS + -ROWS % ways, longest):
            placed = sharding.to_devices((tokens, mask), rows)
            got = sharding.to_host(forward(found.params, *placed))
            logits[batch] = got[: len(batch)]
        return read_scores(logits, index, reading.output, problem)

    return score


def encode_whole(tokenizer: Any, texts: Sequence[str], longest: int) -> list[list[int]]:
    """The ids of each text between its special tokens, `longest` of them at most."""
    if not texts:
        return []
    return tokenizer(
        list(texts),
        truncation=True,
        max_length=longest,
        return_attention_mask=False,
        return_token_type_ids=False,
    )["input_ids"]


def padded_length(used: int, longest: int) -> int:
    """The next of 32, 48, 64, 96, 128, ..., and `longest` at most.

    At most a third of such a row is padding, and a context of 512 has nine lengths.
    """
    length = SHORTEST
    while length < used:
        # from 2^k to 1.5 * 2^k, and from there to 2^(k+1)
        length += length // 2 if length & (length - 1) == 0 else length // 3
    return min(length, longest)


def batches(
    ids: Sequence[Sequence[int]], rows: int, longest: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Right-padded batches of `rows` rows, the shortest texts first.

    Yields:
      The texts' numbers [up to rows]; tokens [rows, T] int32; mask [rows, T] bool.
    """
    order = np.argsort([len(row) for row in ids], kind="stable")
    for start in range(0, len(order), rows):
        batch = order[start : start + rows]
        T = padded_length(len(ids[batch[-1]]), longest)
        tokens = np.zeros((rows, T), np.int32)
        mask = np.zeros((rows, T), bool)
        for row, index in enumerate(batch):
            tokens[row, : len(ids[index])] = ids[index]
            mask[row, : len(ids[index])] = True
        yield batch, tokens, mask
