"""Responses of different lengths learned from without their padding.

A batch of transcripts is padded twice: prompts on the left, responses on the right. A
`Layout` says how its real tokens fill fewer rows of the same width, several transcripts
to a row, each a segment of its own that attention does not leave. The log-probabilities
come back as [B, N], so that a loss is the same with and without.

Rows and states are rounded up to a quarter of what they would be without packing:
at most a few shapes are compiled, however the lengths fall.

Dimension key: B transcripts, P prompt tokens, N response tokens, W = P + N, R packed
rows, C states of a row that predict a response token.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import sharding


class Layout(NamedTuple):
    """Where the tokens of a batch stand in packed rows; all int32.

    Attributes:
      tokens: [R, W], which of the batch's B·W tokens stands there.
      segments: [R, W], number of the transcript in its row, from 1; 0 is padding.
      states: [R, C], the column of the state that predicts a response token.
      targets: [R, C], which of the batch's B·N response tokens that is; -1 for none.
      places: [B, N], where each response token is among the R·C; any if there is none.
    """

    tokens: jax.Array
    segments: jax.Array
    states: jax.Array
    targets: jax.Array
    places: jax.Array


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Which items go into one row: the longest first, into the first with room.

    Args:
      lengths: [B] int, none above `capacity`.
      capacity: of a row.
    """
    rows: list[list[int]] = []
    room = np.zeros(len(lengths), int)
    for item in np.argsort(-lengths, kind="stable"):
        row = int(np.argmax(room[: len(rows)] >= lengths[item])) if rows else 0
        if not rows or room[row] < lengths[item]:
            row = len(rows)
            rows.append([])
            room[row] = capacity
        rows[row].append(int(item))
        room[row] -= lengths[item]
    return rows


def plan(
    prompt_lengths: np.ndarray,
    response_lengths: np.ndarray,
    batches: np.ndarray,
    *,
    prompt_tokens: int,
    max_new_tokens: int,
    shards: int,
) -> Layout:
    """The layouts of several batches of equal size, with one shape for all.

    Args:
      prompt_lengths: [rows] real tokens of each prompt, at least 1.
      response_lengths: [rows] real tokens of each response, at least 1.
      batches: [K, B] int, the rows of each batch.
      prompt_tokens: P.
      max_new_tokens: N.
      shards: R is a multiple of it, as the batch is cut over the mesh.

    Returns:
      A Layout of NumPy arrays with a leading axis K.
    """
    # The last token predicts nothing that is asked for.
    needed = prompt_lengths + response_lengths - 1
    width = prompt_tokens + max_new_tokens
    packed = [pack(needed[batch], width) for batch in batches]
    spoken = [
        max(int(response_lengths[batch][row].sum()) for row in rows)
        for batch, rows in zip(batches, packed)
    ]
    B = batches.shape[1]
    count = _round_up(max(len(rows) for rows in packed), B, shards)
    states = _round_up(max(spoken), width)
    filled = [
        _fill(
            rows,
            prompt_lengths[batch],
            response_lengths[batch],
            empty=_empty(count, states, B, prompt_tokens, max_new_tokens),
        )
        for batch, rows in zip(batches, packed)
    ]
    return Layout(*(np.stack(x) for x in zip(*filled)))


def plan_transcript(transcript: Any, batches: np.ndarray) -> Layout:
    """`plan` for batches [K, B] of a transcript's rows, whose lengths are fetched."""
    prompt_mask, mask = transcript.prompt_mask, transcript.mask
    lengths = sharding.to_host((prompt_mask.sum(axis=1), mask.sum(axis=1)))
    return plan(
        *lengths,
        batches,
        prompt_tokens=prompt_mask.shape[1],
        max_new_tokens=mask.shape[1],
        shards=sharding.batch_shards(),
    )


def _round_up(needed: int, most: int, multiple: int = 1) -> int:
    """`needed`, up to a quarter of `most`, or to it, and to a multiple."""
    quarter = -(-most // 4)
    rounded = min(-(-needed // quarter) * quarter, most)
    return -(-rounded // multiple) * multiple


def _empty(rows: int, states: int, B: int, P: int, N: int) -> Layout:
    zeros = lambda *shape: np.zeros(shape, np.int32)
    return Layout(
        tokens=zeros(rows, P + N),
        segments=zeros(rows, P + N),
        states=zeros(rows, states),
        targets=zeros(rows, states) - 1,
        places=zeros(B, N),
    )


def _fill(rows, prompt_lengths, response_lengths, *, empty: Layout) -> Layout:
    """One batch's layout."""
    width, (_, N) = empty.tokens.shape[1], empty.places.shape
    P, C = width - N, empty.states.shape[1]
    for r, items in enumerate(rows):
        column = state = 0
        for segment, item in enumerate(items, start=1):
            prompt, response = int(prompt_lengths[item]), int(response_lengths[item])
            length = prompt + response - 1
            first = item * width + P - prompt
            here, said = slice(column, column + length), slice(state, state + response)
            empty.tokens[r, here] = np.arange(first, first + length)
            empty.segments[r, here] = segment
            empty.states[r, said] = column + prompt - 1 + np.arange(response)
            empty.targets[r, said] = item * N + np.arange(response)
            empty.places[item, :response] = r * C + state + np.arange(response)
            column, state = column + length, state + response
    return empty


def gather(layout: Layout, padded: jax.Array) -> jax.Array:
    """The packed rows [R, W] of tokens [B, W]."""
    return padded.reshape(-1)[layout.tokens]


def states(layout: Layout, hidden: jax.Array) -> jax.Array:
    """Of hidden states [R, W, D] those that predict response tokens: [R, C, D]."""
    return jnp.take_along_axis(hidden, layout.states[:, :, None], axis=1)


def targets(layout: Layout, responses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The response tokens [R, C] of responses [B, N], and the mask of real ones."""
    real = layout.targets >= 0
    return responses.reshape(-1)[jnp.maximum(layout.targets, 0)], real


def spread(layout: Layout | None, values: jax.Array, mask: jax.Array) -> jax.Array:
    """[R, C] values as [B, N], zero under the mask; as they are without a layout."""
    if layout is None:
        return values
    return jnp.where(mask, values.reshape(-1)[layout.places], 0.0)
