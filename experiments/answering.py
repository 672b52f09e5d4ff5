"""What a finished model answers to many prompts: greedily, kept batch by batch, told now and then.

A run that is killed on the way goes on where its file ends. Prompts are answered in the same
batches then, so that every answer is the same as without the kill.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax import nnx
from rich.console import Console

from qlora_jax.evaluate import Record
from qlora_jax.generate import GenerationConfig, generate

PARTIAL = "answers.partial.jsonl"


def greedy_answers(
    model: nnx.Module,
    prompts: Sequence[Sequence[int]],
    how: GenerationConfig,
    *,
    batch_size: int,
    folder: Path,
    identity: Mapping[str, Any],
    console: Console,
) -> list[list[int]]:
    """The ids of each answer, in the prompts' order.

    Args:
        model: that answers.
        prompts: their ids.
        how: a greedy one.
        batch_size: prompts at once.
        folder: of the run; it gets answers.partial.jsonl, which `forget_partial` deletes.
        identity: what the answers depend on beside prompts and `how`, for JSON.
        console: is told of a long one's progress.

    Raises:
        ValueError: the folder holds answers to other prompts, or of another model.
    """
    asked = hashlib.sha256(repr((prompts, how)).encode()).hexdigest()
    depends_on = {"prompts": asked, **identity}
    record = Record(folder / PARTIAL, depends_on, item="prompt", finding="tokens")
    # The longest first: if memory does not suffice, that shows at once.
    ordered = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    tenths = len(record.found) * 10 // len(prompts)
    for begin in range(0, len(prompts), batch_size):
        batch = ordered[begin : begin + batch_size]
        if all(str(i) in record.found for i in batch):
            continue
        written = generate(model, [prompts[i] for i in batch], how, batch_size=batch_size)
        record.add(
            {"prompt": str(i), "tokens": list(answer.tokens)}
            for i, answer in zip(batch, written, strict=True)
        )
        done = len(record.found)
        if done * 10 // len(prompts) > tenths:
            tenths = done * 10 // len(prompts)
            console.print(f"answered {done} of {len(prompts)}", highlight=False)
    return [record.found[str(i)] for i in range(len(prompts))]


def forget_partial(folder: Path) -> None:
    """Deletes what `greedy_answers` kept, once what is made of it is written."""
    (folder / PARTIAL).unlink(missing_ok=True)


def adapter_digest(adapter: Path) -> str:
    """What tells a saved adapter's weights from others': the SHA-256 of their file, in hex."""
    with (adapter / "adapter_model.safetensors").open("rb") as weights:
        return hashlib.file_digest(weights, "sha256").hexdigest()
