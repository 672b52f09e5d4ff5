"""Table 6: the Vicuna questions, percent of ChatGPT's score, in both reading orders.

    python -m experiments.paper.vicuna [--data EVAL_FOLDER] [--out runs/paper/vicuna]

A system's total score over ChatGPT's in the same judgements; rows whose text held no scores are
counted and left out. Which answer was read first is taken from the answers' ids, never from a
file's name. Seconds; writes result.json, the table as CSV and Markdown, and a PNG figure.
"""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from experiments.cli import run_command
from experiments.paper.figures import can_draw, percent_figure
from experiments.paper.judged import (
    REFERENCE,
    TABLE_6,
    make_rating_parser,
    own_files,
    rating_files,
    system_label,
)
from experiments.paper.tables import Table, write_results
from qlora_jax.evaluate import Percent, Ratings, percent_of, read_ratings

TITLE = "Table 6: percent of ChatGPT's score, Vicuna questions"


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = make_rating_parser("vicuna", __doc__)
    parser.add_argument("--reference", help="whose score is 100 (ChatGPT's)")
    return parser


def percents(ratings: Ratings, reference: str | None) -> dict[str, Percent]:
    """By system, best first; ChatGPT is found by its label, whatever the files call it."""
    if reference is None:
        names = [name for name in ratings.systems if system_label(name) == REFERENCE]
        reference = names[0] if names else REFERENCE
    return percent_of(ratings.ratings, reference)


def percent_table(found: dict[str, Percent]) -> Table:
    """The paper's three numbers and ours."""
    rows = []
    for name, percent in found.items():
        paper = TABLE_6.get(system_label(name), (None, None, None))
        rows.append(
            (
                system_label(name),
                paper[0],
                percent.reference_first,
                paper[1],
                percent.system_first,
                paper[2],
                percent.mean,
                percent.half_width,
                percent.judgements,
            )
        )
    columns = (
        "system",
        "ChatGPT first: paper",
        "ChatGPT first",
        "system first: paper",
        "system first",
        "mean: paper",
        "mean",
        "±",
        "judgements",
    )
    return Table("percent-of-chatgpt", TITLE, columns, tuple(rows))


def run(options: argparse.Namespace, console: Console) -> int:
    """Sums the scores, prints the table and writes OUT."""
    if options.ratings is None:
        files = rating_files(options.data, "vicuna/relative-gpt-3.5")
    else:
        files = own_files(options.ratings)
    ratings = read_ratings(files, reread=options.reread)
    found = percents(ratings, options.reference)
    table = percent_table(found)
    result = {
        "percent": {system_label(name): percent._asdict() for name, percent in found.items()},
        "paper": TABLE_6,
        "judgements": len(ratings.ratings),
        "unreadable": ratings.unreadable,
    }
    write_results(options.out, result, [table])
    console.print(table.rich())
    console.print(
        f"{len(ratings.ratings)} judgements, {sum(ratings.unreadable.values())} more without "
        f"readable scores (in {len(ratings.unreadable)} files)",
        highlight=False,
    )
    if can_draw():
        percent_figure(TITLE, found).savefig(options.out / "percent-of-chatgpt.png")
    else:
        console.print("no figure: it needs pip install 'qlora-jax[plots]'", markup=False)
    console.print(f"written to {options.out}", highlight=False)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 finished, 2 refused."""
    return run_command(make_parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
