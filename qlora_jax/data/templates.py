"""Prompt formats: from a row of a dataset to the text a model reads and the loss it takes.

A finetune on instructions differs from pretraining in one thing only: which tokens count in the
loss. So a format turns a row into *segments*, pieces of text that carry that mark, and everything
after it (`tokenize`, `batches`, the training step) knows nothing of instructions or chats:

    format.segments(row) -> (Segment(prompt, trained=False), Segment(answer, trained=True))

`train_on="response"` takes loss on the answers alone, which the QLoRA paper found better wherever
instruction and answer are clearly apart (38.6 against 37.5 on MMLU, appendix B); `"all"` takes it
on everything, as the paper did for OASST1 and HH-RLHF, which it read as whole conversations;
`"last"`, of a conversation, on what answers its last question.

Whitespace is part of a format. A boundary between segments is always a boundary between tokens
(see `encode`), so a space that separates two segments opens the second one, where both
SentencePiece ("▁answer") and byte-level BPE ("Ġanswer") have their natural pieces.

A format is frozen data without a base class: its `name`, the `columns` it needs of a row, and
`segments`. A new one is a new small dataclass, or a new instance of one of these.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qlora_jax.data.segments import (
    Format,
    Row,
    Segment,
    TrainOn,
    joined,
    shown,
    text_of,
    trained_turns,
    trains_on_all,
    turns_of,
    with_system,
)


@dataclass(frozen=True)
class InstructionFormat:
    """An instruction, perhaps with an input, inside a fixed prompt; then the answer.

    `prompt` is filled (`str.format`) from the row's columns where its input is not empty,
    `prompt_no_input` where it is empty or the column is absent.
    """

    name: str
    prompt: str
    prompt_no_input: str
    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns a row must have; the input's may be absent."""
        return (self.instruction, self.output)

    def source(self, row: Row) -> str:
        """The prompt alone: what to give a finetuned model when asking it something."""
        instruction = text_of(row, self.instruction, self.name)
        given = row.get(self.input)
        if given is None or given == "":
            return self.prompt_no_input.format(instruction=instruction)
        return self.prompt.format(
            instruction=instruction, input=text_of(row, self.input, self.name)
        )

    def segments(self, row: Row, train_on: TrainOn = "response") -> tuple[Segment, ...]:
        """Prompt (source), answer (target)."""
        answer = text_of(row, self.output, self.name)
        return (
            Segment(self.source(row), trains_on_all(train_on), "source"),
            Segment(answer, True),
        )


@dataclass(frozen=True)
class PairFormat:
    """An input and its output, and a `separator` only where the two would run together.

    That is where neither the input ends nor the output begins with whitespace. With the default, a
    Llama tokenizer gives the very ids of the paper's code, which tokenizes both texts as beginnings
    and so gets SentencePiece's space in front of the output.
    """

    name: str
    input: str
    output: str
    separator: str = " "

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns a row must have."""
        return (self.input, self.output)

    def segments(self, row: Row, train_on: TrainOn = "response") -> tuple[Segment, ...]:
        """Input (source), separator and output (target)."""
        given, answer = text_of(row, self.input, self.name), text_of(row, self.output, self.name)
        if given and answer and not given[-1].isspace() and not answer[0].isspace():
            answer = self.separator + answer
        return (Segment(given, trains_on_all(train_on), "source"), Segment(answer, True))


@dataclass(frozen=True)
class ChatStyle:
    """How the turns of a conversation are written down.

    `openings` maps a role to what stands before its turn; `closing` ends every turn and is trained
    on after the assistant's, so that the model learns to hand over. `between` joins turns.
    `special` says that openings and closings are the tokenizer's own markers. A content that does
    not begin with whitespace is written after `content_prefix`.
    """

    openings: Mapping[str, str]
    content_prefix: str = ""
    closing: str = ""
    between: str = ""
    special: bool = False


GUANACO_STYLE = ChatStyle(
    # `timdettmers/openassistant-guanaco` flattens OASST1 to this form; a system text stands bare,
    # as the QLoRA evaluation prompts have it.
    openings={"user": "### Human:", "assistant": "### Assistant:", "system": ""},
    content_prefix=" ",
    between=" ",
)
CHATML_STYLE = ChatStyle(
    openings={role: f"<|im_start|>{role}\n" for role in ("system", "user", "assistant")},
    closing="<|im_end|>",
    between="\n",
    special=True,
)


@dataclass(frozen=True)
class ConversationFormat:
    """A list of turns (`role`, `content`) in a style; `"response"` trains every assistant turn,
    `"last"` those behind the last question.

    `system` is a system prompt for conversations that have none. What names of roles and contents
    are understood: `segments.turns_of`. A model's own style: `chat_format`.
    """

    name: str
    style: ChatStyle
    messages: str = "messages"
    system: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns a row must have."""
        return (self.messages,)

    def segments(self, row: Row, train_on: TrainOn = "response") -> tuple[Segment, ...]:
        """Turn by turn: opening, content, closing; all of it target."""
        turns = turns_of(row, self.messages, self.name, roles=self.style.openings)
        everything = trains_on_all(train_on)
        turns = with_system(turns, self.system)
        answers = trained_turns([turn.role for turn in turns], train_on)
        style, segments = self.style, []
        for index, (role, content, more) in enumerate(turns):
            if content is None or more.get("tool_calls"):
                raise ValueError(
                    f"format {self.name!r} has no way to write a call of a tool, but a row holds "
                    f"{shown(more['tool_calls'])}; take the model's own (chat-template)."
                )
            trained = everything or index in answers
            opening = (style.between if index else "") + style.openings[role]
            if content and not content[0].isspace() and (opening or index):
                content = style.content_prefix + content
            segments += [
                Segment(opening, everything, special=style.special),
                Segment(content, trained),
                Segment(style.closing, trained, special=style.special),
            ]
        return joined(segments)


@dataclass(frozen=True)
class FlatChatFormat:
    """A conversation already flattened to one text, split again at the markers of its speakers.

    With `"all"` the text is one segment, exactly as given. With `"response"` what follows an
    `assistant` marker is trained on, up to the next `human` marker and the whitespace before it;
    with `"last"` only what answers the last question.
    """

    name: str
    human: str
    assistant: str
    text: str = "text"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns a row must have."""
        return (self.text,)

    def segments(self, row: Row, train_on: TrainOn = "response") -> tuple[Segment, ...]:
        """The text, cut after each assistant marker and before each human marker."""
        text = text_of(row, self.text, self.name)
        if trains_on_all(train_on):
            return (Segment(text, True),)
        pieces = re.split(rf"(\s*{re.escape(self.human)}|{re.escape(self.assistant)})", text)
        if self.assistant not in pieces:
            raise ValueError(
                f"format {self.name!r} expects {self.assistant!r} in the column {self.text!r} to "
                f"know what the response is, but a row holds {shown(text)}; train on all of it "
                "(train_on='all') or choose another format."
            )
        # re.split with a group alternates text and marker; the text belongs to the marker before.
        markers = pieces[1::2]
        roles = ["assistant" if marker == self.assistant else "user" for marker in markers]
        answers = trained_turns(roles, train_on)
        segments = [Segment(pieces[0], False)]
        for index, (marker, content) in enumerate(zip(markers, pieces[2::2], strict=True)):
            segments += [Segment(marker, False), Segment(content, index in answers)]
        return joined(segments)


@dataclass(frozen=True)
class TextFormat:
    """Plain text: every token is trained on, whatever `train_on` says, for there is no prompt."""

    name: str
    text: str = "text"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns a row must have."""
        return (self.text,)

    def segments(self, row: Row, train_on: TrainOn = "response") -> tuple[Segment, ...]:
        """The text as one target segment."""
        trains_on_all(train_on)
        return (Segment(text_of(row, self.text, self.name), True),)


# Stanford Alpaca's training prompts (tatsu-lab/stanford_alpaca, train.py), to the character.
ALPACA = InstructionFormat(
    name="alpaca",
    prompt=(
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
    ),
    prompt_no_input=(
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:"
    ),
)

_RENAME = (
    "Say what is which: columns={'output': 'answer'} of load_rows (data.columns.output=answer of a "
    "run)."
)

FORMATS: dict[str, Format] = {
    "alpaca": ALPACA,
    "input-output": PairFormat("input-output", "input", "output"),
    "prompt-completion": PairFormat("prompt-completion", "prompt", "completion"),
    "messages": ConversationFormat("messages", GUANACO_STYLE),
    "messages-chatml": ConversationFormat("messages-chatml", CHATML_STYLE),
    "guanaco": FlatChatFormat("guanaco", "### Human:", "### Assistant:"),
    "hh-rlhf": FlatChatFormat("hh-rlhf", "\n\nHuman:", "\n\nAssistant:", text="chosen"),
    "text": TextFormat("text"),
}
"""The formats by name. `detect_format` names the one that takes given columns."""


def get_format(name: str) -> Format:
    """The format of that name; ValueError lists those that exist."""
    if name not in FORMATS:
        raise ValueError(
            f"there is no prompt format {name!r}; the formats are {', '.join(FORMATS)}."
        )
    return FORMATS[name]


def formats_for(columns: Iterable[str]) -> list[str]:
    """The names of the formats that these columns are enough for."""
    present = set(columns)
    return [name for name, form in FORMATS.items() if present.issuperset(form.columns)]


def detect_format(columns: Iterable[str], *, source: str = "the dataset") -> Format:
    """The format these columns were made for.

    Raises:
        ValueError: no format fits, or two fit equally well; the message says which.
    """
    found = list(columns)
    fitting = formats_for(found)
    if not fitting:
        raise ValueError(
            f"{source} has the columns {', '.join(found) or '(none)'}, which no prompt format "
            "takes; the formats need "
            + "; ".join(f"{name}: {', '.join(form.columns)}" for name, form in FORMATS.items())
            + f". {_RENAME}"
        )
    # Alpaca's rows have an `input` and an `output` too, and an instruction besides.
    if "alpaca" in fitting:
        return FORMATS["alpaca"]
    if len(fitting) > 1:
        own = ", where chat-template is the model's own" if "messages" in fitting else ""
        raise ValueError(
            f"{source} has the columns {', '.join(found)}, which the formats {', '.join(fitting)} "
            f"all take: name the one you mean as the format (data.format of a run{own})."
        )
    return FORMATS[fitting[0]]


def check_columns(columns: Iterable[str], form: Format, *, source: str = "the dataset") -> None:
    """Refuses columns that the format cannot read, saying which format would take them, and what is
    no format."""
    if not isinstance(form, Format):
        raise TypeError(
            f"form is {form!r}, but a prompt format is needed: give FORMATS[name], where name is "
            f"one of {', '.join(FORMATS)}, or a ChatTemplateFormat."
        )
    found = list(columns)
    missing = [column for column in form.columns if column not in found]
    if not missing:
        return
    others = formats_for(found)
    remedy = (
        f"the format{'s' if len(others) > 1 else ''} {', '.join(map(repr, others))} would take it."
        if others
        else f"no format takes these columns. {_RENAME}"
    )
    raise ValueError(
        f"{source} has the columns {', '.join(found) or '(none)'}, but the format {form.name!r} "
        f"needs {', '.join(form.columns)} ({', '.join(missing)} missing); {remedy}"
    )
