"""MMLU's questions, subjects and prompts (Hendrycks et al., arXiv 2009.03300), as published.

57 subjects in four groups; of each, 5 solved questions to show (`dev`), some to tune on (`val`,
1,531 in all) and those that count (`test`, 14,042). A prompt is, character for character, that of
the original `evaluate.py` and of the QLoRA code's own evaluation files, down to the double space
that its way of writing subjects leaves in the first line.
"""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from qlora_jax.data import load_rows

LETTERS = "ABCD"

# The table of the original's categories.py: subject -> subcategory -> one of four groups.
_STEM = (
    "abstract_algebra", "astronomy", "college_biology", "college_chemistry",
    "college_computer_science", "college_mathematics", "college_physics", "computer_security",
    "conceptual_physics", "electrical_engineering", "elementary_mathematics",
    "high_school_biology", "high_school_chemistry", "high_school_computer_science",
    "high_school_mathematics", "high_school_physics", "high_school_statistics",
    "machine_learning",
)  # fmt: skip
_HUMANITIES = (
    "formal_logic", "high_school_european_history", "high_school_us_history",
    "high_school_world_history", "international_law", "jurisprudence", "logical_fallacies",
    "moral_disputes", "moral_scenarios", "philosophy", "prehistory", "professional_law",
    "world_religions",
)  # fmt: skip
_SOCIAL_SCIENCES = (
    "econometrics", "high_school_geography", "high_school_government_and_politics",
    "high_school_macroeconomics", "high_school_microeconomics", "high_school_psychology",
    "human_sexuality", "professional_psychology", "public_relations", "security_studies",
    "sociology", "us_foreign_policy",
)  # fmt: skip
_OTHER = (
    "anatomy", "business_ethics", "clinical_knowledge", "college_medicine", "global_facts",
    "human_aging", "management", "marketing", "medical_genetics", "miscellaneous", "nutrition",
    "professional_accounting", "professional_medicine", "virology",
)  # fmt: skip
GROUPS: dict[str, tuple[str, ...]] = {
    "STEM": _STEM,
    "humanities": _HUMANITIES,
    "social sciences": _SOCIAL_SCIENCES,
    # Business, health (anatomy among it) and miscellaneous.
    "other": _OTHER,
}
"""The four groups, each with its subjects; 57 in all."""

SUBJECTS: dict[str, str] = {s: group for group, subjects in GROUPS.items() for s in subjects}
"""Subject -> group."""

# What the splits are called in the original's folders and in the hub's copy.
_HUB_SPLITS = {"dev": "dev", "val": "validation", "test": "test"}


class Question(NamedTuple):
    """One question: `choices` are four texts, `answer` a letter."""

    subject: str
    text: str
    choices: tuple[str, ...]
    answer: str


def load_questions(
    source: str | Path, split: str, *, limit: int | None = None
) -> dict[str, list[Question]]:
    """The questions of a split by subject, in the files' order.

    Args:
        source: a folder with the original tree (`dev/abstract_algebra_dev.csv` …), or a hub name
            of a set in the form of "cais/mmlu".
        split: "dev", "val" or "test"; any folder of the tree.
        limit: only the first so many of each subject.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a file that is not of this form, a subject that MMLU does not have.
    """
    folder = Path(source)
    if folder.is_file():
        raise ValueError(
            f"{folder} is a file: give the folder with the original's dev/, val/ and test/, or a "
            "hub name such as cais/mmlu."
        )
    questions = (
        _read_folder(folder / split)
        if folder.is_dir()
        else _read_hub(str(source), _HUB_SPLITS.get(split, split))
    )
    found: dict[str, list[Question]] = {}
    for question in questions:
        if question.subject not in SUBJECTS:
            raise ValueError(
                f"{source} has the subject {question.subject!r}, which is none of MMLU's "
                f"{len(SUBJECTS)}: leave it out."
            )
        of_subject = found.setdefault(question.subject, [])
        if limit is None or len(of_subject) < limit:
            of_subject.append(question)
    return found


def _read_folder(folder: Path) -> Iterable[Question]:
    files = sorted(folder.glob("*.csv"))
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no questions: expected the original's CSV files, such as "
            f"abstract_algebra_{folder.name}.csv."
        )
    for file in files:
        subject = file.stem.rpartition("_")[0]
        for number, row in enumerate(_csv_rows(file), 1):
            if len(row) != 6 or row[5] not in tuple(LETTERS):
                raise ValueError(
                    f"{file}, row {number}: expected a question, four choices and one of "
                    f"{', '.join(LETTERS)}, but it has {len(row)} columns and ends in "
                    f"{row[-1][:20] if row else ''!r}."
                )
            yield Question(subject, row[0], tuple(row[1:5]), row[5])


def _csv_rows(file: Path) -> list[list[str]]:
    try:
        # A spreadsheet begins its files with a byte order mark, which is no part of the question.
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = list(csv.reader(lines))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file} cannot be read as CSV in UTF-8 ({error}).") from error
    if not rows:
        raise ValueError(f"{file} is empty: fetch it again, or delete it to leave its subject out.")
    return rows


def _read_hub(name: str, split: str) -> Iterable[Question]:
    rows = load_rows(name, split, name="all")
    needed = ("subject", "question", "choices", "answer")
    if not set(needed) <= set(rows.column_names):
        raise ValueError(
            f"{name} has the columns {', '.join(rows.column_names)}, but MMLU's are "
            f"{', '.join(needed)}: give cais/mmlu, or a folder with the original files."
        )
    for number, row in enumerate(rows):
        answer, choices = row["answer"], row["choices"]
        # The hub's copy counts its choices, others write the letter.
        letter = LETTERS[answer] if type(answer) is int and 0 <= answer < 4 else answer
        if letter not in tuple(LETTERS) or not isinstance(choices, list) or len(choices) != 4:
            raise ValueError(
                f"{name}, row {number}: expected four choices, and as answer 0 to 3 or one of "
                f"{', '.join(LETTERS)}, but it has {choices!r} and {answer!r}."
            )
        yield Question(row["subject"], row["question"], tuple(choices), letter)


def _posed(question: Question) -> str:
    lines = [
        f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=True)
    ]
    return "\n".join([question.text, *lines, "Answer:"])


def prompt_of(question: Question, shots: Sequence[Question] = ()) -> str:
    """The text that a model is to go on with by a letter.

    Args:
        question: what is asked.
        shots: solved questions of its subject, shown before.
    """
    # Each word of a subject is written after a space, and the line ends in one already.
    subject = "".join(f" {word}" for word in question.subject.split("_"))
    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    shown = "".join(f"{_posed(shot)} {shot.answer}\n\n" for shot in shots)
    return head + shown + _posed(question)
