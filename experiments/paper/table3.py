"""What both halves of the paper's Table 3 share: the five ways to finetune, cells, and the report.

A cell is one (column, method, seed). Its folder gets `result.json` when all is done, so that the
same command again goes on where it stopped and leaves finished cells alone. The report puts our
means beside the paper's numbers, as `results.json` and `table.md`.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import shutil
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console

from experiments.embedded import ROOT
from experiments.report import ERROR, RESULT, tell_failure
from experiments.tree import flat
from qlora_jax.checkpoints import Checkpoint, load_model, save_model
from qlora_jax.cli.arguments import count, seed
from qlora_jax.data.json_file import read_json
from qlora_jax.files import write_whole
from qlora_jax.models import family_of
from qlora_jax.nn import LoraConfig
from qlora_jax.quant import QuantConfig
from qlora_jax.train import TrainConfig


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        title: the paper's name for it.
        adapters: whether adapters are trained on a frozen base; else all weights are trained.
        quant: how the base is stored; None for 16 bits.
    """

    title: str
    adapters: bool
    quant: QuantConfig | None


METHODS: dict[str, Method] = {
    "bf16": Method("BF16", False, None),
    "lora": Method("LoRA BF16", True, None),
    # Block-wise absmax like the others; the paper's Int8 was LLM.int8(), which keeps outlier
    # columns in 16 bits.
    "int8": Method("QLoRA Int8", True, QuantConfig("int8", 64, double_quant=False)),
    "fp4": Method("QLoRA FP4", True, QuantConfig("fp4", 64, double_quant=False)),
    "nf4": Method("QLoRA NF4+DQ", True, QuantConfig("nf4", 64, double_quant=True)),
}

SIZES = ("80M", "250M", "780M", "3B", "11B")

PUBLISHED: dict[str, dict[str, float]] = {
    "bf16": {"GLUE": 88.6, "80M": 40.1, "250M": 42.1, "780M": 48.0, "3B": 54.3, "11B": 62.0},
    "lora": {"GLUE": 88.8, "80M": 40.5, "250M": 42.6, "780M": 47.1, "3B": 55.4, "11B": 60.7},
    "int8": {"GLUE": 88.8, "80M": 40.4, "250M": 42.9, "780M": 45.4, "3B": 56.5, "11B": 60.7},
    "fp4": {"GLUE": 88.6, "80M": 40.3, "250M": 42.4, "780M": 47.5, "3B": 55.6, "11B": 60.9},
    "nf4": {"80M": 40.4, "250M": 42.7, "780M": 47.7, "3B": 55.3, "11B": 60.9},
}
"""Table 3 of arXiv 2305.14314: mean GLUE score of RoBERTa-large, and RougeL on Super-NI of T5."""


@dataclass(frozen=True)
class Cell:
    """One run: a column of our table (a task, or a model), a method, a seed."""

    column: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        """Its folder's name."""
        return f"{self.column}-{self.method}-seed{self.seed}"


@dataclass(frozen=True)
class Recipe:
    """How a cell trains; the published values of either half are that module's defaults.

    Attributes:
        lora: the adapters.
        learning_rate: of adapters.
        full_learning_rate: of all weights.
        schedule, warmup: of the rate; `warmup` is a share of the steps.
        epochs: passes over the rows; `steps`, where given, wins.
        batch_size: rows of an update.
        accumulation: micro-batches that an update is cut into.
        max_grad_norm: gradients are clipped to it.
        compute_dtype: of activations; the weights of full finetuning are kept in float32.
    """

    lora: LoraConfig
    learning_rate: float
    full_learning_rate: float
    schedule: str
    warmup: float
    epochs: float
    steps: int | None
    batch_size: int
    accumulation: int
    max_grad_norm: float | None
    compute_dtype: str

    def __post_init__(self) -> None:
        """ValueError for what no cell can train by, before the first one begins."""
        if not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs={self.epochs} must be a finite number above 0.")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"accumulation={self.accumulation} has to divide batch_size={self.batch_size}."
            )
        for method in METHODS.values():
            self.train_config(method, rows=1, seed=0)

    def train_config(self, method: Method, rows: int, seed: int) -> TrainConfig:
        """The `TrainConfig` of a cell on so many rows."""
        steps = self.steps
        if steps is None:
            steps = max(1, round(self.epochs * rows / self.batch_size))
        return TrainConfig(
            steps=steps,
            learning_rate=self.learning_rate if method.adapters else self.full_learning_rate,
            schedule=self.schedule,
            warmup_steps=int(self.warmup * steps),
            micro_batch_size=self.batch_size // self.accumulation,
            gradient_accumulation_steps=self.accumulation,
            max_grad_norm=self.max_grad_norm,
            seed=seed,
            save_every=500,
            log_every=max(1, steps // 5),
        )

    def load(self, base: Path | Checkpoint, method: Method, seed: int, **options: Any) -> Any:
        """The model of a cell; `options` are further arguments of `load_model`."""
        return load_model(
            base,
            quant=method.quant,
            lora=self.lora if method.adapters else None,
            trainable_base=not method.adapters,
            compute_dtype=jnp.dtype(self.compute_dtype),
            seed=seed,
            **options,
        )


def add_arguments(parser: argparse.ArgumentParser, recipe: Recipe) -> None:
    """The options that both halves take, with one half's defaults."""
    parser.add_argument(
        "--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS), help="rows (all)"
    )
    parser.add_argument("--seeds", nargs="+", type=seed, default=[0], help="mean over these (0)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where results go (runs/NAME)")
    parser.add_argument(
        "--scale",
        choices=("full", "tiny"),
        default="full",
        help="tiny: a random model of two layers, made on the spot, and a few rows",
    )
    group = parser.add_argument_group("training")
    group.add_argument("--r", type=count, help=f"rank of the adapters ({recipe.lora.r})")
    group.add_argument("--alpha", type=float, help=f"scale: alpha / r ({recipe.lora.alpha})")
    group.add_argument("--learning-rate", type=float, help=f"adapters ({recipe.learning_rate:g})")
    group.add_argument(
        "--full-learning-rate", type=float, help=f"all weights ({recipe.full_learning_rate:g})"
    )
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=float, help=f"passes over the rows ({recipe.epochs:g})")
    length.add_argument("--steps", type=count, help="updates, instead of epochs")
    group.add_argument("--batch-size", type=count, help=f"rows of an update ({recipe.batch_size})")
    group.add_argument("--accumulation", type=count, help="micro-batches that it is cut into (1)")
    group.add_argument(
        "--compute-dtype",
        choices=("bfloat16", "float32"),
        help="of activations (bfloat16 on an accelerator, float32 on a CPU)",
    )
    rows = parser.add_argument_group("rows")
    rows.add_argument("--train-rows", type=count, help="train on the first so many")
    rows.add_argument("--eval-rows", type=count, help="score the first so many")


def fill_in(options: argparse.Namespace, defaults: Mapping[str, Any]) -> None:
    """Gives a scale's defaults to the options that the command line says nothing of."""
    for name, value in defaults.items():
        given = "epochs" if name == "steps" and options.epochs is not None else name
        if getattr(options, given) is None:
            setattr(options, name, value)


def with_tokenizer(folder: Path, build: Callable[[], nnx.Module]) -> Path:
    """Writes a model with the embedded tokenizer, unless it is there: its config.json comes last,
    so a folder that has one is whole."""
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        for file in (ROOT / "tokenizer").iterdir():
            shutil.copyfile(file, folder / file.name)
        save_model(folder, build())
    return folder


def read_base(folder: Path, build: type) -> Any:
    """The configuration of a model that is to be finetuned.

    Args:
        folder: its folder.
        build: the class that it has to be of.

    Raises:
        ValueError, OSError: config.json is missing or damaged, or says that it is another.
    """
    raw = read_json(folder / "config.json")
    family = family_of(raw)
    if family.build is not build:
        raise ValueError(
            f"{folder} is a {family.model_type!r}, but an {build.__name__} is finetuned here: give "
            "a folder of one."
        )
    return family.read_config(raw)


def read_recipe(recipe: Recipe, options: argparse.Namespace) -> Recipe:
    """The half's defaults with what the command line says instead.

    Raises:
        ValueError: a value out of its range.
    """
    given = {
        name: getattr(options, name)
        for name in (
            "learning_rate",
            "full_learning_rate",
            "epochs",
            "steps",
            "batch_size",
            "accumulation",
            "compute_dtype",
        )
        if getattr(options, name) is not None
    }
    lora = {
        name: getattr(options, name)
        for name in ("r", "alpha")
        if getattr(options, name) is not None
    }
    given.setdefault("compute_dtype", "float32" if jax.default_backend() == "cpu" else "bfloat16")
    fields = {**vars(recipe), **given, "lora": LoraConfig(**{**vars(recipe.lora), **lora})}
    return Recipe(**fields)


def run_cells(
    cells: Sequence[Cell],
    out: Path,
    settings: Callable[[Cell], Mapping[str, Any]],
    run: Callable[[Cell, Path, dict[str, Any]], Mapping[str, Any]],
    console: Console,
) -> dict[Cell, dict[str, Any]]:
    """Runs the cells that are not finished; returns the results of all that are.

    Args:
        cells: in order.
        out: the folder of cell folders.
        settings: what decides a cell's result beside its name; kept in it, and compared.
        run: (cell, its folder, its settings as JSON keeps them) → its result.
        console: where progress is told.

    Raises:
        ValueError: a finished cell was made with other settings, or one is asked for twice.
    """
    for name, times in Counter(cell.name for cell in cells).items():
        if times > 1:
            raise ValueError(f"the cell {name} is asked for {times} times: once will do.")
    decided = {cell: json.loads(json.dumps(dict(settings(cell)), default=str)) for cell in cells}
    results: dict[Cell, dict[str, Any]] = {}
    for cell in cells:
        path = out / cell.name / RESULT
        if path.is_file():
            results[cell] = read_json(path)
            was, now = flat(results[cell].get("settings", {})), flat(decided[cell])
            for name in sorted({*was, *now}):
                if was.get(name) != now.get(name):
                    raise ValueError(
                        f"{path.parent} was made with {name} {was.get(name)!r}, but now it is "
                        f"{now.get(name)!r}: set it back, or choose another --out."
                    )
    for number, cell in enumerate(cells, 1):
        folder = out / cell.name
        if cell in results:
            console.print(f"{cell.name}: finished before", highlight=False)
            continue
        console.rule(f"{number}/{len(cells)} {cell.name}", align="left")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            result = {**run(cell, folder, decided[cell]), "settings": decided[cell]}
        except Exception as error:  # one cell must not stop the others
            tell_failure(error, folder, console)
        else:
            (folder / ERROR).unlink(missing_ok=True)
            write_whole(folder / RESULT, json.dumps(result, indent=1) + "\n")
            results[cell] = result
        # A model's arrays are in reference cycles (nnx graphs): without this, two are alive.
        gc.collect()
    return results


def identity_of(cell: Cell, settings: Mapping[str, Any], rows: Sequence[Any]) -> dict[str, Any]:
    """What `fit` knows a cell by: its settings and training rows. Its `identity_defaults`, too: a
    cell that was begun when less was kept in mind is taken to have had the rest."""
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()[:16]
    return {"cell": cell.name, **settings, "rows": f"sha256:{digest}"}


def mean_scores(
    results: Mapping[Cell, Mapping[str, Any]],
) -> dict[str, dict[str, float]]:
    """Method → column → mean of the cells' `score` over seeds, in percent."""
    scores: dict[str, dict[str, list[float]]] = {}
    for cell, result in results.items():
        scores.setdefault(cell.method, {}).setdefault(cell.column, []).append(result["score"])
    return {
        method: {column: 100 * statistics.fmean(values) for column, values in columns.items()}
        for method, columns in scores.items()
    }


def markdown(
    heading: str, columns: Sequence[str], rows: Sequence[tuple[str, Mapping[str, float]]]
) -> str:
    """A Markdown table of percentages; what is not known is a dash."""

    def cell(values: Mapping[str, float], column: str) -> str:
        return f"{values[column]:.1f}" if column in values else "–"

    lines = [
        f"| {heading} | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
        *(f"| {name} | {' | '.join(cell(v, c) for c in columns)} |" for name, v in rows),
    ]
    return "\n".join(lines) + "\n"


def about(what: str, options: argparse.Namespace, results: Mapping[Cell, Mapping[str, Any]]) -> str:
    """The sentences under a table: what was measured, on how much, where."""
    text = f"{what}; mean over seeds {', '.join(map(str, options.seeds))}."
    if results:
        rows = _span([result["train_rows"] for result in results.values()])
        steps = _span([result["steps"] for result in results.values()])
        text += f" {rows} training rows, {steps} steps a cell."
    if options.scale == "tiny":
        text += (
            " At this scale the table shows that everything runs, not what a method is worth: "
            "without --model(s) the base is random."
        )
    return f"{text} {jax.devices()[0].device_kind}, jax {jax.__version__}."


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def write_report(
    out: Path, title: str, table: str, notes: str, results: Mapping[Cell, Mapping[str, Any]]
) -> None:
    """Writes `results.json` (every cell) and `table.md`."""
    cells = [{**vars(cell), **result} for cell, result in results.items()]
    write_whole(out / "results.json", json.dumps({"title": title, "cells": cells}, indent=1))
    write_whole(out / "table.md", f"# {title}\n\n{table}\n{notes}\n")
