"""What ratings say without a model of them: percent of a reference system, and who beat whom.

**Percent of a reference** (the QLoRA paper's Table 6, after the Vicuna evaluation): a system's
total of points over the reference's total in the same judgements. Judges favour what they read
first, by five points of a hundred and more, so both orders stand side by side, and together.

The interval of the mean is that of a ratio estimator over questions (Cochran, Sampling Techniques,
§6.4): questions are what was drawn at random, and both orders of one are not independent.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from qlora_jax.evaluate.ratings import Rating


class Percent(NamedTuple):
    """A system's points in percent of the reference's, from `judgements` judgements.

    `reference_first` and `system_first` are by reading order, NaN where an order was not judged;
    `mean` is over both, and `half_width` is half its 95% interval, NaN where one question is all
    there is. Against a reference without a point any points are infinitely many percent.
    """

    reference_first: float
    system_first: float
    mean: float
    half_width: float
    judgements: int


class WinMatrix(NamedTuple):
    """`share[i, j]` of the points system i took from j (a draw is half), NaN if they never met."""

    systems: tuple[str, ...]
    share: Float64[np.ndarray, "system system"]
    judgements: Int64[np.ndarray, "system system"]


def percent_of(ratings: Iterable[Rating], reference: str) -> dict[str, Percent]:
    """Every system that met the reference, best first.

    Raises:
        ValueError: the reference was never judged.
    """
    # system -> question -> (points of system, of reference) of each order
    found: dict[str, dict[bool, list[tuple[str, float, float]]]] = defaultdict(
        lambda: {True: [], False: []}
    )
    systems = set()
    for question, first, second, (a, b) in ratings:
        systems |= {first, second}
        if first == reference:
            found[second][True].append((question, b, a))
        elif second == reference:
            found[first][False].append((question, a, b))
    if not found:
        raise ValueError(
            f"{reference!r} was not judged against any system; there are "
            f"{', '.join(sorted(systems)) or 'no judgements'}."
        )
    percents = {name: _percent(orders[True], orders[False]) for name, orders in found.items()}
    return dict(
        sorted(percents.items(), key=lambda item: (math.isnan(item[1].mean), -item[1].mean))
    )


def _percent(
    reference_first: list[tuple[str, float, float]], system_first: list[tuple[str, float, float]]
) -> Percent:
    both = [*reference_first, *system_first]
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for question, own, other in both:
        totals[question][0] += own
        totals[question][1] += other
    own, other = np.array(list(totals.values())).T
    n, half_width = len(totals), math.nan
    if n > 1 and other.any():
        spread = np.std(own - own.sum() / other.sum() * other, ddof=1) / other.mean()
        half_width = 100 * 1.96 * float(spread) / n**0.5
    return Percent(
        _ratio(reference_first), _ratio(system_first), _ratio(both), half_width, len(both)
    )


def _ratio(judged: list[tuple[str, float, float]]) -> float:
    own, other = math.fsum(row[1] for row in judged), math.fsum(row[2] for row in judged)
    if other == 0:
        return math.inf if own else math.nan
    return 100 * own / other


def win_matrix(ratings: Iterable[Rating]) -> WinMatrix:
    """Who took how much from whom."""
    judged = list(ratings)
    systems = tuple(sorted({name for r in judged for name in (r.first, r.second)}))
    index = {name: i for i, name in enumerate(systems)}
    won = np.zeros((len(systems), len(systems)))
    for rating in judged:
        a, b = rating.points
        i, j = index[rating.first], index[rating.second]
        points = 1.0 if a > b else 0.0 if a < b else 0.5
        won[i, j] += points
        won[j, i] += 1 - points
    judgements = won + won.T
    share = np.divide(won, judgements, out=np.full_like(won, np.nan), where=judgements > 0)
    return WinMatrix(systems, share, judgements.astype(np.int64))
