"""The paper's memory figure: stacked bars, one for each model and card, with the cards' limits."""

import dataclasses
from importlib.util import find_spec
from pathlib import Path

from qlora_jax.plan.memory import Components
from qlora_jax.plan.report import LABELS, Report

_COLOURS = ("#3b4a6b", "#7d8fb3", "#c46a4a", "#e0a458", "#8a5a83", "#5f9e7c", "#b9b9b0")

FORMATS = (".png", ".svg", ".pdf")
"""What the name of a figure's file may end in."""


def check_plot(file: Path) -> None:
    """Checks, before there is anything to draw, that `plot` can write `file`.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: its name ends in none of FORMATS.
    """
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError("A plot needs matplotlib: pip install 'qlora-jax[plots]'.")
    if file.suffix.lower() not in FORMATS:
        raise ValueError(f"a plot is one of {', '.join(FORMATS)}, and {file} is named as none.")


def plot(reports: list[Report], file: str | Path) -> None:
    """Writes the figure.

    Args:
        reports: one bar each, in order.
        file: PNG, SVG or PDF, by its name.

    Raises:
        ModuleNotFoundError, ValueError: as `check_plot` does.
    """
    check_plot(Path(file))
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.8 + 1.1 * len(reports), 4.2), layout="constrained")
    axes = figure.subplots()
    places = range(len(reports))
    bottom = [0.0] * len(reports)
    for field, colour in zip(dataclasses.fields(Components), _COLOURS, strict=True):
        heights = [getattr(item.plan.device, field.name) / 2**30 for item in reports]
        axes.bar(places, heights, 0.62, bottom, color=colour, label=LABELS[field.name])
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    for place, item in zip(places, reports, strict=True):
        axes.text(place, bottom[place], f"{bottom[place]:.1f}", ha="center", va="bottom")
        if item.plan.usable is not None:
            limit = item.plan.usable / 2**30
            axes.plot((place - 0.4, place + 0.4), (limit, limit), color="black", linewidth=1.2)
    # A folder or hub name by its last part: a whole path would leave no room for the bars.
    names = [f"{Path(item.name).name}\n{item.plan.card or 'this device'}" for item in reports]
    axes.set_xticks(list(places), names, fontsize=8)
    axes.set_ylabel("GiB on the device (line: usable)")
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], fontsize=8, frameon=False, loc="outside right upper")
    figure.savefig(file, dpi=110)
