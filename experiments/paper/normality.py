"""Are trained weights normally distributed? The paper's appendix F, for any model.

    python -m experiments.paper.normality huggyllama/llama-7b
    python -m experiments.paper.normality stdlib-4m

NF4 rests on this. Its sixteen values are quantiles of a normal distribution about zero, so that
where weights are normal each code is used about equally often and none is wasted. Spreads need not
be alike: every block of 64 is divided by its own largest weight first, so a hidden unit (output
neuron: a row of the matrix, which is whole blocks in the paper's models) may have its own. What has
to be normal is the unit, and so each unit is tested, by Shapiro and Wilk's W: near 1 where the
sorted weights lie as a normal sample's would.

At the 5 % level chance alone rejects 5 % of normal units; the paper has 7.5 % for LLaMA 7B. The
more weights a unit has, the smaller a departure is seen: the share says whether weights are exactly
normal, and W how nearly. The table has its median; of normal weights that is 0.982 for 64 of them,
0.9974 for 576, 0.9996 for 4,096.

p is an approximation, Royston's, which rejects too few of long rows (docs/results.md); beyond 5,000
weights scipy warns of it. Of a longer row a random 5,000 are tested, the same ones in every run. A
row of one number is counted as not normal. Weights are read one matrix at a time, in 16 or 32 bits:
a 4-bit folder has but its data type's own values, and is refused. LLaMA 7B's 1.36 million units
take minutes, so none is left out.

OUT gets normality.json (each matrix), normality.md (by kind of linear layer) and normality.png (by
depth; needs matplotlib: extra `plots`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import Progress
from scipy.stats import shapiro

from experiments.cli import run_command
from experiments.paper.figures import can_draw
from experiments.paper.tables import Table
from experiments.rows import find_model
from qlora_jax.checkpoints import Checkpoint, check_shapes, linear_weights, open_checkpoint
from qlora_jax.files import write_whole
from qlora_jax.models import family_of

LEVEL = 0.05
"""A unit is called non-normal where p is below; so is this share of normal ones, by chance."""
LONGEST = 5000
"""Weights of one unit beyond which scipy holds p for inaccurate."""
PAPER = 0.075
"""The paper's share of non-normal units in LLaMA 7B."""
_ROWS = 256


class Matrix(NamedTuple):
    """One linear weight: its checkpoint's name, kind and depth, and W and p of each of its units,
    of `inputs` weights each."""

    name: str
    kind: str
    layer: int
    inputs: int
    statistics: np.ndarray
    p_values: np.ndarray


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.paper.normality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="embedded model, folder or hub name")
    add("--out", type=Path, metavar="FOLDER", help="(runs/normality/MODEL)")
    return parser


def shapiro_wilk(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shapiro and Wilk's W and p of each row of a matrix [units, inputs].

    Raises:
        ValueError: a weight is not finite.
    """
    rng = np.random.default_rng(0)
    found = [_test_rows(weight[at : at + _ROWS], rng) for at in range(0, len(weight), _ROWS)]
    statistics, p_values = zip(*found, strict=True)
    return np.concatenate(statistics), np.concatenate(p_values)


def _test_rows(rows: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    rows = rows.astype(np.float64)
    if not np.isfinite(rows).all():
        raise ValueError("a weight is NaN or infinite, which no trained one is: fetch it again.")
    if rows.shape[1] > LONGEST:
        rows = rng.permuted(rows, axis=1)[:, :LONGEST]
    statistics, p_values = np.zeros((2, len(rows)))
    varied = rows.min(axis=1) < rows.max(axis=1)
    rows = rows[varied]
    if len(rows):
        # W has no unit; scipy takes a range below 1e-19 for none.
        rows /= np.abs(rows).max(axis=1, keepdims=True)
        statistics[varied], p_values[varied] = shapiro(rows, axis=1)
    return statistics, p_values


def linear_layers(checkpoint: Checkpoint) -> dict[str, int]:
    """The layers' linear weights by name, each with its layer's number.

    Raises:
        ValueError: an unknown architecture, tensors that contradict config.json, or 4 bits.
    """
    if checkpoint.quant is not None:
        raise ValueError(
            f"{checkpoint.source} is in {checkpoint.quant.quant_type}, where blocks hold sixteen "
            "numbers at most: give the checkpoint in 16 or 32 bits that it was made from."
        )
    check_shapes(checkpoint)
    linear = linear_weights(checkpoint)
    family = family_of(checkpoint.config)
    config = family.for_weights(family.read_config(checkpoint.config), checkpoint.tensors)
    slots = family.weight_names(config)
    return {
        name: slot.stack_index[0]
        for name, slot in slots.items()
        if name in linear and slot.stack_index
    }


def run(options: argparse.Namespace, console: Console) -> int:
    """Tests every unit and writes OUT."""
    checkpoint = open_checkpoint(find_model(options.model))
    layers = linear_layers(checkpoint)
    out = options.out or Path("runs") / "normality" / Path(options.model).name
    matrices = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        for name in bar.track(layers, description="testing"):
            weight = np.asarray(checkpoint.read(name))
            try:
                statistics, p_values = shapiro_wilk(weight)
            except ValueError as error:
                raise ValueError(f"{name} of {checkpoint.source}: {error}") from error
            kind = name.split(".")[-2]
            matrices.append(Matrix(name, kind, layers[name], weight.shape[1], statistics, p_values))
    out.mkdir(parents=True, exist_ok=True)
    told = {"model": options.model, "level": LEVEL, "matrices": [_as_dict(m) for m in matrices]}
    write_whole(out / "normality.json", json.dumps(told, indent=1) + "\n")
    table = table_of(matrices, options.model)
    write_whole(out / "normality.md", table.markdown())
    console.print(table.rich())
    if can_draw():
        plot(matrices, out / "normality.png", title=Path(options.model).name)
    else:
        console.print("no plot without matplotlib: pip install 'qlora-jax[plots]'", markup=False)
    console.print(str(out), highlight=False)
    return 0


def _as_dict(matrix: Matrix) -> dict[str, Any]:
    return {
        "name": matrix.name,
        "kind": matrix.kind,
        "layer": matrix.layer,
        "units": len(matrix.p_values),
        "inputs": matrix.inputs,
        "tested": min(matrix.inputs, LONGEST),
        "non_normal": int((matrix.p_values < LEVEL).sum()),
        "median_w": round(float(np.median(matrix.statistics)), 6),
    }


def _share(matrices: Sequence[Matrix]) -> float:
    """Of all their units, those that are not normal."""
    return float(np.mean(np.concatenate([matrix.p_values for matrix in matrices]) < LEVEL))


def table_of(matrices: Sequence[Matrix], model: str) -> Table:
    """A line for each kind of linear layer, one for all of them, and the paper's."""
    kinds = dict.fromkeys(matrix.kind for matrix in matrices)
    lines = [_line(kind, [m for m in matrices if m.kind == kind]) for kind in kinds]
    paper = ("LLaMA 7B, the paper", None, None, None, None, *_shown(PAPER))
    return Table(
        "normality",
        f"{model}: hidden units whose weights are not normal (p < {LEVEL})",
        ("linear layer", "units", "weights each", "tested", "W", "non-normal", "above chance"),
        (*lines, _line("all", matrices), paper),
    )


def _line(name: str, matrices: Sequence[Matrix]) -> tuple[str, ...]:
    statistics = np.concatenate([matrix.statistics for matrix in matrices])
    widths = sorted({matrix.inputs for matrix in matrices})
    tested = sorted({min(width, LONGEST) for width in widths})
    each, those = (", ".join(f"{width:,}" for width in some) for some in (widths, tested))
    w = f"{np.median(statistics):.4f}"
    return (name, f"{len(statistics):,}", each, those, w, *_shown(_share(matrices)))


def _shown(share: float) -> tuple[str, str]:
    return f"{share:.1%}", f"{100 * (share - LEVEL):+.1f}"


def plot(matrices: Sequence[Matrix], path: Path, *, title: str) -> None:
    """The share of non-normal units over depth, one line per kind of linear layer."""
    from matplotlib.figure import Figure

    figure = Figure((7, 4.2), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="layer", ylabel="non-normal units, %")
    for kind in dict.fromkeys(matrix.kind for matrix in matrices):
        of_kind = [matrix for matrix in matrices if matrix.kind == kind]
        layers = sorted({matrix.layer for matrix in of_kind})
        shares = [100 * _share([m for m in of_kind if m.layer == layer]) for layer in layers]
        axes.plot(layers, shares, marker="o", markersize=4, linewidth=1.3, label=kind)
    axes.axhline(100 * LEVEL, color="0.4", linewidth=1, linestyle="--", label="by chance")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 2 refused."""
    return run_command(make_parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
