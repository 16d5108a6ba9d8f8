"""Charts: round numbers, and everything where it belongs."""

import re

import numpy as np
import pytest

from rlhf_jax.analysis.report import charts
from rlhf_jax.analysis.report.charts import (
    Axis,
    Mark,
    Point,
    curve_chart,
    line_chart,
    ticks,
)
from rlhf_jax.analysis.statistics import Interval

from .example_findings import Page

X = Axis("phase", ".0f", whole=True)
LEFT, RIGHT = charts.LEFT, charts.SMALL[0] - charts.RIGHT


def point(x, mean, half=0.1):
    return Point(x, Interval(mean, mean - half, mean + half), f"<at {x}>", str(x))


def attributes(svg, kind):
    return [attrs for _, attrs in Page(svg).tags if attrs.get("class") == kind]


def middles(svg):
    return [(float(a["cx"]), float(a["cy"])) for a in attributes(svg, "dot")]


@pytest.mark.parametrize(
    ("low", "high", "most", "expected"),
    [
        (0.0, 1.0, 5, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.03, 0.97, 4, [0.25, 0.5, 0.75]),
        (-1.2, 2.9, 4, [0, 2]),  # steps of 1 would be five
        (-130.0, 250.0, 4, [-100, 0, 100, 200]),
        (1e-4, 3e-4, 4, [1e-4, 1.5e-4, 2e-4, 2.5e-4, 3e-4]),
    ],
)
def test_ticks_are_round_and_few(low, high, most, expected):
    np.testing.assert_allclose(ticks(low, high, most), expected, atol=1e-12)


@pytest.mark.parametrize("high", [1, 2, 3, 7, 13, 24, 30, 400])
def test_whole_ticks_are_whole(high):
    found = ticks(0, high, 6, whole=True)
    assert all(value == round(value) for value in found)
    assert 2 <= len(found) <= 7


def test_points_are_spread_over_the_plot():
    svg = line_chart([point(0, 1.0), point(10, 3.0), point(40, 2.0)], X, Axis("y"))
    (x0, y0), (x1, y1), (x2, y2) = middles(svg)
    assert (x0, x2) == (LEFT, RIGHT)
    assert x1 == pytest.approx(LEFT + (RIGHT - LEFT) / 4, abs=0.1)
    # halfway between 1 and 3; up is less
    assert y2 == pytest.approx((y0 + y1) / 2, abs=0.1)
    assert y1 < y2 < y0


def test_the_band_is_between_the_ends_of_the_intervals():
    svg = line_chart([point(0, 0.0, 1.0), point(1, 0.0, 0.5)], X, Axis("y"))
    (band,) = attributes(svg, "band")
    corners = [tuple(map(float, pair.split(","))) for pair in band["points"].split()]
    (_, y), _ = middles(svg)
    up, up_less, down_less, down = (corner[1] - y for corner in corners)
    assert up == pytest.approx(-down, abs=0.11)
    assert up_less == pytest.approx(up / 2, abs=0.11)
    assert down_less == pytest.approx(down / 2, abs=0.11)


def test_nothing_is_drawn_beyond_what_a_share_can_be():
    y = Axis("share", ".0%", low=0, high=1)
    svg = line_chart([point(0, 0.99, 0.2), point(1, 0.5, 0.2)], X, y)
    (band,) = attributes(svg, "band")
    heights = [float(pair.split(",")[1]) for pair in band["points"].split()]
    assert min(heights) == 8  # the top of the plot is 1
    assert "100%" in Page(svg).text
    assert "120%" not in Page(svg).text


def test_an_axis_holds_its_ends():
    x = X._replace(ends=(0, 20))
    svg = line_chart([point(5, 1.0), point(15, 1.0)], x, Axis("y"))
    places = [at for at, _ in middles(svg)]
    width = RIGHT - LEFT
    assert places == pytest.approx([LEFT + width / 4, LEFT + 3 * width / 4], abs=0.1)


@pytest.mark.parametrize("value", [0.0, 1.0, -3e-9, 5e6])
def test_one_constant_point_can_be_drawn(value):
    svg = line_chart([point(3, value, 0.0)], X, Axis("y"))
    assert "nan" not in svg
    ((x, _),) = middles(svg)
    assert LEFT < x < RIGHT


def test_numbers_of_an_axis_can_be_told_apart():
    svg = line_chart([point(0, -0.002, 0.0), point(1, 0.003, 0.0)], X, Axis("y"))
    page = Page(svg)
    texts = page.of[".end"]
    assert len(set(texts)) == len(texts)
    assert "−0.002" in texts
    assert "0" in texts


def test_notes_are_told_as_they_are():
    svg = line_chart([point(0, 1.0), point(1, 2.0)], X, Axis("y"))
    assert Page(svg).of["title"] == ["<at 0>", "<at 1>"]


def test_marks_have_a_line_each():
    marks = [Mark(1, "take 1", "taken"), Mark(1, "wrong from 1", "onset")]
    svg = line_chart([point(0, 1.0), point(2, 2.0)], X, Axis("y"), marks=marks)
    (first,) = attributes(svg, "middle taken")
    (second,) = attributes(svg, "middle onset")
    assert float(second["y"]) - float(first["y"]) >= 11  # the size of the letters
    lines = re.findall(r'class="mark \w+" d="M([\d.]+)', svg)
    assert lines == [f"{(LEFT + RIGHT) / 2:.1f}"] * 2


def test_the_curve_goes_through_its_points():
    points = [point(0, 0.0), point(1, 1.0), point(2, 4.0)]
    svg = curve_chart(points, np.square, Axis("d"), Axis("y"))
    (line,) = attributes(svg, "curve")
    curve = np.array([pair.split(",") for pair in line["points"].split()], float)
    for x, y in middles(svg):
        assert np.interp(x, *curve.T) == pytest.approx(y, abs=0.3)


def test_names_cover_neither_names_nor_points():
    rng = np.random.default_rng(0)
    points = [point(x, y) for x, y in rng.normal(size=(40, 2)).round(1)]
    svg = curve_chart(points, None, Axis("d"), Axis("y"))
    names = re.findall(r'<text x="([\d.]+)" y="([\d.]+)">([^<]+)</text>', svg)
    assert 5 < len(names) < 40
    boxes = [(float(x), float(y), 6 * len(name)) for x, y, name in names]
    for k, (x, y, width) in enumerate(boxes):
        assert not any(x < u < x + width and y - 11 < v < y for u, v in middles(svg))
        for u, v, other in boxes[:k]:
            assert x + width <= u or u + other <= x or abs(y - v) >= 11


def test_a_chart_has_a_name_for_those_who_do_not_see_it():
    svg = line_chart([point(0, 1.0)], X, Axis('reward "a"'))
    (attrs,) = [attrs for tag, attrs in Page(svg).tags if tag == "svg"]
    assert attrs["aria-label"] == 'reward "a"'
    assert attrs["role"] == "img"
