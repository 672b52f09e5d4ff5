"""A judge for pairs of answers: many questions to one endpoint, and a rating file that survives.

    pairings(...)   who meets whom, in both reading orders
    judge(...)      asks, and appends one row per pair to a rating file of `ratings.py`'s form

How to think of it: the rating files are the state. A row is written, and forced to the disk, as
soon as its verdict is there; a run that was killed goes on where the files end, and loses no more
than the answers that were on their way.

- **Retries.** An attempt that brings no verdict (a timeout, a refusal, a broken connection, a text
  without one) is repeated after 1, 2, 4, … seconds, up to a minute, each drawn between half and the
  whole so that many workers do not come back at once; longer where the service asks for it. After
  `attempts` the pair is recorded as missing: score -1, the reason in its metadata. `retry_missing`
  asks about those again, another day.
- **A budget**, in calls, tokens or money: no attempt begins once it is spent. What was not asked is
  not recorded, and a later run with more budget asks it.
"""

import itertools
import json
import math
import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from qlora_jax.evaluate.answers import Answer, JudgedQuestion
from qlora_jax.evaluate.endpoint import Chat, Endpoint, EndpointError, Reply, ask
from qlora_jax.evaluate.judge_prompts import Form, judge_messages
from qlora_jax.evaluate.ratings import (
    UNREADABLE,
    answer_id,
    check_rating,
    check_systems,
    parse_choice,
    parse_scores,
)
from qlora_jax.files import write_whole


@dataclass(frozen=True)
class Budget:
    """What a run may spend; None for no limit. Prices are per million tokens."""

    calls: int | None = None
    tokens: int | None = None
    cost: float | None = None
    prompt_price: float = 0.0
    completion_price: float = 0.0

    def __post_init__(self) -> None:
        """ValueError for what is no limit or price, or a cost limit without prices, which nothing
        would ever reach.
        """
        for name, value in vars(self).items():
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} must be a finite number, 0 or more.")
        if self.cost is not None and not (self.prompt_price or self.completion_price):
            raise ValueError(
                f"cost={self.cost} limits nothing without prices: give prompt_price and "
                "completion_price, per million tokens."
            )


class Pairing(NamedTuple):
    """Two systems' answers to a question, in the order in which the judge reads them."""

    question: JudgedQuestion
    systems: tuple[str, str]
    answers: tuple[Answer, Answer]


@dataclass
class Spent:
    """What a run has spent so far."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def cost(self, budget: Budget) -> float:
        """In the currency of the budget's prices."""
        return (
            self.prompt_tokens * budget.prompt_price
            + self.completion_tokens * budget.completion_price
        ) / 1e6


@dataclass(frozen=True)
class JudgeReport:
    """What came of a run: pairs judged now, found judged, missing, and not asked for the budget."""

    judged: int
    already: int
    missing: int
    unasked: int
    spent: Spent
    files: tuple[Path, ...] = ()


def pairings(
    questions: Iterable[JudgedQuestion],
    answers: Mapping[str, Mapping[str, Answer]],
    *,
    reference: str | None = None,
) -> list[Pairing]:
    """Every two systems in both orders, or every system with `reference` alone.

    Args:
        questions: what was asked.
        answers: system → question id → answer.
        reference: a system that all others are compared with.

    Raises:
        ValueError: fewer than two systems, names that a rating file cannot tell apart, or a system
            that did not answer every question.
    """
    asked = list(questions)
    check_systems(answers, _in_file_name)
    if len(answers) < 2:
        raise ValueError(f"a comparison needs two systems, but there is {', '.join(answers)}.")
    for name, given in answers.items():
        absent = [question.id for question in asked if question.id not in given]
        if absent:
            raise ValueError(
                f"{name} has no answer to {len(absent)} of {len(asked)} questions, {absent[0]} "
                "among them: finish generating first."
            )
    if reference is not None and reference not in answers:
        raise ValueError(f"reference is {reference!r}, but there are {', '.join(answers)}.")
    couples = [
        couple
        for couple in itertools.permutations(answers, 2)
        if reference is None or reference in couple
    ]
    return [
        Pairing(question, (a, b), (answers[a][question.id], answers[b][question.id]))
        for a, b in couples
        for question in asked
    ]


def judge(
    pairs: Sequence[Pairing],
    endpoint: Endpoint,
    folder: Path,
    *,
    form: Form = "choice",
    budget: Budget = Budget(),
    attempts: int = 5,
    concurrency: int = 4,
    retry_missing: bool = False,
    sleep: Callable[[float], object] | None = None,
    on_progress: Callable[[int, int], object] | None = None,
) -> JudgeReport:
    """Ask about every pair that the folder's rating files do not hold yet.

    Args:
        pairs: from `pairings`.
        endpoint: the judge.
        folder: of the rating files, one per ordered couple of systems; made where absent.
        form: "choice" for Elo, "scores" for percent of a reference.
        budget: what may be spent.
        attempts: per pair, the first one included.
        concurrency: questions under way at once.
        retry_missing: ask again about pairs that are recorded as missing.
        sleep: how to wait between attempts; None waits, and wakes up where the run is stopped.
        on_progress: sees (pairs done, pairs to do) after each.

    Raises:
        ValueError: the endpoint can answer nothing: a wrong key, model or address. What was judged
            before stays in the files.
    """
    if attempts < 1 or concurrency < 1:
        raise ValueError(f"attempts={attempts} and concurrency={concurrency} must be 1 or more.")
    folder.mkdir(parents=True, exist_ok=True)
    files = {pair.systems: _file(folder, pair.systems, endpoint, form) for pair in pairs}
    held = {systems: _recover(file, drop_missing=retry_missing) for systems, file in files.items()}
    todo = [pair for pair in pairs if _identity(pair) not in held[pair.systems]]
    run = _Run(endpoint, form, budget, attempts, sleep)
    judged = missing = 0
    with ThreadPoolExecutor(concurrency) as pool:
        futures = {pool.submit(run.judge, pair, files[pair.systems]): pair for pair in todo}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                readable = future.result()
                judged += readable is True
                missing += readable is False
                if on_progress is not None:
                    on_progress(done, len(todo))
        except BaseException:
            run.stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    return JudgeReport(
        judged,
        len(pairs) - len(todo),
        missing,
        len(todo) - judged - missing,
        run.spent,
        tuple(files.values()),
    )


@dataclass
class _Run:
    """What the workers share."""

    endpoint: Endpoint
    form: Form
    budget: Budget
    attempts: int
    sleep: Callable[[float], object] | None
    spent: Spent = field(default_factory=Spent)
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopped: threading.Event = field(default_factory=threading.Event)

    def judge(self, pair: Pairing, file: Path) -> bool | None:
        """True: a verdict was recorded; False: it is missing; None: not asked, nothing recorded."""
        question, (first, second) = pair.question, pair.answers
        messages = judge_messages(
            self.form, question.text, first.text, second.text, question.category
        )
        text, reason, tried = "", "", 0
        for tried in range(1, self.attempts + 1):
            if not self._may_ask():
                return None
            wait = 0.0
            try:
                reply = self._ask(messages)
            except EndpointError as error:
                if error.fatal:
                    self.stopped.set()
                    raise ValueError(f"the judge cannot be asked: {error}.") from None
                reason, wait = str(error), error.retry_after
            else:
                text, reason = reply.text, "the text holds no verdict"
                score = _score(self.form, text)
                if score is not None:
                    self._record(file, pair, text, score, {"attempts": tried})
                    return True
            if tried < self.attempts:
                backoff = min(60.0, 2.0 ** (tried - 1)) * random.uniform(0.5, 1.0)
                (self.sleep or self.stopped.wait)(max(wait, backoff))
        none = UNREADABLE if self.form == "choice" else [UNREADABLE, UNREADABLE]
        self._record(file, pair, text, none, {"attempts": tried, "missing": reason})
        return False

    def _may_ask(self) -> bool:
        """Takes one call from the budget, if there is one left."""
        with self.lock:
            spent, budget = self.spent, self.budget
            tokens = spent.prompt_tokens + spent.completion_tokens
            over = (
                (budget.calls is not None and spent.calls >= budget.calls)
                or (budget.tokens is not None and tokens >= budget.tokens)
                or (budget.cost is not None and spent.cost(budget) >= budget.cost)
            )
            if over or self.stopped.is_set():
                return False
            spent.calls += 1
            return True

    def _ask(self, messages: Chat) -> Reply:
        reply = ask(self.endpoint, messages)
        with self.lock:
            self.spent.prompt_tokens += reply.prompt_tokens
            self.spent.completion_tokens += reply.completion_tokens
        return reply

    def _record(
        self, file: Path, pair: Pairing, text: str, score: Any, metadata: dict[str, Any]
    ) -> None:
        """Appends one row, whole and on the disk before anything else is."""
        first, second = pair.answers
        system1, system2 = pair.systems
        row = {
            "review_id": answer_id("\n".join([file.name, *_identity(pair)])),
            pair.question.key: pair.question.row[pair.question.key],
            "answer1_id": first.id,
            "answer2_id": second.id,
            "reviewer_id": self.endpoint.model,
            "metadata": {"system1": system1, "system2": system2, **metadata},
            "text": text,
            "score": score,
        }
        with self.lock, file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
            stream.flush()
            os.fsync(stream.fileno())


def _score(form: Form, text: str) -> Any:
    """What a rating file holds as the score of a text; None where it has none."""
    if form == "choice":
        return parse_choice(text)
    scores = parse_scores(text)
    return None if scores is None else list(scores)


def _identity(pair: Pairing) -> tuple[str, str, str]:
    return (pair.question.id, pair.answers[0].id, pair.answers[1].id)


def _file(folder: Path, systems: tuple[str, str], endpoint: Endpoint, form: Form) -> Path:
    first, second, judge_name = map(_in_file_name, (*systems, endpoint.model))
    ending = "-threeclass" if form == "choice" else ""
    return folder / f"{first}-vs-{second}-{judge_name}-reviewer{ending}.jsonl"


def _in_file_name(name: str) -> str:
    return name.replace("/", "_")


def _recover(file: Path, *, drop_missing: bool) -> set[tuple[str, str, str]]:
    """The pairs that a file holds; a last line cut short by a kill is taken off it first."""
    if not file.exists():
        return set()
    rows = list(_complete_lines(file))
    kept = [(line, row) for line, row in rows if not (drop_missing and _is_missing(row))]
    text = "".join(f"{line}\n" for line, _ in kept)
    if text != file.read_text(encoding="utf-8"):
        write_whole(file, text)
    return {
        (str(row.get("question_id", row.get("message_id"))), row["answer1_id"], row["answer2_id"])
        for _, row in kept
    }


def _complete_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = file.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                return
            raise ValueError(
                f"{file}, line {number} is not JSON ({error}): mend or delete it."
            ) from error
        check_rating(row, file, number)
        yield line, row


def _is_missing(row: dict[str, Any]) -> bool:
    score = row["score"]
    return UNREADABLE in (score if isinstance(score, list) else [score])
