"""Do two judges, two benchmarks or two reading orders agree?

Between rankings of systems: Kendall's τ (τ-b, for ties) and Spearman's ρ. Between judges of the
same items: Fleiss' κ (Psychological Bulletin 76, 1971), the share of agreement beyond what chance
would give; 1 is perfect, 0 is chance. These are the measures of the QLoRA paper's §6.2.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64
from scipy import stats

from qlora_jax.evaluate.ratings import Rating


class RankAgreement(NamedTuple):
    """How two scores rank the systems that both know."""

    kendall_tau: float
    spearman_rho: float
    systems: int


def rank_agreement(a: Mapping[str, float], b: Mapping[str, float]) -> RankAgreement:
    """Kendall's τ-b and Spearman's ρ over the systems that both mappings rate.

    Raises:
        ValueError: fewer than two systems in common.
    """
    common = sorted(a.keys() & b.keys())
    if len(common) < 2:
        raise ValueError(
            f"the rankings share {len(common)} systems ({', '.join(common)}), but agreement needs "
            "at least 2."
        )
    x, y = [a[name] for name in common], [b[name] for name in common]
    return RankAgreement(
        float(stats.kendalltau(x, y).statistic),
        float(stats.spearmanr(x, y).statistic),
        len(common),
    )


def fleiss_kappa(counts: Int64[np.ndarray, "item category"]) -> float:
    """Fleiss' κ; `counts[i, c]` judges put item i into category c.

    It is 1 where all put everything into one category, where the formula is 0 / 0.

    Raises:
        ValueError: items judged by different numbers of judges, or by fewer than two.
    """
    judges = counts.sum(1)
    if len(counts) == 0 or judges.min() < 2 or judges.min() != judges.max():
        raise ValueError(
            "Fleiss' kappa needs at least one item and as many judges, two or more, for every item;"
            f" found {len(counts)} items with {sorted(set(judges.tolist()))} judges."
        )
    n = judges[0]
    agreed = ((counts**2).sum(1) - n) / (n * (n - 1))
    chance = ((counts.sum(0) / counts.sum()) ** 2).sum()
    return 1.0 if chance == 1 else float((agreed.mean() - chance) / (1 - chance))


def order_agreement(ratings: Iterable[Rating]) -> tuple[float, int]:
    """Fleiss' κ between the two reading orders, as two judges, and how many pairs had both.

    The categories are a win of the alphabetically first system, its defeat, and a draw.
    """
    verdicts: dict[tuple[str, str, str], dict[bool, int]] = defaultdict(dict)
    for question, first, second, (a, b) in ratings:
        verdict, turned = int(np.sign(a - b)), first > second
        if turned:
            first, second, verdict = second, first, -verdict
        # Of a pair that was read twice in one order, the last time counts.
        verdicts[question, first, second][turned] = verdict
    both = [list(orders.values()) for orders in verdicts.values() if len(orders) == 2]
    counts = np.array([[pair.count(v) for v in (1, -1, 0)] for pair in both], np.int64)
    return fleiss_kappa(counts.reshape(-1, 3)), len(both)
