"""GLUE's eight tasks (arXiv 1804.07461, without WNLI): where their rows are and what they score.

Rows are read from GLUE's own folders of .tsv files, from .jsonl, .json, .csv or .parquet files with
the hub's columns (a copy of the hub's folder, too), or from the hub. GLUE's .tsv files know no
quoting: a quotation mark is a character.
"""

from __future__ import annotations

import contextlib
import csv
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qlora_jax.data import load_rows
from qlora_jax.evaluate import Metric, Scores, accuracy, accuracy_and_f1, correlations, matthews

_ENDINGS = (".tsv", ".jsonl", ".json", ".csv", ".parquet")
# How the hub's files end: each split is one.
_ONE_SHARD = "-00000-of-00001"
_SPLITS = {
    "train": ("train",),
    "validation": ("dev", "validation"),
    "validation_matched": ("dev_matched", "validation_matched"),
    "validation_mismatched": ("dev_mismatched", "validation_mismatched"),
}
# CoLA's files have no header.
_COLA_COLUMNS = ("source", "label", "mark", "sentence")


class Row(NamedTuple):
    """One example: a text or two, and a class or a value."""

    texts: tuple[str, ...]
    label: int | float


@dataclass(frozen=True)
class Task:
    """One task of GLUE.

    Attributes:
        title: its name in print, and of its folder.
        texts: for each text, the columns that may hold it.
        classes: names of the classes in order; () where the label is a value.
        metric: references and predictions → scores.
        score: which of them goes into the mean.
        validation: the splits that are scored; of two, the mean counts.
    """

    title: str
    texts: tuple[tuple[str, ...], ...]
    classes: tuple[str, ...]
    metric: Metric
    score: str
    validation: tuple[str, ...] = ("validation",)

    @property
    def num_labels(self) -> int:
        """Outputs of the head: 1 for a value."""
        return len(self.classes) or 1

    def row(self, columns: Mapping[str, Any], where: str) -> Row:
        """A row of any of its file formats.

        Raises:
            ValueError: a column is missing, or the label is none of the task's.
        """
        texts = tuple(str(_column(columns, names, where)) for names in self.texts)
        label = _column(columns, ("label", "gold_label", "Quality", "is_duplicate", "score"), where)
        if not self.classes:
            with contextlib.suppress(TypeError, ValueError):
                if math.isfinite(float(label)):
                    return Row(texts, float(label))
            raise ValueError(f"{where}: the label is {label!r}, but {self.title} has numbers.")
        if label in self.classes:
            return Row(texts, self.classes.index(label))
        if str(label).isdecimal() and int(label) < len(self.classes):
            return Row(texts, int(label))
        raise ValueError(f"{where}: the label is {label!r}, but {self.title} has {self.classes}.")

    def scores(self, references: Mapping[str, Any], predictions: Mapping[str, Any]) -> Scores:
        """All scores over its validation splits, and `score`, the one that counts."""
        each = {s: self.metric(references[s], predictions[s]) for s in self.validation}
        main = statistics.fmean(scores[self.score] for scores in each.values())
        if len(each) == 1:
            return {**each[self.validation[0]], "score": main}
        named = {f"{name}_{s}": v for s, scores in each.items() for name, v in scores.items()}
        return {**named, "score": main}


_SENTENCE = (("sentence",),)
_SENTENCES = (("sentence1", "#1 String"), ("sentence2", "#2 String"))
_ENTAILMENT = ("entailment", "not_entailment")

TASKS: dict[str, Task] = {
    "mnli": Task(
        "MNLI",
        (("premise", "sentence1"), ("hypothesis", "sentence2")),
        ("entailment", "neutral", "contradiction"),
        accuracy,
        "accuracy",
        ("validation_matched", "validation_mismatched"),
    ),
    "sst2": Task("SST-2", _SENTENCE, ("negative", "positive"), accuracy, "accuracy"),
    "mrpc": Task("MRPC", _SENTENCES, ("different", "equivalent"), accuracy_and_f1, "accuracy"),
    "cola": Task("CoLA", _SENTENCE, ("unacceptable", "acceptable"), matthews, "matthews"),
    "qnli": Task("QNLI", (("question",), ("sentence",)), _ENTAILMENT, accuracy, "accuracy"),
    "qqp": Task(
        "QQP",
        (("question1",), ("question2",)),
        ("not_duplicate", "duplicate"),
        accuracy_and_f1,
        "accuracy",
    ),
    "rte": Task("RTE", _SENTENCES, _ENTAILMENT, accuracy, "accuracy"),
    "stsb": Task("STS-B", _SENTENCES, (), correlations, "pearson"),
}
"""By the hub's names, in the order that papers list them."""


def load_split(task: str, source: str | Path, split: str, limit: int | None = None) -> list[Row]:
    """The rows of one split of a task.

    Args:
        task: a key of `TASKS`.
        source: a file; a folder with one folder per task, or with files whose names begin with the
            task's; or a hub name.
        split: "train", or one of the task's validation splits.
        limit: the first so many rows only.

    Raises:
        FileNotFoundError: a folder without such a file.
        ValueError: rows that are not the task's.
    """
    path = Path(source).expanduser()
    file = _find(path, task, split) if path.is_dir() else path
    rows: Iterable[Mapping[str, Any]]
    if file.suffix == ".tsv" and file.is_file():
        rows = _read_tsv(file, task)
    elif file.is_file():
        rows = load_rows(file)
    else:
        rows = load_rows(str(source), split, name=task)
    found: list[Row] = []
    for number, columns in enumerate(rows, 1):
        if limit is not None and len(found) == limit:
            break
        found.append(TASKS[task].row(columns, f"row {number} of {file}"))
    if not found:
        raise ValueError(f"{file} is empty: there is not one row in it.")
    return found


def _find(folder: Path, task: str, split: str) -> Path:
    title = TASKS[task].title
    patterns = [f"{name}/{word}" for name in (title, task) for word in _SPLITS[split]]
    patterns += [f"{task}*{word}" for word in _SPLITS[split]]
    for pattern in patterns:
        for file in sorted(folder.glob(f"{pattern}*")):
            stem = file.stem.removesuffix(_ONE_SHARD)
            if file.suffix in _ENDINGS and (
                stem.endswith(pattern.rpartition("/")[2])
                or stem.endswith(pattern.rpartition("*")[2])
            ):
                return file
    raise FileNotFoundError(
        f"{folder} has no {split} file of {task}: expected {title}/{_SPLITS[split][0]}.tsv, or "
        f"{task}_{_SPLITS[split][0]} with one of {', '.join(_ENDINGS)}."
    )


def _read_tsv(file: Path, task: str) -> Iterable[Mapping[str, Any]]:
    with file.open(encoding="utf-8", newline="") as stream:
        lines = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        header = _COLA_COLUMNS if task == "cola" else next(lines, ())
        for fields in lines:
            # GLUE's QQP has torn lines, which the hub's copy leaves out.
            if task == "qqp" and len(fields) < len(header):
                continue
            yield dict(zip(header, fields, strict=False))


def _column(columns: Mapping[str, Any], names: tuple[str, ...], where: str) -> Any:
    for name in names:
        if columns.get(name) is not None:
            return columns[name]
    raise ValueError(
        f"{where} has the columns {', '.join(map(str, columns))}, but {' or '.join(names)} is "
        "needed: give the task's own file."
    )
