"""From logits to a token: temperature, top-k, top-p, and one uniform number a row.

Nothing here sorts the vocabulary: truncation finds its threshold by bisection, and
the draw inverts the cumulative distribution in two levels. Both are many times
cheaper than a full sort or a Gumbel draw over the vocabulary on a CPU.

Dimension key: B rows, V vocabulary, K = `BLOCK` tokens of one block.
"""

import jax
import jax.numpy as jnp

BLOCK = 128
BISECTIONS = 32


def sample_keys(root: jax.Array, index: jax.Array) -> jax.Array:
    """One key a sample, from the run's key and the sample's index alone.

    Args:
      root: a typed key.
      index: [B] int32, the global indices of the samples.

    Returns:
      [B] typed keys.
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(root, index)


def uniforms(keys: jax.Array, step: jax.Array) -> jax.Array:
    """The uniform number in [0, 1) that each row uses at decoding step `step`, [B]."""
    draw = lambda key: jax.random.uniform(jax.random.fold_in(key, step))
    return jax.vmap(draw)(keys)


def truncation_threshold(
    logits: jax.Array, weights: jax.Array, target: jax.Array
) -> jax.Array:
    """The largest threshold whose tokens still weigh `target`.

    τ = max{ τ : Σ_v w_v · 1[logit_v ≥ τ] ≥ target }. Ties at the threshold are all
    kept. The bisection is over the bits of a float32, of which there are 32: it is
    exact, however far apart the logits lie.

    Args:
      logits: [B, V] float32, finite or -inf.
      weights: [B, V] float32, non-negative: 1 for top-k, the probability for top-p.
      target: [B] float32, at most the sum of the weights.

    Returns:
      [B] float32.
    """

    def halve(_, bounds):
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)
        enough = mass(middle) >= target
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    def mass(threshold):
        above = logits >= _from_ordered(threshold)[:, None]
        return jnp.sum(jnp.where(above, weights, 0.0), axis=-1)

    bounds = (
        _to_ordered(jnp.min(logits, axis=-1)),
        _to_ordered(jnp.max(logits, axis=-1)),
    )
    low, high = jax.lax.fori_loop(0, BISECTIONS, halve, bounds)
    # The upper bound itself is never probed: one token may weigh enough alone.
    return _from_ordered(jnp.where(mass(high) >= target, high, low))


def _to_ordered(x: jax.Array) -> jax.Array:
    """float32 to int32 in the same order: neighbours differ by one."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _from_ordered(n: jax.Array) -> jax.Array:
    """The inverse of `_to_ordered`."""
    bits = jnp.where(n < 0, n ^ jnp.int32(0x7FFFFFFF), n)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def truncate(logits: jax.Array, *, top_k: int, top_p: float) -> jax.Array:
    """Sets the logits outside the top k, then outside the nucleus p, to -inf.

    Args:
      logits: [B, V] float32, after the temperature.
      top_k: how many tokens to keep; 0 keeps all.
      top_p: smallest set of likeliest tokens with this probability; 1.0 keeps all.

    Returns:
      [B, V] float32.

    References:
      Holtzman et al. 2019, section 3.1, https://arxiv.org/abs/1904.09751
    """
    keep = jnp.ones_like(logits, bool)
    if 0 < top_k < logits.shape[-1]:
        count = jnp.full(logits.shape[:1], float(top_k))
        threshold = truncation_threshold(logits, jnp.ones_like(logits), count)
        keep = logits >= threshold[:, None]
    if top_p < 1.0:
        probs = jnp.where(keep, jax.nn.softmax(logits, axis=-1), 0.0)
        mass = top_p * jnp.sum(probs, axis=-1)
        threshold = truncation_threshold(logits, probs, mass)
        keep &= logits >= threshold[:, None]
    return jnp.where(keep, logits, -jnp.inf)


def invert_cdf(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """The first token whose cumulative weight exceeds `uniform` of the total.

    Sums blocks of K tokens, finds the block, then the token inside it: one pass over
    the vocabulary instead of a cumulative sum over all of it.

    Args:
      weights: [B, V] float32, non-negative, some positive in each row.
      uniform: [B] float32 in [0, 1).

    Returns:
      [B] int32; never a token of weight zero.
    """
    B, V = weights.shape
    blocks = -(-V // BLOCK)
    padded = jnp.pad(weights, ((0, 0), (0, blocks * BLOCK - V)))
    padded = padded.reshape(B, blocks, BLOCK)
    sums = jnp.sum(padded, axis=-1)
    cumulative = jnp.cumsum(sums, axis=-1)
    target = uniform * cumulative[:, -1]
    block = _first_over(cumulative, sums, target)

    inside = jnp.take_along_axis(padded, block[:, None, None], axis=1)[:, 0]
    before = jnp.take_along_axis(cumulative, jnp.maximum(block - 1, 0)[:, None], axis=1)
    before = jnp.where(block[:, None] > 0, before, 0.0)
    offset = _first_over(before + jnp.cumsum(inside, axis=-1), inside, target)
    return (block * BLOCK + offset).astype(jnp.int32)


def _first_over(
    cumulative: jax.Array, weights: jax.Array, target: jax.Array
) -> jax.Array:
    """The first positive weight whose cumulative sum is over the target, [B].

    Cumulative sums are rounded, on some devices not even monotonically: an entry of
    weight zero may seem to be the first, or none at all, which means the last.
    """
    positive = weights > 0
    over = (cumulative > target[:, None]) & positive
    last = weights.shape[-1] - 1 - jnp.argmax(positive[:, ::-1], axis=-1)
    return jnp.where(jnp.any(over, axis=-1), jnp.argmax(over, axis=-1), last)


def sample(
    logits: jax.Array,
    uniform: jax.Array,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[jax.Array, jax.Array]:
    """Draws one token a row.

    Args:
      logits: [B, V] float32.
      uniform: [B] float32 in [0, 1), the row's randomness; unused when greedy.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: how many tokens to keep; 0 keeps all.
      top_p: nucleus probability; 1.0 keeps all.

    Returns:
      tokens [B] int32, and their log-probabilities [B] float32 under the distribution
      that was sampled from (under the plain softmax when greedy).
    """
    logits = logits.astype(jnp.float32)
    if temperature == 0:
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logprobs = jax.nn.log_softmax(logits, axis=-1)
    else:
        kept = truncate(logits / temperature, top_k=top_k, top_p=top_p)
        logprobs = jax.nn.log_softmax(kept, axis=-1)
        tokens = invert_cdf(jnp.exp(logprobs), uniform)
    return tokens, jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
