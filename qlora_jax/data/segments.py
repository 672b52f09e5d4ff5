"""What a prompt format gives: pieces of text, each marked with whether it is trained on.

And what all formats share: how they read a row's columns and turns, and refuse what is not there.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

Row = Mapping[str, Any]
TrainOn = Literal["response", "last", "all"]
"""What the loss is taken on: every answer, the answer to the last question alone, or all text."""


class Segment(NamedTuple):
    """A piece of an example's text, tokenized on its own.

    `part` says which length limit it falls under: `source_max_len` bounds what an instruction asks,
    `target_max_len` what is answered; a conversation is all target, as in the paper.
    `special` lets the tokenizer read its own markers (`<|im_end|>`) in this text: only ever for
    text that the format wrote, never for a row's content, so that a row about HTML's `<s>` cannot
    begin a new sequence.
    """

    text: str
    trained: bool
    part: Literal["source", "target"] = "target"
    special: bool = False


@runtime_checkable
class Format(Protocol):
    """What `tokenize_rows` asks of a prompt format."""

    @property
    def name(self) -> str:
        """How the format is called in configurations and messages."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns a row must have."""
        ...

    def segments(self, row: Row, train_on: TrainOn = "response") -> tuple[Segment, ...]:
        """The row as text in order, each piece marked with whether it is trained on."""
        ...


def joined(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    """Without the empty ones, and neighbours that differ in nothing made one."""
    result: list[Segment] = []
    for segment in segments:
        if not segment.text:
            continue
        if result and result[-1][1:] == segment[1:]:
            result[-1] = result[-1]._replace(text=result[-1].text + segment.text)
        else:
            result.append(segment)
    return tuple(result)


def trains_on_all(train_on: str) -> bool:
    """Whether `train_on` is "all"; ValueError where it is no `TrainOn`."""
    if train_on not in get_args(TrainOn):
        raise ValueError(f"train_on is {train_on!r}, but must be 'response', 'last' or 'all'.")
    return train_on == "all"


def trained_turns(roles: Sequence[str], train_on: TrainOn) -> list[int]:
    """Which turns of a conversation are an assistant's with loss: all of its, or with "last" those
    that answer the last question, several where it calls tools."""
    written = [index for index, role in enumerate(roles) if role == "assistant"]
    if train_on != "last" or not written:
        return written
    question = max((i for i in range(written[-1]) if roles[i] == "user"), default=-1)
    return [index for index in written if index > question]


def text_of(row: Row, column: str, name: str) -> str:
    """The text in a row's column; ValueError of the format `name` where there is none."""
    value = row.get(column)
    if not isinstance(value, str):
        raise ValueError(
            f"format {name!r} expects text in the column {column!r}, but a row holds "
            f"{shown(value)}."
        )
    return value


# Role names of OASST ("prompter"), ShareGPT ("human", "gpt") and the Hugging Face `messages` form.
_ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant"}

_CONTENTS = ("content", "text", "value")
_NO_VALUES: Mapping[str, Any] = {}


class Turn(NamedTuple):
    """One turn of a conversation.

    `content` is None of an assistant's turn that only calls tools. `more` is what else the row says
    of the turn (`tool_calls`, `reasoning_content`, `name` …), without what is None in it: a dataset
    in Arrow's columns gives every turn all the keys that any has.
    """

    role: str
    content: str | None
    more: Mapping[str, Any] = _NO_VALUES


def turns_of(
    row: Row, column: str, name: str, *, roles: Collection[str] | None = None
) -> list[Turn]:
    """The conversation in a row's column.

    A turn may name its content `text` (OASST) or `value` (ShareGPT) and its role `from` (ShareGPT).

    Args:
        row: a mapping.
        column: where its list of turns stands.
        name: of the format, for messages.
        roles: those the format knows; None: any.

    Raises:
        ValueError: no list of turns, a turn without role and text (or call of a tool), a role that
            is not known.
    """
    turns = row.get(column)
    if not isinstance(turns, list | tuple) or not turns:
        raise ValueError(
            f"format {name!r} expects the column {column!r} to hold a list of "
            f"turns with role and content, but a row holds {shown(turns)}."
        )
    return [_turn(turn, name, roles) for turn in turns]


def _turn(turn: Any, name: str, roles: Collection[str] | None) -> Turn:
    if isinstance(turn, Mapping):
        role = turn.get("role") or turn.get("from")
        content = next((turn[k] for k in _CONTENTS if turn.get(k) is not None), None)
        own = ("role", "from", *_CONTENTS)
        more = without_none({k: value for k, value in turn.items() if k not in own})
        calls = content is None and more.get("tool_calls")
        if isinstance(role, str) and (isinstance(content, str) or calls):
            role = _ROLES.get(role, role)
            if roles is None or role in roles:
                return Turn(role, content, more)
    known = "" if roles is None else f" ({', '.join(roles)})"
    raise ValueError(
        f"format {name!r} expects turns with a role{known} and a text content, but a row holds the "
        f"turn {shown(turn)}."
    )


def tools_of(row: Row, name: str) -> list[Any] | None:
    """The tools that a row says a conversation may call: in its column `tools`, a list of JSON
    schemas, or the JSON text of one; None where there is none.

    Raises:
        ValueError: the column of the format `name` holds something else.
    """
    tools = row.get("tools")
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(f"the column 'tools' is not valid JSON ({error}).") from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(
            f"format {name!r} expects the column 'tools' to hold a list of JSON schemas, but a row "
            f"holds {shown(tools)}."
        )
    return without_none(tools)


def without_none(value: Any) -> Any:
    """A value without the keys, at any depth, that hold None."""
    if isinstance(value, Mapping):
        return {key: without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [without_none(inner) for inner in value]
    return value


def with_system(turns: Sequence[Turn], system: str | None) -> list[Turn]:
    """The turns, with a system prompt in front where one is given and they have none."""
    if system is None or turns[0].role == "system":
        return list(turns)
    return [Turn("system", system), *turns]


def shown(value: Any) -> str:
    """A value for a message, cut short."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
