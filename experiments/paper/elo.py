"""Tables 1 and 7: Elo ratings from the pairwise judgements, with win matrices and agreement.

    python -m experiments.paper.elo [--data EVAL_FOLDER] [--orders 10000] [--out runs/paper/elo]

K = 32, everyone starts at 1000, the mean of 10,000 random orders of the matches. Two columns, for
two notions of a match: every judgement, and every question (both reading orders averaged); "95% of
orders" is how far the order alone moves a rating, "±" the error of the mean. Half a minute on two
cores, most of it for the 953 OA questions; these are left out where their ratings are not at hand.

`--length 520` stops every order after that many matches, `--reread` reads the judge's text again
where the released score is -1. Writes result.json, tables as CSV and Markdown, and PNG figures.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
from rich.console import Console

from experiments.cli import run_command
from experiments.paper.figures import can_draw, elo_figure, win_figure
from experiments.paper.judged import (
    TABLE_1,
    TABLE_7,
    labelled_ratings,
    make_rating_parser,
    own_files,
    rating_files,
    system_label,
)
from experiments.paper.tables import Table, write_results
from qlora_jax.cli.arguments import seed
from qlora_jax.evaluate import (
    Elo,
    MatchUnit,
    Ratings,
    WinMatrix,
    elo,
    make_matches,
    order_agreement,
    rank_agreement,
    win_matrix,
)

BENCHMARKS = {
    "vicuna": ("vicuna/pairwise", "Table 1: Elo, Vicuna questions", TABLE_1),
    "oa": ("oa", "Table 7: Elo, OA questions", TABLE_7),
}


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = make_rating_parser("elo", __doc__)
    parser.add_argument("--orders", type=int, default=10_000, help="random orders to play")
    parser.add_argument("--length", type=int, help="matches to play of each order (all)")
    parser.add_argument("--k", type=float, default=32.0)
    parser.add_argument("--seed", type=seed, default=0)
    return parser


def elo_table(name: str, title: str, published: dict[str, int], by_unit: dict[str, Elo]) -> Table:
    """The paper's numbers and ours, both notions of a match."""
    columns: tuple[str, ...] = ("system", "paper")
    for unit in by_unit:
        columns += (f"per {unit}", "±", "95% of orders", "Δ paper")
    first = next(iter(by_unit.values()))
    rows = []
    for index in sorted(range(len(first.systems)), key=lambda i: -first.mean[i]):
        label = system_label(first.systems[index])
        row: list[Any] = [label, published.get(label)]
        for table in by_unit.values():
            low, high = table.interval()[:, index]
            mean = float(table.mean[index])
            paper = published.get(label)
            row += [
                mean,
                1.96 * float(table.standard_error[index]),
                f"{low:.0f} to {high:.0f}",
                None if paper is None else f"{mean - paper:+.1f}",
            ]
        rows.append(tuple(row))
    return Table(f"elo-{name}", title, columns, tuple(rows))


def win_table(name: str, matrix: WinMatrix, order: list[int]) -> Table:
    """Percent of the points that the row's system took from the column's."""
    labels = [system_label(matrix.systems[i]) for i in order]
    rows = tuple(
        (label, *(100 * share for share in matrix.share[i, order].tolist()))
        for label, i in zip(labels, order, strict=True)
    )
    return Table(f"wins-{name}", f"Percent won against, {name}", ("system", *labels), rows, 0)


def benchmark(
    name: str,
    title: str,
    files: list[Path],
    published: dict[str, int],
    options: argparse.Namespace,
    console: Console,
) -> tuple[dict[str, Any], list[Table], dict[str, float]]:
    """One benchmark: its part of result.json, its tables, and the mean rating of every system."""
    ratings = labelled_ratings(files, reread=options.reread)
    by_unit = {
        unit: elo(
            make_matches(ratings.ratings, unit),
            k=options.k,
            orders=options.orders,
            length=options.length,
            seed=options.seed,
        )
        for unit in get_args(MatchUnit)
    }
    played = by_unit["judgement"]
    matrix = win_matrix(ratings.ratings)
    order = np.argsort(-played.mean).tolist()
    tables = [elo_table(name, title, published, by_unit), win_table(name, matrix, order)]
    for table in tables:
        console.print(table.rich())
    unreadable = sum(ratings.unreadable.values())
    console.print(
        f"{len(ratings.ratings)} judgements, {unreadable} more without a readable score",
        highlight=False,
    )
    result: dict[str, Any] = {
        "judgements": len(ratings.ratings),
        "unreadable": ratings.unreadable,
        "elo": {unit: elo_result(table, published) for unit, table in by_unit.items()},
    }
    if judged_twice(ratings):
        kappa, pairs = order_agreement(ratings.ratings)
        result["order_agreement"] = {"fleiss_kappa": kappa, "pairs": pairs}
        console.print(
            f"the two reading orders agree with Fleiss' κ {kappa:.2f} on {pairs} questions × pairs",
            highlight=False,
        )
    if can_draw():
        options.out.mkdir(parents=True, exist_ok=True)
        elo_figure(title, played, published).savefig(options.out / f"elo-{name}.png")
        win_figure(tables[1].title, matrix, order).savefig(options.out / f"wins-{name}.png")
    labels = map(system_label, played.systems)
    return result, tables, dict(zip(labels, played.mean.tolist(), strict=True))


def elo_result(table: Elo, published: dict[str, int]) -> dict[str, Any]:
    """Every system's numbers, for result.json."""
    return {
        system_label(system): {
            "mean": float(table.mean[i]),
            "standard_error": float(table.standard_error[i]),
            "interval_95": table.interval()[:, i].tolist(),
            "paper": published.get(system_label(system)),
        }
        for i, system in enumerate(table.systems)
    }


def judged_twice(ratings: Ratings) -> bool:
    """Whether some question was judged in both orders for the same two systems."""
    seen = {(r.question, r.first, r.second) for r in ratings.ratings}
    return any((question, second, first) in seen for question, first, second in seen)


def run(options: argparse.Namespace, console: Console) -> int:
    """Plays the matches, prints the tables and writes OUT."""
    result: dict[str, Any] = {}
    tables: list[Table] = []
    rankings: list[dict[str, float]] = []
    chosen: dict[str, tuple[str, list[Path], dict[str, int]]] = {}
    if options.ratings is not None:
        chosen["own"] = ("Elo", own_files(options.ratings), {})
    else:
        chosen = {
            name: (title, rating_files(options.data, folder), published)
            for name, (folder, title, published) in BENCHMARKS.items()
            if name == "vicuna" or (options.data / "ratings-gpt4" / folder).is_dir()
        }
        if "oa" not in chosen:
            console.print(f"{options.data} has no OA ratings: Table 7 is left out.")
    for name, (title, files, published) in chosen.items():
        result[name], made, ranking = benchmark(name, title, files, published, options, console)
        tables += made
        rankings.append(ranking)
    if len(rankings) == 2:
        agreement = rank_agreement(*rankings)
        result["benchmarks_agree"] = agreement._asdict()
        console.print(
            f"the two benchmarks rank {agreement.systems} systems with Kendall's τ "
            f"{agreement.kendall_tau:.2f}, Spearman's ρ {agreement.spearman_rho:.2f}",
            highlight=False,
        )
    write_results(options.out, result, tables)
    if not can_draw():
        console.print("no figures: they need pip install 'qlora-jax[plots]'", markup=False)
    console.print(f"written to {options.out}", highlight=False)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 finished, 2 refused."""
    return run_command(make_parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
