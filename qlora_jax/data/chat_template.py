"""Chat templates: the Jinja programs that models carry to say how a conversation is written down.

A model that was trained to chat was trained on one exact way of writing turns, and its folder says
which, as a Jinja template over `messages` (`tokenizer_config.json` or `chat_template.jinja`). It is
a program from the internet, so it runs in Jinja's immutable sandbox, as in transformers: it can
loop and concatenate, and reach nothing.

`ChatTemplateFormat` makes a prompt format of one. A rendered conversation is a single string, but
two things must be known about every character of it:

- **Is it trained on?** Where the template has `{% generation %}` blocks, they say so. Elsewhere an
  assistant's turn is what rendering grows by when the turn is added to those before it, prompted to
  answer; this is verified, and a template that rewrites earlier turns later on is refused. The loss
  ends with the eos token, not with the line break that many templates put behind it.
- **Is it the template's or the row's?** A marker in a row's own text (a row about `<|im_end|>`)
  must stay characters. Contents and reasoning are rendered between two marks, and the borders read
  back. A text that does not come out whole between its marks (the template rewrites it beyond
  trimming, or cuts reasoning out of it) has no border, and is read as transformers reads it,
  markers anywhere; so are tools and the calls of them.
"""

import datetime
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from qlora_jax.data.json_file import read_json_if_any
from qlora_jax.data.segments import (
    Row,
    Segment,
    TrainOn,
    joined,
    tools_of,
    trains_on_all,
    turns_of,
    with_system,
    without_none,
)

# Noncharacters: Unicode keeps them for a program's own use and no text may hold them.
_GENERATION, _CONTENT = ("\ufdd0", "\ufdd1"), ("\ufdd2", "\ufdd3")
_MARKS = (*_GENERATION, *_CONTENT)
_OPENING = {closing: opening for opening, closing in (_GENERATION, _CONTENT)}
_MARK_IT = (
    "put {% generation %} … {% endgeneration %} around it in the template, or train on 'all'."
)
_CUT_APART = (
    "a chat template cuts apart what it has written between {% generation %} and "
    "{% endgeneration %}: it has to come out whole."
)

# What a message may call its reasoning; templates read the first two.
_REASONING = ("reasoning_content", "thinking", "reasoning")

Message = Mapping[str, Any]
Place = tuple[int, str]  # a message's number and key
Span = tuple[int, int]


@dataclass(frozen=True)
class ChatTemplate:
    """A model's own way of writing conversations.

    Attributes:
        source: the Jinja template.
        special_tokens: what it may call `bos_token`, `eos_token` and so on.
        name: what to call it in messages: the model folder's name.
    """

    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    name: str = "the chat template"

    @property
    def marks_generation(self) -> bool:
        """Whether `{% generation %}` says what an assistant writes."""
        return _compiled(self.source)[1]

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        """The conversation as one text.

        Args:
            messages: turns with a `role` and a `content`.
            add_generation_prompt: end with what stands before an assistant's answer.
            variables: further names the template knows (`tools`, `enable_thinking` …).

        Raises:
            ValueError: the template refuses the conversation (in its own words) or is no template.
        """
        text = self._render(messages, add_generation_prompt, variables)
        return _read_marks(text)[0]

    def _render(
        self, messages: Sequence[Message], prompted: bool = False, variables: Any = None
    ) -> str:
        """The text with the marks of `{% generation %}` in it."""
        names = {
            "add_generation_prompt": prompted,
            "tools": None,
            "documents": None,
            **self.special_tokens,
            **(variables or {}),
        }
        told = [_with_reasoning(message) for message in messages]
        try:
            return _compiled(self.source)[0].render(messages=told, **names)
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(
                f"the chat template of {self.name} does not take this conversation: {error}."
            ) from error


def _with_reasoning(message: Message) -> Message:
    """The message with its reasoning under the two names that templates know it by."""
    found = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    if found is None:
        return message
    return {"thinking": found, **message, "reasoning_content": found}


class _Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}`: what stands inside comes out between marks."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own interface)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """The block as a call of `_marked`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_marked")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return _GENERATION[0] + caller() + _GENERATION[1]


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> tuple[jinja2.Template, bool]:
    """The template, in an environment like transformers', and whether it marks generation."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        template = environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"a chat template is not valid Jinja (line {error.lineno}: {error.message}): correct "
            "chat_template in tokenizer_config.json."
        ) from error
    marked = any(
        token == "generation" for _, kind, token in environment.lex(source) if kind == "name"
    )
    return template, marked


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' `tojson`: unlike Jinja's, without HTML escapes and sorting of keys."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> NoReturn:
    """What a template calls to say that it does not take a conversation."""
    raise jinja2.TemplateError(message)


def load_chat_template(path: str | Path, name: str | None = None) -> ChatTemplate:
    """The chat template of a model folder.

    `chat_template.jinja`, and `additional_chat_templates/NAME.jinja`, are taken before the
    `chat_template` of tokenizer_config.json, as in transformers.

    Args:
        path: the folder.
        name: which, where there are several ("default", "tool_use" …); None: the default one.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it has no template (of that name).
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist: expected a folder with a tokenizer.")
    config = read_json_if_any(folder / "tokenizer_config.json")
    found = config.get("chat_template")
    if isinstance(found, str):
        found = {"default": found}
    elif isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}
    templates: dict[str, str] = dict(found or {})
    files = {f.stem: f for f in (folder / "additional_chat_templates").glob("*.jinja")}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    templates |= {stem: file.read_text(encoding="utf-8") for stem, file in files.items()}
    wanted = name or "default"
    if wanted not in templates:
        has = f"it has {', '.join(templates)}" if templates else "it has none"
        raise ValueError(
            f"{folder} has no chat template {wanted!r} ({has}): put one in chat_template.jinja, or "
            "use the format 'messages' or 'messages-chatml'."
        )
    tokens = {**read_json_if_any(folder / "special_tokens_map.json"), **config}
    special = {
        key: value["content"] if isinstance(value, dict) else value
        for key, value in tokens.items()
        if key.endswith("_token") and isinstance(value, str | dict)
    }
    return ChatTemplate(templates[wanted], special, folder.resolve().name)


@dataclass(frozen=True)
class ChatTemplateFormat:
    """Rows of `messages`, and perhaps of `tools`, written by a model's own chat template.

    `"response"` trains what assistants write, up to and with their eos token; see the module's
    prologue for how it is found.

    Attributes:
        template: the template.
        messages: the column that holds the turns.
        system: a system prompt for conversations that have none; the template refuses it in its
            own words where its model knows no system turns.
        name: how the format is called.
    """

    template: ChatTemplate
    messages: str = "messages"
    system: str | None = None
    name: str = "chat-template"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns a row must have."""
        return (self.messages,)

    def segments(self, row: Row, train_on: TrainOn = "response") -> tuple[Segment, ...]:
        """The rendered conversation, cut wherever its training or its origin changes; all target.

        Raises:
            ValueError: the row holds no conversation, the template refuses it, or, without
                `{% generation %}`, it writes an assistant's turn differently once others follow.
        """
        everything = trains_on_all(train_on)
        turns = with_system(turns_of(row, self.messages, self.name), self.system)
        messages = [
            without_none({"role": role, "content": content, **more})
            for role, content, more in turns
        ]
        tools = tools_of(row, self.name)
        told = json.dumps([messages, tools], ensure_ascii=False, default=str)
        if any(mark in told for mark in _MARKS):
            raise ValueError(
                "a row holds a Unicode noncharacter (U+FDD0 to U+FDD3), which no text may: "
                "remove it."
            )
        text, marks = _read_marks(self._marked(messages, tools))
        text = self._without_tail(text)
        if self.template.marks_generation:
            trained = marks[_GENERATION[0]]
        else:
            trained = [] if everything else self._answers(messages, tools, text)
        contents = marks[_CONTENT[0]]
        borders = {at for span in (*trained, *contents) for at in span if at < len(text)}
        cuts = sorted({0, len(text), *borders})
        return joined(
            Segment(
                text[start:stop],
                everything or _inside(start, trained),
                special=not _inside(start, contents),
            )
            for start, stop in itertools.pairwise(cuts)
        )

    def _marked(self, messages: Sequence[Message], tools: Any) -> str:
        """The rendering with marks around every text that comes out whole between them: contents
        and reasoning."""
        plain = self.template._render(messages, variables={"tools": tools})
        texts: dict[Place, str] = {
            (index, key): message[key]
            for index, message in enumerate(messages)
            for key in ("content", *_REASONING)
            if isinstance(message.get(key), str)
        }
        stripped = {place: text.strip() for place, text in texts.items()}
        for written in (texts, stripped):
            whole = self._with_marks(messages, tools, written, plain)
            if whole is not None:
                return whole
        # One text that the template takes apart leaves the borders of the others.
        kept = {
            place: written[place]
            for place in texts
            for written in (texts, stripped)
            if self._with_marks(messages, tools, {place: written[place]}, plain) is not None
        }
        return self._with_marks(messages, tools, kept, plain) or plain

    def _with_marks(
        self, messages: Sequence[Message], tools: Any, texts: Mapping[Place, str], plain: str
    ) -> str | None:
        """The rendering with marks around these texts; None where it is not the plain one but for
        the marks, or does not have the texts whole between them."""
        opening, closing = _CONTENT
        changed = [dict(message) for message in messages]
        for (index, key), text in texts.items():
            changed[index][key] = f"{opening}{text}{closing}"
        try:
            marked = self.template._render(changed, variables={"tools": tools})
            read, spans = _read_marks(marked)
        except ValueError:
            return None  # a template that looks into texts, and not at ours
        intact = all(read[start:stop] in texts.values() for start, stop in spans[opening])
        return marked if intact and read == _read_marks(plain)[0] else None

    def _without_tail(self, text: str) -> str:
        """Without whitespace behind a last eos: nothing is learnt from it."""
        eos, bare = self.template.special_tokens.get("eos_token"), text.rstrip()
        return bare if eos and bare.endswith(eos) else text

    def _answers(self, messages: Sequence[Message], tools: Any, text: str) -> list[Span]:
        """Where the assistants' turns stand, by rendering the conversation turn by turn."""
        render = functools.partial(self.template.render, tools=tools)
        eos = self.template.special_tokens.get("eos_token")
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            try:
                before = render(messages[:index], add_generation_prompt=True)
            except ValueError as error:
                raise ValueError(
                    f"turn {index} of a conversation cannot be prompted for ({error}), so that "
                    f"what the assistant wrote cannot be told apart: {_MARK_IT}"
                ) from error
            after = self._without_tail(render(messages[: index + 1]))
            if eos and not text.startswith(after):
                # One that stands behind the last turn alone, whoever's that is (Phi-3).
                after = after.removesuffix(eos)
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError(
                    f"the chat template of {self.template.name} writes turn {index} of a "
                    "conversation differently when others follow or when it is prompted for, so "
                    f"that what the assistant wrote cannot be told apart: {_MARK_IT}"
                )
            spans.append((len(before), len(after)))
        return spans


def _read_marks(text: str) -> tuple[str, dict[str, list[Span]]]:
    """The text without marks, and by opening mark where the marked pieces stand in it.

    Raises:
        ValueError: a mark has no partner, for the template cuts marked text apart.
    """
    spans: dict[str, list[Span]] = {_GENERATION[0]: [], _CONTENT[0]: []}
    if not any(mark in text for mark in _MARKS):
        return text, spans
    kept: list[str] = []
    opened: dict[str, int] = {}
    for character in text:
        if character not in _MARKS:
            kept.append(character)
            continue
        begins = character in spans
        opening = character if begins else _OPENING[character]
        if begins == (opening in opened):
            raise ValueError(_CUT_APART)
        if begins:
            opened[opening] = len(kept)
        else:
            spans[opening].append((opened.pop(opening), len(kept)))
    if opened:
        raise ValueError(_CUT_APART)
    return "".join(kept), spans


def _inside(at: int, spans: Sequence[Span]) -> bool:
    return any(start <= at < stop for start, stop in spans)
