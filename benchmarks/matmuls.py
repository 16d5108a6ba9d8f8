"""How fast XLA's and torch's matrix products are on one core, and its memory.

    taskset -c 0 python benchmarks/matmuls.py --torch=/path/to/venv/bin/python

The products are those of a training step of 8 x 128 tokens in `peers.py`: forward, the
gradient of the input, and that of the weights. They bound what the rows of that table
can be: a step is made of them for the greater part.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

TOKENS = 1024
SHAPES = ((384, 384), (384, 1024), (1024, 384), (384, 8192))  # in, out
KINDS = ("forward", "input", "weights")


def processor_seconds(run: Callable[[], None], times: int = 15) -> float:
    """The median seconds of the processor of a call, after the first."""
    run()
    found = []
    for _ in range(times):
        started = time.process_time()
        run()
        found.append(time.process_time() - started)
    return statistics.median(found)


def products_of_torch(dtype: str, arrays: list[np.ndarray]) -> list[Callable]:
    """The three products as functions without arguments."""
    import torch

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    x, w, g = (torch.tensor(a).to(getattr(torch, dtype)) for a in arrays)
    weights = w.T.contiguous()  # as torch keeps them, [out, in]
    return [lambda: x @ weights.T, lambda: g @ weights, lambda: g.T @ x]


def products_of_xla(dtype: str, arrays: list[np.ndarray]) -> list[Callable]:
    """The three products as the library's `dot` makes them."""
    import jax
    import jax.numpy as jnp

    from rlhf_jax.models.layers import dot

    x, w, g = (jnp.asarray(a, dtype) for a in arrays)
    x, g = (a.reshape(8, 128, -1) for a in (x, g))
    w = w.astype(jnp.float32)
    forward = jax.jit(lambda x, w: dot(x, w.astype(x.dtype)))
    gradient = lambda of: jax.jit(
        lambda x, w, g: jax.vjp(dot, x, w.astype(x.dtype))[1](g.astype(jnp.float32))[of]
    )
    to_input, to_weights = gradient(0), gradient(1)
    return [
        lambda: forward(x, w).block_until_ready(),
        lambda: to_input(x, w, g).block_until_ready(),
        lambda: to_weights(x, w, g).block_until_ready(),
    ]


def measure(side: str) -> None:
    """Prints the rates of one side: "xla" or "torch"."""
    build = products_of_xla if side == "xla" else products_of_torch
    for dtype in ("float32", "bfloat16"):
        for inner, outer in SHAPES:
            rng = np.random.default_rng(0)
            sizes = (TOKENS, inner), (inner, outer), (TOKENS, outer)
            arrays = [rng.normal(size=size).astype(np.float32) for size in sizes]
            runs = build(dtype, arrays)
            work = 2e-9 * TOKENS * inner * outer
            rates = (f"{work / processor_seconds(run):.0f}" for run in runs)
            shape = f"{TOKENS} x {inner} x {outer}"
            print(f"| {dtype} {shape} | {side} | {' | '.join(rates)} |", flush=True)


def bandwidth() -> float:
    """GB/s at which one core reads an array that no cache holds."""
    large = np.ones(100_000_000, np.float32)
    return large.nbytes / processor_seconds(lambda: large.sum(), 5) / 1e9


def main() -> None:
    """Run both sides, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torch", default="", help="Python with torch")
    parser.add_argument("--side", choices=("xla", "torch"), help="this one, here")
    given = parser.parse_args()
    if given.side:
        return measure(given.side)
    print(f"memory: {bandwidth():.1f} GB/s\n")
    print(f"| product, GFLOP/s | by | {' | '.join(KINDS)} |\n|---|---|---|---|---|")
    quiet = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }
    for side, python in (("xla", sys.executable), ("torch", given.torch)):
        if python:
            command = [python, __file__, f"--side={side}"]
            sys.stdout.flush()
            subprocess.run(command, check=True, env=quiet)
    return None


if __name__ == "__main__":
    main()
