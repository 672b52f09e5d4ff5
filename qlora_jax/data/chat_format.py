"""A prompt format of a model's own chat template: what of a conversation is trained on.

A rendered conversation is a single string, but two things must be known about every character of
it:

- **Is it trained on?** Where the template has `{% generation %}` blocks, they say so. Elsewhere an
  assistant's turn is what rendering grows by when the turn is added to those before it, prompted to
  answer; this is verified, and where a template writes an earlier turn anew once others follow (as
  Qwen3's, which takes its reasoning out), only the answer to the last question can be trained on.
  The loss ends with the eos token, not with the line break that many templates put behind it.
- **Is it the template's or the row's?** A marker in a row's own text (a row about `<|im_end|>`)
  must stay characters. Contents and reasoning are rendered between two marks, and the borders read
  back. A text that does not come out whole between its marks (the template rewrites it beyond
  trimming, or cuts reasoning out of it) has no border, and is read as transformers reads it,
  markers anywhere; so are tools and the calls of them.
"""

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_jax.data.chat_template import REASONING, ChatTemplate, Message
from qlora_jax.data.marks import CONTENT, GENERATION, MARKS, Span, read_marks
from qlora_jax.data.segments import (
    Row,
    Segment,
    TrainOn,
    joined,
    tools_of,
    trained_turns,
    trains_on_all,
    turns_of,
    with_system,
    without_none,
)

_MARK_IT = (
    "train on 'last', the answer to the last question, or on 'all', or put {% generation %} … "
    "{% endgeneration %} around it in the template."
)

Place = tuple[int, str]
"""A message's number and key."""


@dataclass(frozen=True)
class ChatTemplateFormat:
    """Rows of `messages`, and perhaps of `tools`, written by a model's own chat template.

    `"response"` trains what assistants write, up to and with their eos token, `"last"` what they
    write after the last question; see the module's prologue for how it is found.

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
                `{% generation %}`, it writes a turn with loss differently once others follow.
        """
        everything = trains_on_all(train_on)
        turns = with_system(turns_of(row, self.messages, self.name), self.system)
        messages = [
            without_none({"role": role, "content": content, **more})
            for role, content, more in turns
        ]
        tools = tools_of(row, self.name)
        told = json.dumps([messages, tools], ensure_ascii=False, default=str)
        if any(mark in told for mark in MARKS):
            raise ValueError(
                "a row holds a Unicode noncharacter (U+FDD0 to U+FDD3), which no text may: "
                "remove it."
            )
        text, marks = read_marks(self._marked(messages, tools))
        text = self._without_tail(text)
        answers = [] if everything else trained_turns([turn.role for turn in turns], train_on)
        if not self.template.marks_generation:
            trained = self._answers(messages, answers, tools, text)
        else:
            trained = marks[GENERATION[0]]
            if train_on == "last" and answers:
                begin = len(self._prompt(messages, answers[0], tools, text))
                trained = [span for span in trained if span[1] > begin]
        contents = marks[CONTENT[0]]
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
        plain = self.template.render_marked(messages, variables={"tools": tools})
        with_marks = functools.partial(self._with_marks, messages, tools, read_marks(plain)[0])
        texts: dict[Place, str] = {
            (index, key): message[key]
            for index, message in enumerate(messages)
            for key in ("content", *REASONING)
            if isinstance(message.get(key), str)
        }
        stripped = {place: text.strip() for place, text in texts.items()}
        for written in (texts, stripped):
            whole = with_marks(written)
            if whole is not None:
                return whole
        # One text that the template takes apart leaves the borders of the others.
        kept = {
            place: written[place]
            for place in texts
            for written in (texts, stripped)
            if with_marks({place: written[place]}) is not None
        }
        return with_marks(kept) or plain

    def _with_marks(
        self, messages: Sequence[Message], tools: Any, plain: str, texts: Mapping[Place, str]
    ) -> str | None:
        """The rendering with marks around these texts; None where it is not the `plain` one but for
        the marks, or does not have the texts whole between them."""
        opening, closing = CONTENT
        changed = [dict(message) for message in messages]
        for (index, key), text in texts.items():
            changed[index][key] = f"{opening}{text}{closing}"
        try:
            marked = self.template.render_marked(changed, variables={"tools": tools})
            read, spans = read_marks(marked)
        except ValueError:
            return None  # a template that looks into texts, and not at ours
        intact = all(read[start:stop] in texts.values() for start, stop in spans[opening])
        return marked if intact and read == plain else None

    def _without_tail(self, text: str) -> str:
        """Without whitespace behind a last eos: nothing is learnt from it."""
        eos, bare = self.template.special_tokens.get("eos_token"), text.rstrip()
        return bare if eos and bare.endswith(eos) else text

    def _answers(
        self, messages: Sequence[Message], answers: Sequence[int], tools: Any, text: str
    ) -> list[Span]:
        """Where these turns of assistants stand, by rendering the conversation turn by turn."""
        eos = self.template.special_tokens.get("eos_token")
        spans = []
        for index in answers:
            before = self._prompt(messages, index, tools, text)
            after = self._without_tail(self.template.render(messages[: index + 1], tools=tools))
            if eos and not text.startswith(after):
                # One that stands behind the last turn alone, whoever's that is (Phi-3).
                after = after.removesuffix(eos)
            if not (text.startswith(after) and after.startswith(before)):
                raise self._rewritten(index)
            spans.append((len(before), len(after)))
        return spans

    def _prompt(self, messages: Sequence[Message], index: int, tools: Any, text: str) -> str:
        """What prompts for a turn; ValueError where the whole `text` does not begin with it."""
        try:
            prompt = self.template.render(messages[:index], add_generation_prompt=True, tools=tools)
        except ValueError as error:
            raise ValueError(
                f"turn {index} of a conversation cannot be prompted for ({error}), so that "
                f"what the assistant wrote cannot be told apart: {_MARK_IT}"
            ) from error
        if not text.startswith(prompt):
            raise self._rewritten(index)
        return prompt

    def _rewritten(self, index: int) -> ValueError:
        return ValueError(
            f"the chat template of {self.template.name} writes turn {index} of a conversation "
            "differently when others follow or when it is prompted for, so that what the assistant "
            f"wrote cannot be told apart: {_MARK_IT}"
        )


def _inside(at: int, spans: Sequence[Span]) -> bool:
    return any(start <= at < stop for start, stop in spans)
