"""Parts of a parameter tree: cut in two by a rule, and put together again."""

from collections.abc import Callable
from typing import Any

import jax


def split(tree: Any, chosen: Callable[[tuple], bool]) -> tuple[Any, Any]:
    """(the leaves whose path is chosen, the others), each a tree of nested dicts.

    Args:
      tree: nested dicts.
      chosen: a leaf's path, as `jax.tree_util` gives it -> whether it is taken.
    """
    taken: dict = {}
    left: dict = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        place = taken if chosen(path) else left
        for key in path[:-1]:
            place = place.setdefault(key.key, {})
        place[path[-1].key] = leaf
    return taken, left


def join(one: Any, other: Any | None) -> Any:
    """Two trees of nested dicts that share no leaf, as one; None is an empty one.

    Raises:
      ValueError: both have a leaf at the same place.
    """
    joined = dict(one)
    for key, value in (other or {}).items():
        if key not in joined:
            joined[key] = value
        elif isinstance(value, dict) and isinstance(joined[key], dict):
            joined[key] = join(joined[key], value)
        else:
            raise ValueError(f"both trees have a leaf at {key!r}")
    return joined


def weight_name(path: tuple) -> str:
    """The name of a weight as patterns see it: "layers/mlp/up/kernel"."""
    keys = (key for key in path if isinstance(key, jax.tree_util.DictKey))
    return "/".join(key.key for key in keys)
