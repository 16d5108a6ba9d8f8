"""Where a run's randomness comes from: one root, a branch a use, a fold a phase."""

import jax

# Folded into the run's root key before anything else, so no two uses share a stream.
INIT, SAMPLING, ORDER, HELDOUT, DROPOUT = range(5)


def branch_key(seed: int, branch: int, phase: int) -> jax.Array:
    """The key of one use in one phase; a pure function of its arguments."""
    root = jax.random.fold_in(jax.random.key(seed), branch)
    return jax.random.fold_in(root, phase)
