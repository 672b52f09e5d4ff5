"""Super-NaturalInstructions (arXiv 2204.07705): instances by task, prompts, held-out tasks.

What is measured is instruction following on *tasks* never trained on, so rows are split by task.
Two sources are read: a copy of the repository allenai/natural-instructions (`tasks/*.json` with its
official `splits/default`), and flattened rows with the columns instruction, input, output and the
task's name (`topic` or `task`), of which some tasks are held out by a seeded draw.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qlora_jax.data import load_rows


class Instance(NamedTuple):
    """One question of a task, with the task's instruction and every accepted answer."""

    task: str
    definition: str
    examples: tuple[tuple[str, str], ...]
    input: str
    references: tuple[str, ...]


def prompt(instance: Instance, shots: int = 2) -> str:
    """What the encoder reads: the definition, worked examples, the input, in Tk-Instruct's layout.

    Args:
        instance: the question.
        shots: worked examples at most; flattened rows have none.
    """
    parts = [f"Definition: {instance.definition.strip()}"]
    for number, (given, answer) in enumerate(instance.examples[:shots], 1):
        parts.append(f"Positive Example {number} -\nInput: {given.strip()}\nOutput: {answer}")
    parts.append(f"Now complete the following example -\nInput: {instance.input.strip()}\nOutput: ")
    return "\n\n".join(parts)


def load_split(
    source: str | Path, *, per_task: int, held_out_tasks: int
) -> tuple[list[Instance], list[Instance]]:
    """Instances of the tasks to train on, and of those to score, both shuffled.

    Args:
        source: a copy of the repository, or rows as a file, a folder or a hub name.
        per_task: the first so many instances of each task, as in Tk-Instruct (100).
        held_out_tasks: how many tasks of flattened rows are held out; the repository says itself.

    Raises:
        FileNotFoundError: the source, or a task that the split names, is missing.
        ValueError: rows with other columns, or too few tasks.
    """
    folder = Path(source).expanduser()
    if (folder / "splits" / "default").is_dir():
        return (
            _shuffled(_official(folder, "train_tasks", per_task)),
            _shuffled(_official(folder, "test_tasks", per_task)),
        )
    tasks: dict[str, list[Instance]] = {}
    for number, row in enumerate(load_rows(source)):
        instance = _flattened(row, f"row {number} of {source}")
        tasks.setdefault(instance.task, []).append(instance)
    if len(tasks) <= held_out_tasks:
        raise ValueError(
            f"{source} has {len(tasks)} tasks, but {held_out_tasks} are to be held out: give more "
            "rows, or hold out fewer (--held-out-tasks)."
        )
    names = _shuffled(sorted(tasks))
    parts = (names[held_out_tasks:], names[:held_out_tasks])
    chosen = [_shuffled([i for name in part for i in tasks[name][:per_task]]) for part in parts]
    return chosen[0], chosen[1]


def _shuffled(items: list[Any]) -> list[Any]:
    """In an order that is the same every time, so that the first few are of many tasks."""
    return random.Random(0).sample(items, len(items))


def _official(folder: Path, split: str, per_task: int) -> list[Instance]:
    instances = []
    for name in (folder / "splits" / "default" / f"{split}.txt").read_text("utf-8").split():
        path = folder / "tasks" / f"{name}.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, but {split}.txt names it: fetch it again.")
        task = json.loads(path.read_text(encoding="utf-8"))
        definition = task["Definition"]
        examples = tuple((e["input"], e["output"]) for e in task["Positive Examples"])
        instances += [
            Instance(
                name,
                definition if isinstance(definition, str) else definition[0],
                examples,
                row["input"],
                tuple(row["output"]),
            )
            for row in task["Instances"][:per_task]
        ]
    return instances


def _flattened(row: Mapping[str, Any], where: str) -> Instance:
    task, output = row.get("topic") or row.get("task"), row.get("output")
    references: list[Any] = output if isinstance(output, list) else [output]
    texts = [task, row.get("instruction"), row.get("input"), *(references or [None])]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"{where} has the columns {', '.join(row)}, but topic (or task), instruction and input "
            "are needed as texts, and output as a text or a list of them."
        )
    return Instance(str(task), row["instruction"], (), row["input"], tuple(references))


def as_pairs(instances: Iterable[Instance]) -> list[dict[str, str]]:
    """Rows for `tokenize_pairs`: prompt and first reference."""
    return [{"input": prompt(i), "output": i.references[0]} for i in instances]


def by_task(instances: Sequence[Instance], scores: Sequence[float]) -> dict[str, float]:
    """The mean of a score over the instances of each task."""
    collected: dict[str, list[float]] = {}
    for instance, score in zip(instances, scores, strict=True):
        collected.setdefault(instance.task, []).append(score)
    return {task: sum(values) / len(values) for task, values in sorted(collected.items())}
