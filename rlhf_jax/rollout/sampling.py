"""From logits to a token: temperature, truncation, and a few random numbers a row.

Nothing here sorts the vocabulary: truncation finds its threshold by bisection, and a
draw picks a block of tokens, then a token of it. Both are many times cheaper than a
full sort or a random number for each token of the vocabulary on a CPU.

Dimension key: B rows, V vocabulary, K = `BLOCK` tokens of one block.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import backend

BLOCK = 256
TINY = 2.0**-126


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
    """The numbers in [0, 1) that draw token `step` [B] of each row: [B, 1 + K]."""

    def draw(key, step):
        return jax.random.uniform(jax.random.fold_in(key, step), 1 + BLOCK)

    return jax.vmap(draw)(keys, step)


def truncation_threshold(
    values: jax.Array,
    weights: jax.Array,
    target: jax.Array,
    low: float = -math.inf,
    high: float = math.inf,
) -> jax.Array:
    """The largest threshold whose tokens still weigh `target`.

    τ = max{ τ : Σ_v w_v · 1[x_v ≥ τ] ≥ target }. Ties at the threshold are all kept.
    The bisection is over the bits of a float32, so it is exact, however far apart the
    values lie.

    Args:
      values: [B, V] float32, what is compared with the threshold; finite or -inf.
      weights: [B, V] float32, non-negative.
      target: [B] float32, at most the sum of the weights.
      low: what τ cannot lie under.
      high: what all values lie under.

    Returns:
      [B] float32.
    """

    def mass(threshold):
        above = values >= _from_ordered(threshold)[:, None]
        return jnp.sum(jnp.where(above, weights, 0.0), axis=-1)

    def narrow(_, bounds):
        low, high = bounds
        probes = _between(low, high, levels)
        enough = [mass(probe) >= target for probe in probes]
        for probe, over in zip(probes, enough):
            low = jnp.where(over, probe, low)
        for probe, over in zip(probes[::-1], enough[::-1]):
            high = jnp.where(over, high, probe)
        return low, high

    # A pass over the vocabulary costs an accelerator more than what is done in it.
    levels = 1 if backend.on_cpu() else 3
    ends = np.float32([low, high]).view(np.int32)
    ends = np.where(ends < 0, ends ^ np.int32(0x7FFFFFFF), ends)
    passes = -(-int(int(ends[1]) - int(ends[0])).bit_length() // levels)
    bounds = tuple(jnp.full(target.shape, end) for end in ends)
    found, _ = jax.lax.fori_loop(0, passes, narrow, bounds)
    return _from_ordered(found)


def _between(low: jax.Array, high: jax.Array, levels: int) -> list[jax.Array]:
    """The points that so many levels of halving would probe, in order."""
    if levels == 0:
        return []
    middle = (low & high) + ((low ^ high) >> 1)
    below, above = _between(low, middle, levels - 1), _between(middle, high, levels - 1)
    return [*below, middle, *above]


def _from_ordered(n: jax.Array) -> jax.Array:
    """float32 from an int32 in the same order: neighbours differ by one."""
    bits = jnp.where(n < 0, n ^ jnp.int32(0x7FFFFFFF), n)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def weigh(logits: jax.Array, *, top_k: int, top_p: float, min_p: float) -> jax.Array:
    """How likely each token is to be drawn, relative to the likeliest.

    Of the top k the nucleus p, and of that what min-p leaves; zero for all others.

    Args:
      logits: [B, V] float32, after the temperature.
      top_k: how many tokens to keep; 0 keeps all.
      top_p: smallest set of likeliest tokens with this probability; 1.0 keeps all.
      min_p: keeps those at least this fraction as likely as the likeliest; 0.0 all.

    Returns:
      [B, V] float32, the largest of each row 1; zero too where exp underflows.

    References:
      Nucleus: Holtzman et al. 2019, section 3.1, https://arxiv.org/abs/1904.09751
      min-p: Nguyen et al. 2024, section 3, https://arxiv.org/abs/2407.01082
    """
    V = logits.shape[-1]
    shifted = logits - logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(shifted)
    if 0 < top_k < V:
        count = jnp.full(logits.shape[:1], float(top_k))
        threshold = truncation_threshold(logits, jnp.ones_like(logits), count)
        weights = jnp.where(logits >= threshold[:, None], weights, 0.0)
    if top_p < 1.0:
        # All tokens below an even share of the rest weigh less than the rest.
        low = 0.5 * (1.0 - top_p) / V
        target = top_p * weights.sum(axis=-1)
        above = float(np.nextafter(np.float32(1), np.float32(2)))
        threshold = truncation_threshold(weights, weights, target, low, above)
        weights = jnp.where(weights >= threshold[:, None], weights, 0.0)
    if min_p > 0.0:
        weights = jnp.where(shifted >= math.log(min_p), weights, 0.0)
    return weights


def tokens_in(tokens: jax.Array, mask: jax.Array, vocab_size: int) -> jax.Array:
    """Which of the vocabulary's tokens each row has: [B, T] -> [B, V] bool."""
    of_row = lambda t, m: jnp.zeros(vocab_size, bool).at[t].max(m, mode="drop")
    return jax.vmap(of_row)(tokens, mask)


def add_token(seen: jax.Array | None, token: jax.Array) -> jax.Array | None:
    """`tokens_in` with one more token [B] in each row; None stays None."""
    if seen is None:
        return None
    return jax.vmap(lambda row, t: row.at[t].set(True))(seen, token)


def penalize(logits: jax.Array, seen: jax.Array | None, penalty: float) -> jax.Array:
    """Logits of tokens seen before, less likely: l/θ where positive, else l·θ.

    Args:
      logits: [B, V] float32, before the temperature.
      seen: [B, V] bool, tokens of the prompt and the response so far; None if θ = 1.
      penalty: θ, above 1 against repetition.

    References:
      Keskar et al. 2019, section 4.1, https://arxiv.org/abs/1909.05858
    """
    if seen is None:
        return logits
    penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(seen, penalized, logits)


def draw_token(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Draws from a distribution given by weights: a block of tokens, then a token.

    The block is where the cumulative weight exceeds the first number's share of the
    total. In it argmax_v w_v / e_v has the distribution of the weights, the e_v being
    exponential. By the cumulative weight alone, a rounding error would change a token
    of probability p about 1/p times as often, which is felt where many are likely.

    Args:
      weights: [B, V] float32, non-negative, some positive in each row.
      uniform: [B, 1 + K] float32 in [0, 1).

    Returns:
      [B] int32; never a token of weight zero.

    References:
      Efraimidis & Spirakis 2006, weighted random sampling, algorithm A, for one item.
    """
    B, V = weights.shape
    blocks = -(-V // BLOCK)
    padded = jnp.pad(weights, ((0, 0), (0, blocks * BLOCK - V)))
    padded = padded.reshape(B, blocks, BLOCK)
    sums = jnp.sum(padded, axis=-1)
    cumulative = jnp.cumsum(sums, axis=-1)
    block = _first_over(cumulative, sums, uniform[:, 0] * cumulative[:, -1])

    inside = jnp.take_along_axis(padded, block[:, None, None], axis=1)[:, 0]
    exponential = jnp.maximum(-jnp.log1p(-uniform[:, 1:]), TINY)
    race = jnp.where(inside > 0, inside / exponential, -1.0)
    return (block * BLOCK + jnp.argmax(race, axis=-1)).astype(jnp.int32)


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
    min_p: float,
) -> tuple[jax.Array, jax.Array]:
    """Draws one token a row.

    Args:
      logits: [B, V] float32.
      uniform: [B, 1 + K] float32 in [0, 1), see `uniforms`; unused when greedy.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: how many tokens to keep; 0 keeps all.
      top_p: nucleus probability; 1.0 keeps all.
      min_p: least probability, as a fraction of the likeliest's; 0.0 keeps all.

    Returns:
      tokens [B] int32, and their log-probabilities [B] float32 under the distribution
      that was sampled from (under the plain softmax when greedy).
    """
    logits = logits.astype(jnp.float32)
    if temperature == 0:
        weights = weigh(logits, top_k=0, top_p=1.0, min_p=0.0)
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        logits = logits / temperature
        weights = weigh(logits, top_k=top_k, top_p=top_p, min_p=min_p)
        tokens = draw_token(weights, uniform)
    drawn = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, drawn - logits.max(axis=-1) - jnp.log(weights.sum(axis=-1))
