"""MMLU of a model, with or without an adapter: tables 4 and 5 of the paper, one cell at a time.

    python -m experiments.paper.mmlu huggyllama/llama-7b                       # 5-shot, test split
    python -m experiments.paper.mmlu MODEL --adapter runs/x/adapter --quant nf4
    python -m experiments.paper.mmlu stdlib-4m --data FOLDER --split val --shots 0 --limit 10

MODEL is an embedded model, a Hugging Face folder or a hub name. --data is a hub name in the form of
cais/mmlu, or a folder with the original dev/, val/ and test/ CSV files. Prompts and scores are the
original evaluation's (qlora_jax/evaluate/mmlu.py). OUT gets every answer (answers.jsonl) and the
result (mmlu.json); the same command again goes on where it was broken off.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from experiments.answering import adapter_digest
from experiments.cli import (
    COMPUTE_DTYPES,
    QUANT_HELP,
    keep_compiled_programs,
    read_quant,
    run_command,
)
from experiments.config import MmluConfig
from experiments.examination import LONGEST, ask, check_questions
from experiments.rows import decoder_context, find_model
from qlora_jax.checkpoints import check_adapter, load_adapter
from qlora_jax.cli.arguments import count
from qlora_jax.evaluate import GROUPS, MmluResult
from qlora_jax.files import write_whole
from qlora_jax.pretrained import load_pretrained


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.paper.mmlu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="embedded model, folder or hub name")
    add("--adapter", type=Path, metavar="FOLDER", help="a PEFT adapter for it")
    add("--quant", help=QUANT_HELP)
    add("--compute-dtype", choices=COMPUTE_DTYPES, default="bfloat16", help="of activations")
    add("--data", default="cais/mmlu", help="hub name or folder of the questions (cais/mmlu)")
    add("--split", default="test", help="test, val (test)")
    add("--shots", type=int, default=5, metavar="N", help="solved questions shown (5)")
    add("--limit", type=count, metavar="N", help="only so many questions of each subject")
    add("--batch-size", type=int, default=8, metavar="N", help="questions at once (8)")
    add("--out", type=Path, metavar="FOLDER", help="(runs/mmlu/MODEL-Nshot-SPLIT)")
    return parser


def table(result: MmluResult, title: str) -> Table:
    """The groups and the two means."""
    shown = Table(title=title, title_justify="left")
    shown.add_column("")
    shown.add_column("questions", justify="right")
    shown.add_column("right", justify="right")
    for group, share in result.groups.items():
        asked = sum(result.asked.get(subject, 0) for subject in GROUPS[group])
        shown.add_row(group, f"{asked:,}", f"{share:.1%}")
    shown.add_section()
    shown.add_row("all questions (micro)", f"{sum(result.asked.values()):,}", f"{result.micro:.1%}")
    shown.add_row(
        "mean over subjects (macro)", f"{len(result.asked)} subjects", f"{result.macro:.1%}"
    )
    return shown


def run(options: argparse.Namespace, console: Console) -> int:
    """Asks the questions and writes OUT."""
    config = MmluConfig(
        source=options.data,
        split=options.split,
        shots=options.shots,
        limit=options.limit,
        batch_size=options.batch_size,
    )
    folder = find_model(options.model)
    context = decoder_context(folder)
    quant = read_quant(options.quant, folder)
    lora = None if options.adapter is None else check_adapter(options.adapter)
    # The questions may come from the hub.
    check_questions(config)
    identity: dict[str, Any] = {"model": options.model, "quant": str(quant)}
    identity["compute_dtype"] = options.compute_dtype
    name = f"{Path(options.model).name}-{options.shots}shot-{options.split}"
    out = options.out or Path("runs") / "mmlu" / name
    keep_compiled_programs(out.parent / ".jax-cache")
    dtype = jnp.dtype(options.compute_dtype)
    model, tokenizer = load_pretrained(folder, quant=quant, lora=lora, compute_dtype=dtype)
    if options.adapter is not None:
        load_adapter(options.adapter, model)
        identity["adapter"] = adapter_digest(options.adapter)
    out.mkdir(parents=True, exist_ok=True)
    result = ask(
        model,
        tokenizer,
        config,
        options.split,
        context,
        answers=out / "answers.jsonl",
        identity=identity,
        console=console,
    )
    told = {**identity, "split": options.split, "shots": options.shots, **result.as_dict()}
    write_whole(out / "mmlu.json", json.dumps(told, indent=1) + "\n")
    console.print(table(result, f"{options.model}: MMLU, {options.shots}-shot, {options.split}"))
    if result.shortened or result.cut:
        console.print(
            f"{result.shortened} questions were shown with fewer shots to fit "
            f"{min(context, LONGEST)} tokens, "
            f"{result.cut} of them lost their beginning.",
            highlight=False,
        )
    console.print(str(out / "mmlu.json"), highlight=False)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 2 refused."""
    return run_command(make_parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
