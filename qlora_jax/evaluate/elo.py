"""Elo: one number per system from pairs that met, and how far the order of the matches moves it.

A system's rating r says how often it should win: against r', 1 / (1 + 10^((r' - r) / 400)) of the
points. After each match both move by K times what was unexpected (Elo 1978, §1.6). What comes last
therefore counts most, and a rating depends on the order; the QLoRA paper (§5.2) plays the matches
in 10,000 random orders, K = 32, everyone starting at 1000, and reports the mean.

How to think of it: one order is a `jax.lax.scan` over matches, all orders are one `jax.vmap`. The
orders are shuffled by NumPy on the host, which is faster than sorting random keys on the device.

Two notions of a match:

- `"judgement"`: every row of the ratings, so that a question judged in both orders is two matches.
- `"question"`: both orders of a question are one match with the mean of their points. A judge that
  prefers what it read first then says "equal", instead of one win and one defeat.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int, Int32, Shaped

from qlora_jax.evaluate.ratings import Rating

MatchUnit = Literal["judgement", "question"]


class Matches(NamedTuple):
    """Who met and what came out: `result` is the share of the points that `first` took.

    `systems` names them, in the order in which `first` and `second` [match] count them.
    """

    systems: tuple[str, ...]
    first: Int32[np.ndarray, " match"]
    second: Int32[np.ndarray, " match"]
    result: Float32[np.ndarray, " match"]


@dataclass(frozen=True)
class Elo:
    """Ratings [order system] after the last match of every order."""

    systems: tuple[str, ...]
    ratings: Float32[np.ndarray, "order system"]

    @property
    def mean(self) -> Float64[np.ndarray, " system"]:
        """What the paper reports."""
        return self.ratings.mean(0, dtype=np.float64)

    @property
    def standard_error(self) -> Float64[np.ndarray, " system"]:
        """Of the mean, over orders: how much of it is the luck of these orders."""
        return self.ratings.std(0, dtype=np.float64, ddof=1) / math.sqrt(len(self.ratings))

    def interval(self, level: float = 0.95) -> Float64[np.ndarray, "2 system"]:
        """The middle `level` of the orders' ratings: how much one order could have misled."""
        tail = 50 * (1 - level)
        return np.percentile(self.ratings.astype(np.float64), [tail, 100 - tail], axis=0)


def make_matches(ratings: Iterable[Rating], unit: MatchUnit = "judgement") -> Matches:
    """Matches from judgements: whoever has more points wins, equal points are a draw.

    Raises:
        ValueError: an unknown unit, or no judgement.
    """
    if unit not in ("judgement", "question"):
        raise ValueError(f"unit is {unit!r}, but 'judgement' or 'question' is needed.")
    played: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for number, rating in enumerate(ratings):
        a, b = rating.points
        pair, result = (rating.first, rating.second), (1.0 if a > b else 0.0 if a < b else 0.5)
        if unit == "question":
            if pair[0] > pair[1]:
                pair, result = pair[::-1], 1 - result
            played[(*pair, rating.question)].append(result)
        else:
            played[(*pair, str(number))].append(result)
    if not played:
        raise ValueError("there is no readable judgement to make matches of.")
    systems = tuple(sorted({name for pair in played for name in pair[:2]}))
    index = {name: i for i, name in enumerate(systems)}
    return Matches(
        systems,
        np.array([index[pair[0]] for pair in played], np.int32),
        np.array([index[pair[1]] for pair in played], np.int32),
        np.array([sum(results) / len(results) for results in played.values()], np.float32),
    )


def elo(
    matches: Matches,
    *,
    k: float = 32.0,
    start: float = 1000.0,
    orders: int = 10_000,
    length: int | None = None,
    seed: int = 0,
    chunk: int = 2000,
) -> Elo:
    """Ratings after the matches, in many random orders.

    Args:
        matches: who met and what came out.
        k: how far one match moves a rating at most.
        start: everyone's rating before the first match.
        orders: how many random orders are played.
        length: stop each order after so many matches; None plays all.
        seed: of the orders.
        chunk: orders played at once; bounds memory to chunk × matches indices.

    Raises:
        ValueError: fewer than two orders, or a length beyond the matches.
    """
    count = len(matches.result)
    if orders < 2:
        raise ValueError(f"orders={orders}, but an interval needs at least 2.")
    if length is not None and not 1 <= length <= count:
        raise ValueError(f"length={length}, but there are {count} matches to play.")
    if not 0 < k < math.inf:
        raise ValueError(f"k={k} must be a finite number above 0: what a match moves at most.")
    generator = np.random.default_rng(seed)
    initial = jnp.full(len(matches.systems), start, jnp.float32)
    arrays = [jnp.asarray(array) for array in matches[1:]]
    played = []
    for begin in range(0, orders, chunk):
        order = np.tile(np.arange(count, dtype=np.int32), (min(chunk, orders - begin), 1))
        order = generator.permuted(order, axis=1, out=order)[:, :length]
        played.append(np.asarray(_play_all(*arrays, jnp.asarray(order), initial, k)))
    return Elo(matches.systems, np.concatenate(played))


@jax.jit
def _play_all(
    first: Int[Array, " match"],
    second: Int[Array, " match"],
    result: Float[Array, " match"],
    orders: Int[Array, "order played"],
    initial: Float[Array, " system"],
    k: Shaped[Array, ""] | float,
) -> Float[Array, "order system"]:
    def play(ratings: Float[Array, " system"], match: Int[Array, ""]) -> tuple[Array, None]:
        a, b = first[match], second[match]
        expected = jax.nn.sigmoid((ratings[a] - ratings[b]) * (math.log(10) / 400))
        moved = k * (result[match] - expected)
        return ratings.at[a].add(moved).at[b].add(-moved), None

    return jax.vmap(lambda order: jax.lax.scan(play, initial, order)[0])(orders)
