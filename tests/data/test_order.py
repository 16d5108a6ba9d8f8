"""Which rows a phase takes."""

import numpy as np
import pytest

from rlhf_jax.data.order import phase_rows


def rows(phases, *, count=10, batch_size=4, seed=0):
    picked = [
        phase_rows(count, phase, batch_size=batch_size, seed=seed) for phase in phases
    ]
    return np.concatenate(picked).tolist()


def test_every_row_comes_once_an_epoch_in_a_new_order():
    taken = rows(range(5))  # 5 phases of 4 are 2 epochs of 10: a batch spans both
    assert sorted(taken[:10]) == sorted(taken[10:]) == list(range(10))
    assert taken[:10] != taken[10:] and taken[:10] != list(range(10))


def test_a_phase_depends_on_seed_and_phase_alone():
    assert rows([3]) == rows(range(5))[12:16]  # nothing to replay after a restart
    assert rows([3], batch_size=5) == rows(range(10), batch_size=2)[15:20]
    assert rows([3]) != rows([3], seed=1)


def test_more_rows_than_there_are():
    taken = rows([0], count=3, batch_size=7)
    assert sorted(taken[:3]) == sorted(taken[3:6]) == [0, 1, 2]


@pytest.mark.parametrize("seed", [-1, 2**32, 2**40 + 7])
def test_any_integer_is_a_seed(seed):
    assert sorted(rows([0], batch_size=10, seed=seed)) == list(range(10))


def test_the_result_indexes_arrays():
    picked = phase_rows(6, 0, batch_size=6, seed=0)
    assert picked.shape == (6,) and np.issubdtype(picked.dtype, np.integer)
    assert np.arange(6)[picked].sum() == 15
