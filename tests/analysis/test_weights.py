"""How far parts of a model moved: by hand, and by a loop over a whole model."""

import jax
import numpy as np
import pytest

from rlhf_jax.analysis.weights import relative_change

from .small_model import draw_params, small_model


def tree():
    """Two layers, each a part with the norm √(9 + 16) = 5 and another of zeros."""
    return {
        "embed": {"tokens": np.array([[2.0, 0.0], [0.0, 0.0]], np.float32)},
        "layers": {
            "attention": {"query": {"kernel": np.array([[[3.0]], [[3.0]]])}},
            "attention_norm": {"scale": np.array([[4.0], [4.0]])},
            "mlp": {"up": {"kernel": np.zeros((2, 1, 3), np.float32)}},
        },
        "final_norm": {"scale": np.array([1.0, 1.0])},
    }


def test_one_layer_by_hand():
    moved = tree()
    moved["layers"]["attention"]["query"]["kernel"] = np.array([[[3.0]], [[4.0]]])
    moved["layers"]["attention_norm"]["scale"] = np.array([[4.0], [2.0]])
    found = relative_change(moved, tree())
    # √(1 + 4) over 5; all: √5 over √(4 + 2·25 + 2)
    assert found == {
        "embed": 0.0,
        "layers/0/attention": 0.0,
        "layers/1/attention": pytest.approx(np.sqrt(5) / 5),
        "layers/0/mlp": 0.0,
        "layers/1/mlp": 0.0,
        "final_norm": 0.0,
        "all": pytest.approx(np.sqrt(5 / 56)),
    }


def test_a_part_that_was_zero():
    """There is no ratio: 0 as long as it is zero, and 1 then."""
    moved = tree()
    moved["layers"]["mlp"]["up"]["kernel"] = np.array([[[0.0] * 3], [[9.0] * 3]])
    found = relative_change(moved, tree())
    assert (found["layers/0/mlp"], found["layers/1/mlp"]) == (0.0, 1.0)


def test_nothing_moves_of_the_reference_itself():
    assert set(relative_change(tree(), tree()).values()) == {0.0}


@pytest.mark.parametrize("post_norms", [False, True])
def test_a_whole_model_is_that_of_a_loop(post_norms):
    model = small_model(post_norms=post_norms)
    reference, params = (draw_params(model, seed) for seed in (0, 1))
    sums = {}
    for path, old in jax.tree_util.tree_leaves_with_path(reference):
        names, new = [key.key for key in path], params
        for name in names:
            new = new[name]
        old, new = np.asarray(old, np.float64), np.asarray(new, np.float64)
        if names[0] == "layers":
            part = "attention" if "attention" in names[1] else "mlp"
            pieces = [(f"layers/{i}/{part}", old[i], new[i]) for i in range(len(old))]
        else:
            pieces = [(names[0], old, new)]
        for part, a, b in pieces:
            for name in (part, "all"):
                moved, size = sums.get(name, (0.0, 0.0))
                sums[name] = moved + np.sum((b - a) ** 2), size + np.sum(a**2)
    found = relative_change(params, reference)
    assert found.keys() == sums.keys()
    for name, (moved, size) in sums.items():
        assert found[name] == pytest.approx(np.sqrt(moved / size), rel=1e-5), name
