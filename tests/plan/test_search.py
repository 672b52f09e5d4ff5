import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.plan.search import largest_that_fits


@settings(max_examples=200)
@given(
    slope=st.integers(1, 10**9),
    curve=st.integers(0, 10**5),
    base=st.integers(0, 10**11),
    limit=st.integers(1, 10**11),
    step=st.integers(1, 256),
)
def test_the_answer_fits_and_the_next_does_not(slope, curve, base, limit, step):
    def bytes_at(n):
        return base + slope * n + curve * n * n

    found = largest_that_fits(bytes_at, limit, start=step, step=step, most=10**6, compiles=10**4)
    if found is None:
        assert bytes_at(step) > limit
    else:
        assert found % step == 0
        assert bytes_at(found) <= limit
        assert found + step > 10**6 or bytes_at(found + step) > limit


def test_a_line_takes_three_compiles_beside_the_plan_at_hand():
    asked = []

    def bytes_at(n):
        asked.append(n)
        return 1000 + 7 * n

    assert largest_that_fits(bytes_at, 2000, known={1: 1007}) == 142
    # A second, the answer, and one more that shows that the next does not fit.
    assert asked == [2, 142, 143]


def test_a_step_that_does_not_fit_is_searched_downward():
    assert largest_that_fits(lambda n: 10 * n, 75, known={32: 320}, compiles=9) == 7


def test_a_look_near_the_answer_finds_it_behind_a_bend():
    def bytes_at(n):
        return max(500, 10 * n)  # flat at first: another part of the step has the peak

    assert largest_that_fits(bytes_at, 900, known={1: 500}, second=70) == 90


def test_what_was_compiled_last_is_kept_where_the_budget_ends():
    found = largest_that_fits(lambda n: math.ceil(n**1.7), 10**6, compiles=4)
    assert found is not None
    assert math.ceil(found**1.7) <= 10**6


def test_points_at_hand_are_of_use_within_the_search_alone():
    known = {5: 5, 60: 60}
    assert largest_that_fits(lambda n: n, 100, start=10, step=10, most=50, known=known) == 50


def test_nothing_is_asked_beyond_what_is_known_to_be_too_large():
    asked = []

    def bytes_at(n):
        asked.append(n)
        return 10 * n

    assert largest_that_fits(bytes_at, 55, known={1: 10, 8: 80}, second=20) == 5
    assert max(asked) < 8


def test_bytes_that_do_not_grow_lead_to_the_end():
    assert largest_that_fits(lambda n: 7, 10, most=64) == 64


@pytest.mark.parametrize("most", [1, 5])
def test_the_search_ends(most):
    assert largest_that_fits(lambda n: n, 100, most=most) == most


def test_a_start_beyond_the_end_is_not_asked():
    """Of a model with fewer learned positions than a step of the search, say."""

    def refuse(n):
        raise ValueError(f"there are no {n} positions")

    assert largest_that_fits(refuse, 100, start=256, step=256, most=128) is None
