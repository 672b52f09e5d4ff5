"""Questions and a system's answers to them, in the files that the paper released and judges read.

Questions: one JSON object a line with `question_id`, `text`, `category`. Answers come in two forms:
those of outside systems have an `answer_id` and a `text`; those of models trained there have the
question as `text`, what the model was given as `prompt`, everything it wrote as `generation`, and
that up to the next turn as `generation_truncated`. The latter have no id: it is made of the text.
"""

from pathlib import Path
from typing import Any, NamedTuple

from qlora_jax.data.json_file import read_json_lines
from qlora_jax.evaluate.ratings import answer_id

ASSISTANT_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""What stands before the first turn of every prompt that the paper's models were judged on, to the
character (the released `prompt` column). A model that begins it anew has ended its answer."""


class JudgedQuestion(NamedTuple):
    """What a system is asked. `row` is the whole line of the file, `key` the name of its id."""

    id: str
    text: str
    category: str
    key: str
    row: dict[str, Any]


class Answer(NamedTuple):
    """What a judge reads, and the id that ratings know it by."""

    id: str
    text: str


def read_questions(file: Path) -> list[JudgedQuestion]:
    """The questions of `vicuna_questions.jsonl` or `oa_questions.jsonl`, in the file's order.

    Raises:
        ValueError: a line without an id or a text.
    """
    questions = []
    for row in _rows(file):
        key = _id_key(file, row)
        if not isinstance(row.get("text"), str):
            raise ValueError(f"{file}: question {row[key]} has no text, only {', '.join(row)}.")
        category = str(row.get("category") or "generic")
        questions.append(JudgedQuestion(str(row[key]), row["text"], category, key, row))
    return questions


def read_answers(file: Path) -> dict[str, Answer]:
    """Answers by question id.

    Raises:
        ValueError: a line that holds no answer, or two answers to one question.
    """
    answers: dict[str, Answer] = {}
    for row in _rows(file):
        question = str(row[_id_key(file, row)])
        if question in answers:
            raise ValueError(f"{file} holds two answers to question {question}.")
        given, text = row.get("answer_id"), row.get("text")
        if isinstance(given, str) and isinstance(text, str):
            answers[question] = Answer(given, text)
            continue
        text = row.get("generation_truncated", row.get("generation"))
        if not isinstance(text, str):
            raise ValueError(
                f"{file}: the row of question {question} has the columns {', '.join(row)}, but an "
                "answer needs answer_id and text, or generation, and strings in them."
            )
        # Up to the system text, as far as the assistant's name: a model may end its copy early.
        text = text.split(ASSISTANT_SYSTEM.partition(" assistant")[0])[0]
        answers[question] = Answer(answer_id(text), text)
    return answers


def _rows(file: Path) -> list[dict[str, Any]]:
    rows = [row for _, row in read_json_lines(file)]
    if not rows:
        raise ValueError(f"{file} is empty: expected one JSON object a line.")
    return rows


def _id_key(file: Path, row: dict[str, Any]) -> str:
    for key in ("question_id", "message_id"):
        if key in row:
            return key
    raise ValueError(
        f"{file}: a row has the columns {', '.join(row)}, but needs question_id (or message_id)."
    )
