"""The judged tables as pictures; matplotlib (extra `plots`) is imported only where one is drawn."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from experiments.paper.judged import system_label
from qlora_jax.evaluate import Elo, Percent, WinMatrix

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure((width, height), dpi=150, layout="constrained")


def elo_figure(title: str, ratings: Elo, published: dict[str, int]) -> Figure:
    """Mean and middle 95% of the orders of every system, the paper's mean as a cross."""
    order = np.argsort(ratings.mean)
    names = [system_label(ratings.systems[i]) for i in order]
    low, high = ratings.interval()[:, order]
    figure = _figure(6, 0.4 * len(names) + 1.2)
    axes = figure.add_subplot(title=title, xlabel="Elo")
    axes.hlines(names, low, high, color="tab:blue", linewidth=2, alpha=0.5, label="95% of orders")
    axes.plot(ratings.mean[order], names, "o", color="tab:blue", label="mean")
    known = [name for name in names if name in published]
    axes.plot([published[name] for name in known], known, "x", color="tab:red", label="paper")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def win_figure(title: str, matrix: WinMatrix, order: Sequence[int]) -> Figure:
    """The win matrix as coloured squares, in the given order of systems."""
    names = [system_label(matrix.systems[i]) for i in order]
    shares = 100 * matrix.share[np.ix_(order, order)]
    figure = _figure(0.7 * len(names) + 2, 0.6 * len(names) + 2)
    axes = figure.add_subplot(title=title)
    axes.imshow(shares, cmap="RdBu", vmin=0, vmax=100)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    for (i, j), share in np.ndenumerate(shares):
        if np.isfinite(share):
            axes.text(j, i, f"{share:.0f}", ha="center", va="center", fontsize=8)
    return figure


def percent_figure(title: str, percents: dict[str, Percent], reference: str) -> Figure:
    """Both reading orders of every system as two ends of a line, the mean as a dot."""
    names = [system_label(name) for name in percents][::-1]
    values = list(percents.values())[::-1]
    figure = _figure(6.5, 0.25 * len(names) + 1.2)
    axes = figure.add_subplot(title=title, xlabel=f"percent of {reference}'s score")
    axes.hlines(
        names,
        [value.reference_first for value in values],
        [value.system_first for value in values],
        color="tab:blue",
        linewidth=3,
        alpha=0.35,
        label=f"{reference} read first … system read first",
    )
    means, errors = [v.mean for v in values], [v.half_width for v in values]
    axes.errorbar(means, names, xerr=errors, fmt="o", color="tab:blue", label="mean, 95% interval")
    axes.axvline(100, color="grey", linewidth=1)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right")
    return figure
