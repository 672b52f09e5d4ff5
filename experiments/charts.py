"""The two charts of a sweep's page, as inline SVG: loss curves, and before → after on one scale.

Nothing here draws pixels or needs a script: an SVG is text, its colours are the page's CSS
variables (so it follows light and dark), and its `<title>` elements are the tooltips.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """One run's curves: `color` is the index of its variant."""

    name: str
    color: int
    train: Points
    validation: Points


@dataclass(frozen=True)
class Change:
    """One run's held-out loss before and after."""

    name: str
    color: int
    before: float
    after: float


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) inside [low, high], about `count`."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def smoothed(points: Points, weight: float = 0.8) -> list[tuple[float, float]]:
    """An exponential mean with the start's bias taken out: single steps' losses are noise."""
    mean, norm, result = 0.0, 0.0, []
    for x, y in points:
        mean = weight * mean + (1 - weight) * y
        norm = weight * norm + (1 - weight)
        result.append((x, mean / norm))
    return result


def y_range(lines: Sequence[Line]) -> tuple[float, float]:
    """The losses that a row of panels has to show, with a margin."""
    values = [y for line in lines for _, y in [*smoothed(line.train), *line.validation]]
    values = [v for v in values if math.isfinite(v)]
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    margin = max(0.05 * (high - low), 0.01 * abs(high), 1e-3)
    return low - margin, high + margin


def loss_panel(lines: Sequence[Line], bounds: tuple[float, float], label: str) -> str:
    """Loss over steps: faint lines for (smoothed) training, strong dotted ones for held-out."""
    width, height, left, right, top, bottom = 340, 210, 38, 8, 8, 26
    low, high = bounds
    most = max((x for line in lines for x, _ in [*line.train, *line.validation]), default=1) or 1

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + x / most * (width - left - right),
            height - bottom - (y - low) / (high - low) * (height - top - bottom),
        )

    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label, quote=True)}">'
    ]
    for value in ticks(low, high):
        _, y = at(0, value)
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{left - 6}" y="{y + 3.5:.1f}" text-anchor="end">{value:g}</text>'
        )
    for value in ticks(0, most):
        x, _ = at(value, low)
        parts.append(f'<text x="{x:.1f}" y="{height - 10}" text-anchor="middle">{value:g}</text>')
    for line in lines:
        name = escape(line.name)
        train = _path(smoothed(line.train), at)
        if train:
            parts.append(
                f'<path class="train c{line.color}" d="{train}">'
                f"<title>{name}, training</title></path>"
            )
    for line in lines:
        name = escape(line.name)
        held_out = _path(line.validation, at)
        if held_out:
            parts.append(f'<path class="held c{line.color}" d="{held_out}"/>')
        for x, y in line.validation:
            if math.isfinite(y):
                px, py = at(x, y)
                parts.append(
                    f'<circle class="c{line.color}" cx="{px:.1f}" cy="{py:.1f}" r="3">'
                    f"<title>{name}: held-out {y:.4f} at step {x:g}</title></circle>"
                )
    return "".join([*parts, "</svg>"])


def change_chart(changes: Sequence[Change], bounds: tuple[float, float]) -> str:
    """One row per run on a common scale: a hollow dot before, a filled one after."""
    width, row = 400, 18
    low, high = bounds
    span = (high - low) or 1.0

    def at(value: float) -> float:
        return 8 + (value - low) / span * (width - 16)

    height = row * len(changes) + 4
    parts = [f'<svg class="change" viewBox="0 0 {width} {height}" role="img" aria-label="change">']
    for index, change in enumerate(changes):
        y = row * index + row / 2 + 2
        before, after = at(change.before), at(change.after)
        parts.append(
            f'<g class="c{change.color}"><title>{escape(change.name)}: {change.before:.4f} before, '
            f"{change.after:.4f} after</title>"
            f'<line class="bar" x1="{before:.1f}" x2="{after:.1f}" y1="{y}" y2="{y}"/>'
            f'<circle class="hollow" cx="{before:.1f}" cy="{y}" r="4"/>'
            f'<circle cx="{after:.1f}" cy="{y}" r="5"/></g>'
        )
    return "".join([*parts, "</svg>"])


def _path(points: Points, at: object) -> str:
    """An SVG path; a value that is not finite breaks the line."""
    steps, pen = [], "M"
    for x, y in points:
        if not math.isfinite(y):
            pen = "M"
            continue
        px, py = at(x, y)  # type: ignore[operator]
        steps.append(f"{pen}{px:.1f} {py:.1f}")
        pen = "L"
    return "".join(steps) if len(steps) > 1 else ""
