"""Log-probabilities and entropies of tokens, without the logits in memory.

B sequences, T tokens, C tokens of one chunk, D model, V vocabulary, S batch shards.

Of all arrays in the training of a language model the logits `[B, T, V]` are the
largest, and a loss needs two numbers of each row. `token_logprobs` goes from hidden
states straight to the numbers, a chunk of tokens at a time, and makes the logits of a
chunk again in the backward pass.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from rlhf_jax.losses._checks import (
    check_float,
    check_integer,
    check_rank,
    check_shape,
    check_whole,
    float32,
    given_mask,
)
from rlhf_jax.losses._chunks import (
    cap_and_scale,
    count_chunks,
    join,
    keep_real,
    make_options,
    split,
    unembed,
)


def token_logprobs(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    mask: jax.Array | None = None,
    *,
    temperature: float,
    chunk_size: int | None,
    logit_softcap: float | None = None,
    label_smoothing: float = 0.0,
    batch_shards: int = 1,
    gather: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target token, and the entropy it was drawn with.

    zᵥ = cap(h·Wᵥ) / τ,   cap(x) = s·tanh(x/s)
    log p(y) = z_y − log Σᵥ exp zᵥ,   H = −Σᵥ pᵥ log pᵥ

    `hidden[:, t]` must predict `targets[:, t]`: the shift by one is the caller's.

    The product is taken in the dtype of `hidden` with float32 accumulation, and the
    softmax in float32. Gradients flow to `hidden` and `unembedding` from both results,
    the entropy too; that of the unembedding is summed over chunks in float32.

    Args:
      hidden: float [B, T, D], after the final norm.
      unembedding: float [V, D], the embedding's orientation.
      targets: int [B, T]; any integer where masked. A real target outside [0, V) gives
        a log-probability of nan.
      mask: bool [B, T], True = a real token; None when all are real. Masked slots may
        hold anything, and pass no gradient on.
      temperature: τ, a Python number above 0. Use the sampler's.
      chunk_size: tokens of each sequence in one chunk; logits of B·chunk_size rows
        exist at a time, in the forward and in the backward pass, which computes them
        again. Each chunk adds to the whole gradient of the unembedding, so with few
        rows that takes the time: let them be 200 or more on a CPU, some thousands on
        an accelerator. None: all at once, kept for the backward pass.
      logit_softcap: s, a Python number (Gemma 2); None for no cap.
      label_smoothing: ε. Above 0 the first result is Σᵥ qᵥ log pᵥ, with
        q = (1−ε)·onehot(y) + ε/V, for cross-entropy with smoothed labels.
      batch_shards: over how many devices B is sharded, when in chunks on a mesh. Each
        then sums its own gradient of the unembedding over all chunks, and they add up
        once in the end; with 1 they add up at every chunk. Divides B.

      gather: called with the unembedding in the dtype of `hidden`, before the chunks;
        on a mesh it lays it out as every chunk needs it. Hashable; None: no change.

    Returns:
      (logprobs, entropy), both float32 [B, T] in nats; zero in masked slots.

    Raises:
      ValueError: a shape does not fit, hidden or unembedding is not float, targets are
        not integers, or a hyper-parameter is out of range.

    References:
      Label smoothing: Szegedy et al. 2016, section 7, https://arxiv.org/abs/1512.00567
      Soft-capping: Gemma 2, section 2, https://arxiv.org/abs/2408.00118
      Logits by chunk: Wijmans et al. 2024, https://arxiv.org/abs/2411.09009
    """
    check_rank("B T D", hidden=hidden)
    check_rank("V D", unembedding=unembedding)
    check_float("hidden", hidden)
    check_float("unembedding", unembedding)
    B, T, D = hidden.shape
    V = unembedding.shape[0]
    check_shape("unembedding", unembedding, (V, D), "[V, D] with the D of hidden")
    _check_targets(targets, (B, T), "the [B, T] of hidden")
    mask = given_mask(mask, (B, T), "the [B, T] of hidden")
    divides = f" that divides the {B} rows of hidden"
    check_whole("batch_shards", batch_shards, 1, divides, multiple=B)
    num_chunks = count_chunks(chunk_size, T)
    options = make_options(temperature, logit_softcap, label_smoothing)
    options = options._replace(
        num_chunks=num_chunks, batch_shards=batch_shards, gather=gather
    )

    hidden = keep_real(hidden, mask)
    targets = jnp.asarray(targets).astype(jnp.int32)
    logprobs, entropy = _token_logprobs(options, hidden, unembedding, targets)
    return _finish(logprobs, entropy, targets, mask, V)


def logprobs_from_logits(
    logits: jax.Array,
    targets: jax.Array,
    mask: jax.Array | None = None,
    *,
    temperature: float,
    logit_softcap: float | None = None,
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target token and the entropy, from logits.

    zᵥ = cap(lᵥ) / τ,   cap(x) = s·tanh(x/s)
    log p(y) = z_y − log Σᵥ exp zᵥ,   H = −Σᵥ pᵥ log pᵥ

    A logit of −inf (a token that cannot be drawn) adds nothing to the entropy.

    Args:
      logits: float [B, T, V].
      targets: int [B, T]; any integer where masked. A real target outside [0, V) gives
        a log-probability of nan.
      mask: bool [B, T], True = a real token; None when all are real. Masked slots may
        hold anything, and pass no gradient on.
      temperature: τ, a Python number above 0. Use the sampler's.
      logit_softcap: s, for logits that are not capped yet; None for no cap.
      label_smoothing: ε, as in `token_logprobs`.

    Returns:
      (logprobs, entropy), both float32 [B, T] in nats; zero in masked slots.

    Raises:
      ValueError: a shape does not fit, targets are not integers, or a
        hyper-parameter is out of range.

    References:
      As `token_logprobs`.
    """
    check_rank("B T V", logits=logits)
    _check_targets(targets, np.shape(logits)[:2], "the [B, T] of logits")
    mask = given_mask(mask, np.shape(logits)[:2], "the [B, T] of logits")
    options = make_options(temperature, logit_softcap, label_smoothing)
    logits = keep_real(float32(logits), mask)
    targets = jnp.asarray(targets).astype(jnp.int32)
    z = cap_and_scale(logits, options)
    logprobs, entropy, _ = _statistics(z, targets, options)
    return _finish(logprobs, entropy, targets, mask, logits.shape[-1])


def _check_targets(targets, expected, source):
    check_shape("targets", targets, expected, source)
    check_integer("targets", targets)


def _finish(logprobs, entropy, targets, mask, V):
    # A label of -100 that no mask covers must not pass for a log-probability.
    logprobs = jnp.where((targets >= 0) & (targets < V), logprobs, jnp.nan)
    return keep_real(logprobs, mask), keep_real(entropy, mask)


def _target_weights(targets, V, options):
    """One-hot rows by comparison, which is local on a sharded V."""
    vocabulary = jnp.arange(V, dtype=jnp.int32)[None, None, :]
    epsilon = options.label_smoothing
    onehot = targets[..., None] == vocabulary
    return jnp.where(onehot, 1.0 - epsilon, 0.0) + epsilon / V


def _statistics(logits, targets, options):
    """Log-probabilities, entropies and log-normalisers of float32 [B, T, V]."""
    largest = jax.lax.stop_gradient(logits.max(-1))
    shifted = logits - largest[..., None]
    weights = jnp.exp(shifted)
    total = weights.sum(-1)
    # Local on a sharded V too: each device looks in its part.
    target = jnp.take_along_axis(shifted, targets[..., None], -1, mode="clip")[..., 0]
    if options.label_smoothing:
        epsilon = options.label_smoothing
        # 0·(−inf) is nan, so that ε = 1 leaves the target out.
        own = (1.0 - epsilon) * target if epsilon < 1 else 0.0
        target = own + epsilon * shifted.mean(-1)
    # 0·(−inf) is nan: what cannot be drawn adds nothing.
    average = (weights * jnp.where(weights > 0, shifted, 0.0)).sum(-1) / total
    log_total = jnp.log(total)
    return target - log_total, log_total - average, largest + log_total


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_logprobs(options, hidden, unembedding, targets):
    return _forward(options, hidden, unembedding, targets)[0]


def _cast(options, hidden, unembedding):
    cast = unembedding.astype(hidden.dtype)
    return cast if options.gather is None else options.gather(cast)


def _forward(options, hidden, unembedding, targets):
    """The results, and what the backward pass needs."""
    keep_logits = options.num_chunks is None
    cast = _cast(options, hidden, unembedding)

    def chunk(_, inputs):
        h, y = inputs
        logits = unembed(h, cast)
        statistics = _statistics(cap_and_scale(logits, options), y, options)
        return None, (*statistics, logits if keep_logits else None)

    inputs = split(hidden, options), split(targets, options)
    _, (logprobs, entropy, normalizer, logits) = jax.lax.scan(chunk, None, inputs)
    T = targets.shape[1]
    results = join(logprobs, T), join(entropy, T)
    return results, (hidden, unembedding, targets, entropy, normalizer, logits)


def _backward(options, residuals, cotangents):
    """Both gradients from one pass over the logits.

    ∂log p(y)/∂zᵥ = qᵥ − pᵥ,   ∂H/∂zᵥ = −pᵥ (log pᵥ + H)

    A result that the loss does not use has no cotangent and costs nothing.
    """
    hidden, unembedding, targets, entropy, normalizer, kept_logits = residuals
    cotangents = [None if isinstance(g, SymbolicZero) else g for g in cotangents]
    if cotangents[1] is None:
        entropy = None
    cast = _cast(options, hidden, unembedding)

    S = options.batch_shards

    def by_shard(x):
        # Over one axis: a sum over two would be a copy first, which a CPU feels, but
        # for bfloat16 the products of the copy are that much faster there.
        if x.dtype == jnp.bfloat16:
            return x.reshape(S, -1, x.shape[1], x.shape[-1])
        return x.reshape(S, 1, -1, x.shape[-1])

    def chunk(unembedding_grad, inputs):
        h, y, H, normalizer, logits, g_logprob, g_entropy = inputs
        if logits is None:
            logits = unembed(h, cast)
        z = cap_and_scale(logits, options)
        logp = z - normalizer[..., None]
        p = jnp.exp(logp)
        q = _target_weights(y, z.shape[-1], options)
        g = 0.0
        if g_logprob is not None:
            g = g_logprob[..., None] * (q - p)
        if g_entropy is not None:
            g -= g_entropy[..., None] * p * (logp + H[..., None])
        if options.logit_softcap is not None:
            tanh = z * (options.temperature / options.logit_softcap)
            g = g * (1.0 - jnp.square(tanh))
        # The products run in the dtype of the forward ones: float32 x bfloat16 would
        # be widened to float32, at a fraction of an accelerator's speed.
        g = (g / options.temperature).astype(h.dtype)
        h_grad = jnp.einsum("btv,vd->btd", g, cast, preferred_element_type=jnp.float32)
        unembedding_grad += jnp.einsum(
            "sbtv,sbtd->svd",
            by_shard(g),
            by_shard(h),
            preferred_element_type=jnp.float32,
        )
        return unembedding_grad, h_grad.astype(h.dtype)

    chunks = lambda x: None if x is None else split(x, options)
    inputs = (
        *(chunks(x) for x in (hidden, targets)),
        entropy,
        normalizer,
        kept_logits,
        *(chunks(x) for x in cotangents),
    )
    unembedding_grad, hidden_grad = jax.lax.scan(
        chunk, jnp.zeros((S, *unembedding.shape), jnp.float32), inputs
    )
    unembedding_grad = unembedding_grad.sum(0)
    T = targets.shape[1]
    return join(hidden_grad, T), unembedding_grad.astype(unembedding.dtype), None


def _forward_of_primals(options, *primals):
    return _forward(options, *(primal.value for primal in primals))


_token_logprobs.defvjp(_forward_of_primals, _backward, symbolic_zeros=True)
