"""Elo against a plain loop in float64, and against the paper's Table 1 on its own ratings."""

import numpy as np
import pytest

from experiments.paper.judged import TABLE_1, system_label
from qlora_jax.evaluate import Matches, Rating, elo, make_matches, read_ratings
from tests.evaluate.released import released


def plain_elo(matches, order, k=32.0, start=1000.0):
    ratings = [start] * len(matches.systems)
    for match in order:
        a, b = matches.first[match], matches.second[match]
        expected = 1 / (1 + 10 ** ((ratings[b] - ratings[a]) / 400))
        change = k * (float(matches.result[match]) - expected)
        ratings[a] += change
        ratings[b] -= change
    return ratings


def random_matches(count=300, systems=5, seed=0):
    rng = np.random.default_rng(seed)
    first = rng.integers(0, systems, count, np.int32)
    second = (first + rng.integers(1, systems, count, np.int32)) % systems
    result = rng.choice(np.float32([0, 0.25, 0.5, 1]), count)
    return Matches(tuple("abcde"[:systems]), first, second.astype(np.int32), result)


@pytest.mark.parametrize("length", [None, 40])
def test_every_order_equals_a_plain_float64_loop(length):
    matches = random_matches()
    found = elo(matches, orders=6, length=length, seed=3, chunk=4)
    generator = np.random.default_rng(3)
    for part in (slice(0, 4), slice(4, 6)):
        count = len(range(*part.indices(6)))
        orders = np.tile(np.arange(300, dtype=np.int32), (count, 1))
        generator.permuted(orders, axis=1, out=orders)
        expected = [plain_elo(matches, order[:length]) for order in orders]
        np.testing.assert_allclose(found.ratings[part], expected, atol=0.01)


def test_points_are_conserved_and_k_and_start_count():
    matches = random_matches()
    found = elo(matches, orders=50, k=16.0, start=1500.0)
    np.testing.assert_allclose(found.ratings.sum(1), 5 * 1500, atol=0.1)
    again = elo(matches, orders=50, k=16.0, start=1500.0)
    np.testing.assert_array_equal(found.ratings, again.ratings)
    assert np.any(elo(matches, orders=50, k=16.0, start=1500.0, seed=1).ratings != found.ratings)


def test_mean_error_and_interval_are_those_of_the_orders():
    found = elo(random_matches(), orders=400)
    np.testing.assert_allclose(found.mean, np.mean(np.float64(found.ratings), 0))
    np.testing.assert_allclose(
        found.standard_error, np.std(np.float64(found.ratings), 0, ddof=1) / 20
    )
    inside = (found.ratings >= found.interval()[0]) & (found.ratings <= found.interval()[1])
    np.testing.assert_allclose(inside.mean(0), 0.95, atol=0.01)


def test_matches_of_judgements_and_of_questions():
    ratings = [
        Rating("q1", "b", "a", (1.0, 0.0)),
        Rating("q1", "a", "b", (9.0, 8.5)),
        Rating("q2", "a", "b", (0.5, 0.5)),
    ]
    single = make_matches(ratings)
    assert single.systems == ("a", "b")
    assert single.first.tolist() == [1, 0, 0]
    assert single.result.tolist() == [1.0, 1.0, 0.5]
    both = make_matches(ratings, "question")
    assert (both.first.tolist(), both.second.tolist()) == ([0, 0], [1, 1])
    assert both.result.tolist() == [0.5, 0.5]


def test_nothing_to_play_is_refused():
    with pytest.raises(ValueError, match="no readable judgement"):
        make_matches([])
    with pytest.raises(ValueError, match="needs at least 2"):
        elo(random_matches(), orders=1)
    for k in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be a finite number above 0"):
            elo(random_matches(), k=k)
    with pytest.raises(ValueError, match="there are 300 matches"):
        elo(random_matches(), length=301)
    assert len(elo(random_matches(), orders=2, length=300).ratings) == 2


def deviations(unit, **options):
    ratings = read_ratings(released("ratings-gpt4/vicuna/pairwise").glob("*.jsonl"))
    assert (len(ratings.ratings), sum(ratings.unreadable.values())) == (4467, 13)
    found = elo(make_matches(ratings.ratings, unit), **options)
    assert found.standard_error.max() < 0.5
    return {
        system_label(system): mean - TABLE_1[system_label(system)]
        for system, mean in zip(found.systems, found.mean, strict=True)
    }


def test_the_papers_elo_within_6_points_for_7_of_8_systems():
    found = deviations("question")
    assert set(found) == set(TABLE_1)
    assert {name for name, off in found.items() if abs(off) > 6} == {"GPT-4"}
    assert abs(found["GPT-4"]) < 25


def test_the_papers_elo_within_4_points_for_all_where_orders_end_after_520_matches():
    assert max(map(abs, deviations("judgement", length=520).values())) < 4
