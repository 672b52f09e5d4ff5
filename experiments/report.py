"""What came out of a sweep: read back from its run folders, as a table, a CSV file and a page.

Everything is read from disk, so a report can be made again at any time, and a sweep that was
interrupted and continued reports all its cells.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.cells import Cell
from qlora_jax.data.json_file import read_json_lines
from qlora_jax.files import write_whole

RESULT = "result.json"
ERROR = "error.txt"
METRICS = "metrics.jsonl"
SCORES = {"MMLU": "MMLU, % right", "ROUGE-L": "ROUGE-L, %"}
"""What a finished model is examined in, and what its percents are called."""


@dataclass(frozen=True)
class CellReport:
    """A cell and what its folder holds.

    Attributes:
        cell: the cell.
        status: "finished", "failed", or "not run".
        result: the content of result.json of a finished cell.
        error: of a failed one, in one line.
        train_curve: (step, loss) of the training steps.
        validation_curve: (step, held-out loss).
    """

    cell: Cell
    status: str
    result: dict[str, Any] | None = None
    error: str | None = None
    train_curve: tuple[tuple[int, float], ...] = ()
    validation_curve: tuple[tuple[int, float], ...] = ()

    @property
    def before(self) -> float:
        """Held-out loss of the base model, as this cell stores it."""
        return float(self.result["before"]["loss"]) if self.result else float("nan")

    @property
    def after(self) -> float:
        """Held-out loss after training."""
        return float(self.result["after"]["loss"]) if self.result else float("nan")

    @property
    def scores(self) -> dict[str, float]:
        """In percent, by their names in `SCORES`; of a run that was not examined, none."""
        result = self.result or {}
        shares = {"MMLU": result.get("mmlu", {}).get("micro"), "ROUGE-L": result.get("rouge_l")}
        return {name: 100 * share for name, share in shares.items() if share is not None}


def scores_of(reports: Sequence[CellReport]) -> list[str]:
    """The names of the scores that any of the cells has."""
    return [name for name in SCORES if any(name in report.scores for report in reports)]


def read_cell(cell: Cell, folder: Path) -> CellReport:
    """The report of one cell from its run folder."""
    if (folder / RESULT).is_file():
        try:
            result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
            lines = read_metrics(folder / METRICS)
        except (OSError, ValueError) as error:
            why = f"{RESULT} or {METRICS} is damaged ({error}): delete the folder to run it again"
            return CellReport(cell, "failed", error=why)
        train = tuple((line["step"], line["loss"]) for line in lines if "loss" in line)
        held_out = tuple((line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line)
        return CellReport(cell, "finished", result, None, train, held_out)
    if (folder / ERROR).is_file():
        return CellReport(cell, "failed", error=(folder / ERROR).read_text("utf-8").split("\n")[0])
    return CellReport(cell, "not run")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of the metrics.jsonl of a run that has ended; raises as `read_json_lines` does."""
    return [line for _, line in read_json_lines(path)]


def tell_failure(error: Exception, folder: Path, console: Console) -> None:
    """Says what a run failed of, and writes it into its folder, with the traceback; while the
    error is handled."""
    text = " ".join(str(error).split()) or type(error).__name__
    console.print(f"[red]failed:[/red] {escape(text)}", highlight=False)
    with contextlib.suppress(OSError):  # a full disk
        write_whole(folder / ERROR, f"{text}\n\n{traceback.format_exc()}")


def duration(seconds: float) -> str:
    """`"2 min 05 s"`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def percent(change: float) -> str:
    """`"−12.3 %"`, with a minus sign as wide as the plus."""
    return f"{change:+.1%}".replace("-", "−").replace("%", " %")


def shown_score(report: CellReport, name: str) -> str:
    """A score of a finished cell for a table, "–" where it has none of that name."""
    return f"{report.scores[name]:.1f}" if name in report.scores else "–"


def csv_text(reports: Sequence[CellReport]) -> str:
    """`results.csv`: one line per cell, labels first; a cell without a result has empty figures."""
    labels = list(dict.fromkeys(name for r in reports for name in r.cell.labels))
    figures = [
        "loss_before", "loss_after", "perplexity_before", "perplexity_after", "validation_tokens",
        "steps", "trained_tokens", "tokens_per_second", "seconds", "peak_host_memory_bytes",
        "peak_device_memory_bytes", "adapter_parameters", "base_bytes",
        "mmlu_micro", "mmlu_macro", "rouge_l",
    ]  # fmt: skip
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*labels, "status", *figures, "error"])
    for report in reports:
        row: list[Any] = [report.cell.labels.get(name, "") for name in labels]
        if report.result is None:
            writer.writerow([*row, report.status, *[""] * len(figures), report.error or ""])
            continue
        result = report.result
        known = {
            "loss_before": result["before"]["loss"],
            "loss_after": result["after"]["loss"],
            "perplexity_before": result["before"]["perplexity"],
            "perplexity_after": result["after"]["perplexity"],
            "validation_tokens": result["after"]["tokens"],
            "mmlu_micro": result.get("mmlu", {}).get("micro", ""),
            "mmlu_macro": result.get("mmlu", {}).get("macro", ""),
            "rouge_l": "",
            **result,
        }
        writer.writerow([*row, report.status, *(known[name] for name in figures), ""])
    return buffer.getvalue()


def terminal_matrices(name: str, reports: Sequence[CellReport]) -> list[Table]:
    """The sweep as matrices, datasets × models: of each score where runs were examined, else of the
    held-out loss.

    Of several seeds the mean; variants one below the other; "–" where nothing is finished.
    """
    scores: list[str | None] = [*scores_of(reports)]
    return [_matrix(name, reports, score) for score in scores or [None]]


def _matrix(name: str, reports: Sequence[CellReport], score: str | None) -> Table:
    what = SCORES[score] if score else "held-out loss after training"
    table = Table(title=f"{name}: {what}", title_justify="left")
    models = list(dict.fromkeys(r.cell.labels["model"] for r in reports))
    variants = list(dict.fromkeys(r.cell.variant for r in reports))
    for column in ("dataset", *(["method"] if len(variants) > 1 else [])):
        table.add_column(column)
    for model in models:
        table.add_column(model, justify="right")

    def shown(dataset: str, variant: str, model: str) -> str:
        key = (dataset, variant, model)
        found = [
            r.scores[score] if score else r.after
            for r in reports
            if (r.cell.labels["dataset"], r.cell.variant, r.cell.labels["model"]) == key
            and r.result is not None
            and (score is None or score in r.scores)
        ]
        return f"{sum(found) / len(found):.{1 if score else 3}f}" if found else "–"

    for dataset in dict.fromkeys(r.cell.labels["dataset"] for r in reports):
        for variant in variants:
            row = [dataset, *([variant] if len(variants) > 1 else [])]
            table.add_row(*row, *(shown(dataset, variant, model) for model in models))
    return table


def terminal_table(name: str, reports: Sequence[CellReport]) -> Table:
    """The sweep for a terminal: one line per cell."""
    axes = [a for a in reports[0].cell.labels if a not in ("dataset", "model", "seed")]
    several = len({r.cell.labels["seed"] for r in reports}) > 1
    names = ["dataset", "model", *axes, *(["seed"] if several else [])]
    table = Table(title=f"{name}: held-out loss", title_justify="left")
    for label in names:
        table.add_column(label)
    scores = scores_of(reports)
    for label in ("before", "after", "change", "perplexity", *scores, "tokens/s", "time"):
        table.add_column(label, justify="right", no_wrap=True)
    previous = None
    for report in reports:
        group = (report.cell.labels["dataset"], report.cell.labels["model"])
        if previous is not None and group != previous:
            table.add_section()
        previous = group
        row = [report.cell.labels[label] for label in names]
        if report.result is None:
            table.add_row(*row, f"[red]{report.status}[/red]", *[""] * (5 + len(scores)))
            continue
        result = report.result
        change = report.after / report.before - 1
        table.add_row(
            *row,
            f"{report.before:.4f}",
            f"[bold]{report.after:.4f}[/bold]",
            f"[{'green' if change < 0 else 'red'}]{percent(change)}[/]",
            f"{result['before']['perplexity']:.1f} → {result['after']['perplexity']:.1f}",
            *(shown_score(report, name) for name in scores),
            f"{result['tokens_per_second']:,.0f}",
            duration(result["seconds"]),
        )
    return table
