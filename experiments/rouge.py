"""ROUGE-L for a run: the finished model answers the held-out rows, as in the paper's Figure 2.

What is asked is known before anything is computed, from the rows' tokens as training would read
them, whether their loss is on answers or on all. Of a row that is everything before its answer; of
a conversation, before its last answer: the last that is left, where the row was cut. A row of which
no answer is left is not asked. Answers are greedy, and each is compared with the row's own, which
`data.target_max_len` may have cut. ROUGE-L compares words of Latin letters and digits; a row whose
answer has none gets 0.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from rich.console import Console

from experiments.answering import forget_partial, greedy_answers
from experiments.config import RunConfig
from experiments.rows import answers_of, model_config
from qlora_jax.data import IGNORE, Example, Pair, Tokenizer, load_tokenizer
from qlora_jax.evaluate import rouge_l
from qlora_jax.files import write_whole
from qlora_jax.generate import GenerationConfig, check_prompts, read_eos_token_ids
from qlora_jax.processes import on_first

ANSWERS = "answers.jsonl"

# Ids of a prompt, of the answer to it, and of what stands behind that.
_Parts = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Exercise:
    """What a finished model is to answer.

    Attributes:
        prompts: their ids.
        references: the answers that the rows have.
        generation: how long answers may be, and what ends them.
        batch_size: prompts at once.
    """

    prompts: list[list[int]]
    references: list[str]
    generation: GenerationConfig
    batch_size: int


def exercise_of(run: RunConfig, folder: Path, longest: int | None) -> Exercise | None:
    """What the held-out rows ask of the model in a folder; None where nothing is to be asked.

    Args:
        run: as configured.
        folder: the base model's.
        longest: as `examples_of` takes it.

    Raises:
        ValueError: the rows do not tell what is asked from what is answered, have no answer that
            could be compared, or their prompts leave no room for one.
        ModuleNotFoundError: rouge-score is not installed.
    """
    if run.rouge is None:
        return None
    try:
        rows = answers_of(run.data, folder, longest)
    except ValueError as error:
        raise ValueError(f"rouge is set, which asks for the rows' answers: {error}") from error
    count = min(run.rouge.limit or len(rows), len(rows))
    # Rows lie by length: of fewer, evenly spaced ones.
    asked = [_taken_apart(rows[i * len(rows) // count]) for i in range(count)]
    if all(len(prompt) == 1 for prompt, *_ in asked):  # bos, or what stands in its place
        raise ValueError(
            f"rouge is set, but the held-out rows of {run.data.source} are answers alone, without "
            f"a prompt (data.format={run.data.format}): leave rouge out."
        )
    tokenizer = load_tokenizer(folder)
    references = [tokenizer.decode(answer).strip() for _, answer, _ in asked]
    if rouge_l([[text] for text in references], references)["rougeL"] == 0:
        raise ValueError(
            f"rouge is set, but no answer in the held-out rows of {run.data.source} has a word of "
            "Latin letters or digits, which are all that ROUGE-L compares: leave rouge out."
        )
    longest_answer = max(len(answer) for _, answer, _ in asked)
    generation = GenerationConfig(
        max_new_tokens=run.rouge.max_new_tokens or longest_answer,
        eos_token_ids=_ends(asked, tokenizer, folder),
    )
    prompts = [prompt.tolist() for prompt, *_ in asked]
    try:
        check_prompts(prompts, generation, model_config(folder))
    except ValueError as error:
        raise ValueError(
            f"rouge is set, but {error} (rouge.max_new_tokens, data.source_max_len.)"
        ) from error
    return Exercise(prompts, references, generation, run.rouge.batch_size)


def _taken_apart(row: Example | Pair) -> _Parts:
    if isinstance(row, Pair):
        return row.source, row.target, row.target[:0]
    stop = int(np.flatnonzero(row.labels != IGNORE)[-1]) + 1
    # The first label is without loss in every row.
    begin = int(np.flatnonzero(row.labels[:stop] == IGNORE)[-1]) + 1
    return row.input_ids[:begin], row.input_ids[begin:stop], row.input_ids[stop:]


def _ends(asked: Sequence[_Parts], tokenizer: Tokenizer, folder: Path) -> list[int]:
    """What ends an answer: eos, what the model's folder names, and the special token that a
    template ends its turns with."""
    assert tokenizer.eos_token_id is not None  # or tokenization had refused the rows
    closings = {int(answer[-1]) for _, answer, behind in asked if len(behind)}
    special = {t for t in closings if tokenizer.decode([t]) == "" != _written(tokenizer, [t])}
    return sorted({tokenizer.eos_token_id, *read_eos_token_ids(folder), *special})


def _written(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of ids with their special tokens."""
    return tokenizer.decode(ids, skip_special=False)


def score(
    model: nnx.Module,
    tokenizer: Tokenizer,
    exercise: Exercise | None,
    folder: Path,
    identity: Mapping[str, Any],
    console: Console,
) -> dict[str, Any]:
    """The finished model's score for result.json, {} where nothing is asked; its answers go into
    the run folder. `identity` is what they depend on beside the exercise."""
    if exercise is None:
        return {}
    console.print(f"answering {len(exercise.prompts)} held-out rows", highlight=False)
    written = greedy_answers(
        model,
        exercise.prompts,
        exercise.generation,
        batch_size=exercise.batch_size,
        folder=folder,
        identity=identity,
        console=console,
    )

    def conclude() -> float:
        answers = [tokenizer.decode(ids).strip() for ids in written]
        pairs = list(zip(exercise.references, answers, strict=True))
        scores = [rouge_l([[reference]], [answer])["rougeL"] for reference, answer in pairs]
        prompts = (_written(tokenizer, prompt) for prompt in exercise.prompts)
        lines = (
            {"prompt": prompt, "reference": reference, "answer": answer, "score": each}
            for prompt, (reference, answer), each in zip(prompts, pairs, scores, strict=True)
        )
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_whole(folder / ANSWERS, text)
        forget_partial(folder)
        return statistics.fmean(scores)

    mean: float = on_first(conclude)
    console.print(f"ROUGE-L {100 * mean:.1f}", highlight=False)
    return {"rouge_l": mean}
