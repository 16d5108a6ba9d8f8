"""Checks of parameters: trees whose leaves are named in the error."""

from collections.abc import Callable
from typing import Any

import jax


def named_leaves(name: str, tree: Any, is_leaf: Callable | None = None) -> dict:
    """The leaves of a tree by their name in it, such as "params['bias']"."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=is_leaf)
    return {name + jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def check_same_structure(name: str, tree: Any, params: Any) -> None:
    """Raise ValueError unless `tree` has the structure of `params`.

    Raises:
      ValueError: names the leaves that only one of them has, or gives the structures
        where these alone differ, as of a list and a tuple, or where one is a leaf.
    """
    given, expected, leaf = (jax.tree.structure(x) for x in (tree, params, 0))
    if given == expected:
        return
    if leaf in (given, expected):
        given = "a single leaf" if given == leaf else given
        raise ValueError(
            f"{name} is {given}, expected the structure of params, {expected}."
        )
    ours, theirs = (set(named_leaves("", x)) for x in (params, tree))
    differences = [
        f"{what} {', '.join(sorted(paths))}"
        for what, paths in (("lacks", ours - theirs), ("has", theirs - ours))
        if paths
    ]
    raise ValueError(
        f"{name} {' and '.join(differences) or f'is {given}'}, expected the structure "
        f"of params{'' if differences else f', {expected}'}."
    )
