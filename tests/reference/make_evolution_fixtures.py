"""Make tests/fixtures/losses/evolution.npz: what EGGROLL's own code computes.

Run in an environment with jax and optax:

    python tests/reference/make_evolution_fixtures.py HYPERSCALE_ES

HYPERSCALE_ES is a checkout of https://github.com/ESHyperscale/HyperscaleES (made with
commit b77f7d6). Its functions are called as they stand. The factors of its noise are
kept, so that nothing here depends on the random bits of a version of jax.

The file holds (N members, T tokens, D in, O out, R rank):
    kernel [D, O]  x [N, T, D]  sigma
    A [N, D, R]  B [N, O, R]        noise with the sign and 1/√R in A, without σ
    outputs [N, T, O]               of the perturbed layer
    raw [N]  group_size  plain, grouped [N]     fitness before and after shaping
    update [D, O]                   what it gives its optimizer, from `plain`
"""

import argparse
import importlib
import pathlib
import sys
import types

import jax
import numpy as np

OUT = pathlib.Path(__file__).parents[1] / "fixtures" / "losses" / "evolution.npz"
N, T, D, O, R = 8, 3, 5, 4, 3  # noqa: E741
SIGMA, GROUP = 0.1, 4


def load_noiser(root):
    """EGGROLL's noiser, without the models and environments of the package."""
    for name in ("hyperscalees", "hyperscalees.noiser"):
        package = types.ModuleType(name)
        package.__path__ = [str(root / "src" / name.replace(".", "/"))]
        sys.modules[name] = package
    return importlib.import_module("hyperscalees.noiser.eggroll")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hyperscale_es", type=pathlib.Path)
    eggroll = load_noiser(parser.parse_args().hyperscale_es)
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    kernel, x, raw = normal(D, O), normal(N, T, D), 3 * normal(N) + 1
    key, members = jax.random.key(0), np.arange(N)
    noiser = eggroll.EggRoll
    frozen, state = noiser.init_noiser(kernel, SIGMA, 1.0, rank=R)
    grouped, _ = noiser.init_noiser(kernel, SIGMA, 1.0, rank=R, group_size=GROUP)
    factors = [
        eggroll.get_lora_update_params(frozen, 1 / np.sqrt(R), (0, i), kernel, key)
        for i in members
    ]
    outputs = [noiser.do_Tmm(frozen, state, kernel, key, (0, i), x[i]) for i in members]
    plain = noiser.convert_fitnesses(frozen, state, raw)
    saved = {
        "kernel": kernel,
        "x": x,
        "sigma": np.float32(SIGMA),
        "A": np.stack([A for A, _ in factors]),
        "B": np.stack([B for _, B in factors]),
        "outputs": np.stack(outputs),
        "raw": raw,
        "group_size": GROUP,
        "plain": plain,
        "grouped": noiser.convert_fitnesses(grouped, state, raw),
        "update": noiser._do_update(
            kernel, key, plain, (np.zeros(N, int), members), 1, SIGMA, frozen
        ),
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(OUT, **saved)
    for name, x in saved.items():
        print(name, np.shape(x), np.ravel(x)[:6])
    print(f"{OUT}: {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
