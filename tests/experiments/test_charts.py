"""Where the points of a sweep's charts lie."""

import re

import pytest

from experiments.charts import Change, Line, change_chart, loss_panel, smoothed, ticks, y_range

NAN = float("nan")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2.5, 5, 7.5, 10]),
        (1.93, 2.31, [2.0, 2.1, 2.2, 2.3]),
        (0, 100, [0, 25, 50, 75, 100]),
        (3, 3, [3]),
    ],
)
def test_ticks_are_round_and_inside(low, high, expected):
    assert ticks(low, high) == expected


def test_a_smoothed_line_begins_where_the_losses_do():
    (_, first), (x, second) = smoothed([(1, 0.0), (2, 9.0)])
    assert (first, x) == (0, 2)
    assert second == pytest.approx((0.8 * 0.2 * 0 + 0.2 * 9) / (0.8 * 0.2 + 0.2))
    assert smoothed([(1, 5.0)])[0][1] == pytest.approx(5)


def test_a_panel_has_room_for_all_that_is_finite():
    lines = [Line("a", 0, [], [(0, NAN), (1, 4.0)]), Line("b", 0, [(1, 2.0)], [])]
    assert y_range(lines) == pytest.approx((1.9, 4.1))
    assert y_range([Line("a", 0, [], [])]) == (0, 1)


def test_high_losses_lie_high_and_what_is_not_finite_breaks_a_line():
    line = Line("a <b>", 3, [], [(0, 4.0), (5, 2.0), (7, NAN), (10, 2.0), (10, 4.0)])
    text = loss_panel([line], (2.0, 4.0), "a test")
    dots = re.findall(r'<circle class="c3" cx="([\d.]+)" cy="([\d.]+)" r="3"><title>a &lt;b', text)
    assert dots == [("38.0", "8.0"), ("185.0", "184.0"), ("332.0", "184.0"), ("332.0", "8.0")]
    assert 'class="held c3" d="M38.0 8.0L185.0 184.0M332.0 184.0L332.0 8.0"' in text
    assert "train" not in text


def test_a_hollow_dot_is_before_and_a_filled_one_after():
    text = change_chart([Change("a", 1, 4.0, 2.0)], (2.0, 4.0))
    assert '<circle class="hollow" cx="392.0"' in text
    assert '<circle cx="8.0"' in text
    assert "4.0000 before, 2.0000 after" in text
