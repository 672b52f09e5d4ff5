"""Any task of EleutherAI's lm-evaluation-harness on a model of ours (extra `eval`).

    import lm_eval
    from qlora_jax.evaluate import Harness
    lm = Harness(model, tokenizer, max_len=2048).lm()
    lm_eval.simple_evaluate(lm, tasks=["arc_easy"])      # or python -m experiments.harness

The harness asks a model three things, and `Harness` answers them in plain Python types:

- `loglikelihood`: how likely is this text after that one, and would greedy decoding write it?
- `loglikelihood_rolling`: how likely is a whole document, in windows of what the model reads?
- `generate_until`: what comes next, up to one of these texts?

`lm()` wraps them into the harness's own class, which alone needs the package. The borders between
context and continuation are the harness's: both are tokenized together, and what goes beyond the
tokens of the context alone is the continuation.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from qlora_jax.data import IGNORE, ChatTemplate, Tokenizer
from qlora_jax.evaluate.mmlu import bucket_of
from qlora_jax.evaluate.perplexity import split_adapters
from qlora_jax.generate import GenerationConfig, generate_text
from qlora_jax.models.loss import LOSS_CHUNK, cross_entropy
from qlora_jax.models.pieces import cut
from qlora_jax.models.positions import positions_to
from qlora_jax.models.streaming import options_for

_MAX_NEW_TOKENS = 256
# What tasks call the limit of an answer; the first that a task names counts, as in the harness.
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_OPTIONS = {"until", "do_sample", *_SAMPLING, *_LIMITS}


class _Scored(NamedTuple):
    """Tokens of a context and of what is scored after it, at least one each."""

    context: list[int]
    continuation: list[int]


class Harness:
    """A causal language model as the harness sees one.

    Args:
        model: with `hidden` and `head`, and for `generate_until` with the generation protocol.
        tokenizer: its own.
        max_len: tokens the model reads at most; longer contexts lose their beginning.
        batch_size: requests at once.
        chat_template: for tasks that are asked as conversations (`--apply_chat_template`).
    """

    def __init__(
        self,
        model: nnx.Module,
        tokenizer: Tokenizer,
        *,
        max_len: int,
        batch_size: int = 8,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        if max_len < 2 or batch_size < 1:
            raise ValueError(f"max_len={max_len} must be 2 or more, batch_size={batch_size} 1.")
        self.model, self.tokenizer, self.max_len = model, tokenizer, max_len
        self.batch_size, self.chat_template = batch_size, chat_template
        graphdef, self._lora, self._frozen = split_adapters(model)
        self._step = make_score_step(graphdef, compiler_options=options_for(model))
        # What a text without a context follows.
        prefix = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
        self._prefix = next(token for token in prefix if token is not None)

    def loglikelihood(self, requests: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For each (context, continuation): its log-probability in nats, and whether it is greedy.

        Raises:
            ValueError: a continuation without a token.
        """
        return self._score([self._pair(*request) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[tuple[str]]) -> list[float]:
        """For each (text,): the log-probability of all of it, in windows of `max_len` tokens.

        Every token is scored once; the last window is as long as the others and scores only what
        no other did. The bos that a family begins texts with is read and not scored; lm-eval's own
        model of transformers scores it too, behind a second one, but with `add_bos_token=False`.
        """
        windows: list[_Scored] = []
        owners: list[int] = []
        for index, (text,) in enumerate(requests):
            ids = self.tokenizer.encode(text, bos=False)
            for start in range(0, len(ids), self.max_len):
                end = min(start + self.max_len, len(ids))
                read = [self._prefix, *ids][max(end - self.max_len, 0) : end]
                scored = end - start
                context = read[: len(read) - scored + 1]
                windows.append(_Scored(context, ids[start:end]))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._score(windows), strict=True):
            totals[owner] += score
        return totals

    def generate_until(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """For each (context, options): the text that follows, cut before the first of `until`.

        Options: `until` (a text or several), `max_gen_toks` (or one of its other names), and
        `do_sample`, `temperature`, `top_p`, `top_k`, `min_p`, `repetition_penalty`; greedy without
        `do_sample` and a temperature.

        Raises:
            ValueError: an option that is not known here, or no room for a context.
        """
        alike: dict[tuple[GenerationConfig, bool | None], dict[int, str]] = {}
        for index, (context, options) in enumerate(requests):
            config = _generation(options)
            room = self.max_len - config.max_new_tokens
            if room < 1:
                raise ValueError(
                    f"max_gen_toks is {config.max_new_tokens}, which leaves no room for a context "
                    f"in max_len={self.max_len}: ask for less."
                )
            text = self._shortened(context, room)
            alike.setdefault((config, self._bos(text)), {})[index] = text
        answers = [""] * len(requests)
        for (config, bos), texts in alike.items():
            written = generate_text(
                self.model,
                self.tokenizer,
                list(texts.values()),
                config,
                key=jax.random.key(0),
                batch_size=self.batch_size,
                special=self.chat_template is not None,
                bos=bos,
            )
            for index, answer in zip(texts, written, strict=True):
                answers[index] = answer.text
        return answers

    def conversation(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """Turns as one text; the last one as an answer's beginning without `add_generation_prompt`.

        Raises:
            ValueError: there is no template, or it refuses the turns.
        """
        if self.chat_template is None:
            raise ValueError("the model has no chat template: give Harness one.")
        text = self.chat_template.render(messages, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        # The model goes on with it: what ends a turn must not follow.
        begun = messages[-1]["content"].lstrip()
        at = text.rfind(begun.rstrip())
        if at < 0:
            raise ValueError(
                f"the chat template rewrites {begun[:40]!r}, the beginning of an answer, so that "
                "the model cannot go on with it: ask without a template."
            )
        return text[:at] + (begun if text.startswith(begun, at) else begun.rstrip())

    def lm(self) -> Any:
        """The same as an `lm_eval.api.model.LM`.

        Raises:
            ModuleNotFoundError: lm-eval is not installed.
        """
        try:
            from lm_eval.api.model import LM
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "the evaluation harness is not installed: pip install 'qlora-jax[eval]'."
            ) from error
        return _as_lm(self, LM)

    def _bos(self, text: str) -> bool | None:
        """Whether bos goes before a text: as the family does, but not a second one, behind that of
        a template."""
        bos = self.tokenizer.bos_token_id
        if bos is None or self.chat_template is None:
            return None
        written = text.startswith(self.tokenizer.decode([bos], skip_special=False))
        return False if written else None

    def _encode(self, text: str) -> list[int]:
        special = self.chat_template is not None
        return self.tokenizer.encode(text, bos=self._bos(text), special=special)

    def _pair(self, context: str, continuation: str) -> _Scored:
        # A space at the border belongs to the word that follows.
        bare = context.rstrip()
        context, continuation = bare, context[len(bare) :] + continuation
        if context:
            before = self._encode(context)
            after = self._encode(context + continuation)[len(before) :]
        else:
            before, after = [self._prefix], self.tokenizer.encode(continuation, bos=False)
        if not after:
            raise ValueError(f"the continuation {continuation!r} adds no token to its context.")
        return _Scored(before or [self._prefix], after)

    def _shortened(self, context: str, room: int) -> str:
        """The end of a context, as much of it as `room` tokens hold."""
        whole = ids = self._encode(context)
        count = len(whole)
        # More than once: what is left begins with bos again, and may take other tokens than before.
        while len(ids) > room and count:
            count = max(count - (len(ids) - room), 0)
            left = whole[len(whole) - count :]
            context = self.tokenizer.decode(left, skip_special=self.chat_template is None)
            ids = self._encode(context)
        return context

    def _score(self, items: Sequence[_Scored]) -> list[tuple[float, bool]]:
        """By length, so that few programs serve all; results in the order of the items."""
        results: dict[int, tuple[float, bool]] = {}
        # The last token is only predicted, never read.
        rows = [(item.context + item.continuation)[-self.max_len - 1 :] for item in items]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        for begin in range(0, len(order), self.batch_size):
            batch = order[begin : begin + self.batch_size]
            length = bucket_of(len(rows[batch[0]]) - 1, self.max_len)
            input_ids = np.full((self.batch_size, length), self.tokenizer.pad_token_id, np.int32)
            targets = np.full((self.batch_size, length), IGNORE, np.int32)
            for row, index in enumerate(batch):
                ids = rows[index]
                count = min(len(items[index].continuation), len(ids) - 1)
                input_ids[row, : len(ids) - 1] = ids[:-1]
                targets[row, len(ids) - 1 - count : len(ids) - 1] = ids[-count:]
            scores, greedy = self._step(self._lora, self._frozen, input_ids, targets)
            found = zip(batch, np.asarray(scores), np.asarray(greedy), strict=False)
            results.update({i: (float(score), bool(same)) for i, score, same in found})
        return [results[i] for i in range(len(items))]


def make_score_step(
    graphdef: nnx.GraphDef,
    *,
    chunk: int = LOSS_CHUNK,
    compiler_options: Mapping[str, Any] | None = None,
) -> Callable[..., tuple[Float[Array, " b"], Bool[Array, " b"]]]:
    """A jitted (lora, frozen, input_ids [b s], targets [b s]) -> log-probabilities, greedy or not.

    Targets are what each position should predict, -100 where nothing is scored, as in the padding
    behind the last that is, which causality hides. The logits of `chunk` tokens are held at once.
    """

    @functools.partial(jax.jit, compiler_options=dict(compiler_options or {}) or None)
    def step(
        lora: PyTree, frozen: PyTree, input_ids: Int[Array, "b s"], targets: Int[Array, "b s"]
    ) -> tuple[Float[Array, " b"], Bool[Array, " b"]]:
        model: Any = nnx.merge(graphdef, lora, frozen)

        def score(piece: tuple[Array, Array]) -> tuple[Array, Array]:
            hidden, targets = piece
            logits = model.head(hidden)
            same = (jnp.argmax(logits, axis=-1) == targets) | (targets == IGNORE)
            return -cross_entropy(logits, targets).sum(axis=-1), same.all(axis=-1)

        seq = input_ids.shape[1]
        last = jnp.max(jnp.where(targets == IGNORE, 0, jnp.arange(seq)), axis=1)
        hidden = model.hidden(input_ids, positions=positions_to(last, seq))
        pieces = cut(hidden, chunk), cut(targets, chunk, IGNORE)
        scores, same = jax.lax.map(score, pieces)
        return scores.sum(axis=0), same.all(axis=0)

    return step


def _generation(options: Mapping[str, Any]) -> GenerationConfig:
    """A task's `generation_kwargs`, read as the harness does for its own models."""
    # One beam is no search.
    strange = [n for n in options if n not in _OPTIONS and (n, options[n]) != ("num_beams", 1)]
    if strange:
        raise ValueError(
            f"the task's generation_kwargs have {strange[0]}={options[strange[0]]!r}, which is not "
            f"supported here: leave it out, or take {', '.join(sorted(_OPTIONS))}."
        )
    until = options.get("until") or ()
    limits = [options[name] for name in _LIMITS if options.get(name) is not None]
    temperature = options.get("temperature")
    sampled = options.get("do_sample")
    if sampled is None:
        sampled = bool(temperature)
    return GenerationConfig(
        max_new_tokens=int(limits[0] if limits else _MAX_NEW_TOKENS),
        temperature=float(1.0 if temperature is None else temperature) if sampled else 0.0,
        top_p=float(options.get("top_p", 1.0)),
        top_k=options.get("top_k"),
        min_p=float(options.get("min_p") or 0.0),
        repetition_penalty=float(options.get("repetition_penalty", 1.0)),
        stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
    )


def _as_lm(harness: Harness, base: type) -> Any:
    """An instance of the harness's abstract class `base` that answers with `harness`."""

    class QloraJaxLM(base):  # type: ignore[misc, valid-type]
        """A model of qlora_jax under lm-evaluation-harness."""

        def loglikelihood(self, requests: Any) -> Any:
            return harness.loglikelihood([request.args for request in requests])

        def loglikelihood_rolling(self, requests: Any) -> Any:
            return harness.loglikelihood_rolling([request.args for request in requests])

        def generate_until(self, requests: Any) -> Any:
            return harness.generate_until([request.args for request in requests])

        @property
        def tokenizer_name(self) -> str:
            return harness.tokenizer.name

        def chat_template(self, chat_template: bool | str = False) -> str:
            return "" if harness.chat_template is None else harness.chat_template.source

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            return harness.conversation(chat_history, add_generation_prompt=add_generation_prompt)

    return QloraJaxLM()
