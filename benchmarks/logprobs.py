"""Memory and speed of `losses.token_logprobs` against logits in one piece.

    python benchmarks/logprobs.py memory
    taskset -c 0 python benchmarks/logprobs.py speed

Both take the gradient of the sum of all log-probabilities and entropies. "memory" reads
the temporaries out of the compiled program, at sizes that need not fit this machine;
"speed" runs all by turns and gives the ratio of each round, plain over chunked: above 1
the chunks are faster.
"""

import functools
import importlib.metadata
import platform
import statistics
import sys
import time

import jax
import jax.numpy as jnp

from rlhf_jax import losses


def plain(hidden, unembedding, targets, *, temperature):
    """The usual way: all logits at once, and JAX's own derivative."""
    logits = jnp.einsum(
        "btd,vd->btv", hidden, unembedding, preferred_element_type=jnp.float32
    )
    logprobs = jax.nn.log_softmax(logits / temperature)
    entropy = -(jnp.exp(logprobs) * logprobs).sum(-1)
    return jnp.take_along_axis(logprobs, targets[..., None], -1)[..., 0], entropy


def gradient_of(function):
    """Jitted gradient in the hidden states and the unembedding."""

    def total(hidden, unembedding, targets):
        logprobs, entropy = function(hidden, unembedding, targets, temperature=0.7)
        return logprobs.sum() + entropy.sum()

    return jax.jit(jax.grad(total, argnums=(0, 1)))


def functions(chunk_sizes):
    """What is compared, by name: the usual way, and chunks of each size."""
    chunked = {
        f"chunks of {size}": functools.partial(losses.token_logprobs, chunk_size=size)
        for size in chunk_sizes
    }
    return {"plain": plain, **chunked}


def shapes(B, T, V, D, dtype):
    """Hidden states, unembedding and targets, as shapes alone."""
    return (
        jax.ShapeDtypeStruct((B, T, D), dtype),
        jax.ShapeDtypeStruct((V, D), dtype),
        jax.ShapeDtypeStruct((B, T), jnp.int32),
    )


def memory(B=8, T=1024, V=128_000, chunk_sizes=(16, 64)):
    """Print the bytes that the compiled gradients need beside arguments and results."""
    print(f"B={B} T={T} V={V}: temporaries of the gradient, and their share of plain's")
    for D, dtype in ((256, jnp.float32), (2048, jnp.float32), (2048, jnp.bfloat16)):
        arguments, needed = shapes(B, T, V, D, dtype), {}
        for name, function in functions(chunk_sizes).items():
            compiled = gradient_of(function).lower(*arguments).compile()
            needed[name] = compiled.memory_analysis().temp_size_in_bytes
            print(
                f"D={D:<4} {jnp.dtype(dtype).name:8}  {name:13}"
                f"{needed[name] / 2**30:7.2f} GiB  {needed[name] / needed['plain']:.3f}"
            )


def speed(B=8, T=128, V=50_000, D=512, chunk_sizes=(16, 32, 64), rounds=7):
    """Print the ratios of times, and how far apart the gradients are."""
    keys = jax.random.split(jax.random.key(0), 3)
    arguments = (
        jax.random.normal(keys[0], (B, T, D)),
        0.05 * jax.random.normal(keys[1], (V, D)),
        jax.random.randint(keys[2], (B, T), 0, V),
    )
    compiled = {name: gradient_of(f) for name, f in functions(chunk_sizes).items()}
    results = {name: function(*arguments) for name, function in compiled.items()}
    jax.block_until_ready((arguments, results))  # none of it falls into round one
    times = {name: [] for name in compiled}
    for _ in range(rounds):
        for name, function in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            times[name].append(time.perf_counter() - start)

    print(f"B={B} T={T} V={V} D={D}: seconds, plain / chunked of each round, and")
    print("the largest difference of a gradient over its largest entry")
    for name in compiled:
        ratios = [p / c for p, c in zip(times["plain"], times[name], strict=True)]
        errors = [
            float(jnp.abs(x - y).max() / jnp.abs(x).max())
            for x, y in zip(results["plain"], results[name], strict=True)
        ]
        print(
            f"{name:13}{statistics.median(times[name]):6.2f} s   median "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            f"   hidden {errors[0]:.1e}, unembedding {errors[1]:.1e}"
        )


def main(arguments):
    """Run the part that is named."""
    parts = {"memory": memory, "speed": speed}
    if len(arguments) != 1 or arguments[0] not in parts:
        sys.exit("usage: python benchmarks/logprobs.py memory|speed")
    version = importlib.metadata.version("jax")
    print(f"jax {version}, Python {platform.python_version()}, {jax.devices()[0]}")
    parts[arguments[0]]()


if __name__ == "__main__":
    main(sys.argv[1:])
