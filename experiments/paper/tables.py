"""A small table that prints on a terminal, in Markdown and as CSV, and a folder of results."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table as RichTable

from qlora_jax.files import write_whole

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """Rows under columns; floats are shown with `digits` decimals, None and NaN as a dash."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    digits: int = 1

    def shown(self, cell: Cell) -> str:
        """A cell as text."""
        if cell is None or (isinstance(cell, float) and math.isnan(cell)):
            return "–"
        return f"{cell:.{self.digits}f}" if isinstance(cell, float) else str(cell)

    def markdown(self) -> str:
        """The table in Markdown; every column but the first is a number's."""
        lines = [self.columns, ("---", *["---:"] * (len(self.columns) - 1))]
        lines += [tuple(self.shown(cell) for cell in row) for row in self.rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def csv(self) -> str:
        """The table as CSV, floats in full."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(["" if cell is None else cell for cell in row] for row in self.rows)
        return buffer.getvalue()

    def rich(self) -> RichTable:
        """The table for a terminal."""
        table = RichTable(title=self.title, title_justify="left")
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="right" if index else "left", no_wrap=index == 0)
        for row in self.rows:
            table.add_row(*(self.shown(cell) for cell in row))
        return table


def write_results(folder: Path, result: dict[str, Any], tables: Sequence[Table]) -> None:
    """`result.json`, one `NAME.csv` per table, and all tables in `tables.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "result.json", json.dumps(result, indent=1) + "\n")
    for table in tables:
        write_whole(folder / f"{table.name}.csv", table.csv())
    text = "\n".join(f"## {table.title}\n\n{table.markdown()}" for table in tables)
    write_whole(folder / "tables.md", text)
