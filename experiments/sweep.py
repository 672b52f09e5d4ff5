"""Finetune every cell of datasets × models × options × seeds, and report them side by side.

With no arguments: configs/embedded.yaml, two tiny pretrained Llamas × the embedded datasets ×
{QLoRA, 16-bit LoRA}, under five minutes on two cores and without a network.

    python -m experiments.sweep my.yaml --seeds 0 1 2
    python -m experiments.sweep --models stdlib-4m --axis lora.r=4,16,64 --set train.steps=50
    python -m experiments.sweep --preset paper-table5 --dry-run       # the paper's sweeps, and
    python -m experiments.sweep --preset paper-table5 --scale tiny    # what they would cost

A sweep's file holds the sections of a single run (model, data, quant, lora, train, devices) for
what all cells share, and lists of what differs: models, datasets, seeds, axes (any option), rules
(options for some cells only); see experiments/cells.py and experiments/configs/.

Each cell is a run folder, OUT/CELL, as `python -m experiments.finetune` makes it. The same command
again skips finished cells, resumes a killed one to the same bits, and tries failed ones again; a
cell that fails is reported and the rest goes on. Several processes may work on one OUT: each cell
is taken by one of them. At the end: a table here, OUT/results.csv, and OUT/report.html, one
self-contained page with the datasets × scales matrix and the loss curves.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import gc
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.markup import escape

from experiments.cells import Cell, Sweep, build_sweep
from experiments.checks import check, with_own_adapters
from experiments.cli import (
    CONFIGS,
    interrupted,
    keep_compiled_programs,
    make_console,
    read_settings,
    refuse,
    termination_interrupts,
    wandb_callbacks,
)
from experiments.dry_run import CARDS as DRY_RUN_CARDS
from experiments.dry_run import dry_run
from experiments.folders import check_writable, delete_run
from experiments.page import render
from experiments.presets import PRESETS, QUESTIONS, ROWS, preset
from experiments.report import (
    CellReport,
    csv_text,
    duration,
    read_cell,
    tell_failure,
    terminal_matrices,
    terminal_table,
)
from experiments.run import dated, execute, is_finished
from experiments.tree import Tree, from_yaml, read_yaml
from pallas_kernels.cards import CARDS, find_card
from qlora_jax.cli.arguments import seed
from qlora_jax.files import write_whole
from qlora_jax.train.run_folder import locked_run_folder


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "config", nargs="?", type=Path, metavar="FILE",
        help="YAML file of the sweep (configs/embedded.yaml)",
    )  # fmt: skip
    parser.add_argument("--preset", metavar="NAME", help=f"instead: {', '.join(PRESETS)}")
    parser.add_argument(
        "--scale", choices=("full", "tiny"),
        help="of a preset: the paper's models, or the embedded ones on this machine (full)",
    )  # fmt: skip
    parser.add_argument(
        "--rows", type=Path, metavar="FOLDER",
        help="real rows for --scale tiny, where it has them (../shared/data/instruct)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder of all (runs/NAME)")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="instead of the file's")
    parser.add_argument("--datasets", nargs="+", metavar="DATA", help="instead of the file's")
    parser.add_argument("--seeds", nargs="+", type=seed, metavar="N", help="instead of the file's")
    parser.add_argument(
        "--axis", action="append", default=[], metavar="KEY=V1,V2",
        help="an axis of any option's values; repeatable, the last about an option counts",
    )  # fmt: skip
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="set any option in every cell; repeatable, the last about an option counts",
    )  # fmt: skip
    parser.add_argument("--wandb", metavar="PROJECT", help="log to Weights & Biases as well")
    parser.add_argument("--only", metavar="PATTERN", help="cells whose name matches, as in *qlora*")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--dry-run", action="store_true",
        help="list the cells with their tokens, FLOPs, memory and hours, and stop",
    )  # fmt: skip
    instead.add_argument("--report-only", action="store_true", help="run nothing, report again")
    instead.add_argument("--overwrite", action="store_true", help="delete the cells' earlier runs")
    parser.add_argument(
        "--cards", nargs="+", metavar="CARD",
        help=f"with --dry-run: hours on these ({' '.join(DRY_RUN_CARDS)}; of {', '.join(CARDS)})",
    )  # fmt: skip
    parser.add_argument(
        "--compile", action="store_true", help="with --dry-run: memory from the compiler"
    )
    return parser


def read_sweep(options: argparse.Namespace) -> Sweep:
    """The sweep that the command line describes; ValueError or OSError where there is none."""
    file, where = _tree(options)
    tree = dict(file)
    for name in ("models", "datasets", "seeds"):
        chosen = getattr(options, name)
        if chosen is not None:
            tree[name] = _chosen(tree.get(name), chosen)
    settings = read_settings(options.set)
    axes = read_settings(options.axis, settings, "--axis")
    own = {key: _values(key, value) for key, value in axes.items() if key not in settings}
    given = tree.get("axes") or {}
    if isinstance(given, dict):  # anything else is refused below
        tree["axes"] = {**given, **own}
    # A preset's rules are for every model and dataset of the paper.
    sweep = build_sweep(tree, where, settings, file if options.preset is None else None)
    if options.only is None:
        return sweep
    cells = tuple(c for c in sweep.cells if fnmatch.fnmatch(c.name.lower(), options.only.lower()))
    if not cells:
        names = ", ".join(c.name for c in sweep.cells[:4])
        raise ValueError(f"--only {options.only!r} matches no cell; cells are named {names} …")
    return replace(sweep, cells=cells)


def _tree(options: argparse.Namespace) -> tuple[Tree, str]:
    """The tree that a file or a preset gives, and what to call it."""
    if options.preset is None:
        file = options.config or CONFIGS / "embedded.yaml"
        return read_yaml(file), str(file)
    if options.config is not None:
        raise ValueError(f"give either {options.config} or --preset {options.preset}.")
    scale = options.scale or "full"
    tree = preset(
        options.preset,
        scale,
        out=None if options.dry_run else _out(options, f"{options.preset}-{scale}"),
        rows=options.rows or ROWS,
        questions=QUESTIONS,
    )
    return tree, f"the preset {options.preset}"


def _refuse_idle(options: argparse.Namespace) -> None:
    """ValueError for an option that does nothing without another, which is not given."""
    for name, other in (
        ("scale", "preset"),
        ("rows", "preset"),
        ("cards", "dry_run"),
        ("compile", "dry_run"),
    ):
        if getattr(options, name) and not getattr(options, other):
            raise ValueError(f"--{name} is given, but belongs to --{other.replace('_', '-')}.")


def _values(key: str, given: Any) -> list[Any]:
    """What `--axis KEY=V1,V2` lists; one value is a list of one."""
    if isinstance(given, str):
        given = from_yaml(f"[{given}]", f"the value of --axis {key!r}")
    return given if isinstance(given, list) else [given]


def _out(options: argparse.Namespace, name: str) -> Path:
    return options.out or Path("runs") / name


def _chosen(given: Any, names: Sequence[Any]) -> Any:
    """The file's own sections for names that it describes, else the bare names."""
    if isinstance(given, dict):
        return {name: given.get(name, name) for name in names}
    return list(names)


def with_adapters(sweep: Sweep) -> Sweep:
    """The sweep with the adapters that `python -m experiments.finetune` gives its models.

    Raises:
        ValueError, OSError: there is no such model, or its config.json is damaged.
    """
    cells = (replace(c, run=with_own_adapters(c.run, c.own_lora)) for c in sweep.cells)
    return replace(sweep, cells=tuple(cells))


def plan(sweep: Sweep, out: Path) -> list[Cell]:
    """The cells still to run, once everything that they read has been looked at.

    Raises:
        ValueError, OSError: a cell cannot run, or its folder holds another run.
    """
    todo = []
    for cell in sweep.cells:
        run = dated(cell.run, out / cell.name)
        if not is_finished(run, out / cell.name):
            todo.append((cell, run))
    for _, run in todo:
        check(run)
    return [cell for cell, _ in todo]


def run_cell(cell: Cell, folder: Path, console: Console, wandb: str | None = None) -> None:
    """Runs one cell; what goes wrong with it is written down and goes no further."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked_run_folder(folder))
        except (RuntimeError, OSError) as error:  # another process works on it: not ours to write
            console.print(f"[yellow]left alone:[/yellow] {escape(str(error))}", highlight=False)
            return
        _run_locked(cell, folder, console, wandb)
    # A model's arrays are in reference cycles (nnx graphs): without this, two are alive at once.
    gc.collect()


def _run_locked(cell: Cell, folder: Path, console: Console, wandb: str | None) -> None:
    try:
        run = dated(cell.run, folder)
        if is_finished(run, folder):  # by another process, since the sweep began
            console.print("finished by another process")
            return
        callbacks = wandb_callbacks(wandb, folder, run)
        execute(run, folder, labels=cell.labels, callbacks=callbacks, console=console)
    except Exception as error:  # one cell must not stop a night's sweep
        tell_failure(error, folder, console)


def run_all(
    sweep: Sweep,
    todo: Sequence[Cell],
    out: Path,
    console: Console,
    command: str,
    wandb: str | None = None,
) -> None:
    """Runs cells one after another, and reports after each."""
    for number, cell in enumerate(todo, 1):
        console.rule(f"{number}/{len(todo)} {cell.name}", align="left")
        run_cell(cell, out / cell.name, console, wandb)
        write_report(sweep, out, command)


def write_report(sweep: Sweep, out: Path, command: str) -> list[CellReport]:
    """Writes results.csv and report.html from the run folders."""
    reports = [read_cell(cell, out / cell.name) for cell in sweep.cells]
    results = [r.result for r in reports if r.result]
    seconds = duration(sum(result["seconds"] for result in results))
    about = (
        f"{seconds} of training in all, on {jax.devices()[0].device_kind}, jax {jax.__version__}, "
        f"Python {platform.python_version()}."
    )
    write_whole(out / "results.csv", csv_text(reports))
    write_whole(out / "report.html", render(sweep.name, reports, command=command, about=about))
    return reports


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 all finished, 1 some cell is not, 2 refused, 130
    interrupted."""
    typed = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "experiments.sweep", *typed])
    options = make_parser().parse_args(arguments)
    console = make_console()
    try:
        _refuse_idle(options)
        sweep = read_sweep(options)
        out = _out(options, sweep.name)
        if options.dry_run:
            cards = [find_card(name) for name in options.cards or DRY_RUN_CARDS]
            dry_run(sweep, out, console, cards, compiled=options.compile)
            return 0
        if not options.report_only:
            sweep = with_adapters(sweep)
        elif not out.is_dir():
            raise FileNotFoundError(f"--report-only is given, but there is no folder {out}.")
        wandb_callbacks(options.wandb, out, sweep.cells[0].run)
        if options.overwrite:
            for cell in sweep.cells:
                check(cell.run)
            for cell in sweep.cells:
                delete_run(out / cell.name)
        todo = [] if options.report_only else plan(sweep, out)
        check_writable(out)
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        return refuse(error)
    except KeyboardInterrupt:
        return interrupted()
    keep_compiled_programs(out.parent / ".jax-cache")
    console.print(f"{sweep.name}: {len(sweep.cells)} cell(s), {len(todo)} to run, in {out}")
    try:
        with termination_interrupts():
            run_all(sweep, todo, out, console, command, options.wandb)
    except KeyboardInterrupt:
        return interrupted(out)
    reports = write_report(sweep, out, command)
    console.print(terminal_table(sweep.name, reports))
    if len(reports) > 1:
        for matrix in terminal_matrices(sweep.name, reports):
            console.print(matrix)
    for report in reports:
        if report.result is None:
            why = f": {report.error}" if report.error else ""
            told = f"{report.cell.name} {report.status}{why}"
            console.print(told, highlight=False, markup=False)
    console.print(f"{out / 'results.csv'}\n{out / 'report.html'}", highlight=False)
    return 0 if all(report.result for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
