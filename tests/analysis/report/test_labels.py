"""How numbers and phases are written."""

import itertools
import math

import pytest

from rlhf_jax.analysis.report import labels
from rlhf_jax.analysis.statistics import Interval


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (1.2345, "+.3f", "+1.234"),
        (-0.5, ".1%", "−50.0%"),
        (None, ".2f", "–"),
        (math.nan, ".2f", "–"),
        (math.inf, "+.2f", "∞"),
        (-math.inf, "+.2f", "−∞"),
    ],
)
def test_numbers(value, form, text):
    assert labels.number(value, form) == text


def test_intervals_and_p_values():
    interval = Interval(-1.0, -2.0, 0.25)
    assert labels.spread(interval, "+.2f") == "−1.00 [−2.00, +0.25]"
    assert labels.p_text(0.0123) == "p = 0.012"
    assert labels.p_text(0.0001) == "p < 0.001"
    assert labels.signed(".1f") == labels.signed("+.1f") == "+.1f"


def test_lists_of_phases():
    assert labels.listed([3]) == "phase 3"
    assert labels.listed([3, 6, 9]) == "phases 3, 6 and 9"


def test_measures_have_names():
    assert labels.label("judge/vader").name == "judge vader"
    assert labels.label("reward/length").name == "reward length"
    assert labels.label("tokens").unit == "tokens a response"
    assert labels.label("tokens", words=True).unit == "words a response"
    assert labels.label("something_new").name == "something_new"


@pytest.mark.parametrize("count", [2, 11, 12, 13, 14, 25, 400])
@pytest.mark.parametrize("keep", [(), (7,), (0, 1, 9)])
def test_thinned_keeps_both_ends_and_what_is_to_be_kept(count, keep):
    found = labels.thinned(range(count), 12, keep)
    assert len(found) <= 12
    assert found == sorted(set(found))
    assert {0, count - 1, *(k for k in keep if k < count)} <= set(found)
    if count <= 12:
        assert found == list(range(count))
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert max(gaps) <= math.ceil((count - 1) / (11 - len(keep)))


def test_too_little_room_is_said():
    with pytest.raises(ValueError, match="at least 4"):
        labels.thinned(range(9), 3, (4, 5))
