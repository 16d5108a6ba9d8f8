"""Responses of different lengths learned from without their padding.

A batch of transcripts is padded, and a forward pass spends its time on padding too. A
`Layout` says how the real tokens fill fewer rows of the same width, several transcripts
to a row, each a segment of its own that attention does not leave. The log-probabilities
come back as [B, N], so that a loss is the same with and without.

Rows are rounded up to an eighth, and states to a quarter, of what they would be without
packing: of 32 shapes a run meets about ten, and each is compiled once.

Dimension key: B transcripts of W tokens, N of them responses or what may be one, at the
end; R packed rows, C states of a row that predict a response token.
"""

from collections.abc import Callable
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


class Spans(NamedTuple):
    """Where a transcript's tokens stand among its W; each [rows] int."""

    start: np.ndarray  # the column of its first token
    response: np.ndarray  # of the first that is learned, after `start`
    end: np.ndarray  # past the last


def plan(
    spans: Spans, batches: np.ndarray, *, width: int, responses: int, shards: int
) -> Layout:
    """The layouts of several batches of equal size, with one shape for all.

    Args:
      spans: of all rows.
      batches: [K, B] int, the rows of each batch.
      width: W.
      responses: N, the last columns of W, in which all responses lie.
      shards: R is a multiple of it, as the batch is cut over the mesh.

    Returns:
      A Layout of NumPy arrays with a leading axis K.

    Raises:
      ValueError: a response is empty, has no token before it, or lies elsewhere.
    """
    first = np.maximum(spans.start + 1, width - responses)
    if not (np.all(spans.response >= first) and np.all(spans.response < spans.end)):
        raise ValueError(
            f"each response must have a token, one before it, and lie in the last "
            f"{responses} of {width} columns"
        )
    # The last token predicts nothing that is asked for.
    needed, spoken = spans.end - 1 - spans.start, spans.end - spans.response
    packed = [pack(needed[batch], width) for batch in batches]
    most = max(
        int(spoken[batch][row].sum())
        for batch, rows in zip(batches, packed)
        for row in rows
    )
    B = batches.shape[1]
    count = _round_up(max(len(rows) for rows in packed), B, parts=8, multiple=shards)
    states = _round_up(most, width, parts=4)
    filled = [
        _fill(
            rows,
            Spans(*(column[batch] for column in spans)),
            empty=_empty(count, states, B, width, responses),
        )
        for batch, rows in zip(batches, packed)
    ]
    return Layout(*(np.stack(x) for x in zip(*filled)))


def plan_transcript(transcript: Any, batches: np.ndarray) -> Layout:
    """`plan` for batches [K, B] of a transcript's rows, whose lengths are fetched."""
    prompt_mask, mask = transcript.prompt_mask, transcript.mask
    P, N = prompt_mask.shape[1], mask.shape[1]
    prompts, said = sharding.to_host((prompt_mask.sum(axis=1), mask.sum(axis=1)))
    return plan(
        Spans(P - prompts, np.full_like(said, P), P + said),
        batches,
        width=P + N,
        responses=N,
        shards=sharding.batch_shards(),
    )


def _round_up(needed: int, most: int, *, parts: int, multiple: int = 1) -> int:
    """`needed`, up to a part of `most`, or to it, and to a multiple."""
    part = -(-most // parts)
    rounded = min(-(-needed // part) * part, most)
    return -(-rounded // multiple) * multiple


def _empty(rows: int, states: int, B: int, width: int, responses: int) -> Layout:
    zeros = lambda *shape: np.zeros(shape, np.int32)
    return Layout(
        tokens=zeros(rows, width),
        segments=zeros(rows, width),
        states=zeros(rows, states),
        targets=zeros(rows, states) - 1,
        places=zeros(B, responses),
    )


def _fill(rows: list[list[int]], spans: Spans, *, empty: Layout) -> Layout:
    """One batch's layout."""
    width, N = empty.tokens.shape[1], empty.places.shape[1]
    C = empty.states.shape[1]
    for r, items in enumerate(rows):
        column = state = 0
        for segment, item in enumerate(items, start=1):
            start, response, end = (int(x[item]) for x in spans)
            here = slice(column, column + end - 1 - start)
            said = slice(state, state + end - response)
            empty.tokens[r, here] = item * width + np.arange(start, end - 1)
            empty.segments[r, here] = segment
            # The state before a token predicts it.
            told = np.arange(response, end)
            empty.states[r, said] = column + told - 1 - start
            among = told - (width - N)
            empty.targets[r, said] = item * N + among
            empty.places[item, among] = r * C + np.arange(said.start, said.stop)
            column, state = here.stop, said.stop
    return empty


def gather(layout: Layout, padded: jax.Array) -> jax.Array:
    """The packed rows [R, W] of tokens [B, W]."""
    return padded.reshape(-1)[layout.tokens]


def states(layout: Layout, hidden: jax.Array) -> jax.Array:
    """Of hidden states [R, W, D] those that predict response tokens: [R, C, D]."""
    return jnp.take_along_axis(hidden, layout.states[:, :, None], axis=1)


def predict(
    layout: Layout, tokens: jax.Array, apply: Callable[..., jax.Array]
) -> jax.Array:
    """States [R, C, D] of tokens [B, W]; `apply(tokens, segments)` gives [R, W, D]."""
    return states(layout, apply(gather(layout, tokens), layout.segments))


def targets(layout: Layout, responses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The response tokens [R, C] of responses [B, N], and the mask of real ones."""
    real = layout.targets >= 0
    return responses.reshape(-1)[jnp.maximum(layout.targets, 0)], real


def spread(layout: Layout | None, values: jax.Array, mask: jax.Array) -> jax.Array:
    """[R, C] values as [B, N], zero under the mask; as they are without a layout."""
    if layout is None:
        return values
    return jnp.where(mask, values.reshape(-1)[layout.places], 0.0)
