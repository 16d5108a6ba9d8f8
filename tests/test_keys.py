"""The randomness of a run comes from keys that no two uses share."""

import jax

from rlhf_jax import keys


def test_branches_and_phases_have_keys_of_their_own():
    seen = {
        tuple(jax.random.key_data(keys.branch_key(seed, branch, phase)).tolist())
        for seed in (0, 1)
        for branch in (keys.INIT, keys.SAMPLING, keys.ORDER, keys.HELDOUT)
        for phase in (0, 1, 2)
    }
    assert len(seen) == 24
