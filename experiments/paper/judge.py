"""Have a judge compare systems' answers, as GPT-4 did for the paper.

    export OPENAI_API_KEY=…
    python -m experiments.paper.judge --url https://api.openai.com/v1 --judge gpt-4 \\
        --questions vicuna_questions.jsonl --answers A.jsonl B.jsonl … --out runs/paper/ratings \\
        --max-cost 20 --prompt-price 30 --completion-price 60

Every two systems meet in both orders and the judge names the better answer (`--form choice`, for
Elo), or every system meets `--reference` and both are marked out of ten (`--form scores`). Any
OpenAI-compatible endpoint will do; the key is read from the environment (`--key-variable`).

Ratings are written in the released form as they come: the same command again goes on where a killed
one stopped, and asks what a budget left unasked; `--retry-missing` asks again what brought no
verdict. Then: python -m experiments.paper.elo (or .vicuna) --ratings runs/paper/ratings.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from experiments.cli import run_command
from experiments.paper.judged import SHARED, questions_of, system_label
from qlora_jax.cli.arguments import count
from qlora_jax.evaluate import (
    Budget,
    Endpoint,
    check_systems,
    judge,
    pairings,
    read_answers,
    system_name,
)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.paper.judge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--url", required=True, help="https://…/v1")
    parser.add_argument("--judge", required=True, help="the model's name there")
    parser.add_argument("--key-variable", default="OPENAI_API_KEY", metavar="NAME")
    parser.add_argument(
        "--questions", type=Path, default=SHARED / "prompts/vicuna_questions.jsonl", metavar="FILE"
    )
    parser.add_argument(
        "--answers", type=Path, nargs="+", required=True, metavar="FILE",
        help="a system's each, which is called by the file's name",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/paper/ratings"), metavar="FOLDER")
    parser.add_argument("--form", choices=("choice", "scores"), default="choice")
    parser.add_argument("--reference", help="a system that all others are compared with")
    parser.add_argument("--limit", type=count, help="the first questions only")
    parser.add_argument("--attempts", type=int, default=5)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds")
    parser.add_argument("--retry-missing", action="store_true")
    budget = parser.add_argument_group("budget")
    budget.add_argument("--max-calls", type=int)
    budget.add_argument("--max-tokens", type=int, help="of prompts and answers together")
    budget.add_argument("--max-cost", type=float)
    budget.add_argument("--prompt-price", type=float, default=0.0, help="per million tokens")
    budget.add_argument("--completion-price", type=float, default=0.0, help="per million tokens")
    return parser


def run(options: argparse.Namespace, console: Console) -> int:
    """Asks the judge and writes its ratings into OUT."""
    budget = Budget(
        options.max_calls,
        options.max_tokens,
        options.max_cost,
        options.prompt_price,
        options.completion_price,
    )
    endpoint = Endpoint(options.url, options.judge, options.key_variable, timeout=options.timeout)
    names = [system_name(file.stem) for file in options.answers]
    # A table of these ratings would refuse them, once they are paid for.
    check_systems(names, system_label)
    answers = {n: read_answers(file) for n, file in zip(names, options.answers, strict=True)}
    pairs = pairings(
        questions_of(options.questions)[: options.limit],
        answers,
        reference=options.reference,
    )
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("judging", total=len(pairs))
        report = judge(
            pairs,
            endpoint,
            options.out,
            form=options.form,
            budget=budget,
            attempts=options.attempts,
            concurrency=options.concurrency,
            retry_missing=options.retry_missing,
            on_progress=lambda done, todo: progress.update(task, completed=done, total=todo),
        )
    spent = report.spent
    priced = budget.prompt_price or budget.completion_price
    cost = f", {spent.cost(budget):.2f} spent" if priced else ""
    console.print(
        f"{report.judged} pairs judged, {report.already} were judged before, {report.missing} "
        f"without a verdict, {report.unasked} not asked for the budget\n{spent.calls} calls, "
        f"{spent.prompt_tokens:,} + {spent.completion_tokens:,} tokens{cost}\n"
        f"ratings in {options.out}",
        highlight=False,
    )
    return 1 if report.unasked else 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 all asked, 1 the budget is spent, 2 refused."""
    return run_command(make_parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
