"""The eight instruction datasets of the QLoRA paper (section 5, appendix B), under its names.

A dataset here is one entry of a table: where it lies on the hub, its licence, how many rows the
paper counts, on what it takes loss, and the *schemas* its rows come in. A schema is a set of
columns, the format that reads them and, where a row holds several examples (or a tree of them), a
function that takes the row apart. The same dataset is met in several schemas, as its authors
published it, as the hub has it and as others flattened it: the first whose columns are there reads.

    data = load_instruct("oasst1")                          # from the hub
    data = load_instruct("oasst1", "oasst_trees.jsonl")     # the same from a file
    examples = tokenize_rows(data.rows, data.form, tokenizer, train_on=data.train_on)
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from qlora_jax.data.segments import Format, Row, TrainOn
from qlora_jax.data.sources import load_rows
from qlora_jax.data.templates import (
    ALPACA,
    FORMATS,
    GUANACO_STYLE,
    ConversationFormat,
    FlatChatFormat,
    PairFormat,
)

Expand = Callable[[Row], Iterable[Row]]

_PAIRS = PairFormat("input-output", "input", "output")
# What OpenAI's finetuning wanted at the end of a completion; the tokenizer's eos ends ours.
_END_OF_TEXT = "<|endoftext|>"


class Schema(NamedTuple):
    """Columns that rows may have, the format for them, and how to take a row apart first."""

    columns: tuple[str, ...]
    form: Format
    expand: Expand | None = None


@dataclass(frozen=True)
class InstructDataset:
    """One dataset of the paper.

    `hub` and `hub_options` are what `load_rows` takes; `paper_rows` is the paper's count of
    examples, None where it subsampled; `licence` is that of the data, as its authors state it.
    """

    hub: str
    licence: str
    paper_rows: int | None
    train_on: TrainOn
    schemas: tuple[Schema, ...]
    hub_options: Mapping[str, Any] = field(default_factory=dict)


class InstructRows(NamedTuple):
    """Rows with what to read them by: the arguments of `tokenize_rows`."""

    rows: Sequence[Row]
    form: Format
    train_on: TrainOn


def best_path(tree: Row) -> Iterator[Row]:
    """An OASST message tree as one conversation: at each level the reply that people ranked first.

    Deleted messages are passed over; unranked ones come after the ranked. A conversation ends with
    an answer, so a last turn of the prompter is dropped; a tree without any answer gives no row.
    """
    messages = []
    message = tree["prompt"]
    while message:
        messages.append({"role": message["role"], "content": message["text"]})
        replies = [reply for reply in message.get("replies") or () if not reply.get("deleted")]
        message = min(replies, key=_rank, default=None)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if messages:
        yield {"messages": messages}


def _rank(message: Row) -> float:
    rank = message.get("rank")
    return float("inf") if rank is None else float(rank)


def _prompt_completion(row: Row) -> Iterator[Row]:
    yield {
        "input": row["prompt"],
        "output": row["completion"].removesuffix(_END_OF_TEXT),
    }


def _seed_task(row: Row) -> Iterator[Row]:
    for instance in row["instances"]:
        yield {"instruction": row["instruction"], **instance}


def _unnatural(row: Row) -> Iterator[Row]:
    # The core set has one instance a row; the full set adds reformulations of the instruction.
    for instance in (*row["instances"], *(row.get("reformulations") or ())):
        yield {"input": instance["instruction_with_input"], "output": instance["output"]}


def _instruction_and_input(row: Row) -> Iterator[Row]:
    given = "\n".join(part for part in (row["instruction"], row["input"]) if part)
    # Super-NaturalInstructions lists every accepted answer; the first is trained on.
    output = row["output"][0] if isinstance(row["output"], list) else row["output"]
    yield {"input": given, "output": output}


def _chain_of_thought(row: Row) -> Iterator[Row]:
    output = f"{row['rationale']} So the answer is {row['answer']}."
    yield {"input": row["question"], "output": output}


def _chip2(row: Row) -> Iterator[Row]:
    human, found, answer = row["text"].partition("\n<bot>:")
    if not found or not human.startswith("<human>:"):
        raise ValueError(
            f"a Chip2 row must read '<human>: ...\\n<bot>: ...', but one begins {human[:60]!r}."
        )
    yield {"input": human.removeprefix("<human>:").strip(), "output": answer.strip()}


_PROMPT_COMPLETION = Schema(("prompt", "completion"), _PAIRS, _prompt_completion)
_FLATTENED = Schema(("instruction", "input", "output"), _PAIRS, _instruction_and_input)

INSTRUCT: dict[str, InstructDataset] = {
    "oasst1": InstructDataset(
        hub="timdettmers/openassistant-guanaco",
        licence="Apache-2.0",
        paper_rows=9_209,
        train_on="all",
        schemas=(
            Schema(
                ("message_tree_id", "prompt"),
                ConversationFormat("oasst1-tree", GUANACO_STYLE),
                best_path,
            ),
            Schema(
                ("guanaco_text",),
                FlatChatFormat("oasst1", "### Human:", "### Assistant:", text="guanaco_text"),
            ),
            Schema(("text",), FORMATS["guanaco"]),
        ),
    ),
    "hh-rlhf": InstructDataset(
        hub="Anthropic/hh-rlhf",
        licence="MIT",
        paper_rows=160_800,
        train_on="all",
        schemas=(Schema(("chosen", "rejected"), FORMATS["hh-rlhf"]),),
    ),
    "alpaca": InstructDataset(
        hub="tatsu-lab/alpaca",
        licence="CC-BY-NC-4.0",
        paper_rows=51_942,
        train_on="response",
        schemas=(Schema(("instruction", "input", "output"), ALPACA),),
    ),
    "alpaca-clean": InstructDataset(
        hub="yahma/alpaca-cleaned",
        licence="CC-BY-NC-4.0",
        paper_rows=None,
        train_on="response",
        schemas=(Schema(("instruction", "input", "output"), ALPACA),),
    ),
    "self-instruct": InstructDataset(
        hub="yizhongw/self_instruct",
        hub_options={"name": "self_instruct"},
        licence="Apache-2.0",
        paper_rows=82_612,
        train_on="response",
        schemas=(_PROMPT_COMPLETION, Schema(("instruction", "instances"), ALPACA, _seed_task)),
    ),
    "unnatural-instructions-core": InstructDataset(
        hub="mrm8488/unnatural-instructions-core",
        licence="MIT",
        paper_rows=None,
        train_on="response",
        schemas=(Schema(("instruction", "instances"), _PAIRS, _unnatural), _FLATTENED),
    ),
    "unnatural-instructions": InstructDataset(
        hub="mrm8488/unnatural-instructions-full",
        licence="MIT",
        paper_rows=240_670,
        train_on="response",
        schemas=(Schema(("instruction", "instances"), _PAIRS, _unnatural), _FLATTENED),
    ),
    "flan-v2": InstructDataset(
        hub="SirNeural/flan_v2",
        licence="Apache-2.0",
        paper_rows=None,
        train_on="response",
        schemas=(
            Schema(("inputs", "targets"), PairFormat("flan-v2", "inputs", "targets")),
            Schema(("question", "answer", "rationale"), _PAIRS, _chain_of_thought),
            _PROMPT_COMPLETION,
            _FLATTENED,
        ),
    ),
    "chip2": InstructDataset(
        hub="laion/OIG",
        hub_options={"data_files": "unified_chip2.jsonl"},
        licence="Apache-2.0",
        paper_rows=210_289,
        train_on="response",
        schemas=(Schema(("text",), _PAIRS, _chip2),),
    ),
    "longform": InstructDataset(
        hub="akoksal/LongForm",
        licence="MIT",
        paper_rows=23_700,
        train_on="response",
        schemas=(Schema(("input", "output"), _PAIRS),),
    ),
}
"""The datasets of the paper by name."""


def load_instruct(
    name: str,
    source: str | Path | None = None,
    split: str | None = None,
    *,
    cache_dir: str | Path | None = None,
) -> InstructRows:
    """The rows of one of the paper's datasets, with the paper's prompt and loss mask for it.

    Args:
        name: a key of `INSTRUCT`.
        source: a file or folder with the dataset's rows in any of its schemas; None: the hub.
        split: as for `load_rows`; FLAN v2 has more than 15 million rows, so take a slice of it.
        cache_dir: as for `load_rows`.

    Raises:
        ValueError: no such dataset; columns of another one (the message says whose).
        FileNotFoundError, ConnectionError: as `load_rows`.
    """
    if name not in INSTRUCT:
        raise ValueError(f"there is no dataset {name!r}; the paper's are {', '.join(INSTRUCT)}.")
    dataset = INSTRUCT[name]
    if source is None:
        rows = load_rows(dataset.hub, split, cache_dir=cache_dir, **dataset.hub_options)
    else:
        rows = load_rows(source, split, cache_dir=cache_dir)
    schema = _schema_of(rows.column_names, name, source or dataset.hub)
    if schema.expand is None:
        return InstructRows(rows, schema.form, dataset.train_on)
    expanded = [example for row in rows for example in schema.expand(row)]
    return InstructRows(expanded, schema.form, dataset.train_on)


def _schema_of(columns: list[str], name: str, source: str | Path) -> Schema:
    for schema in INSTRUCT[name].schemas:
        if set(schema.columns) <= set(columns):
            return schema
    others = [
        other
        for other, dataset in INSTRUCT.items()
        if any(set(schema.columns) <= set(columns) for schema in dataset.schemas)
    ]
    expected = " or ".join(f"({', '.join(schema.columns)})" for schema in INSTRUCT[name].schemas)
    remedy = (
        f"these are columns of {', '.join(others)}"
        if others
        else "no dataset of the paper has these: use load_rows and a format of FORMATS"
    )
    raise ValueError(
        f"{source} has the columns {', '.join(columns)}, but {name!r} has {expected}; {remedy}."
    )
