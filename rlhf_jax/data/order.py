"""Which rows a phase takes: a pure function of (seed, phase), so nothing is saved."""

import numpy as np


def phase_rows(count: int, phase: int, *, batch_size: int, seed: int) -> np.ndarray:
    """Row numbers [batch_size] of a phase, counted from 0.

    All rows come once before any comes again, and each epoch has its own order.
    """
    import grain

    order = grain.MapDataset.range(count).seed(seed % 2**32).shuffle().repeat()
    first = phase * batch_size
    return np.array([order[first + i] for i in range(batch_size)])
