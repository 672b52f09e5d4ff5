"""What a judge said of pairs of answers: rating files, one JSON object a line.

The form is that of the ratings released with the QLoRA paper, so that theirs and ours are read by
the same code. A row names the two answers in the order in which the judge read them
(`answer1_id`, `answer2_id`), holds the judge's whole `text` and its `score`: two numbers out of
ten, or 1, 2 or 3 for "the first", "the second" and "equally good"; -1 where the text held neither.

How to think of it:

- **A file name says who met, the answer ids say who was read first.** The names of many released
  files have the order reversed. An answer's id belongs to the one system that all files which hold
  it have in common; that decides each file, without a list of answers. Rows that this project
  writes name the two systems in their `metadata`, which then decides.
- **Points.** A verdict becomes the points of either side: (1, 0), (0, 1) or (0.5, 0.5). Scores out
  of ten stay as they are. Whoever has more has won, in both forms.
- **Nothing is guessed.** A row without a readable score is counted and left out.
"""

import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qlora_jax.data.json_file import read_json_lines

CHOICES = {1: (1.0, 0.0), 2: (0.0, 1.0), 3: (0.5, 0.5)}
"""What a verdict is worth to the answer read first and to the one read second."""

UNREADABLE = -1
"""The score of a text without one; of a pair of scores it is written twice."""


class Rating(NamedTuple):
    """One judgement: `first` and `second` are systems, in the order in which they were read."""

    question: str
    first: str
    second: str
    points: tuple[float, float]


@dataclass(frozen=True)
class Ratings:
    """All readable judgements of some files, and how many of each file's rows were unreadable."""

    ratings: tuple[Rating, ...]
    unreadable: dict[str, int]

    @property
    def systems(self) -> tuple[str, ...]:
        """Every system that was judged, sorted."""
        return tuple(sorted({s for r in self.ratings for s in (r.first, r.second)}))


def read_ratings(files: Iterable[Path], *, reread: bool = False) -> Ratings:
    """The judgements of rating files named `A-vs-B-JUDGE-reviewer[...].jsonl`.

    Args:
        files: rating files of one benchmark, all that there are: who was read first is found from
            the answer ids that several files share.
        reread: read a row's text again where its score is -1, with the parsers here, which are
            more patient than the ones that the released scores were made with.

    Raises:
        ValueError: a file that is no rating file, or rows that do not say who was read first.
    """
    rows = {file: content for file in sorted(files) if (content := _read_rows(file))}
    if not rows:
        raise ValueError("there is no rating to read: expected *.jsonl with one rating a line.")
    names = {file: _systems_in_name(file) for file in rows if not _named(rows[file])}
    owners = _owners((names[file], rows[file]) for file in names)
    ratings: list[Rating] = []
    unreadable: Counter[str] = Counter()
    for file, content in rows.items():
        order = _order(file, names[file], content, owners) if file in names else None
        for row in content:
            points = _points(row, reread=reread)
            if points is None:
                unreadable[file.name] += 1
                continue
            first, second = order or (row["metadata"]["system1"], row["metadata"]["system2"])
            ratings.append(Rating(_question(row), first, second, points))
    return Ratings(tuple(ratings), dict(unreadable))


def parse_scores(text: str) -> tuple[float, float] | None:
    """The two scores out of ten of a judge's text, or None.

    They stand on the first line, or, where the judge was asked to solve the problem first, at the
    end: as a pair `(a, b)` on the last line, or after the names of the two assistants.
    """
    lines = text.strip().split("\n")
    number = r"(\d+(?:\.\d+)?)(?:/10)?"
    pair = rf"{number}\s*[,;\s]\s*{number}"
    named = r"Assistant {}(?::| a score of)\s*" + number
    found = re.fullmatch(rf"\(?\s*{pair}\s*\)?", lines[0].strip()) or re.search(
        rf"\(\s*{pair}\s*\)$", lines[-1].strip()
    )
    if found:
        scores = (float(found[1]), float(found[2]))
    else:
        # The last mention counts: single steps are sometimes marked before.
        each = [re.findall(named.format(which), text) for which in (1, 2)]
        if not all(each):
            return None
        scores = (float(each[0][-1]), float(each[1][-1]))
    return scores if max(scores) <= 10 else None


def parse_choice(text: str) -> int | None:
    """The verdict of a judge's text, 1, 2 or 3 (equally good), or None.

    Judges were asked for a bare number on the last line. Where they wrote a sentence there, the
    choice that it states first counts ("I choose option 3, as both …").
    """
    lines = [line.strip() for line in text.strip().split("\n")]
    last = lines[-1].strip("*_`\"'()[]#. ")
    if last in ("1", "2", "3"):
        return int(last)
    chosen = re.search(
        r"(?:choose|choice|option|answer|verdict|best|better)(?: is| as)?:? *"
        r"(?:the )?(?:option |number |answer )*(?:one )?"
        r"(?:(?:provided|given|written) by |(?:of|from|by) )?(?:assistant )?([123])\b(?!/)",
        last,
        re.IGNORECASE,
    )
    if chosen:
        return int(chosen[1])
    if re.search(r"\b(?:equivalent|equally good|a tie)\b", last, re.IGNORECASE):
        return 3
    return None


def answer_id(text: str) -> str:
    """The id that released rating files give an answer of a model trained there: from its text.

    It is the version-5 UUID of the text in the DNS namespace, written in 57 unambiguous
    characters, as the `shortuuid` library does.
    """
    alphabet = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
    number, digits = uuid.uuid5(uuid.NAMESPACE_DNS, text).int, ""
    while number:
        number, digit = divmod(number, len(alphabet))
        digits = alphabet[digit] + digits
    return digits.rjust(22, alphabet[0])


def system_name(stem: str) -> str:
    """A system's short name from that of its answers: `7b-guanaco` of
    `7b-guanaco-vicuna-generations-topp0.9-temp0.7`, `gpt4` of `answer_gpt4`.
    """
    stem = re.sub(r"-(vicuna|oa)-generations(-topp[\d.]+-temp[\d.]+)?$", "", stem)
    return re.sub(r"^answer[-_]", "", stem)


def check_systems(names: Iterable[str], label: Callable[[str], str] = str) -> None:
    """Refuses systems that cannot be told apart by what a file or a table calls them.

    Raises:
        ValueError: a name that is empty, or two whose `label` is the same.
    """
    labelled: dict[str, str] = {}
    for name in names:
        called = label(name)
        if not called.strip():
            raise ValueError(f"a system is called {name!r}: give it a name.")
        if called in labelled:
            raise ValueError(
                f"two systems are called {called} here ({labelled[called]}, {name}): give one of "
                "them another name."
            )
        labelled[called] = name


def _read_rows(file: Path) -> list[dict[str, Any]]:
    rows = []
    for number, row in read_json_lines(file):
        check_rating(row, file, number)
        rows.append(row)
    return rows


def check_rating(row: Any, file: Path, number: int) -> None:
    """Checks one line of a rating file.

    Raises:
        ValueError: it lacks what a rating has, or holds something else in its place.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{file}, line {number} holds no JSON object, but a rating is one.")
    missing = [key for key in ("answer1_id", "answer2_id", "score") if key not in row]
    if missing:
        raise ValueError(
            f"{file}, line {number} has the keys {', '.join(row)}, but a rating also needs "
            f"{', '.join(missing)}: is this a file of answers?"
        )
    metadata = row.get("metadata") or {}
    texts = [row["answer1_id"], row["answer2_id"], row.get("text") or ""]
    if isinstance(metadata, dict):
        texts += [metadata[key] for key in ("system1", "system2") if key in metadata]
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"{file}, line {number} is no rating: answer ids, text and the systems of its metadata "
            "have to be strings."
        )


def _question(row: dict[str, Any]) -> str:
    # The OA benchmark's questions are messages.
    return str(row.get("question_id", row.get("message_id")))


def _points(row: dict[str, Any], *, reread: bool) -> tuple[float, float] | None:
    score, text = row["score"], row.get("text") or ""
    if isinstance(score, list):
        if len(score) == 2 and all(isinstance(n, int | float) and n >= 0 for n in score):
            return (float(score[0]), float(score[1]))
        return parse_scores(text) if reread else None
    if isinstance(score, int | float) and score in CHOICES:
        return CHOICES[int(score)]
    choice = parse_choice(text) if reread else None
    return None if choice is None else CHOICES[choice]


def _named(rows: Sequence[dict[str, Any]]) -> bool:
    return all({"system1", "system2"} <= (row.get("metadata") or {}).keys() for row in rows)


def _systems_in_name(file: Path) -> tuple[str, str]:
    """`7b-guanaco`, `gpt4` of `7b-guanaco-…-vs-answer-gpt4-gpt-4-reviewer-threeclass.jsonl`."""
    stem = re.sub(r"-gpt-?4-reviewer(-threeclass)?$", "", file.stem)
    names = [system_name(name) for name in stem.split("-vs-")]
    if len(names) != 2 or names[0] == names[1]:
        raise ValueError(
            f"{file.name} does not name two systems: expected A-vs-B-gpt4-reviewer.jsonl, or rows "
            "whose metadata names system1 and system2."
        )
    return names[0], names[1]


def _owners(
    files: Iterable[tuple[tuple[str, str], list[dict[str, Any]]]],
) -> dict[str, set[str]]:
    """For every answer id, the systems that all files which hold it name."""
    owners: dict[str, set[str]] = {}
    for systems, rows in files:
        for row in rows:
            for key in ("answer1_id", "answer2_id"):
                owners[row[key]] = owners.get(row[key], set(systems)) & set(systems)
    return owners


def _order(
    file: Path,
    systems: tuple[str, str],
    rows: Sequence[dict[str, Any]],
    owners: dict[str, set[str]],
) -> tuple[str, str]:
    """The two systems in the order in which this file's answers were read."""
    a, b = systems
    votes: Counter[tuple[str, str]] = Counter()
    for row in rows:
        first, second = owners[row["answer1_id"]], owners[row["answer2_id"]]
        # Two systems may give one answer, word for word, and so one id: such rows decide nothing.
        if first == second:
            continue
        if first == {a} or second == {b}:
            votes[a, b] += 1
        elif first == {b} or second == {a}:
            votes[b, a] += 1
    if len(votes) != 1:
        found = "in both orders" if votes else "in no order that their ids tell"
        raise ValueError(
            f"{file.name}: the answers of {a} and {b} were read {found}: read all rating files of "
            "the benchmark together, so that each system meets at least two others."
        )
    return next(iter(votes))
