"""Prompts to responses: prefill, then one compiled decode loop with a KV cache.

A sample is a function of (weights, prompt, key, index) alone: each row draws from a
key folded with its own index, so that batch size, padding, mesh, slots and the order of
rows change nothing but floating-point round-off.

The rows that are decoded together are slots. There are as many as requests, or fewer:
then a slot whose response has ended takes the next request (continuous batching), so
that a few long responses do not keep the whole batch waiting. All slots write to the
same column of the cache, which goes round the N columns after the prompts': a response
has at most N tokens, so none of its own is overwritten, and no scatter is needed.

Dimension key: B requests, G of them to each prompt, R slots, P prompt tokens
(left-padded), N new tokens, V vocabulary, D model width. On a mesh each shard of the
batch has a queue of its own, and requests are counted within it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rlhf_jax import sharding
from rlhf_jax.models.cache import Cache, extend, lay_out
from rlhf_jax.models.transformer import Model
from rlhf_jax.rollout import sampling
from rlhf_jax.sharding import BATCH, constrain


class Sampling(NamedTuple):
    """How responses are drawn; static in a compiled program.

    Attributes:
      max_new_tokens: N.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k, top_p, min_p: which tokens may be drawn, see `sampling.weigh`.
      eos_id: the token that ends a response.
      pad_id: what stands after it.
      repetition_penalty: θ of `sampling.penalize`; 1 is none.
      slots: R, how many responses are decoded together; 0: all.
      cache_dtype: of the KV cache, one of `models.cache.CACHE_DTYPES`.
    """

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    eos_id: int
    pad_id: int
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    slots: int = 0
    cache_dtype: str = ""


class Responses(NamedTuple):
    """What `generate` returns.

    Attributes:
      tokens: [B, N] int32, `pad_id` after the end of a response.
      mask: [B, N] bool, true on response tokens, the EOS token included.
      logprobs: [B, N] float32, of the distribution sampled from; 0 after the end.
      finished: [B] bool, true where the response ended with EOS.
    """

    tokens: jax.Array
    mask: jax.Array
    logprobs: jax.Array
    finished: jax.Array


class _Prompts(NamedTuple):
    """What a slot needs to begin: [B/G, ...] of each prompt, [B] of each request."""

    cache: Cache
    seen: jax.Array | None  # [B/G, V] bool
    first: jax.Array  # [B] int32, the first token of each response
    keys: jax.Array  # [B, ...] uint32, the data of each request's key


class _Slots(NamedTuple):
    """What the R slots are busy with."""

    request: jax.Array  # [R] int32; the number of requests where a slot is idle
    length: jax.Array  # [R] int32, tokens of the response so far
    token: jax.Array  # [R] int32, the last of them
    keys: jax.Array  # [R, ...] uint32
    seen: jax.Array | None  # [R, V] bool, tokens of prompt and response
    cache: Cache


class _Written(NamedTuple):
    """The responses so far."""

    tokens: jax.Array  # [B, N] int32
    logprobs: jax.Array  # [B, N] float32
    lengths: jax.Array  # [B] int32
    finished: jax.Array  # [B] bool


class _Loop(NamedTuple):
    """The decode loop's carry."""

    step: jax.Array  # [] int32, decode steps so far
    waiting: jax.Array  # [shards] int32, the first request that has not begun
    slots: _Slots
    written: _Written


def repeat_rows(tree: Any, times: int) -> Any:
    """Each row of every array [B/G, ...] G times in a row: [B, ...]."""

    def repeat(x: jax.Array) -> jax.Array:
        if times == 1:
            return x
        wide = jnp.broadcast_to(x[:, None], (len(x), times, *x.shape[1:]))
        return constrain(wide.reshape(-1, *x.shape[1:]), BATCH, *[None] * (x.ndim - 1))

    return jax.tree.map(repeat, tree)


def generate(
    model: Model,
    params: Any,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    keys: jax.Array,
    settings: Sampling,
) -> Responses:
    """Samples as many responses to each prompt as there are keys for.

    A prompt is read once, however many responses it gets. Stops when every response has
    met EOS or has `max_new_tokens` tokens.

    Args:
      model: the policy's functions.
      params: the policy's weights.
      prompts: [B/G, P] int32, left-padded.
      prompt_mask: [B/G, P] bool, true on real tokens; at least the last of each row.
      keys: [B] typed keys, see `sampling.sample_keys`; those of one prompt are
        neighbours.
      settings: how to sample.

    Returns:
      The B responses; pure, so jit it with `model` and `settings` static.
    """
    P, B, N = prompts.shape[1], len(keys), settings.max_new_tokens
    G, shards = B // len(prompts), sharding.batch_shards()
    R = min(settings.slots or B, B)
    layers = model.unstack(params)
    hidden, cache = model.prefill(
        params, prompts, prompt_mask, cache_length=P, cache_dtype=settings.cache_dtype
    )
    seen = None
    if settings.repetition_penalty != 1:
        seen = sampling.tokens_in(prompts, prompt_mask, model.config.vocab_size)
    key_data, impl = jax.random.key_data(keys), jax.random.key_impl(keys)
    engine = _Engine(model, layers, settings, impl, P, B // shards)
    logits, first_seen = repeat_rows((model.unembed(layers, hidden[:, -1]), seen), G)
    no_tokens = jnp.zeros(B, jnp.int32)
    first, logprobs = _draw(engine, logits, key_data, no_tokens, first_seen)
    asked = _Prompts(cache, seen, first, key_data)
    loop = _Loop(
        step=jnp.int32(0),
        waiting=jnp.zeros(shards, jnp.int32),
        slots=_no_slots(asked, R, engine.total, P + N),
        written=_first_column(first, logprobs, settings),
    )
    loop = _run(engine, asked, loop, refills=R < B)
    tokens, logprobs, lengths, finished = loop.written
    mask = jnp.arange(N)[None, :] < lengths[:, None]
    return Responses(tokens, mask, logprobs, finished)


class _Engine(NamedTuple):
    """What does not change while responses are drawn."""

    model: Model
    layers: Any  # the weights, as `Model.unstack` gives them
    settings: Sampling
    key_impl: Any
    prompt_tokens: int  # P
    total: int  # requests of a shard


def _run(engine: _Engine, asked: _Prompts, loop: _Loop, *, refills: bool) -> _Loop:
    """Decodes until every request has its response."""
    total = engine.total

    def busy(loop):
        return jnp.any(loop.slots.request < total)

    def waits(loop):
        """Whether a shard has both an idle slot and a request that has not begun."""
        idle = (loop.slots.request >= total).reshape(len(loop.waiting), -1)
        return jnp.any(jnp.any(idle, axis=1) & (loop.waiting < total))

    decode = functools.partial(_decode, engine)
    refill = functools.partial(_give_requests, engine, asked)
    loop = refill(loop)
    if not refills:
        return jax.lax.while_loop(busy, decode, loop)
    until_one_is_idle = lambda loop: jax.lax.while_loop(
        lambda loop: busy(loop) & ~waits(loop), decode, loop
    )
    return jax.lax.while_loop(
        lambda loop: busy(loop) | waits(loop),
        lambda loop: until_one_is_idle(refill(loop)),
        loop,
    )


def _draw(engine: _Engine, logits, key_data, length, seen):
    """The next token of each row, of which `length` are drawn, and its logprob."""
    settings = engine.settings
    keys = jax.random.wrap_key_data(key_data, impl=engine.key_impl)
    logits = constrain(logits, BATCH, None)
    return sampling.sample(
        sampling.penalize(logits, seen, settings.repetition_penalty),
        sampling.uniforms(keys, length),
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
    )


def _decode(engine: _Engine, loop: _Loop) -> _Loop:
    """One more token for every slot that is not idle."""
    slots, settings = loop.slots, engine.settings
    column = engine.prompt_tokens + loop.step % settings.max_new_tokens
    hidden, cache = engine.model.decode(engine.layers, slots.token, slots.cache, column)
    logits = engine.model.unembed(engine.layers, hidden)
    token, logprobs = _draw(engine, logits, slots.keys, slots.length, slots.seen)
    written = _by_shard(
        functools.partial(_write, settings=settings),
        *(loop.written, slots.request, slots.length, token, logprobs),
    )
    idle = _ends(token, slots.length + 1, settings)
    slots = slots._replace(
        request=jnp.where(idle, engine.total, slots.request),
        length=slots.length + 1,
        token=token,
        seen=sampling.add_token(slots.seen, token),
        cache=cache,
    )
    return loop._replace(step=loop.step + 1, slots=slots, written=written)


def _give_requests(engine: _Engine, asked: _Prompts, loop: _Loop) -> _Loop:
    """The next requests for the slots that are idle."""
    waiting, slots = _by_shard(
        functools.partial(_refill, total=engine.total, settings=engine.settings),
        *(loop.waiting, loop.slots, asked),
    )
    slots = slots._replace(cache=lay_out(slots.cache))
    return loop._replace(waiting=waiting, slots=slots)


def _ends(token: jax.Array, length: jax.Array, settings: Sampling) -> jax.Array:
    """Whether a response ends with this token, which makes it so long."""
    return (token == settings.eos_id) | (length >= settings.max_new_tokens)


def _first_column(first: jax.Array, logprobs: jax.Array, settings: Sampling):
    """What is written once every response has its first token."""
    B, N = len(first), settings.max_new_tokens
    tokens = jnp.full((B, N), settings.pad_id, jnp.int32)
    return _Written(
        tokens=tokens.at[:, 0].set(first),
        logprobs=jnp.zeros((B, N), jnp.float32).at[:, 0].set(logprobs),
        lengths=jnp.ones(B, jnp.int32),
        finished=first == settings.eos_id,
    )


def _no_slots(asked: _Prompts, slots: int, total: int, length: int) -> _Slots:
    """Slots that are all idle, with a cache of so many columns."""
    empty = lambda x: jnp.zeros((slots, *x.shape[1:]), x.dtype)
    return _Slots(
        request=jnp.full(slots, total, jnp.int32),
        length=jnp.zeros(slots, jnp.int32),
        token=empty(asked.first),
        keys=empty(asked.keys),
        seen=jax.tree.map(empty, asked.seen),
        cache=lay_out(jax.tree.map(empty, extend(asked.cache, length))),
    )


def _by_shard(function: Any, *trees: Any) -> Any:
    """`function` of each batch shard's rows alone: nothing crosses devices."""
    shards = sharding.batch_shards()
    if shards == 1:
        return function(*trees)

    def cut(x):
        x = x.reshape(shards, len(x) // shards, *x.shape[1:])
        free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
        return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH, *free))

    found = jax.vmap(function)(*jax.tree.map(cut, trees))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)


def _write(written, request, length, token, logprobs, *, settings) -> _Written:
    """Adds the slots' new tokens; those of idle slots go nowhere."""
    at = lambda old, new: old.at[request, length].set(new, mode="drop")
    of_row = lambda old, new: old.at[request].set(new, mode="drop")
    return _Written(
        tokens=at(written.tokens, token),
        logprobs=at(written.logprobs, logprobs),
        lengths=of_row(written.lengths, length + 1),
        finished=of_row(written.finished, token == settings.eos_id),
    )


def _refill(waiting, slots: _Slots, asked: _Prompts, *, total, settings):
    """The first request still waiting, and the slots with the requests before it."""
    idle = slots.request >= total
    request = waiting[0] + jnp.cumsum(idle) - 1
    takes = idle & (request < total)
    waiting = waiting + takes.sum()
    prompt = request // (total // len(asked.cache.lengths))

    def begin(new, old, rows):
        """Row `rows[i]` in place of row i, in the columns that `new` has."""
        new = new.at[rows].get(mode="clip")
        pick = takes.reshape(-1, *[1] * (new.ndim - 1))
        if new.shape == old.shape:
            return jnp.where(pick, new, old)
        part = jax.lax.slice(old, (0,) * old.ndim, new.shape)
        return jax.lax.dynamic_update_slice(
            old, jnp.where(pick, new, part), (0,) * old.ndim
        )

    cache = extend(asked.cache._replace(layers=()), slots.cache.valid.shape[1])
    cache = cache._replace(layers=asked.cache.layers)
    token = begin(asked.first, slots.token, request)
    one = jnp.where(takes, 1, slots.length)
    ended = takes & _ends(token, one, settings)
    seen = jax.tree.map(lambda *x: begin(*x, prompt), asked.seen, slots.seen)
    slots = _Slots(
        request=jnp.where(takes & ~ended, request, slots.request),
        length=one,
        token=token,
        keys=begin(asked.keys, slots.keys, request),
        seen=sampling.add_token(seen, token),
        cache=jax.tree.map(lambda *x: begin(*x, prompt), cache, slots.cache),
    )
    return waiting, slots
