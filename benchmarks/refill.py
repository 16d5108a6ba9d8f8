"""Responses of very different lengths: slots that are refilled against whole batches.

    taskset -c 0 python benchmarks/refill.py

64 requests whose lengths are exponential (mean 44, at most 128 tokens) because every
token is EOS with probability 1/44. "batches" decodes 16 at a time, each batch until its
longest response has ended; "slots" gives a slot that is done the next request; "at
once" decodes all 64 together. The tokens are compared first, then all run by turns.
"""

import functools
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.transformer import make_model
from rlhf_jax.rollout import Sampling, generate, sample_keys

EOS, MEAN, LONGEST, REQUESTS, SLOTS, PROMPT, ROUNDS = 2, 44, 128, 64, 16, 32, 7
SHAPE = TransformerConfig(
    vocab_size=8192,
    d_model=384,
    num_layers=6,
    num_heads=6,
    num_kv_heads=6,
    head_dim=64,
    d_ff=1024,
    max_positions=512,
    tied_embeddings=True,
)


def with_exponential_lengths(model):
    """The model, but every token of its responses is EOS with probability 1 / MEAN."""

    def unembed(params, hidden):
        logits = model.unembed(params, hidden).at[..., EOS].set(-jnp.inf)
        odds = jax.nn.logsumexp(logits, axis=-1) - jnp.log(MEAN - 1.0)
        return logits.at[..., EOS].set(odds)

    return model._replace(unembed=unembed)


def in_batches(draw, params, prompts, mask, keys):
    """All requests, SLOTS of them at a time."""
    parts = [
        draw(params, *(x[start : start + SLOTS] for x in (prompts, mask, keys)))
        for start in range(0, REQUESTS, SLOTS)
    ]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def main():
    """Compare the tokens, then print what each way takes."""
    model = with_exponential_lengths(make_model(SHAPE))
    params = model.init(jax.random.key(0))
    prompts = jax.random.randint(jax.random.key(1), (REQUESTS, PROMPT), 3, 8192)
    mask = jnp.ones_like(prompts, bool)
    keys = sample_keys(jax.random.key(2), jnp.arange(REQUESTS))
    settings = Sampling(LONGEST, 1.0, 0, 1.0, EOS, 0)

    def draw_with(slots):
        how = settings._replace(slots=slots)
        return jax.jit(lambda *args: generate(model, *args, how))

    ways = {
        "batches": functools.partial(in_batches, draw_with(0)),
        "slots": draw_with(SLOTS),
        "at once": draw_with(0),
    }
    arguments = params, prompts, mask, keys
    found = {name: jax.device_get(way(*arguments)) for name, way in ways.items()}
    lengths = found["batches"].mask.sum(axis=1)
    for name, responses in found.items():
        np.testing.assert_array_equal(responses.tokens, found["batches"].tokens)
        gap = np.abs(responses.logprobs - found["batches"].logprobs).max()
        print(f"{name}: the same tokens, log-probabilities within {gap:.0e}")
    times = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            started = time.perf_counter()
            jax.block_until_ready(way(*arguments))
            times[name].append(time.perf_counter() - started)

    print(f"jax {jax.__version__}, Python {platform.python_version()}")
    print(f"{REQUESTS} requests, lengths {lengths.mean():.0f} on average, ", end="")
    print(f"median {np.median(lengths):.0f}, longest {lengths.max()}")
    for name, seconds in times.items():
        ratios = [b / s for b, s in zip(times["batches"], seconds, strict=True)]
        print(
            f"{name:8} {statistics.median(seconds):6.2f} s "
            f"{lengths.sum() / statistics.median(seconds):6.0f} tokens/s   "
            f"{statistics.median(ratios):.2f} times batches "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
