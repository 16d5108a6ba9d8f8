"""What a GPU or TPU reaches: decoding, a training step, and a whole PPO phase.

    python benchmarks/accelerator.py decode train phase

The model has the shape of Llama 3.2 1B, with fresh weights, in bfloat16 with float32
masters. "decode" counts the bytes of weights and cache that a step reads against the
device's bandwidth, "train" the FLOPs of a step against its peak (MFU), and "phase" the
share of a PPO phase that is spent inside compiled programs.
"""

import functools
import platform
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import losses
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.transformer import make_model
from rlhf_jax.rollout import Sampling, generate, sample_keys

# Bytes/s of memory and bfloat16 FLOP/s, as the vendors state them.
PEAKS = {"H200": (4.8e12, 989e12), "H100": (3.35e12, 989e12), "A100": (2e12, 312e12)}
SHAPE = TransformerConfig(
    vocab_size=128_256,
    d_model=2048,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    d_ff=8192,
    max_positions=131_072,
    rope_theta=500_000.0,
    norm_eps=1e-5,
    tied_embeddings=True,
)


def timed(run, rounds=5):
    """Seconds of the first call, and the median of some after it."""
    seconds = []
    for _ in range(1 + rounds):
        started = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - started)
    return seconds[0], statistics.median(seconds[1:])


def share_of_peak(rate, which):
    """A rate as a share of the device's bandwidth (0) or FLOP/s (1), if known."""
    kind = jax.devices()[0].device_kind
    peak = next((peaks[which] for name, peaks in PEAKS.items() if name in kind), None)
    return "" if peak is None else f", {rate / peak:.1%} of {peak:.3g}"


def decode(rows=64, prompt=128, new=288):
    """A decode step: a rollout of `new` tokens less one of a single token."""
    model = make_model(SHAPE, dtype="bfloat16")
    params = jax.jit(model.init)(jax.random.key(0))
    prompts = jnp.full((rows, prompt), 5)
    mask = jnp.ones_like(prompts, bool)
    keys = sample_keys(jax.random.key(1), jnp.arange(rows))
    weights = 2 * sum(leaf.size for leaf in jax.tree.leaves(params))
    plain = Sampling(new, 1.0, 0, 1.0, -1, 0)

    def seconds_of(settings):
        draw = jax.jit(lambda *args: generate(model, *args, settings))
        return timed(lambda: draw(params, prompts, mask, keys))

    for name, settings in {
        "greedy": plain._replace(temperature=0.0),
        "full softmax": plain,
        "top-p 0.9": plain._replace(top_p=0.9),
        "int8 cache": plain._replace(cache_dtype="int8"),
    }.items():
        compile_seconds, whole = seconds_of(settings)
        _, start = seconds_of(settings._replace(max_new_tokens=1))
        step = (whole - start) / (new - 1)
        of_token = 2 * SHAPE.num_kv_heads * SHAPE.num_layers * SHAPE.head_dim
        bytes_each = 1 + 4 / SHAPE.head_dim if settings.cache_dtype else 2
        cache = rows * (prompt + new) * of_token * bytes_each
        rate = (weights + cache) / step
        print(
            f"decode, {name}: {1e3 * step:.2f} ms a step, {rows / step:,.0f} tokens/s, "
            f"{rate / 1e12:.2f} TB/s{share_of_peak(rate, 0)}; prefill {start:.3f} s, "
            f"first call {compile_seconds:.1f} s",
            flush=True,
        )


def train(rows=8, tokens=2048):
    """A training step: cross-entropy, gradients, AdamW, layers recomputed."""
    model = make_model(SHAPE, dtype="bfloat16")
    params = jax.jit(model.init)(jax.random.key(0))
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    texts = jax.random.randint(jax.random.key(1), (rows, tokens), 0, SHAPE.vocab_size)
    optimizer = optax.adamw(1e-4)
    for keeps in ("", "matmuls"):
        model = make_model(SHAPE, dtype="bfloat16", remat=True, remat_keeps=keeps)

        def loss(params, texts, model=model):
            hidden = model.apply(params, texts, None)
            logprobs, _ = losses.token_logprobs(
                hidden[:, :-1],
                model.unembedding(params),
                texts[:, 1:],
                temperature=1.0,
                chunk_size=256,
            )
            return -logprobs.mean()

        @functools.partial(jax.jit, donate_argnums=0)
        def step(state, loss=loss):
            params, opt_state = state
            value, grads = jax.value_and_grad(loss)(params, texts)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), value

        held = [(jax.tree.map(jnp.copy, params), jax.jit(optimizer.init)(params))]

        def run(step=step, held=held):
            held[0], value = step(held[0])
            return value

        compile_seconds, seconds = timed(run)
        # 6 a parameter and token, and the two products of attention, causal.
        attention = 6 * SHAPE.num_layers * SHAPE.d_model * tokens
        flops = rows * tokens * (6 * size + attention)
        rate = flops / seconds
        print(
            f"train step, {rows} x {tokens}, remat_keeps={keeps!r}: {seconds:.3f} s, "
            f"{rows * tokens / seconds:,.0f} tokens/s, {rate / 1e12:.0f} TFLOP/s"
            f"{share_of_peak(rate, 1)} (recomputation not counted); first call "
            f"{compile_seconds:.1f} s",
            flush=True,
        )
        del held


def main(arguments):
    """Run the parts that are named."""
    parts = {"decode": decode, "train": train}
    if not arguments or set(arguments) - set(parts):
        sys.exit(f"usage: python benchmarks/accelerator.py {' '.join(parts)}")
    device = jax.devices()[0].device_kind
    print(f"jax {jax.__version__}, Python {platform.python_version()}, {device}")
    for part in arguments:
        parts[part]()
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
        print(f"peak memory so far {peak / 2**30:.1f} GiB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
