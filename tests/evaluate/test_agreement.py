"""Agreement: κ of the published example, rank correlations by hand."""

import numpy as np
import pytest

from qlora_jax.evaluate import Rating, fleiss_kappa, order_agreement, rank_agreement


def test_kappa_of_a_worked_example():
    """14 judges, ten subjects, five categories: κ = 0.210 (Wikipedia, "Fleiss' kappa")."""
    counts = np.array(
        [
            [0, 0, 0, 0, 14],
            [0, 2, 6, 4, 2],
            [0, 0, 3, 5, 6],
            [0, 3, 9, 2, 0],
            [2, 2, 8, 1, 1],
            [7, 7, 0, 0, 0],
            [3, 2, 6, 3, 0],
            [2, 5, 3, 2, 2],
            [6, 5, 2, 1, 0],
            [0, 2, 2, 3, 7],
        ]
    )
    assert fleiss_kappa(counts) == pytest.approx(0.210, abs=5e-4)


def test_kappa_is_one_where_all_agree_and_zero_by_chance():
    assert fleiss_kappa(np.array([[2, 0], [0, 2]])) == 1.0
    assert fleiss_kappa(np.array([[2, 0], [2, 0]])) == 1.0
    rng = np.random.default_rng(0)
    counts = rng.multinomial(3, [0.5, 0.5], 20_000)
    assert fleiss_kappa(counts) == pytest.approx(0, abs=0.02)


def test_ranks_by_hand():
    a = {"x": 1.0, "y": 2.0, "z": 3.0, "only here": 9.0}
    agreement = rank_agreement(a, {"x": 10.0, "y": 30.0, "z": 20.0, "only there": 0.0})
    # Of three pairs two agree; ρ = 1 - 6 · (0 + 1 + 1) / (3 · 8).
    assert agreement == pytest.approx((1 / 3, 0.5, 3))


def test_orders_as_two_judges():
    ratings = [
        Rating("1", "a", "b", (1, 0)), Rating("1", "b", "a", (0, 1)),
        Rating("2", "a", "b", (1, 0)), Rating("2", "b", "a", (1, 0)),
        Rating("3", "a", "b", (0.5, 0.5)), Rating("3", "b", "a", (0.5, 0.5)),
        Rating("4", "a", "b", (0, 1)), Rating("4", "a", "b", (1, 0)),
        Rating("5", "a", "b", (0, 1)), Rating("5", "b", "a", (1, 0)),
    ]  # fmt: skip
    ratings = [r._replace(points=tuple(map(float, r.points))) for r in ratings]
    kappa, pairs = order_agreement(ratings)
    assert pairs == 4
    counts = np.array([[2, 0, 0], [1, 1, 0], [0, 0, 2], [0, 2, 0]])
    assert kappa == pytest.approx(fleiss_kappa(counts))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="share 1 systems"):
        rank_agreement({"x": 1.0, "y": 2.0}, {"x": 1.0})
    with pytest.raises(ValueError, match="as many judges"):
        fleiss_kappa(np.array([[2, 0], [1, 0]]))
