"""Responses of different lengths learned from without their padding.

A batch of transcripts is padded, and a forward pass spends its time on padding too. A
`Layout` says how the real tokens fill fewer rows, several transcripts to a row, each a
segment of its own that attention does not leave. Responses to one prompt share it: it
stands once, they follow one after the other, and none sees another. Log-probabilities
come back as [B, N], so that a loss is the same with and without.

Rows are rounded up to an eighth, and states to a quarter, of what they would be without
packing: a run meets ten to twenty shapes, and each is compiled once.

Dimension key: B transcripts of W tokens, N of them responses or what may be one, at the
end; R packed rows of X tokens, cut over Z shards of the mesh; C states of a shard that
predict a response token.

References:
    Wang and Hegde 2024 (one prompt for both responses of DPO),
    https://arxiv.org/abs/2410.20305
    Liu et al. 2025 (one prompt for a group of GRPO), https://arxiv.org/abs/2506.05433
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import backend, sharding

# Rows may be up to twice as wide as a transcript, for several of the longest responses
# to follow their prompt. That has to save a seventh of all places, padding included, as
# attention takes longer in wider rows.
WORTH_WIDENING = 6 / 7


class Layout(NamedTuple):
    """Where the tokens of a batch stand in packed rows; all int32.

    Attributes:
      tokens: [R, X], which of the batch's B·W tokens stands there.
      segments: [R, X], number of a prompt and its responses in the row, from 1; 0 is
        padding.
      branches: [R, X], number of a response in its segment, from 1; 0 is the prompt.
        None if no segment has more than one.
      states: [Z, C], which of a shard's tokens predicts a response token.
      targets: [Z, C], which of the batch's B·N response tokens that is; -1 for none.
      places: [B, N], where each response token is among the Z·C; any if there is none.
    """

    tokens: jax.Array
    segments: jax.Array
    branches: jax.Array | None
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


def pack_evenly(
    lengths: np.ndarray, capacity: int, count: int
) -> list[list[int]] | None:
    """Items into `count` rows, the longest first, each into the row with most room.

    None if one does not fit.
    """
    rows: list[list[int]] = [[] for _ in range(count)]
    room = np.full(count, capacity)
    for item in np.argsort(-lengths, kind="stable"):
        row = int(np.argmax(room))
        if room[row] < lengths[item]:
            return None
        rows[row].append(int(item))
        room[row] -= lengths[item]
    return rows


class Spans(NamedTuple):
    """Where a transcript's tokens stand among its W; each [rows] int."""

    start: np.ndarray  # the column of its first token
    response: np.ndarray  # of the first that is learned, after `start`
    end: np.ndarray  # past the last


class Rows(NamedTuple):
    """How the rows of several batches are filled, before they are written out."""

    packed: list[list[list[np.ndarray]]]  # batch, row, segment: [responses] int
    count: int  # R
    width: int  # X


def plan(
    spans: Spans,
    batches: np.ndarray,
    *,
    width: int,
    responses: int,
    shards: int,
    prompts: np.ndarray | None = None,
) -> Layout:
    """The layouts of several batches of equal size, with one shape for all.

    Args:
      spans: of all rows.
      batches: [K, B] int, the rows of each batch.
      width: W.
      responses: N, the last columns of W, in which all responses lie.
      shards: Z, over how many devices the batch is cut.
      prompts: [rows] int, equal for rows whose prompts are, to the token: where such
        meet in a batch they share it. None: no two are.

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
    cut = [Spans(*(column[batch] for column in spans)) for batch in batches]
    # On TPUs fused attention knows segments, and nothing within one.
    if prompts is None or backend.on_tpu():
        prompts = np.arange(len(spans.start))
    alike = [_alike(prompts[batch]) for batch in batches]
    rows = _choose_rows(cut, alike, width, responses, shards)
    spoken = [
        int(sum((batch.end - batch.response)[x].sum() for x in itertools.chain(*mine)))
        for batch, filled in zip(cut, rows.packed)
        for mine in _dealt(filled, shards)
    ]
    B = batches.shape[1]
    states = _round_up(max(spoken), -(-B * responses // shards), parts=4)
    zeros = lambda *shape: np.zeros(shape, np.int32)
    segments = itertools.chain.from_iterable(itertools.chain(*rows.packed))
    shared = any(len(items) > 1 for items in segments)
    empty = Layout(
        tokens=zeros(rows.count, rows.width),
        segments=zeros(rows.count, rows.width),
        branches=zeros(rows.count, rows.width) if shared else None,
        states=zeros(shards, states),
        targets=zeros(shards, states) - 1,
        places=zeros(B, responses),
    )
    layouts = [
        _fill(filled, batch, width, jax.tree.map(np.copy, empty))
        for batch, filled in zip(cut, rows.packed)
    ]
    return jax.tree.map(lambda *x: np.stack(x), *layouts)


def plan_transcript(transcript: Any, batches: np.ndarray, *, group: int = 1) -> Layout:
    """`plan` for batches [K, B] of a transcript's rows, whose lengths are fetched.

    Args:
      transcript: of which each `group` rows have one prompt.
      batches: row numbers.
      group: G.
    """
    prompt_mask, mask = transcript.prompt_mask, transcript.mask
    P, N = prompt_mask.shape[1], mask.shape[1]
    prompts, said = sharding.to_host((prompt_mask.sum(axis=1), mask.sum(axis=1)))
    return plan(
        Spans(P - prompts, np.full_like(said, P), P + said),
        batches,
        width=P + N,
        responses=N,
        shards=sharding.batch_shards(),
        prompts=np.arange(len(said)) // group,
    )


def _alike(prompts: np.ndarray) -> list[np.ndarray]:
    """The places of each number in [B] numbers."""
    order = np.argsort(prompts, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(prompts[order])) + 1)


def _choose_rows(
    batches: Sequence[Spans],
    alike: Sequence[list],
    width: int,
    responses: int,
    shards: int,
) -> Rows:
    """What takes the fewest places: prompts apart, shared, or shared in wider rows."""
    B = len(batches[0].start)
    longest = max(int((batch.end - batch.response).max()) for batch in batches)
    longest = min(_round_up(longest, width, parts=4), responses)
    # A longer segment would leave other shards idle.
    together = min(max(map(len, itertools.chain(*alike))), max(1, B // shards))
    room_for = min(together, 1 + width // longest)
    wider = width + (room_for - 1) * longest
    apart = [np.arange(B)[:, None]] * len(batches)
    choices = [(1, width, apart)]
    if together > 1:
        choices.append((1, width, alike))
    if room_for > 1:
        # cuDNN's backward pass wants even lengths with a mask.
        choices.append((WORTH_WIDENING, wider + wider % 2, alike))
    best = None
    for worth, wide, groups in choices:
        segments = [_segments(*batch, wide, together) for batch in zip(batches, groups)]
        needed = max(len(pack(sizes, wide)) for _, sizes in segments)
        without = -(-B * width // wide)
        count = _round_up(needed, without, parts=8, multiple=shards)
        if best is None or count * wide < worth * best.count * best.width:
            best = Rows([_rows(*x, wide, count) for x in segments], count, wide)
    return best


def _segments(
    spans: Spans, alike: Sequence[np.ndarray], width: int, together: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """The responses that share a prompt in one row, `together` at most, and tokens."""
    before = spans.response - spans.start
    # The last token predicts nothing that is asked for.
    after = spans.end - 1 - spans.response
    segments = [
        items[chosen]
        for few in alike
        for items in np.split(few, range(together, len(few), together))
        for chosen in pack(after[items], width - before[items[0]])
    ]
    sizes = [before[items[0]] + after[items].sum() for items in segments]
    return segments, np.array(sizes)


def _rows(
    segments: list[np.ndarray], sizes: np.ndarray, width: int, count: int
) -> list[list[np.ndarray]]:
    """Segments laid into at most `count` rows, of about the same length if they fit."""
    packed = pack_evenly(sizes, width, count) or pack(sizes, width)
    return [[segments[i] for i in row] for row in packed]


def _round_up(needed: int, most: int, *, parts: int, multiple: int = 1) -> int:
    """`needed`, up to a part of `most`, or to it, and to a multiple."""
    part = -(-most // parts)
    rounded = -(-needed // part) * part
    if needed <= most:
        rounded = min(rounded, most)
    return -(-rounded // multiple) * multiple


def _dealt(rows: list, shards: int) -> list[list]:
    """The rows of each shard."""
    return [rows[shard::shards] for shard in range(shards)]


def _fill(
    rows: list[list[np.ndarray]], spans: Spans, width: int, layout: Layout
) -> Layout:
    """Writes one batch into an empty layout."""
    for shard, mine in enumerate(_dealt(rows, len(layout.states))):
        state = 0
        for row, segments in enumerate(mine):
            column = 0
            for number, items in enumerate(segments, start=1):
                place = _Place(shard, row, column, state)
                column, state = _fill_segment(
                    number, items, spans, width, layout, place
                )
    return layout


class _Place(NamedTuple):
    """Where in a layout a segment begins."""

    shard: int
    row: int  # of the shard
    column: int
    state: int


def _fill_segment(
    number: int,
    items: np.ndarray,
    spans: Spans,
    width: int,
    layout: Layout,
    place: _Place,
) -> tuple[int, int]:
    """Writes a prompt and its responses; the column and the state after them."""
    shard, row, column, state = place
    r = shard * (len(layout.tokens) // len(layout.states)) + row
    X, C, N = layout.tokens.shape[1], layout.states.shape[1], layout.places.shape[1]
    start, response = spans.start[items[0]], spans.response[items[0]]
    prompt = slice(column, column + response - start)
    layout.tokens[r, prompt] = items[0] * width + np.arange(start, response)
    column = prompt.stop
    for branch, item in enumerate(items, start=1):
        response, end = spans.response[item], spans.end[item]
        here = slice(column, column + end - 1 - response)
        layout.tokens[r, here] = item * width + np.arange(response, end - 1)
        if layout.branches is not None:
            layout.branches[r, here] = branch
        said = slice(state, state + end - response)
        # The state before a token predicts it.
        layout.states[shard, said] = row * X + np.r_[prompt.stop - 1, here]
        among = np.arange(response, end) - (width - N)
        layout.targets[shard, said] = item * N + among
        layout.places[item, among] = shard * C + np.r_[said]
        column, state = here.stop, said.stop
    layout.segments[r, prompt.start : column] = number
    return column, state


def gather(layout: Layout, padded: jax.Array) -> jax.Array:
    """The packed rows [R, X] of tokens [B, W]."""
    return padded.reshape(-1)[layout.tokens]


def states(layout: Layout, hidden: jax.Array) -> jax.Array:
    """Of hidden states [R, X, D] those that predict response tokens: [Z, C, D]."""
    of_shards = hidden.reshape(len(layout.states), -1, hidden.shape[-1])
    return jnp.take_along_axis(of_shards, layout.states[:, :, None], axis=1)


def predict(
    layout: Layout, tokens: jax.Array, apply: Callable[..., jax.Array]
) -> jax.Array:
    """States [Z, C, D] of tokens [B, W]; `apply` is a model's, bound to weights."""
    hidden = apply(gather(layout, tokens), layout.segments, branches=layout.branches)
    return states(layout, hidden)


def targets(layout: Layout, responses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The response tokens [Z, C] of responses [B, N], and the mask of real ones."""
    real = layout.targets >= 0
    return responses.reshape(-1)[jnp.maximum(layout.targets, 0)], real


def chunk_size(layout: Layout | None, size: int | None, rows: int) -> int | None:
    """States of a shard in a chunk, to be as many as `size` of each of B `rows`."""
    if layout is None or size is None:
        return size
    return max(1, size * rows // len(layout.states))


def spread(layout: Layout | None, values: jax.Array, mask: jax.Array) -> jax.Array:
    """[Z, C] values as [B, N], zero under the mask; as they are without a layout."""
    if layout is None:
        return values
    return jnp.where(mask, values.reshape(-1)[layout.places], 0.0)
