"""`generate`: token ids in, token ids out, for any number of prompts of any lengths.

Prompts are taken longest first in batches of a fixed size; within a batch they are padded on the
left to a bucket (16, 32, 64, … tokens), so that all rows write at the same place and few programs
are compiled. A last batch that is not full gets rows that have ended before they begin.

**Samples are reproducible one by one.** A prompt's random numbers come from the call's key and the
prompt's own tokens, and from how many times the same prompt stood in the call before; never from
its neighbours, its place or the batch size. (Logits themselves differ in their last bits with the
padding, which a draw notices once in very many tokens.)
"""

import math
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int, Int32, Key, UInt32

from qlora_jax.generate.config import GenerationConfig
from qlora_jax.generate.decode import Generative, Written, advance, reads_source, start
from qlora_jax.models import spread_rows
from qlora_jax.processes import whole

OnTokens = Callable[[int, tuple[int, ...]], bool | None]
"""(index of the prompt, all its tokens so far) -> True to end it there.

Called for every prompt that is being written, whenever new tokens arrive."""


class Generation(NamedTuple):
    """What was written after one prompt, and why it ended.

    `finish` is "stop" after an end token (which is the last of `tokens`) or where `on_tokens` said
    so, "length" at `max_new_tokens`.
    """

    tokens: tuple[int, ...]
    finish: Literal["stop", "length"]


def generate(
    model: Any,
    prompts: Sequence[Any] | Int[Array, "prompt token"] | Int[np.ndarray, "prompt token"],
    config: GenerationConfig = GenerationConfig(),
    *,
    key: Key[Array, ""] | None = None,
    batch_size: int = 8,
    on_tokens: OnTokens | None = None,
    every: int = 16,
) -> list[Generation]:
    """Continue each prompt; results in the prompts' order.

    Args:
        model: a `Decoder`, an `EncoderDecoder`, or any NNX module with their protocol.
        prompts: token ids, each at least one, in sequences or arrays; special tokens are the
            caller's.
        config: how long, how random, where to stop. Its `stop` texts need a tokenizer:
            `generate_text`.
        key: of the samples; may be left out where `config` is greedy.
        batch_size: rows written at once.
        on_tokens: sees tokens as they come, and may end a row.
        every: how many tokens per row lie between two calls of `on_tokens`.

    Raises:
        ValueError: an empty prompt, one of no token ids, a token that the model has no row for,
            sampling without a key, stop texts, or a prompt that leaves no room for
            `max_new_tokens` in the model's positions.
    """
    prompts = [_ids(index, prompt) for index, prompt in enumerate(prompts)]
    _check(model, prompts, config, key, batch_size, every)
    graphdef, state = nnx.split(model)
    keys = _prompt_keys(prompts, jax.random.key(0) if key is None else key)
    by_length = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    finished: dict[int, Generation] = {}
    for begin in range(0, len(prompts), batch_size):
        rows = by_length[begin : begin + batch_size]
        length = _slots(len(prompts[rows[0]]), getattr(model, "config", None), config)
        input_ids, mask = left_padded([prompts[i] for i in rows], length, batch_size)
        # Rows that fill the batch up have ended before they begin.
        filled = [*rows, *rows[:1] * (batch_size - len(rows))]
        ended = np.arange(batch_size) >= len(rows)
        written = start(
            graphdef,
            state,
            *spread_rows((input_ids, mask, keys[jnp.array(filled)], ended), state),
            config=config,
            cache_length=_cache_length(model, length, config),
        )
        go_on = partial(advance, graphdef, state, config=config)
        if on_tokens is None:
            written = go_on(written, jnp.int32(config.max_new_tokens))
        else:
            written = _write_watched(go_on, written, rows, on_tokens, config, every)
        finished.update(zip(rows, _read(written), strict=False))
    return [finished[i] for i in range(len(prompts))]


def _ids(index: int, prompt: Any) -> list[int]:
    """A prompt's tokens as numbers of Python, whatever they came in."""
    ids = np.asarray(prompt)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(
            f"prompt {index} is {prompt!r}, but a prompt is a sequence of token ids: give one "
            "alone as [ids], and texts to generate_text."
        )
    return ids.tolist()


def _write_watched(
    go_on: Callable[..., Written],
    written: Written,
    rows: Sequence[int],
    on_tokens: OnTokens,
    config: GenerationConfig,
    every: int,
) -> Written:
    """The batch written `every` tokens at a time, each live row shown in between."""
    live = set(range(len(rows)))
    while True:
        for row, generation in enumerate(_read(written)[: len(rows)]):
            if row in live and (
                on_tokens(rows[row], generation.tokens) or generation.finish == "stop"
            ):
                live.remove(row)
        ended = np.array([row not in live for row in range(len(written.ended))])
        written = written._replace(ended=spread_rows(jnp.asarray(ended), written))
        if not live or int(written.step) >= config.max_new_tokens:
            return written
        written = go_on(written, jnp.int32(every))


def _read(written: Written) -> list[Generation]:
    """What every row of a batch has written so far."""
    tokens, length, ended = map(whole, (written.tokens, written.length, written.ended))
    return [
        Generation(tuple(row[:n].tolist()), "stop" if end else "length")
        for row, n, end in zip(tokens, length, ended, strict=True)
    ]


def left_padded(
    prompts: Sequence[Sequence[int]], length: int, batch_size: int
) -> tuple[Int32[np.ndarray, "batch length"], Bool[np.ndarray, "batch length"]]:
    """Ids and mask; rows beyond the prompts repeat the last one, so that none is all padding."""
    input_ids = np.zeros((batch_size, length), np.int32)
    mask = np.zeros((batch_size, length), np.bool_)
    for row in range(batch_size):
        prompt = prompts[min(row, len(prompts) - 1)]
        input_ids[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = True
    return input_ids, mask


def _prompt_keys(prompts: Sequence[Sequence[int]], key: Key[Array, ""]) -> Key[Array, " prompt"]:
    """A key per prompt, from its tokens and from how often it came before."""
    seen: Counter[tuple[int, ...]] = Counter()
    words = np.zeros((len(prompts), 2), np.uint32)
    for index, prompt in enumerate(map(tuple, prompts)):
        words[index] = zlib.crc32(np.array(prompt, np.int32).tobytes()), seen[prompt]
        seen[prompt] += 1

    def own(word: UInt32[Array, "2"]) -> Key[Array, ""]:
        return jax.random.fold_in(jax.random.fold_in(key, word[0]), word[1])

    return jax.vmap(own)(jnp.asarray(words))


def _slots(longest: int, shape: Any, config: GenerationConfig) -> int:
    """How many slots a batch's prompts are padded to, the longest of which has so many tokens."""
    bucket = 16
    while bucket < longest:
        bucket *= 2
    room = [bucket, prompt_room(shape, config) or bucket]
    plain = getattr(getattr(shape, "rope", None), "plain_length", None)
    written = config.max_new_tokens - 1  # that are read again
    if plain is not None and longest + written <= plain:
        # A text that keeps within the length is not to be turned like a long one for its padding.
        room.append(plain - written)
    return min(room)


def prompt_room(shape: Any, config: GenerationConfig) -> int | None:
    """The longest prompt that the positions of a model of this shape (its `config`) allow; None
    where nothing limits it: an encoder–decoder's are distances."""
    limit = getattr(shape, "max_position_embeddings", None)
    return None if limit is None else limit - config.max_new_tokens


def _cache_length(model: Generative, prompt: int, config: GenerationConfig) -> int:
    # The start token of an encoder-decoder takes a slot; the last token written is never read.
    return config.max_new_tokens if reads_source(model) else prompt + config.max_new_tokens - 1


def _check(
    model: Any,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    key: Key[Array, ""] | None,
    batch_size: int,
    every: int,
) -> None:
    if not isinstance(model, Generative):
        raise ValueError(
            f"{type(model).__name__} cannot generate: it has no prefill and decode_step."
        )
    if key is None and not config.greedy:
        raise ValueError(
            f"temperature={config.temperature} draws at random: give key=jax.random.key(...)."
        )
    if config.stop:
        raise ValueError("stop texts need a tokenizer to be found: call generate_text.")
    if batch_size < 1 or every < 1:
        raise ValueError(f"batch_size={batch_size} and every={every} must be 1 or more.")
    shape = getattr(model, "config", None)
    check_prompts(prompts, config, shape)
    rows = getattr(shape, "vocab_size", math.inf)
    for index, prompt in enumerate(prompts):
        strange = [token for token in prompt if not 0 <= token < rows]
        if strange:
            raise ValueError(
                f"prompt {index} has the token {strange[0]}, but the model's vocabulary has "
                f"{rows}: take the model's own tokenizer, or add the tokens to the model, too "
                "(qlora_jax.add_tokens)."
            )


def check_prompts(prompts: Sequence[Sequence[int]], config: GenerationConfig, shape: Any) -> None:
    """Refuses what `generate` would, with the model's shape alone: before it is loaded.

    Args:
        prompts: token ids.
        config: how long the answers may be.
        shape: the model's `config`, such as a `DecoderConfig`.

    Raises:
        ValueError: an empty prompt, or one that leaves no room for `max_new_tokens`; or that leaves
            none for any prompt, given or not.
    """
    room = prompt_room(shape, config)
    if room is not None and room < 1:
        raise ValueError(
            f"max_new_tokens={config.max_new_tokens} leaves no room for a prompt in the model's "
            f"{room + config.max_new_tokens} positions: give less."
        )
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {index} is empty: begin it with the bos token at least.")
        if room is not None and len(prompt) > room:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens, and with max_new_tokens="
                f"{config.max_new_tokens} exceeds the model's {room + config.max_new_tokens} "
                "positions: shorten one of the two."
            )
