"""Percent of ChatGPT against the paper's Table 6, and the win matrix by hand."""

import math

import numpy as np
import pytest

from experiments.paper.judged import TABLE_6, system_label
from qlora_jax.evaluate import Rating, percent_of, read_ratings, win_matrix
from tests.evaluate.released import released

RATINGS = [
    Rating("1", "ref", "x", (8.0, 4.0)),
    Rating("2", "ref", "x", (10.0, 5.0)),
    Rating("1", "x", "ref", (9.0, 9.0)),
    Rating("1", "ref", "y", (5.0, 6.0)),
]


def test_percent_by_hand():
    found = percent_of(RATINGS, "ref")
    assert list(found) == ["y", "x"]
    x = found["x"]
    assert (x.reference_first, x.system_first) == (50.0, 100.0)
    assert x.mean == pytest.approx(100 * 18 / 27)
    assert x.judgements == 3
    # Two questions: totals (13, 17) and (5, 10); residuals of the ratio 2/3, over the mean 13.5.
    residuals = np.array([13 - 17 * 2 / 3, 5 - 10 * 2 / 3])
    assert x.half_width == pytest.approx(196 * residuals.std(ddof=1) / 13.5 / math.sqrt(2))
    assert math.isnan(found["y"].system_first)
    assert math.isnan(found["y"].half_width)


def test_a_reference_that_won_nothing():
    ratings = [
        Rating("1", "ref", "none", (0.0, 0.0)),
        Rating("1", "ref", "some", (0.0, 1.0)),
        Rating("2", "ref", "some", (0.0, 0.0)),
        Rating("1", "ref", "half", (2.0, 1.0)),
    ]
    found = percent_of(ratings, "ref")
    assert list(found) == ["some", "half", "none"]
    assert (found["some"].mean, found["some"].reference_first) == (math.inf, math.inf)
    assert found["half"].mean == 50
    assert math.isnan(found["none"].mean)
    assert all(math.isnan(percent.half_width) for percent in found.values())


def test_an_unknown_reference_is_refused():
    with pytest.raises(ValueError, match="'chatgpt' was not judged against any system"):
        percent_of(RATINGS, "chatgpt")


def test_wins_by_hand():
    matrix = win_matrix(RATINGS)
    assert matrix.systems == ("ref", "x", "y")
    np.testing.assert_allclose(
        matrix.share, [[np.nan, 2.5 / 3, 0], [0.5 / 3, np.nan, np.nan], [1, np.nan, np.nan]]
    )
    np.testing.assert_array_equal(matrix.judgements, [[0, 3, 1], [3, 0, 0], [1, 0, 0]])


def test_the_papers_table_6():
    files = released("ratings-gpt4/vicuna/relative-gpt-3.5").glob("*.jsonl")
    ratings = read_ratings(files)
    assert (len(ratings.ratings), sum(ratings.unreadable.values())) == (5700, 60)
    found = {system_label(n): p for n, p in percent_of(ratings.ratings, "gpt-3.5").items()}
    columns = {name: (found[name].reference_first, found[name].system_first) for name in TABLE_6}
    # The paper has GPT-4's two columns the other way round.
    columns["GPT-4"] = columns["GPT-4"][::-1]
    for name, paper in TABLE_6.items():
        assert columns[name] == pytest.approx(paper[:2], abs=0.1), name
    means = {n for n, paper in TABLE_6.items() if abs(found[n].mean - paper[2]) > 0.1}
    # Here the paper's mean counts three judgements whose scores its order columns leave out.
    assert means == {"Alpaca-13B", "Self-Instruct-13B"}
