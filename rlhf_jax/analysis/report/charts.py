"""Small charts as SVG inside a page: lines with bands, and curves through points.

Colours come from the page's style (`page_style`), so that a chart is light or dark as
the page is. A chart shrinks and grows with its box. Points tell their numbers when one
points at them.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from rlhf_jax.analysis.statistics import Interval
from rlhf_jax.evaluation.pages import escape

SMALL = (360, 200)
LARGE = (460, 300)
LEFT, RIGHT, BOTTOM = 46, 12, 32  # around the plot, px
LINE = 13  # height of a line of text, px
LETTER = 6  # width of a letter, px


class Point(NamedTuple):
    """A mean with its interval, somewhere; `note` is told when one points at it."""

    x: float
    y: Interval
    note: str
    name: str = ""


class Mark(NamedTuple):
    """An upright line; `kind` is its class in the style."""

    x: float
    name: str
    kind: str


class Axis(NamedTuple):
    """What an axis holds.

    Attributes:
      name: written beside it.
      form: of its numbers; "%" forms are shares.
      ends: what it holds besides the points.
      low, high: what it does not go beyond; None for no end.
      whole: whether only whole numbers are marked.
    """

    name: str
    form: str = "g"
    ends: tuple[float, ...] = ()
    low: float | None = None
    high: float | None = None
    whole: bool = False


def line_chart(
    points: Sequence[Point],
    x: Axis,
    y: Axis,
    *,
    marks: Sequence[Mark] = (),
    inner: Sequence[Interval] = (),
) -> str:
    """A line through the means, a band between the ends of the intervals.

    Args:
      points: in the order of x.
      x, y: the axes.
      marks: upright lines.
      inner: a darker band within the first, of as many.
    """
    frame = _frame(points, [], SMALL, x, y, marks)
    means = " ".join(frame.at(p.x, p.y.mean) for p in points)
    parts = [_band(frame, points, [p.y for p in points])]
    if inner:
        parts.append(_band(frame, points, inner))
    if len(points) == 1:
        parts.append(_bar(frame, points[0]))
    parts += [f'<polyline class="line" points="{means}"/>', *_dots(frame, points)]
    return _svg(frame, y.name, [*_axes(frame, x, y), *_marks(frame, marks), *parts])


def curve_chart(
    points: Sequence[Point],
    curve: Callable[[np.ndarray], np.ndarray] | None,
    x: Axis,
    y: Axis,
    *,
    marks: Sequence[Mark] = (),
) -> str:
    """Points with upright intervals, and a curve that was fitted to them.

    Args:
      points: with names, which are written beside them where there is room.
      curve: many x -> as many y; None for no curve.
      x, y: the axes.
      marks: upright lines.
    """
    ends = [*(p.x for p in points), *(mark.x for mark in marks)]
    xs = np.linspace(min(ends), max(ends), 80)
    fitted = [] if curve is None else list(zip(xs.tolist(), curve(xs).tolist()))
    frame = _frame(points, fitted, LARGE, x, y, marks)
    parts = []
    if fitted:
        line = " ".join(frame.at(*pair) for pair in fitted)
        parts.append(f'<polyline class="curve" points="{line}"/>')
    parts += [_bar(frame, p) for p in points]
    parts += [*_dots(frame, points), *_names(frame, points)]
    return _svg(frame, y.name, [*_axes(frame, x, y), *_marks(frame, marks), *parts])


def ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """Round numbers from low to high, at most so many: steps of 1, 2, 2.5 or 5 · 10ⁿ.

    Args:
      low, high: the ends, high above low.
      most: of steps.
      whole: take whole numbers only.
    """
    unit = 10.0 ** math.floor(math.log10((high - low) / most))
    steps = [unit * times for times in (1, 2, 2.5, 5, 10, 20)]
    if whole:
        steps = [s for s in steps if s >= 1 and s == round(s)] or [1.0]
    step = next(s for s in steps if (high - low) / s <= most or s is steps[-1])
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


class _Frame(NamedTuple):
    """Where what is in px: the plot is from (left, top) to (right, bottom)."""

    size: tuple[int, int]
    x: tuple[float, float]
    y: tuple[float, float]
    top: float

    @property
    def right(self) -> float:
        return self.size[0] - RIGHT

    @property
    def bottom(self) -> float:
        return self.size[1] - BOTTOM

    def at_x(self, value: float) -> float:
        low, high = self.x
        return LEFT + (value - low) / (high - low) * (self.right - LEFT)

    def at_y(self, value: float) -> float:
        low, high = self.y
        share = (min(max(value, low), high) - low) / (high - low)
        return self.bottom - share * (self.bottom - self.top)

    def at(self, x: float, y: float) -> str:
        return f"{self.at_x(x):.1f},{self.at_y(y):.1f}"


def _frame(points, curve, size, x, y, marks) -> _Frame:
    xs = [p.x for p in points] + [at for at, _ in curve]
    ys = [end for p in points for end in p.y] + [value for _, value in curve]
    top = 8 + LINE * len(marks)
    return _Frame(size, _range(xs, 0.0, x), _range(ys, 0.06, y), top)


def _range(values, room, axis: Axis) -> tuple[float, float]:
    """From the least to the greatest, with some room, and not beyond the axis."""
    low, high = (end((*values, *axis.ends)) for end in (min, max))
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-3):
        less = max(0.1 * abs(low), 0.5 if axis.whole else 0.05)
        low, high = low - less, high + less
    more = room * (high - low)
    low, high = low - more, high + more
    if axis.low is not None:
        low = max(low, axis.low)
    if axis.high is not None:
        high = min(high, axis.high)
    return low, high


def _axes(frame: _Frame, x: Axis, y: Axis) -> list[str]:
    parts = []
    at_y = ticks(*frame.y, 4 if frame.size == SMALL else 6)
    for value, text in zip(at_y, _numbers(at_y, y.form)):
        h = frame.at_y(value)
        parts.append(f'<path class="grid" d="M{LEFT},{h:.1f}H{frame.right}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{h + 4:.1f}" class="end">{text}</text>')
    at_x = ticks(*frame.x, 6, whole=x.whole)
    for value, text in zip(at_x, _numbers(at_x, x.form)):
        w = frame.at_x(value)
        parts.append(f'<path class="axis" d="M{w:.1f},{frame.bottom}v4"/>')
        place = f'x="{w:.1f}" y="{frame.bottom + 15}"'
        parts.append(f'<text {place} class="middle">{text}</text>')
    parts.append(f'<path class="axis" d="M{LEFT},{frame.bottom}H{frame.right}"/>')
    place = f'x="{frame.right}" y="{frame.size[1] - 4}"'
    parts.append(f'<text {place} class="end soft">{escape(x.name)}</text>')
    return parts


def _numbers(values: Sequence[float], form: str) -> list[str]:
    """The numbers of an axis, with as many decimals as tell them apart."""
    times, sign = (100, "%") if form.endswith("%") else (1, "")
    step = abs(values[1] - values[0]) * times if len(values) > 1 else 1.0
    decimals = next(
        (d for d in range(6) if abs(step - round(step, d)) < 1e-6 * step), 6
    )
    texts = []
    for value in values:
        scaled = value * times
        short = abs(scaled) < 1e5
        text = f"{scaled:.{decimals}f}" if short else f"{scaled:.3g}"
        text = text.replace("-", "−")
        texts.append(("0" if not float(scaled) else text) + sign)
    return texts


def _band(frame: _Frame, points: Sequence[Point], band: Sequence[Interval]) -> str:
    over = [frame.at(p.x, y.high) for p, y in zip(points, band)]
    under = [frame.at(p.x, y.low) for p, y in zip(points, band)]
    return f'<polygon class="band" points="{" ".join(over + under[::-1])}"/>'


def _bar(frame: _Frame, p: Point) -> str:
    ends = f"M{frame.at(p.x, p.y.low)}L{frame.at(p.x, p.y.high)}"
    return f'<path class="bar" d="{ends}"/>'


def _dots(frame: _Frame, points: Sequence[Point]) -> list[str]:
    parts = []
    for p in points:
        at = f'cx="{frame.at_x(p.x):.1f}" cy="{frame.at_y(p.y.mean):.1f}"'
        circles = f'<circle class="near" {at} r="9"/><circle class="dot" {at} r="2.5"/>'
        parts.append(f"<g><title>{escape(p.note)}</title>{circles}</g>")
    return parts


def _names(frame: _Frame, points: Sequence[Point]) -> list[str]:
    """The points' names, the last first, where they cover neither name nor point."""
    dots = [(frame.at_x(p.x), frame.at_y(p.y.mean)) for p in points]
    taken: list[tuple[float, float, float]] = []  # left, bottom, width
    parts = []
    for p in sorted(points, key=lambda p: (p is not points[-1], p is not points[0])):
        width = LETTER * len(p.name) + 2
        x, y = frame.at_x(p.x), frame.at_y(p.y.mean)
        for a, b in ((x + 5, y - 4), (x - 4 - width, y - 4), (x + 5, y + 12)):
            on_dot = any(
                a - 3 < u < a + width + 3 and b - LINE < v < b for u, v in dots
            )
            on_name = any(
                a < c + w and c < a + width and abs(b - d) < LINE for c, d, w in taken
            )
            if not (on_dot or on_name or a + width > frame.size[0]):
                taken.append((a, b, width))
                place = f'x="{a:.1f}" y="{b:.1f}"'
                parts.append(f"<text {place}>{escape(p.name)}</text>")
                break
    return parts


def _marks(frame: _Frame, marks: Sequence[Mark]) -> list[str]:
    """Each has a line of text of its own above the plot."""
    lines, names = [], []
    for row, mark in enumerate(marks):
        x, y = frame.at_x(mark.x), LINE * (row + 1)
        half = LETTER * len(mark.name) / 2
        at = min(max(x, LEFT + half), frame.size[0] - half - 2)
        place = f'x="{at:.1f}" y="{y}" class="middle {mark.kind}"'
        path = f'd="M{x:.1f},{y + 3}V{frame.bottom}"'
        lines.append(f'<path class="mark {mark.kind}" {path}/>')
        names.append(f"<text {place}>{escape(mark.name)}</text>")
    return lines + names


def _svg(frame: _Frame, name: str, parts: Sequence[str]) -> str:
    width, height = frame.size
    kind = "small" if frame.size == SMALL else "large"
    head = f'class="{kind}" viewBox="0 0 {width} {height}" role="img"'
    return f'<svg {head} aria-label="{escape(name)}">{"".join(parts)}</svg>'
