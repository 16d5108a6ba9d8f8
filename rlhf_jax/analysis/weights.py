"""How far training moved each part of a model."""

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import sharding


def relative_change(params: Any, reference: Any) -> dict[str, float]:
    """‖θ − θ_ref‖ / ‖θ_ref‖ of each part, by Frobenius norms.

    Args:
      params: a model's weights, those of its layers stacked on a leading axis.
      reference: the same tree.

    Returns:
      "embed", "layers/0/attention", "layers/0/mlp", ..., "final_norm" -> the ratio, and
      "all" of the whole model. A norm belongs to the part it stands before. A part
      that was and is zero has not changed: 0.
    """
    moved, size = sharding.to_host(_squares(params, reference))
    totals: dict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros(2))
    for path, squares in jax.tree_util.tree_leaves_with_path(moved):
        norms = size
        for key in path:
            norms = norms[key.key]
        names = [key.key for key in path]
        for part, pair in _parts(names, np.atleast_1d(squares), np.atleast_1d(norms)):
            totals[part] += pair
            totals["all"] += pair
    return {part: _ratio(*pair) for part, pair in totals.items()}


@jax.jit
def _squares(params: Any, reference: Any) -> tuple[Any, Any]:
    """Σ (θ − θ_ref)² and Σ θ_ref² of each leaf, [L] of stacked ones, float32."""

    def total(path, x):
        axes = tuple(range(1, x.ndim)) if path[0].key == "layers" else None
        return jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axes)

    moved = jax.tree.map(jnp.subtract, params, reference)
    of_each = jax.tree_util.tree_map_with_path
    return of_each(total, moved), of_each(total, reference)


def _parts(names, squares, norms):
    """(part, its two sums) of a leaf; a stacked one has one for each layer."""
    if names[0] != "layers":
        yield names[0], np.array([squares.sum(), norms.sum()])
        return
    part = "attention" if "attention" in names[1] else "mlp"
    for layer, pair in enumerate(zip(squares, norms, strict=True)):
        yield f"layers/{layer}/{part}", np.array(pair)


def _ratio(moved: float, size: float) -> float:
    return float(np.sqrt(moved / size)) if size else float(moved > 0)
