"""What the judged tables (1, 6 and 7) share: the paper's numbers, the systems' names, the data.

The data are the generations and ratings released with the paper: the folder `eval` of a clone of
github.com/artidoro/qlora, or any folder laid out like it (`ratings-gpt4/vicuna/pairwise`, …).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from pathlib import Path

from qlora_jax.evaluate import JudgedQuestion, Ratings, check_systems, read_questions, read_ratings

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "qlora_eval"

REFERENCE = "ChatGPT"

TABLE_1 = {
    "GPT-4": 1348,
    "Guanaco-65B": 1022,
    "Guanaco-33B": 992,
    "Vicuna-13B": 974,
    "ChatGPT": 966,
    "Guanaco-13B": 913,
    "Bard": 902,
    "Guanaco-7B": 879,
}
"""Elo on the Vicuna questions, GPT-4 as judge."""

TABLE_7 = {
    "GPT-4": 1294,
    "ChatGPT": 1015,
    "Guanaco-65B": 1008,
    "Guanaco-33B": 1002,
    "Vicuna-13B": 936,
    "Guanaco-13B": 885,
    "Guanaco-7B": 860,
}
"""Elo on the OA questions, GPT-4 as judge."""

TABLE_6 = {
    "GPT-4": (119.4, 110.1, 114.5),
    "Bard": (93.2, 96.4, 94.8),
    "Guanaco-65B": (96.7, 101.9, 99.3),
    "Alpaca-65B": (63.0, 77.9, 70.7),
    "FLAN v2-65B": (37.0, 59.6, 48.4),
    "Guanaco-33B": (96.5, 99.2, 97.8),
    "Alpaca-33B": (67.2, 79.7, 73.6),
    "FLAN v2-33B": (26.3, 49.7, 38.0),
    "Vicuna-13B": (91.2, 98.7, 94.9),
    "Guanaco-13B": (87.3, 93.4, 90.4),
    "Alpaca-13B": (63.8, 76.7, 69.4),
    "HH-RLHF-13B": (55.5, 69.1, 62.5),
    "Unnatural Instructions-13B": (50.6, 69.8, 60.5),
    "Chip2-13B": (49.2, 69.3, 59.5),
    "Longform-13B": (44.9, 62.0, 53.6),
    "Self-Instruct-13B": (38.0, 60.5, 49.1),
    "FLAN v2-13B": (32.4, 61.2, 47.0),
    "Guanaco-7B": (84.1, 89.8, 87.0),
    "Alpaca-7B": (57.3, 71.2, 64.4),
    "FLAN v2-7B": (33.3, 56.1, 44.8),
}
"""Percent of ChatGPT's score on the Vicuna questions: ChatGPT read first, system first, mean."""

_NAMES = {
    "gpt4": "GPT-4",
    "gpt-4": "GPT-4",
    "gpt35": REFERENCE,
    "gpt-3.5": REFERENCE,
    "bard": "Bard",
    "alpaca": "Alpaca",
    "chip2": "Chip2",
    "flan": "FLAN v2",
    "guanaco": "Guanaco",
    "hh-rlhf": "HH-RLHF",
    "huggingchat": "HuggingChat",
    "longform": "Longform",
    "self-instruct": "Self-Instruct",
    "unnatural-instructions": "Unnatural Instructions",
    "vicuna": "Vicuna",
}


def make_rating_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """The command line of a table made of ratings: which ones, and where the table goes."""
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.paper.{command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, default=SHARED, metavar="FOLDER")
    add("--ratings", type=Path, metavar="FOLDER", help="own rating files, not the paper's")
    add("--out", type=Path, default=Path("runs/paper") / command, metavar="FOLDER")
    add("--reread", action="store_true", help="read texts whose score is -1 again")
    return parser


def system_label(name: str) -> str:
    """The paper's name of a system: "Guanaco-33B" for `30b-guanaco`; others keep their own."""
    if name in _NAMES:
        return _NAMES[name]
    found = re.fullmatch(r"(\d+)b-(.+)", name) or re.fullmatch(r"(.+)-(\d+)b", name)
    if found is None:
        return name
    size, data = sorted(found.groups(), key=lambda part: not part.isdigit())
    # LLaMA's second largest model has 32.5 billion parameters: 30B to its makers, 33B in the paper.
    return f"{_NAMES.get(data, data)}-{'33' if size == '30' else size}B"


def labelled_ratings(files: Iterable[Path], *, reread: bool) -> Ratings:
    """`read_ratings`, of systems that a table can tell apart.

    Raises:
        ValueError: as `read_ratings`, or two systems have one label.
    """
    ratings = read_ratings(files, reread=reread)
    check_systems(ratings.systems, system_label)
    return ratings


def questions_of(file: Path) -> list[JudgedQuestion]:
    """`read_questions`; FileNotFoundError says where the paper's can be had."""
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist: give --questions a file of questions, such as "
            "eval/prompts/vicuna_questions.jsonl in a clone of https://github.com/artidoro/qlora."
        )
    return read_questions(file)


def rating_files(data: Path, folder: str) -> list[Path]:
    """The rating files of one benchmark, `ratings-gpt4/FOLDER/*.jsonl`.

    Raises:
        FileNotFoundError: there are none; the message says where they can be had.
    """
    place = data / "ratings-gpt4" / folder
    files = sorted(place.glob("*.jsonl"))
    if not files:
        raise FileNotFoundError(
            f"{place} holds no ratings: give --data the folder `eval` of a clone of "
            "https://github.com/artidoro/qlora."
        )
    return files


def own_files(folder: Path) -> list[Path]:
    """The rating files that `--ratings` names."""
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no rating file: expected *.jsonl in it.")
    return files
