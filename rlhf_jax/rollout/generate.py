"""Prompts to responses: prefill, then one compiled decode loop with a KV cache.

A sample is a function of (weights, prompt, key, index) alone: each row draws from a
key folded with its own index, so that batch size, padding, mesh and the order of
rows change nothing but floating-point round-off.

Dimension key: B rows, G of them to each prompt, P prompt tokens (left-padded), N new
tokens, V vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.models.transformer import Model
from rlhf_jax.rollout import sampling
from rlhf_jax.sharding import BATCH, constrain


class Sampling(NamedTuple):
    """How responses are drawn; static in a compiled program."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    eos_id: int
    pad_id: int


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


class _Loop(NamedTuple):
    """The decode loop's carry: what is written so far and what comes next."""

    step: jax.Array
    logits: jax.Array
    cache: Any
    responses: Responses


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

    A prompt is read once, however many responses it gets. Stops when every row has met
    EOS or has `max_new_tokens` tokens.

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
    hidden, cache = model.prefill(params, prompts, prompt_mask, cache_length=P + N)
    last, cache = repeat_rows((hidden[:, -1], cache), B // len(prompts))
    layers = model.unstack(params)

    def draw(loop: _Loop) -> Responses:
        """Writes token `loop.step` of every row that has not ended."""
        logits = constrain(loop.logits, BATCH, None)
        tokens, logprobs = sampling.sample(
            logits,
            sampling.uniforms(keys, loop.step),
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
        )
        done = loop.responses.finished
        tokens = jnp.where(done, settings.pad_id, tokens)
        column = lambda old, new: jax.lax.dynamic_update_slice_in_dim(
            old, new[:, None], loop.step, axis=1
        )
        return Responses(
            tokens=column(loop.responses.tokens, tokens),
            mask=column(loop.responses.mask, ~done),
            logprobs=column(loop.responses.logprobs, jnp.where(done, 0.0, logprobs)),
            finished=done | (tokens == settings.eos_id),
        )

    def advance(loop: _Loop) -> _Loop:
        responses = draw(loop)
        token = jax.lax.dynamic_index_in_dim(
            responses.tokens, loop.step, axis=1, keepdims=False
        )
        hidden, cache = model.decode(layers, token, loop.cache, P + loop.step)
        logits = model.unembed(params, hidden)
        return _Loop(loop.step + 1, logits, cache, responses)

    def unfinished(loop: _Loop) -> jax.Array:
        return (loop.step < N - 1) & ~jnp.all(loop.responses.finished)

    empty = Responses(
        tokens=jnp.full((B, N), settings.pad_id, jnp.int32),
        mask=jnp.zeros((B, N), bool),
        logprobs=jnp.zeros((B, N), jnp.float32),
        finished=jnp.zeros((B,), bool),
    )
    logits = model.unembed(params, last)
    loop = _Loop(jnp.int32(0), logits, cache, empty)
    loop = jax.lax.while_loop(unfinished, advance, loop)
    # The last token needs no decoding after it; a row that ended draws padding.
    return draw(loop)
