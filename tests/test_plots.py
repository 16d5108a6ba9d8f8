"""The training curves as a picture."""

import math

import numpy as np
import pytest

from rlhf_jax import plots
from rlhf_jax.plots import Panel

PANELS = [
    Panel("Reward", "score", {"training": "reward"}, {"held-out": "heldout"}),
    Panel("KL", "nats a response", {"KL": "kl"}, limits=(0, 10)),
    Panel("Never measured", "", {"x": "never"}),
]


def make_rows(count):
    return [
        {"phase": i, "reward": math.sin(i), "kl": math.nan if i == 2 else 0.1 * i}
        | ({"heldout": 0.5} if i % 10 == 0 else {})
        for i in range(1, count + 1)
    ]


@pytest.mark.parametrize("count", [0, 1, 12, 120])
def test_picture_is_written(tmp_path, count):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")
    plots.plot_curves(make_rows(count), path, PANELS, title="a run")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]


def test_more_rows_of_panels_make_a_higher_picture(tmp_path):
    heights = []
    for panels in (PANELS, PANELS * 3):
        plots.plot_curves(make_rows(5), tmp_path / "curves.png", panels)
        header = (tmp_path / "curves.png").read_bytes()[16:24]
        heights.append(int.from_bytes(header[4:], "big"))
    assert heights[1] > 1.5 * heights[0]


def test_smooth_by_hand():
    # window 3: (1+2)/2, (1+2+6)/3, (2+6+7)/3, (6+7)/2
    np.testing.assert_allclose(
        plots.smooth(np.array([1.0, 2, 6, 7]), 3), [1.5, 3.0, 5.0, 6.5]
    )
    np.testing.assert_allclose(plots.smooth(np.ones(20), 7), np.ones(20))
