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
    formats_for,
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

    `hub` and `hub_options` are what `load_rows` takes; `licence` is that of the data, as its
    authors state it. Two counts of examples: `paper_rows` is the paper's, None where it subsampled;
    `released` is that of the hub's whole training split (of several examples to a row, after they
    are taken apart), which is asserted whenever that is read; None where it is never read whole.
    """

    hub: str
    licence: str
    paper_rows: int | None
    released: int | None
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
        released=9_846,
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
        released=160_800,
        train_on="all",
        schemas=(Schema(("chosen", "rejected"), FORMATS["hh-rlhf"]),),
    ),
    "alpaca": InstructDataset(
        hub="tatsu-lab/alpaca",
        licence="CC-BY-NC-4.0",
        paper_rows=51_942,
        released=52_002,
        train_on="response",
        schemas=(Schema(("instruction", "input", "output"), ALPACA),),
    ),
    "alpaca-clean": InstructDataset(
        hub="yahma/alpaca-cleaned",
        licence="CC-BY-NC-4.0",
        paper_rows=None,
        released=51_760,
        train_on="response",
        schemas=(Schema(("instruction", "input", "output"), ALPACA),),
    ),
    "self-instruct": InstructDataset(
        hub="yizhongw/self_instruct",
        hub_options={"name": "self_instruct"},
        licence="Apache-2.0",
        paper_rows=82_612,
        released=82_612,
        train_on="response",
        schemas=(_PROMPT_COMPLETION, Schema(("instruction", "instances"), ALPACA, _seed_task)),
    ),
    "unnatural-instructions-core": InstructDataset(
        hub="mrm8488/unnatural-instructions-core",
        licence="MIT",
        paper_rows=None,
        released=68_478,
        train_on="response",
        schemas=(Schema(("instruction", "instances"), _PAIRS, _unnatural), _FLATTENED),
    ),
    "unnatural-instructions": InstructDataset(
        hub="mrm8488/unnatural-instructions-full",
        licence="MIT",
        paper_rows=240_670,
        released=240_670,
        train_on="response",
        schemas=(Schema(("instruction", "instances"), _PAIRS, _unnatural), _FLATTENED),
    ),
    "flan-v2": InstructDataset(
        hub="SirNeural/flan_v2",
        licence="Apache-2.0",
        paper_rows=None,
        released=None,
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
        released=210_289,
        train_on="response",
        schemas=(Schema(("text",), _PAIRS, _chip2),),
    ),
    "longform": InstructDataset(
        hub="akoksal/LongForm",
        licence="MIT",
        paper_rows=23_700,
        released=23_652,
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
    data_files: str | list[str] | None = None,
    cache_dir: str | Path | None = None,
    check_count: bool = True,
) -> InstructRows:
    """The rows of one of the paper's datasets, with the paper's prompt and loss mask for it.

    Args:
        name: a key of `INSTRUCT`.
        source: a file or folder with the dataset's rows in any of its schemas; None: the hub.
        split: as for `load_rows`; FLAN v2 has more than 15 million rows, so take a slice of it.
        data_files: read only these files of the hub dataset or folder: FLAN v2's submixtures, say.
        cache_dir: as for `load_rows`.
        check_count: refuse the hub's whole training split where it has not `released` examples.

    Raises:
        ValueError: no such dataset; columns of another one (the message says whose); a row that
            contradicts its schema; another count of examples than was released.
        FileNotFoundError, ConnectionError: as `load_rows`.
    """
    if name not in INSTRUCT:
        raise ValueError(f"there is no dataset {name!r}; the paper's are {', '.join(INSTRUCT)}.")
    dataset = INSTRUCT[name]
    where = source or dataset.hub
    options: dict[str, Any] = dict(dataset.hub_options) if source is None else {}
    if data_files is not None:
        options["data_files"] = data_files
    rows = load_rows(where, split, cache_dir=cache_dir, **options)
    schema = _schema_of(rows.column_names, name, where)
    examples = rows if schema.expand is None else _taken_apart(rows, schema.expand, where)
    whole = source is None and data_files is None and split in (None, "train")
    if whole and check_count and dataset.released not in (None, len(examples)):
        raise ValueError(
            f"{where} gave {len(examples)} examples, but {dataset.released} were released: the "
            "download is not whole, or the hub's files have changed; check_count=False takes them."
        )
    return InstructRows(examples, schema.form, dataset.train_on)


def _taken_apart(rows: Iterable[Row], expand: Expand, where: str | Path) -> list[Row]:
    examples: list[Row] = []
    for index, row in enumerate(rows):
        try:
            examples.extend(expand(row))
        except ValueError as error:
            raise ValueError(f"row {index} of {where}: {error}") from error
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(
                f"row {index} of {where} contradicts its schema ({type(error).__name__}: {error}): "
                "correct or leave it out."
            ) from error
    return examples


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
    formats = formats_for(columns)
    if others:
        remedy = f"the loader of {' or '.join(others)} would take them"
    elif formats:
        remedy = f"load_rows and the format {' or '.join(formats)} would take them"
    else:
        remedy = "no loader and no format takes these: rename them"
    raise ValueError(
        f"{source} has the columns {', '.join(columns)}, but {name!r} has {expected}; {remedy}."
    )
