"""Rows for the paper's eight datasets, made from the embedded ones in the originals' schemas.

They stand in where real rows cannot be had: what they say is about Python's standard library, but
they come in the columns and the form in which each dataset was published, so that the same loader,
prompt and loss mask handle them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from experiments.embedded import DATASETS
from qlora_jax.files import write_whole

Row = dict[str, Any]
# Beyond a tiny sweep's need, and quick to write.
_ROWS = 200


def _embedded(name: str) -> Iterator[Row]:
    path = DATASETS[name].folder / "train.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines()[:_ROWS]:
        yield json.loads(line)


def _tree(row: Row) -> Row:
    """A conversation as a message tree of one branch, in Open Assistant's export schema."""
    replies: list[Row] = []
    for turn in reversed(row["messages"]):
        role = "prompter" if turn["role"] == "user" else "assistant"
        replies = [{"text": turn["content"], "role": role, "rank": 0, "replies": replies}]
    # One schema for all levels: `datasets` has no recursive types.
    return {"message_tree_id": "made", "prompt": replies[0]}


def _transcript(row: Row) -> Row:
    names = {"user": "Human", "assistant": "Assistant"}
    turns = [f"\n\n{names[turn['role']]}: {turn['content']}" for turn in row["messages"]]
    return {"chosen": "".join(turns), "rejected": "".join(turns[:-1])}


def _unnatural(row: Row) -> Row:
    asked = f"{row['instruction']}\n{row['input']}"
    instance = {"instruction_with_input": asked, "input": row["input"], "constraints": "None."}
    return {"instruction": row["instruction"], "instances": [instance | {"output": row["output"]}]}


_MAKERS: dict[str, tuple[str, Callable[[Row], Row]]] = {
    "oasst1": ("chat", _tree),
    "hh-rlhf": ("chat", _transcript),
    "alpaca": ("describe", dict),
    "self-instruct": (
        "implement",
        lambda row: {
            "prompt": f"Complete the function.\nInput: {row['input']}\nOutput:",
            "completion": f" {row['output']}<|endoftext|>",
        },
    ),
    "unnatural-instructions": ("describe", _unnatural),
    "flan-v2": (
        "describe",
        lambda row: {
            "inputs": f"{row['input']}\n\n{row['instruction']}",
            "targets": row["output"],
            "task": "made",
        },
    ),
    "chip2": (
        "describe",
        lambda row: {
            "text": f"<human>: {row['instruction']}\n{row['input']}\n<bot>: {row['output']}"
        },
    ),
    "longform": (
        "implement",
        lambda row: {
            "input": f"Write the body of this function.\n{row['input']}",
            "output": row["output"],
            "source": "stdlib",
            "subset": "made",
        },
    ),
}


def made_rows(dataset: str) -> Iterable[Row]:
    """Rows in the schema of one of the paper's datasets; KeyError for another name."""
    embedded, make = _MAKERS[dataset]
    return (make(row) for row in _embedded(embedded))


def write_rows(dataset: str, path: Path) -> None:
    """Writes them as JSON lines, whole or not at all: another sweep may be about to read them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made_rows(dataset))
    write_whole(path, text)
