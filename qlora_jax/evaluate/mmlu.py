"""How much does a model know? MMLU by the letter it would write next.

As the original evaluation defines it: the prompt ends in "Answer:", the scores of the four letters
as next token are compared, the highest is the answer. Nothing is generated. A prompt that is longer
than the model reads loses shots from its end, one by one, as in the original; one that is too long
without any (which the original leaves open) loses its beginning.

Two means are reported, for both are in use. `micro` counts every question once, as the original
does; `macro` is the mean over subjects, as the QLoRA paper's code does.

Prompts are sorted by length into few buckets (two to an octave), so that all 14,042 questions run
through a handful of compiled programs. Answers are written down batch by batch where a file is
given; the same call again asks only what is missing.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from qlora_jax.data import Tokenizer
from qlora_jax.evaluate.mmlu_questions import GROUPS, LETTERS, SUBJECTS, Question, prompt_of
from qlora_jax.evaluate.perplexity import split_adapters
from qlora_jax.evaluate.record import Record
from qlora_jax.models.positions import positions_to
from qlora_jax.models.spread import spread_rows
from qlora_jax.models.streaming import options_for
from qlora_jax.processes import whole

_SHORTEST_BUCKET = 64


@dataclass(frozen=True)
class MmluResult:
    """How an examination went.

    Attributes:
        correct, asked: questions by subject.
        shortened: questions that were shown with fewer shots than wanted.
        cut: questions that lost their beginning, too long even without shots.
    """

    correct: Mapping[str, int]
    asked: Mapping[str, int]
    shortened: int = 0
    cut: int = 0

    @property
    def micro(self) -> float:
        """Correct answers over all questions."""
        return self._share(self.asked)

    @property
    def macro(self) -> float:
        """Mean over subjects of the share of correct answers."""
        return float(np.mean([self.correct[s] / n for s, n in self.asked.items()]))

    @property
    def groups(self) -> dict[str, float]:
        """Correct answers over all questions of each of the four groups that was asked about."""
        present = {g: [s for s in subjects if s in self.asked] for g, subjects in GROUPS.items()}
        return {group: self._share(subjects) for group, subjects in present.items() if subjects}

    def _share(self, subjects: Any) -> float:
        return sum(self.correct[s] for s in subjects) / sum(self.asked[s] for s in subjects)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for a JSON file."""
        return {
            "micro": self.micro,
            "macro": self.macro,
            "groups": self.groups,
            "subjects": {s: self.correct[s] / n for s, n in self.asked.items()},
            "questions": sum(self.asked.values()),
            "shortened": self.shortened,
            "cut": self.cut,
        }


class _Prompt(NamedTuple):
    """One question, ready to be asked: `key` names it, `shots` is how many are shown."""

    key: str
    question: Question
    ids: list[int]
    shots: int
    cut: bool


def answer_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that stand for " A" to " D" behind "Answer:"; of "A" to "D" where there are none.

    Raises:
        ValueError: the vocabulary has no single token for a letter.
    """
    for space in (" ", ""):
        found = [tokenizer.encode(space + letter, continues=True) for letter in LETTERS]
        if all(len(ids) == 1 for ids in found):
            return tuple(ids[0] for ids in found)
    raise ValueError(
        f"the tokenizer {tokenizer.name!r} has no single tokens for the letters {LETTERS}, so its "
        "model cannot be examined by the letter it writes next."
    )


def examine(
    model: nnx.Module,
    tokenizer: Tokenizer,
    questions: Mapping[str, Sequence[Question]],
    dev: Mapping[str, Sequence[Question]],
    *,
    shots: int = 5,
    max_len: int,
    batch_size: int = 8,
    answers: str | Path | None = None,
    identity: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MmluResult:
    """Asks a model multiple-choice questions.

    Args:
        model: a causal language model (`hidden` and `head`).
        tokenizer: its own.
        questions: by subject (`load_questions`).
        dev: solved ones by subject, of which the first `shots` are shown.
        shots: 0 asks without any.
        max_len: tokens the model reads at most.
        batch_size: prompts at once.
        answers: a JSONL file that takes each answer with the four scores, and from which an
            examination that was broken off goes on.
        identity: what the answers depend on beside prompts (the model, its adapter); compared with
            the file's.
        progress: told (questions done, questions in all) now and then.

    Raises:
        ValueError: no questions, a subject without enough shots, a file of another examination.
    """
    prompts = _prompts(tokenizer, questions, dev, shots, max_len)
    digest = hashlib.sha256(repr([(p.key, p.ids) for p in prompts]).encode()).hexdigest()
    depends_on = {"prompts": digest, **(identity or {})}
    record = Record(answers, depends_on, item="question", finding="chosen")
    graphdef, lora, frozen = split_adapters(model)
    letters = answer_tokens(tokenizer)
    answer_scores = _answer_scores(tuple(options_for(model).items()))
    open_prompts = [p for p in prompts if p.key not in record.found]
    for batch in _batches(open_prompts, batch_size):
        rows = _padded(batch, batch_size, max_len, tokenizer.pad_token_id)
        input_ids, last = spread_rows(rows, frozen)
        scores = answer_scores(graphdef, lora, frozen, input_ids, last, tokens=letters)
        record.add(map(_entry, batch, whole(scores)))
        if progress is not None:
            progress(len(record.found), len(prompts))
    subjects = list(dict.fromkeys(p.question.subject for p in prompts))
    right = [p.question.subject for p in prompts if record.found[p.key] == p.question.answer]
    asked = [p.question.subject for p in prompts]
    return MmluResult(
        correct={s: right.count(s) for s in subjects},
        asked={s: asked.count(s) for s in subjects},
        shortened=sum(p.shots < shots for p in prompts),
        cut=sum(p.cut for p in prompts),
    )


@functools.cache
def _answer_scores(
    compiler_options: tuple[tuple[str, Any], ...],
) -> Callable[..., Float[Array, "b choices"]]:
    """(graphdef, lora, frozen, input_ids [b s], last [b], tokens=) -> the scores of `tokens` after
    the prompts' last tokens, which stand at `last`.

    Compiled once for a model and a shape, however often a model is examined while it trains.
    """

    @functools.partial(
        jax.jit,
        static_argnames=("graphdef", "tokens"),
        compiler_options=dict(compiler_options) or None,
    )
    def answer_scores(
        graphdef: nnx.GraphDef,
        lora: PyTree,
        frozen: PyTree,
        input_ids: Int[Array, "b s"],
        last: Int[Array, " b"],
        *,
        tokens: tuple[int, ...],
    ) -> Float[Array, "b choices"]:
        model: Any = nnx.merge(graphdef, lora, frozen)
        # The rows are padded on the right, so causality hides the padding and no mask is needed.
        positions = positions_to(last, input_ids.shape[1])
        hidden = model.hidden(input_ids, positions=positions)
        final = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        return model.head(final)[:, jnp.asarray(tokens)].astype(jnp.float32)

    return answer_scores


def _prompts(
    tokenizer: Tokenizer,
    questions: Mapping[str, Sequence[Question]],
    dev: Mapping[str, Sequence[Question]],
    shots: int,
    max_len: int,
) -> list[_Prompt]:
    if not any(questions.values()):
        raise ValueError("there are no questions to ask.")
    prompts = []
    # In the table's order, whatever the order of files or rows.
    for subject in (s for s in SUBJECTS if questions.get(s)):
        shown = list(dev.get(subject, ()))[:shots]
        if len(shown) < shots:
            raise ValueError(
                f"{subject} has {len(shown)} solved questions to show, but shots={shots} are "
                "wanted: give the dev split, or fewer shots."
            )
        for index, question in enumerate(questions[subject]):
            prompts.append(_fitted(f"{subject}/{index}", question, shown, tokenizer, max_len))
    return prompts


def _fitted(
    key: str, question: Question, shown: Sequence[Question], tokenizer: Tokenizer, max_len: int
) -> _Prompt:
    """The prompt with as many shots as fit."""
    for count in range(len(shown), -1, -1):
        ids = tokenizer.encode(prompt_of(question, shown[:count]))
        if len(ids) <= max_len:
            return _Prompt(key, question, ids, count, False)
    # What counts is the end: the choices and "Answer:". A bos stays in front.
    start = tokenizer.encode("")
    return _Prompt(key, question, start + ids[len(ids) - max_len + len(start) :], 0, True)


def bucket_of(length: int, longest: int) -> int:
    """The padded length of a prompt: 64, 96, 128, 192, 256, 384 … up to the longest allowed."""
    bucket = _SHORTEST_BUCKET
    while bucket < length:
        bucket = bucket * 3 // 2 if bucket & (bucket - 1) == 0 else bucket // 3 * 4
    return min(bucket, longest)


def _batches(prompts: Sequence[_Prompt], size: int) -> Iterator[Sequence[_Prompt]]:
    """By length, the longest first: if memory does not suffice, that shows at once."""
    ordered = sorted(prompts, key=lambda p: -len(p.ids))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _padded(
    batch: Sequence[_Prompt], size: int, longest: int, pad: int
) -> tuple[Int[np.ndarray, "b s"], Int[np.ndarray, " b"]]:
    """Prompts [size, bucket] and the index of each one's last token; missing rows are filling."""
    bucket = bucket_of(max(len(p.ids) for p in batch), longest)
    input_ids = np.full((size, bucket), pad, np.int32)
    last = np.zeros(size, np.int32)
    for row, prompt in enumerate(batch):
        input_ids[row, : len(prompt.ids)] = prompt.ids
        last[row] = len(prompt.ids) - 1
    return input_ids, last


def _entry(prompt: _Prompt, scores: Float[np.ndarray, " choices"]) -> dict[str, Any]:
    """A prompt's line in the record: the letter that scored highest, the first of equals."""
    return {
        "question": prompt.key,
        "chosen": LETTERS[int(scores.argmax())],
        "answer": prompt.question.answer,
        "scores": [round(float(score), 4) for score in scores],
        "shots": prompt.shots,
    }
