"""Chat templates: the Jinja programs that models carry to say how a conversation is written down.

A model that was trained to chat was trained on one exact way of writing turns, and its folder says
which, as a Jinja template over `messages` (`tokenizer_config.json` or `chat_template.jinja`). It is
a program from the internet, so it runs in Jinja's immutable sandbox, as in transformers: it can
loop and concatenate, and reach nothing. `chat_format` makes a prompt format of one.
"""

import datetime
import functools
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

from qlora_jax.data.marks import GENERATION, read_marks
from qlora_jax.data.tokenizer_files import is_token, read_token_files

# What a message may call its reasoning; templates read the first two.
REASONING = ("reasoning_content", "thinking", "reasoning")

Message = Mapping[str, Any]


@dataclass(frozen=True)
class ChatTemplate:
    """A model's own way of writing conversations.

    Attributes:
        source: the Jinja template.
        special_tokens: what it may call `bos_token`, `eos_token` and so on.
        name: what to call it in messages: the model folder's name.
        date: what it may write for today, as Llama 3's does; None for the day of the call.
    """

    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    name: str = "the chat template"
    date: datetime.date | None = None

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
        text = self.render_marked(messages, add_generation_prompt, variables)
        return read_marks(text)[0]

    def render_marked(
        self, messages: Sequence[Message], prompted: bool = False, variables: Any = None
    ) -> str:
        """As `render`, with the marks of `{% generation %}` in it."""
        now = datetime.datetime.now()
        if self.date is not None:
            now = datetime.datetime.combine(self.date, datetime.time())
        names = {
            "strftime_now": now.strftime,
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
    found = next((message[key] for key in REASONING if message.get(key) is not None), None)
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
        return GENERATION[0] + caller() + GENERATION[1]


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> tuple[jinja2.Template, bool]:
    """The template, in an environment like transformers', and whether it marks generation."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
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
    config, token_map, _ = read_token_files(folder)
    found = config.get("chat_template")
    if isinstance(found, str):
        found = {"default": found}
    elif isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}
    templates: dict[str, str] = dict(found or {})
    files = {f.stem: f for f in (folder / "additional_chat_templates").glob("*.jinja")}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    templates |= {stem: _read_text(file) for stem, file in files.items()}
    wanted = name or "default"
    if wanted not in templates:
        has = f"it has {', '.join(templates)}" if templates else "it has none"
        raise ValueError(
            f"{folder} has no chat template {wanted!r} ({has}): put one in chat_template.jinja, or "
            "use the format 'messages' or 'messages-chatml'."
        )
    # What a model has besides, such as an image's token; a list of them has no names.
    more = config.get("extra_special_tokens")
    named = {**token_map, **config, **(more if isinstance(more, dict) else {})}
    special = {
        key: value["content"] if isinstance(value, dict) else value
        for key, value in named.items()
        if key.endswith("_token") and is_token(value)
    }
    return ChatTemplate(templates[wanted], special, folder.resolve().name)


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8 ({error.reason}): fetch it again.") from error
