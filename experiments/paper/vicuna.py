"""Table 6: the Vicuna questions, percent of ChatGPT's score, in both reading orders.

    python -m experiments.paper.vicuna [--data EVAL_FOLDER] [--out runs/paper/vicuna]

A system's total score over ChatGPT's in the same judgements; rows whose text held no scores are
counted and left out. Which answer was read first is taken from the answers' ids, never from a
file's name. Seconds; writes result.json, the table as CSV and Markdown, and a PNG figure.
"""

from __future__ import annotations

import argparse
import re
import sys

from rich.console import Console

from experiments.cli import run_command
from experiments.paper.figures import can_draw, percent_figure
from experiments.paper.judged import (
    REFERENCE,
    TABLE_6,
    labelled_ratings,
    make_rating_parser,
    own_files,
    rating_files,
    system_label,
)
from experiments.paper.tables import Table, write_results
from qlora_jax.evaluate import Percent, Ratings, percent_of


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = make_rating_parser("vicuna", __doc__)
    parser.add_argument("--reference", help="whose score is 100 (ChatGPT's)")
    return parser


def reference_of(ratings: Ratings, reference: str | None) -> str:
    """The system whose score is 100; ChatGPT is found by its label, whatever the files call it."""
    if reference is not None:
        return reference
    return next((name for name in ratings.systems if system_label(name) == REFERENCE), REFERENCE)


def percent_table(found: dict[str, Percent], reference: str) -> Table:
    """Our three numbers of each system, best first, and the paper's, which are of ChatGPT's score.

    Args:
        found: system → its percent.
        reference: the label of the system that they are percents of.
    """
    papers = TABLE_6 if reference == REFERENCE else {}
    rows = []
    for name, percent in found.items():
        paper = papers.get(system_label(name), (None, None, None))
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
        f"{reference} first: paper",
        f"{reference} first",
        "system first: paper",
        "system first",
        "mean: paper",
        "mean",
        "±",
        "judgements",
    )
    name = re.sub(r"[^a-z0-9.]+", "-", reference.lower())
    title = (
        f"{'Table 6: percent' if papers else 'Percent'} of {reference}'s score, Vicuna questions"
    )
    return Table(f"percent-of-{name}", title, columns, tuple(rows))


def run(options: argparse.Namespace, console: Console) -> int:
    """Sums the scores, prints the table and writes OUT."""
    if options.ratings is None:
        files = rating_files(options.data, "vicuna/relative-gpt-3.5")
    else:
        files = own_files(options.ratings)
    ratings = labelled_ratings(files, reread=options.reread)
    reference = reference_of(ratings, options.reference)
    found = percent_of(ratings.ratings, reference)
    table = percent_table(found, system_label(reference))
    result = {
        "reference": system_label(reference),
        "percent": {system_label(name): percent._asdict() for name, percent in found.items()},
        "paper": TABLE_6 if system_label(reference) == REFERENCE else {},
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
        percent_figure(table.title, found, system_label(reference)).savefig(
            options.out / f"{table.name}.png"
        )
    else:
        console.print("no figure: it needs pip install 'qlora-jax[plots]'", markup=False)
    console.print(f"written to {options.out}", highlight=False)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 finished, 2 refused."""
    return run_command(make_parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
