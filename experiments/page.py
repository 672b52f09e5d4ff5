"""A sweep as one HTML page that needs nothing else: no script, no font, no network.

From top to bottom: what was run, the datasets × scales matrix (held-out loss before → after, one
row per variant), those of scores where runs were examined, the loss curves in the same arrangement,
and every cell with its figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from experiments.charts import Change, Line, change_chart, loss_panel, y_range
from experiments.report import CellReport, duration, percent, scores_of, shown_score
from qlora_jax.cli.arguments import readable

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1a; --soft: #6b6a66; --line: #e4e2dc; --card: #fff;
  --page: #f7f6f3; --good: #1a7f4b; --bad: #c0392b;
  --c0: #2f6fde; --c1: #e0762b; --c2: #149a8d; --c3: #9a55c9; --c4: #c43d6b; --c5: #7d7a2a; }
@media (prefers-color-scheme: dark) { :root { --ink: #ecebe7; --soft: #a3a19b; --line: #3a3935;
  --card: #23221f; --page: #191816; --good: #5cc98d; --bad: #f08a7c;
  --c0: #7aa7ff; --c1: #ffa45e; --c2: #4fd0c2; --c3: #c79af0; --c4: #f284a6; --c5: #cbc75f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1200px; padding: 2rem 1.25rem 4rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; letter-spacing: -.01em; }
h2 { font-size: 1.1rem; margin: 2.4rem 0 .2rem; }
p { margin: .2rem 0 1rem; color: var(--soft); max-width: 75ch; }
code { font: .88em ui-monospace, Menlo, Consolas, monospace; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: .85rem; }
.grid-table { width: 100%; border-spacing: 8px; border-collapse: separate; margin: 0 -8px; }
.grid-table th { padding: 0 .4rem; vertical-align: middle; width: 1%; white-space: nowrap; }
.grid-table tr:first-child th { width: auto; }
.grid-table td { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: .7rem .8rem; vertical-align: top; min-width: 300px; }
.row { display: flex; gap: .55rem; align-items: baseline; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.row .name { color: var(--soft); flex: 1; } .row b { font-weight: 650; }
.row .change { min-width: 4em; text-align: right; }
.down { color: var(--good); } .up { color: var(--bad); }
.swatch { display: inline-block; width: .7em; height: .7em; border-radius: 50%; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; color: var(--soft);
  font-size: .88rem; }
.list { width: 100%; font-size: .87rem; font-variant-numeric: tabular-nums; background: var(--card);
  border: 1px solid var(--line); border-radius: 10px; border-collapse: separate;
  border-spacing: 0; }
.list th, .list td { padding: .4rem .7rem; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
.list tr:last-child td { border-bottom: 0; } .list .number { text-align: right; }
.list .why { white-space: normal; color: var(--bad); }
svg { display: block; width: 100%; height: auto; }
svg.change { margin-top: .4rem; }
svg text { fill: var(--soft); font-size: 10px; } svg .grid { stroke: var(--line); }
svg path { fill: none; } svg .train { stroke-width: 1.2; opacity: .45; }
svg .held { stroke-width: 2; } svg .bar { stroke-width: 2.5; opacity: .5; }
svg circle.hollow { fill: var(--card); stroke-width: 1.8; }
"""
_COLORS = 6


def render(name: str, reports: Sequence[CellReport], *, command: str, about: str) -> str:
    """The page.

    Args:
        name: of the sweep.
        reports: its cells, finished or not, in their order.
        command: what was typed.
        about: one line on machine and versions.
    """
    datasets = list(dict.fromkeys(r.cell.labels["dataset"] for r in reports))
    models = list(dict.fromkeys(r.cell.labels["model"] for r in reports))
    variants = list(dict.fromkeys(r.cell.variant for r in reports))
    color = {variant: index % _COLORS for index, variant in enumerate(variants)}
    grid = {
        (d, m): [
            r for r in reports if r.cell.labels["dataset"] == d and r.cell.labels["model"] == m
        ]
        for d in datasets
        for m in models
    }
    rows = {d: [r for m in models for r in grid[d, m]] for d in datasets}
    # Small and large scales of one dataset share their axes, or they could not be compared.
    spans = {d: _span(rows[d]) for d in datasets}
    heights = {d: y_range([_line(r, color) for r in rows[d]]) for d in datasets}
    matrix = _table(datasets, models, lambda d, m: _matrix_cell(grid[d, m], color, spans[d]))
    curves = _table(
        datasets,
        models,
        lambda d, m: loss_panel(
            [_line(r, color) for r in grid[d, m] if r.result], heights[d], f"{d}, {m}: loss"
        ),
    )
    finished = sum(r.result is not None for r in reports)
    unfinished = f", {len(reports) - finished} not finished" if finished < len(reports) else ""
    swatches = "".join(
        f'<span><i class="swatch" style="background:var(--c{color[v]})"></i> {escape(v)}</span>'
        for v in variants
    )
    legend = f'<div class="legend">{swatches}</div>'
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(name)}: QLoRA sweep</title><style>{_STYLE}{_color_rules()}</style></head><body>
<h1>{escape(name)}</h1>
<p>{finished} of {len(reports)} cells finished{unfinished}: {len(datasets)} datasets ×
{len(models)} models × {len(reports) // max(1, len(datasets) * len(models))} runs. {escape(about)}
<br><code>{escape(command)}</code></p>
{legend}
<h2>Held-out loss, before → after</h2>
<p>Nats per trained token on the validation rows; a mean over seeds where there are several. The
percentage is the change. In the chart a hollow dot is before, a filled one after; a dataset's cells
share one scale.</p>
<div class="scroll">{matrix}</div>
{_scores(datasets, models, grid)}<h2>Loss over steps</h2>
<p>Lines with dots are held-out loss, faint ones the smoothed training loss.</p>
<div class="scroll">{curves}</div>
<h2>Every cell</h2>
<div class="scroll">{_list(reports)}</div>
</body></html>
"""


def _scores(
    datasets: Sequence[str], models: Sequence[str], grid: dict[tuple[str, str], list[CellReport]]
) -> str:
    """A matrix of each examination, empty where there was none."""
    reports = [r for cell in grid.values() for r in cell]
    return "".join(
        f"""{_ABOUT[score](next(r.result for r in reports if r.result and score in r.scores))}
<div class="scroll">{_table(datasets, models, lambda d, m, s=score: _means(grid[d, m], s))}</div>
"""
        for score in scores_of(reports)
    )


def _means(reports: Sequence[CellReport], score: str) -> str:
    runs = [r for r in reports if score in r.scores]
    lines = []
    for variant in dict.fromkeys(r.cell.variant for r in runs):
        found = [r.scores[score] for r in runs if r.cell.variant == variant]
        lines.append(
            f'<div class="row"><span class="name">{escape(variant)}</span>'
            f"<b>{sum(found) / len(found):.1f}</b></div>"
        )
    return "".join(lines) or "–"


def _about_mmlu(result: Mapping[str, Any]) -> str:
    about = result["mmlu"]
    return f"""<h2>MMLU, % of questions answered rightly</h2>
<p>{about["shots"]}-shot, {about["questions"]:,} questions of the {escape(about["split"])} split,
each counted once; a guess is right in 25 %.</p>"""


def _about_rouge(_: Mapping[str, Any]) -> str:
    return """<h2>ROUGE-L, % of held-out answers</h2>
<p>The finished model's greedy answers to the prompts of held-out rows, beside the rows' own: the
mean F-measure of their longest common subsequences of words, with stemming.</p>"""


_ABOUT = {"MMLU": _about_mmlu, "ROUGE-L": _about_rouge}


def _color_rules() -> str:
    return "".join(
        f"svg .c{i} {{ stroke: var(--c{i}) }} svg circle.c{i}, svg .c{i} circle:not(.hollow) "
        f"{{ fill: var(--c{i}) }}\n"
        for i in range(_COLORS)
    )


def _table(datasets: Sequence[str], models: Sequence[str], cell: object) -> str:
    head = "".join(f"<th>{escape(model)}</th>" for model in models)
    body = "".join(
        f"<tr><th>{escape(dataset)}</th>"
        + "".join(f"<td>{cell(dataset, model)}</td>" for model in models)  # type: ignore[operator]
        + "</tr>"
        for dataset in datasets
    )
    return f'<table class="grid-table"><tr><th></th>{head}</tr>{body}</table>'


def _matrix_cell(
    reports: Sequence[CellReport], color: dict[str, int], span: tuple[float, float]
) -> str:
    lines, changes = [], []
    for variant in dict.fromkeys(r.cell.variant for r in reports):
        runs = [r for r in reports if r.cell.variant == variant]
        done = [r for r in runs if r.result]
        swatch = f'<i class="swatch" style="background:var(--c{color[variant]})"></i>'
        label = f'<span class="name">{escape(variant)}</span>'
        if not done:
            state = runs[0].status
            lines.append(f'<div class="row">{swatch}{label}<span class="up">{state}</span></div>')
            continue
        before = sum(r.before for r in done) / len(done)
        after = sum(r.after for r in done) / len(done)
        change = after / before - 1
        kind = "down" if change < 0 else "up"
        lines.append(
            f'<div class="row">{swatch}{label}<span>{before:.3f} → <b>{after:.3f}</b></span>'
            f'<span class="change {kind}">{percent(change)}</span></div>'
        )
        changes.append(Change(variant, color[variant], before, after))
    return "".join(lines) + (change_chart(changes, span) if changes else "")


def _span(reports: Sequence[CellReport]) -> tuple[float, float]:
    values = [v for r in reports if r.result for v in (r.before, r.after)]
    return (min(values), max(values)) if values else (0.0, 1.0)


def _line(report: CellReport, color: dict[str, int]) -> Line:
    seed = report.cell.labels["seed"]
    name = f"{report.cell.variant}, seed {seed}"
    return Line(name, color[report.cell.variant], report.train_curve, report.validation_curve)


def _list(reports: Sequence[CellReport]) -> str:
    axes = [a for a in reports[0].cell.labels if a not in ("dataset", "model", "seed")]
    names = ["dataset", "model", *axes, "seed"]
    scores = scores_of(reports)
    numbers = ["before", "after", "perplexity", *scores, "tokens/s", "adapters", "base", "time"]
    head = "".join(f"<th>{escape(n)}</th>" for n in names)
    head += "".join(f'<th class="number">{n}</th>' for n in numbers)
    body = []
    for report in reports:
        cells = "".join(f"<td>{escape(report.cell.labels[n])}</td>" for n in names)
        if report.result is None:
            why = escape(report.error or report.status)
            body.append(f'<tr>{cells}<td class="why" colspan="{len(numbers)}">{why}</td></tr>')
            continue
        result = report.result
        figures = [
            f"{report.before:.4f}",
            f"{report.after:.4f}",
            f"{result['before']['perplexity']:.2f} → {result['after']['perplexity']:.2f}",
            *(shown_score(report, name) for name in scores),
            f"{result['tokens_per_second']:,.0f}",
            f"{result['adapter_parameters']:,}",
            readable(result["base_bytes"]),
            duration(result["seconds"]),
        ]
        cells += "".join(f'<td class="number">{figure}</td>' for figure in figures)
        body.append(f"<tr>{cells}</tr>")
    return f'<table class="list"><tr>{head}</tr>{"".join(body)}</table>'
