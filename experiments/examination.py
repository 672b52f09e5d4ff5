"""MMLU for a run: its questions, found before anything is computed, and its two examinations.

During training a probe asks the validation questions every so many steps (`mmlu.every`); when all
is done the finished model is asked the questions that count (`mmlu.split`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx
from rich.console import Console

from experiments.config import MmluConfig
from qlora_jax.data import Tokenizer
from qlora_jax.evaluate import MmluResult, Question, examine, load_questions
from qlora_jax.train import Probe

VALIDATION = "val"
ANSWERS = "mmlu.jsonl"
# What the QLoRA code reads of a prompt at most.
LONGEST = 2048

Questions = dict[str, list[Question]]


@functools.lru_cache(maxsize=8)
def questions_of(source: str, split: str, limit: int | None) -> Questions:
    """As `load_questions`, read once per process."""
    return load_questions(source, split, limit=limit)


def check_questions(config: MmluConfig) -> None:
    """Reads every question that a run will need.

    Raises:
        ValueError, OSError: what is wrong with them, in a sentence.
    """
    for split in ("dev", VALIDATION if config.every else None, config.split):
        if split is not None:
            questions_of(config.source, split, None if split == "dev" else config.limit)


def ask(
    model: nnx.Module,
    tokenizer: Tokenizer,
    config: MmluConfig,
    split: str,
    context: int,
    *,
    answers: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> MmluResult:
    """One examination, as `qlora_jax.evaluate.examine`, with prompts of at most `context` tokens.

    `answers` keeps what is answered already; `console` is told of a long one's progress.
    """
    told = 0

    def progress(done: int, of: int) -> None:
        nonlocal told
        if console is not None and of > 500 and done * 10 // of > told:
            told = done * 10 // of
            console.print(f"MMLU: {done} of {of} questions", highlight=False)

    return examine(
        model,
        tokenizer,
        questions_of(config.source, split, config.limit),
        questions_of(config.source, "dev", None),
        shots=config.shots,
        max_len=min(context, LONGEST),
        batch_size=config.batch_size,
        answers=answers,
        identity=identity,
        progress=progress,
    )


def probes(config: MmluConfig | None, tokenizer: Tokenizer, context: int) -> list[Probe]:
    """The probe that asks validation questions during training, where one is wanted."""
    if config is None or config.every == 0:
        return []

    def look(model: nnx.Module, step: int) -> Mapping[str, float]:
        result = ask(model, tokenizer, config, VALIDATION, context)
        return {"mmlu_val_micro": result.micro, "mmlu_val_macro": result.macro}

    return [Probe(config.every, look)]


def final(
    model: nnx.Module,
    tokenizer: Tokenizer,
    config: MmluConfig | None,
    context: int,
    folder: Path,
    identity: Mapping[str, Any],
    console: Console | None,
) -> dict[str, Any]:
    """The finished model's result for result.json, {} where none is wanted.

    Answers are kept in the run folder, so that a run killed while it is examined goes on, with
    `identity`, what they depend on beside the questions.
    """
    if config is None or config.split is None:
        return {}
    result = ask(
        model,
        tokenizer,
        config,
        config.split,
        context,
        answers=folder / ANSWERS,
        identity=identity,
        console=console,
    )
    return {"mmlu": {"split": config.split, "shots": config.shots, **result.as_dict()}}
