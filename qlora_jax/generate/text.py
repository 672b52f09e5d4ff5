"""Generation in characters: texts in, texts out, stop texts, streams and chats."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from jaxtyping import Array, Key

from qlora_jax.data import ChatTemplate
from qlora_jax.generate.config import GenerationConfig
from qlora_jax.generate.decode import reads_source
from qlora_jax.generate.generate import generate

OnText = Callable[[int, str], None]
"""(index of the prompt, the text that is new): what a stream calls."""

Message = Mapping[str, Any]


class Answer(NamedTuple):
    """A text, the tokens it took, and whether it came to its own end ("stop") or to the limit."""

    text: str
    tokens: int
    finish: Literal["stop", "length"]


def generate_text(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str] | str,
    config: GenerationConfig = GenerationConfig(),
    *,
    key: Key[Array, ""] | None = None,
    batch_size: int = 8,
    special: bool = False,
    bos: bool | None = None,
    on_text: OnText | None = None,
    every: int = 16,
) -> list[Answer]:
    """Continue each text: prompt and answer, one behind the other, are what was written.

    An answer that begins with a space keeps it. The answer to a template's text (`special`), and an
    encoder–decoder's, is a text of its own.

    Args:
        model: as for `generate`.
        tokenizer: the model's; its eos token ends answers where `config` names no other end.
        prompts: texts, or one.
        config: how long, how random, and the texts that stop an answer (it is cut before them).
        key: of the samples; may be left out where `config` is greedy.
        batch_size: rows written at once.
        special: read the tokenizer's markers in the prompts as such: for texts that a template
            wrote.
        bos: begin prompts with the bos token; None: as the family does.
        on_text: sees each answer grow. Pieces joined are the answer, but for a stop text's part.
        every: tokens per row between two looks at stop texts, or two pieces of a stream.

    Raises:
        ValueError: as `generate` does.
    """
    # One text is a sequence of texts, too: its letters.
    prompts = (prompts,) if isinstance(prompts, str) else prompts
    ids = [tokenizer.encode(prompt, bos=bos, special=special) for prompt in prompts]
    if tokenizer.eos_token_id is not None:
        config = config.with_eos([tokenizer.eos_token_id])
    shown = [""] * len(prompts)
    decode = partial(tokenizer.decode, continues=not (special or reads_source(model)))

    def look(index: int, tokens: tuple[int, ...]) -> bool:
        text = decode(tokens)
        answer = cut_at(text, config.stop)
        stopped = len(answer) < len(text)
        if on_text is not None:
            ready = answer if stopped else settled(answer, config.stop)
            if len(ready) > len(shown[index]):
                on_text(index, ready[len(shown[index]) :])
                shown[index] = ready
        return stopped

    watched = on_text is not None or bool(config.stop)
    written = generate(
        model,
        ids,
        dataclasses.replace(config, stop=()),
        key=key,
        batch_size=batch_size,
        on_tokens=look if watched else None,
        every=every,
    )
    answers = []
    for index, generation in enumerate(written):
        answer = cut_at(decode(generation.tokens), config.stop)
        if on_text is not None and len(answer) > len(shown[index]):
            on_text(index, answer[len(shown[index]) :])
        # "stop" also where a stop text was found: `look` has ended the row there.
        answers.append(Answer(answer, len(generation.tokens), generation.finish))
    return answers


def chat(
    model: Any,
    tokenizer: Any,
    messages: Sequence[Message],
    template: ChatTemplate,
    config: GenerationConfig = GenerationConfig(),
    *,
    key: Key[Array, ""] | None = None,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The assistant's next turn in a conversation of `role` and `content`.

    `template` is the model's own (`data.load_chat_template`); it writes bos itself where the model
    wants it. The tokenizer's markers are read as such in the whole of its text, as in transformers,
    so contents that are not trusted must not hold any. A chat model's folder often names a token
    that ends turns beside the one that ends texts: `read_eos_token_ids(folder)`.
    """
    prompt = template.render(messages, add_generation_prompt=True)
    answer, *_ = generate_text(
        model,
        tokenizer,
        [prompt],
        config,
        key=key,
        batch_size=1,
        special=True,
        bos=False,
        on_text=None if on_text is None else lambda _, piece: on_text(piece),
        every=4,
    )
    return answer.text.strip()


def newest_turns(
    tokenizer: Any, messages: Sequence[Message], template: ChatTemplate, room: int | None
) -> tuple[list[Message], int]:
    """A conversation without its oldest turns, as few as leave it room, and its prompt's tokens.

    A turn begins with a user's message; what stands before the first, a system's, stays, and so
    does the last turn, even where `room` (`prompt_room`; None: no limit) is too little for it.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "user"] or [0]
    kept, tokens = list(messages), 0
    for begin in turns:
        kept = [*messages[: turns[0]], *messages[begin:]]
        prompt = template.render(kept, add_generation_prompt=True)
        tokens = len(tokenizer.encode(prompt, bos=False, special=True))
        if room is None or tokens <= room:
            break
    return kept, tokens


def cut_at(text: str, stop: Iterable[str]) -> str:
    """The text before the stop text that is complete first; of two, the longer one.

    First by its end, not by its beginning: then a growing text is cut in the same place whenever
    it is looked at.
    """
    found = [(at + len(end), at) for end in stop if (at := text.find(end)) >= 0]
    return text[: min(found)[1]] if found else text


def settled(text: str, stop: Iterable[str]) -> str:
    """The beginning of a growing text that will not change any more.

    Its end may still turn into a stop text, and a character whose bytes are not all there decodes
    to U+FFFD.
    """
    text = text.rstrip("\ufffd")
    held = max((n for end in stop for n in range(1, len(end)) if text.endswith(end[:n])), default=0)
    return text[: len(text) - held]
