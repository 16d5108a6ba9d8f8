import pytest

from rlhf_jax.trees import join, split

TREE = {"a": {"x": 1, "y": {"z": 2}}, "b": {"x": 3}}


def test_split_and_join_undo_each_other():
    taken, left = split(TREE, lambda path: path[-1].key == "x")
    assert taken == {"a": {"x": 1}, "b": {"x": 3}}
    assert left == {"a": {"y": {"z": 2}}}
    assert join(taken, left) == join(left, taken) == TREE
    assert split(TREE, lambda path: False) == ({}, TREE)


def test_join_changes_neither_tree():
    one, other = {"a": {"x": 1}}, {"a": {"y": 2}}
    assert join(one, other) == {"a": {"x": 1, "y": 2}}
    assert one == {"a": {"x": 1}} and other == {"a": {"y": 2}}


def test_leaves_at_one_place_are_an_error():
    with pytest.raises(ValueError, match="both trees have a leaf at 'x'"):
        join(TREE, {"b": {"x": 4}})
