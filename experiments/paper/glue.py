"""Table 3, first column: RoBERTa on GLUE, finetuned wholly, with LoRA, and with QLoRA.

    python -m experiments.paper.glue --scale tiny --tasks cola --data ../shared/data/text
    python -m experiments.paper.glue --model FacebookAI/roberta-large --data nyu-mll/glue

MODEL is a RoBERTa folder or hub name. DATA is GLUE's own folder (CoLA/train.tsv, ...), a folder of
files whose names begin with the task's, or a hub name. The head of each task is new, and trained
whole in every method. Scores are those of the validation sets: the test labels are not public.

The paper gives no hyperparameters for this table, so the defaults are those of LoRA's own RoBERTa
runs (arXiv 2106.09685: AdamW, linear decay after 6% warmup) with this project's r and alpha, and
1e-5 for full finetuning (arXiv 1907.11692). They were written down from memory of these two papers:
compare them before you quote a score. Flags set others.

The output folder gets a folder per cell, results.json and table.md. The same command again runs
what is missing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console

from experiments.cli import keep_compiled_programs, run_command
from experiments.paper.glue_tasks import TASKS, Row, Task, load_split
from experiments.paper.table3 import (
    METHODS,
    PUBLISHED,
    Cell,
    Recipe,
    about,
    add_arguments,
    fill_in,
    identity_of,
    markdown,
    mean_scores,
    read_base,
    read_recipe,
    run_cells,
    with_tokenizer,
    write_report,
)
from qlora_jax.checkpoints import Checkpoint, open_checkpoint
from qlora_jax.cli.arguments import count
from qlora_jax.data import (
    ClassificationBatches,
    Labelled,
    Tokenizer,
    load_tokenizer,
    tokenize_texts,
)
from qlora_jax.evaluate import classifier_loss
from qlora_jax.models import EncoderClassifier, EncoderConfig
from qlora_jax.nn import LoraConfig
from qlora_jax.pretrained import find_folder
from qlora_jax.train import fit

RECIPE = Recipe(
    lora=LoraConfig(r=64, alpha=16, lora_dropout=0.1),
    learning_rate=2e-4,
    full_learning_rate=1e-5,
    schedule="linear",
    warmup=0.06,
    epochs=10,
    steps=None,
    batch_size=32,
    accumulation=1,
    max_grad_norm=0.3,
    compute_dtype="bfloat16",
)
TINY = {"train_rows": 64, "eval_rows": 64, "steps": 8, "batch_size": 8, "r": 8}
"""What `--scale tiny` takes where the command line says nothing."""


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.paper.glue",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="RoBERTa folder or hub name (FacebookAI/roberta-large)")
    parser.add_argument("--data", default="nyu-mll/glue", help="folder or hub name (nyu-mll/glue)")
    parser.add_argument(
        "--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS), help="columns (all eight)"
    )
    parser.add_argument("--max-len", type=count, default=128, help="tokens of an example (128)")
    add_arguments(parser, RECIPE)
    return parser


def tiny_roberta(folder: Path, seed: int = 0) -> Path:
    """Writes a random RoBERTa of two layers with the embedded tokenizer, unless it is there."""
    config = EncoderConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=130,
        pad_token_id=0,
    )
    return with_tokenizer(folder, lambda: EncoderClassifier(config, rngs=nnx.Rngs(seed)))


def without_head(base: Path) -> Checkpoint:
    """The base without the head of another task, which it may bring: every task's is new."""
    checkpoint = open_checkpoint(base)
    kept = {n: i for n, i in checkpoint.tensors.items() if not n.startswith("classifier.")}
    return replace(checkpoint, tensors=kept)


def predict(model: EncoderClassifier, batches: ClassificationBatches) -> np.ndarray:
    """A class for each example in order, or a value; batches of `shuffle=False`."""
    graphdef, state = nnx.split(model)
    forward = jax.jit(lambda state, ids, mask: nnx.merge(graphdef, state)(ids, mask))
    scores = np.concatenate(
        [forward(state, b.input_ids, b.attention_mask) for b in batches.one_epoch()]
    )[: len(batches.labels)]
    return scores[:, 0] if scores.shape[1] == 1 else scores.argmax(axis=1)


def _batches(
    rows: list[Row], tokenizer: Tokenizer, max_len: int, **options: Any
) -> ClassificationBatches:
    ids = tokenize_texts([row.texts for row in rows], tokenizer, max_len=max_len)
    examples = [Labelled(i, row.label) for i, row in zip(ids, rows, strict=True)]
    buckets = sorted({min(32, max_len), min(64, max_len), max_len})
    return ClassificationBatches(
        examples, pad_token_id=tokenizer.pad_token_id, buckets=buckets, **options
    )


def run_cell(
    cell: Cell,
    folder: Path,
    settings: dict[str, Any],
    base: Path,
    recipe: Recipe,
    options: argparse.Namespace,
    out: Console,
) -> dict[str, Any]:
    """Finetunes and scores one task by one method."""
    began = time.perf_counter()
    task, method = TASKS[cell.column], METHODS[cell.method]
    train = load_split(cell.column, options.data, "train", options.train_rows)
    held_out = {
        split: load_split(cell.column, options.data, split, options.eval_rows)
        for split in task.validation
    }
    config = recipe.train_config(method, len(train), cell.seed)
    tokenizer = load_tokenizer(base)
    model = recipe.load(
        without_head(base), method, cell.seed, overrides={"num_labels": task.num_labels}
    )
    identity = identity_of(cell, settings, train)
    fit(
        model,
        _batches(
            train,
            tokenizer,
            options.max_len,
            batch_size=config.micro_batch_size,
            accumulation=config.gradient_accumulation_steps,
            seed=cell.seed,
            group_by_length=True,
        ),
        config,
        run_folder=folder,
        loss_fn=classifier_loss,
        console=out,
        identity=identity,
        identity_defaults=identity,
    )
    references, predictions = {}, {}
    for split, rows in held_out.items():
        batches = _batches(
            rows, tokenizer, options.max_len, batch_size=config.micro_batch_size, shuffle=False
        )
        references[split] = [row.label for row in rows]
        predictions[split] = predict(model, batches).tolist()
    scores = task.scores(references, predictions)
    out.print(f"{cell.name}: {scores['score']:.3f}", highlight=False)
    return {
        **scores,
        "train_rows": len(train),
        "eval_rows": {split: len(rows) for split, rows in held_out.items()},
        "steps": config.steps,
        "seconds": round(time.perf_counter() - began, 1),
    }


def table(results: dict[Cell, dict[str, Any]], tasks: list[str]) -> str:
    """The Markdown table: our scores by task, their mean, and the paper's mean."""
    scores = mean_scores(results)
    titles = {name: _title(TASKS[name]) for name in tasks}
    rows = []
    for name, columns in scores.items():
        values = {titles[task]: value for task, value in columns.items()}
        if len(values) == len(tasks):
            values["mean"] = statistics.fmean(values.values())
        if "GLUE" in PUBLISHED[name]:
            values["paper, RoBERTa-large"] = PUBLISHED[name]["GLUE"]
        rows.append((METHODS[name].title, values))
    return markdown("method", [*titles.values(), "mean", "paper, RoBERTa-large"], rows)


def _title(task: Task) -> str:
    return f"{task.title} ({task.score})"


def _cells(options: argparse.Namespace) -> Iterator[Cell]:
    for task in options.tasks:
        for method in options.methods:
            for seed in options.seeds:
                yield Cell(task, method, seed)


def run(options: argparse.Namespace, console: Console) -> int:
    """Trains and scores every cell, prints the table and writes OUT."""
    out = options.out or Path("runs") / "paper-glue"
    fill_in(options, TINY if options.scale == "tiny" else {})
    recipe = read_recipe(RECIPE, options)
    if Path(options.data).is_file():
        raise ValueError(f"--data is {options.data}, one file, which cannot hold both splits.")
    for task in options.tasks:  # before anything is computed
        load_split(task, options.data, "train", options.train_rows)
        for split in TASKS[task].validation:
            load_split(task, options.data, split, options.eval_rows)
    if options.model is None and options.scale == "tiny":
        base = tiny_roberta(out / "tiny-roberta")
    else:
        base = find_folder("FacebookAI/roberta-large" if options.model is None else options.model)
    longest = read_base(base, EncoderClassifier).max_length
    if options.max_len > longest:
        raise ValueError(f"--max-len is {options.max_len}, but {base.name} reads {longest} tokens.")
    settings = {
        "model": str(base),
        "data": options.data,
        "max_len": options.max_len,
        "train_rows": options.train_rows,
        "eval_rows": options.eval_rows,
        "recipe": asdict(recipe),
    }
    keep_compiled_programs(out.parent / ".jax-cache")
    cells = list(_cells(options))
    results = run_cells(
        cells,
        out,
        lambda cell: settings,
        lambda cell, folder, own: run_cell(cell, folder, own, base, recipe, options, console),
        console,
    )
    text = table(results, options.tasks)
    notes = about(
        f"Validation scores in percent of {base.name}; MNLI is the mean of its two sets",
        options,
        results,
    )
    write_report(out, f"GLUE: {base.name}", text, notes, results)
    console.print(text, highlight=False, markup=False)
    console.print(f"{out / 'results.json'}\n{out / 'table.md'}", highlight=False)
    return 0 if len(results) == len(cells) else 1


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 all finished, 1 some cell is not, 2 refused."""
    return run_command(make_parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
