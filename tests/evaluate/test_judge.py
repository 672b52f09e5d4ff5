"""The judge against a stand-in that refuses, times out and garbles before it answers."""

import json
from pathlib import Path

import pytest

from qlora_jax.evaluate import (
    Answer,
    Budget,
    Endpoint,
    JudgedQuestion,
    answer_id,
    judge,
    judge_messages,
    pairings,
    read_ratings,
)
from tests.evaluate.stand_in import StandIn, stand_in

KEY = "secret-of-the-tests"
QUESTIONS = [
    JudgedQuestion(str(i), f"What is {i}?", "generic", "question_id", {"question_id": i})
    for i in range(3)
]
ANSWERS = {
    name: {q.id: Answer(answer_id(f"{name} {q.id}"), f"{name} says {q.id}") for q in QUESTIONS}
    for name in ("cat", "dog")
}
PAIRS = pairings(QUESTIONS, ANSWERS)


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def endpoint(server: StandIn) -> Endpoint:
    # Short where it is waited out, and else so long that a busy machine answers within it.
    return Endpoint(server.url, "stand/in", timeout=1.0 if "hang" in server.script else 60.0)


def prefers_cats(messages):
    text = messages[-1]["content"]
    return "Cats purr.\n" + ("1" if text.index("cat says") < text.index("dog says") else "2")


def rows(folder: Path):
    return [json.loads(line) for file in folder.iterdir() for line in file.read_text().splitlines()]


def never(_):
    raise AssertionError("there is nothing to wait for")


def test_every_pair_is_judged_in_both_orders(tmp_path):
    with stand_in(prefers_cats) as server:
        report = judge(PAIRS, endpoint(server), tmp_path, sleep=never)
    assert (report.judged, report.already, report.missing, report.unasked) == (6, 0, 0, 0)
    assert report.spent.calls == 6
    assert (report.spent.prompt_tokens, report.spent.completion_tokens) == (600, 120)
    assert server.keys == [f"Bearer {KEY}"] * 6
    assert (server.requests[0]["temperature"], server.requests[0]["max_tokens"]) == (0.2, 1024)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "cat-vs-dog-stand_in-reviewer-threeclass.jsonl",
        "dog-vs-cat-stand_in-reviewer-threeclass.jsonl",
    ]
    found = read_ratings(tmp_path.iterdir())
    assert not found.unreadable
    assert {(r.first, r.second, r.points) for r in found.ratings} == {
        ("cat", "dog", (1.0, 0.0)),
        ("dog", "cat", (0.0, 1.0)),
    }
    released = {"review_id", "question_id", "answer1_id", "answer2_id", "reviewer_id", "metadata"}
    assert all(row.keys() == released | {"text", "score"} for row in rows(tmp_path))


def test_a_question_is_judged_by_what_matters_in_its_category(tmp_path):
    pair = PAIRS[0]._replace(question=QUESTIONS[0]._replace(category="math"))
    with stand_in(lambda _: "(8, 6)") as server:
        judge([pair], endpoint(server), tmp_path, form="scores")
    texts = (answer.text for answer in pair.answers)
    asked = judge_messages("scores", pair.question.text, *texts, "math")
    assert [request["messages"] for request in server.requests] == [asked]


def test_marks_out_of_ten(tmp_path):
    pairs = pairings(QUESTIONS, ANSWERS, reference="dog")
    with stand_in(lambda _: "8 6.5\nGood.") as server:
        judge(pairs, endpoint(server), tmp_path, form="scores")
    assert {tuple(row["score"]) for row in rows(tmp_path)} == {(8.0, 6.5)}
    assert {r.points for r in read_ratings(tmp_path.iterdir()).ratings} == {(8.0, 6.5)}


@pytest.mark.parametrize(
    "trouble", ["hang", "drop", "garble", "empty", "refuse", 500, 429, "I cannot say."]
)
def test_trouble_is_retried_with_longer_waits(tmp_path, trouble):
    waits = []
    with stand_in(prefers_cats, [trouble] * 3) as server:
        report = judge(PAIRS[:1], endpoint(server), tmp_path, sleep=waits.append)
    assert (report.judged, report.missing, report.spent.calls) == (1, 0, 4)
    assert rows(tmp_path)[0]["score"] == 1
    assert rows(tmp_path)[0]["metadata"]["attempts"] == 4
    if trouble == 429:
        assert waits == [7.0] * 3
    else:
        assert [0.5 <= w / 2**i <= 1 for i, w in enumerate(waits)] == [True] * 3


@pytest.mark.parametrize(
    "usage", ['["many"]', '{"prompt_tokens": "many"}', '{"prompt_tokens": 1e999}']
)
def test_what_is_no_count_of_tokens_is_no_answer(tmp_path, usage):
    body = f'{{"choices": [{{"message": {{"content": "1"}}}}], "usage": {usage}}}'.encode()
    with stand_in(prefers_cats, [body]) as server:
        report = judge(PAIRS[:1], endpoint(server), tmp_path, sleep=lambda _: None)
    assert (report.judged, report.spent.calls, report.spent.prompt_tokens) == (1, 2, 100)


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        ("inf", 0.5, 1),
        ("nan", 0.5, 1),
        ("-3", 0.5, 1),
        ("soon", 0.5, 1),
        ("1e300", 86_400, 86_400),
        ("Fri, 31 Dec 9998 23:59:59 GMT", 86_400, 86_400),
    ],
)
def test_no_wait_is_longer_than_a_day(tmp_path, header, least, most):
    waits = []
    with stand_in(prefers_cats, [429]) as server:
        server.retry_after = header
        assert judge(PAIRS[:1], endpoint(server), tmp_path, sleep=waits.append).judged == 1
    assert least <= waits[0] <= most


@pytest.mark.parametrize(("trouble", "reason"), [("hang", "no answer within 1 s"), (503, "503")])
def test_what_stays_without_a_verdict_is_recorded_as_missing(tmp_path, trouble, reason):
    with stand_in(prefers_cats, [trouble] * 3) as server:
        where = endpoint(server)
        waits = []
        first = judge(PAIRS, where, tmp_path, attempts=3, concurrency=1, sleep=waits.append)
        assert (first.judged, first.missing) == (5, 1)
        assert len(waits) == 2  # and not behind the last attempt
        missing = next(row for row in rows(tmp_path) if row["score"] == -1)
        assert reason in missing["metadata"]["missing"]
        assert (missing["metadata"]["attempts"], first.spent.calls) == (3, 3 + 5)
        found = read_ratings(tmp_path.iterdir())
        assert len(found.ratings) == 5
        assert sum(found.unreadable.values()) == 1

        again = judge(PAIRS, where, tmp_path)
        assert (again.judged, again.already, again.spent.calls) == (0, 6, 0)
        mended = judge(PAIRS, where, tmp_path, retry_missing=True)
        assert (mended.judged, mended.already, mended.spent.calls) == (1, 5, 1)
    assert not read_ratings(tmp_path.iterdir()).unreadable


def test_a_text_without_a_verdict_is_kept(tmp_path):
    with stand_in(lambda _: "Both are wrong.") as server:
        report = judge(PAIRS[:1], endpoint(server), tmp_path, attempts=2, sleep=lambda _: None)
    assert report.missing == 1
    assert rows(tmp_path)[0]["text"] == "Both are wrong."


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    def stop(done, _):
        if done == 2:
            raise KeyboardInterrupt

    with stand_in(prefers_cats) as server:
        with pytest.raises(KeyboardInterrupt):
            judge(PAIRS, endpoint(server), tmp_path, concurrency=1, on_progress=stop)
        kept = len(rows(tmp_path))
        assert 2 <= kept < 6
        # The process died while it was writing a row.
        file = next(tmp_path.iterdir())
        file.write_text(file.read_text() + '{"review_id": "abc", "question')
        report = judge(PAIRS, endpoint(server), tmp_path)
    assert (report.already, report.judged) == (kept, 6 - kept)
    assert len({row["review_id"] for row in rows(tmp_path)}) == 6
    assert len(read_ratings(tmp_path.iterdir()).ratings) == 6


@pytest.mark.parametrize(
    ("budget", "most"),
    [
        (Budget(calls=2), 2),
        # Of two times 100 and 20.
        (Budget(tokens=240), 2),
        (Budget(cost=0.001, prompt_price=3.0, completion_price=15.0), 2),
    ],
)
def test_a_budget_ends_a_run_and_a_larger_one_goes_on(tmp_path, budget, most):
    with stand_in(prefers_cats) as server:
        report = judge(PAIRS, endpoint(server), tmp_path, budget=budget, concurrency=1)
        assert (report.spent.calls, report.judged, report.unasked) == (most, most, 6 - most)
        assert len(rows(tmp_path)) == most
        assert judge(PAIRS, endpoint(server), tmp_path).judged == 6 - most


def test_a_wrong_key_ends_the_run_in_plain_words_without_the_key(tmp_path):
    with stand_in(prefers_cats, [401] * 6) as server:
        with pytest.raises(ValueError, match="key in OPENAI_API_KEY is missing or wrong") as error:
            judge(PAIRS, endpoint(server), tmp_path)
        assert KEY not in str(error.getrepr(style="long"))
        server.script.clear()
        report = judge(PAIRS, endpoint(server), tmp_path, concurrency=1)
    assert report.already + report.judged == 6
    assert KEY not in "".join(file.read_text() for file in tmp_path.iterdir())


def test_a_system_may_be_called_as_on_the_hub(tmp_path):
    pairs = pairings(QUESTIONS, {f"pets/{name}": given for name, given in ANSWERS.items()})
    with stand_in(prefers_cats) as server:
        files = judge(pairs, endpoint(server), tmp_path).files
    assert files[0] == tmp_path / "pets_cat-vs-pets_dog-stand_in-reviewer-threeclass.jsonl"
    assert read_ratings(files).systems == ("pets/cat", "pets/dog")


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_does_not_get_the_key(tmp_path, status):
    with stand_in(prefers_cats, [status]) as server:
        with pytest.raises(ValueError, match=r"sends on to .*/v1/elsewhere: give the address"):
            judge(PAIRS[:1], endpoint(server), tmp_path)
        assert len(server.keys) == 1


def test_a_keys_line_end_is_not_sent(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    with stand_in(prefers_cats) as server:
        judge(PAIRS[:1], endpoint(server), tmp_path)
    assert server.keys == [f"Bearer {KEY}"]


@pytest.mark.parametrize("key", [f"{KEY}\r\nX-Other: 1", f"“{KEY}”"])
def test_a_key_that_no_header_can_hold_is_not_shown(tmp_path, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with stand_in() as server, pytest.raises(ValueError, match="key in OPENAI_API_KEY") as error:
        judge(PAIRS[:1], endpoint(server), tmp_path)
    assert KEY not in str(error.getrepr(style="long"))
    assert not server.requests


def test_without_a_key_none_is_sent(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with stand_in(prefers_cats) as server:
        judge(PAIRS[:1], endpoint(server), tmp_path)
    assert server.keys == [None]


def test_a_damaged_file_is_not_written_over(tmp_path):
    file = tmp_path / "cat-vs-dog-stand_in-reviewer-threeclass.jsonl"
    file.write_text("not json\n{}\n")
    with stand_in() as server, pytest.raises(ValueError, match="line 1 is not JSON"):
        judge(PAIRS, endpoint(server), tmp_path)
    assert file.read_text() == "not json\n{}\n"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[]", "line 1 holds"),
        ('{"score": 1}', "also needs answer1_id, answer2_id"),
        ('{"answer1_id": "a", "answer2_id": ["b"], "score": 1}', "line 1 is no rating"),
        ('{"answer1_id": "a", "answer2_id": "b", "score": 1, "text": 5}', "line 1 is no rating"),
        ('{"answer1_id": "a", "answer2_id": "b", "score": 1, "metadata": "x"}', "is no rating"),
    ],
)
def test_a_line_that_is_no_rating_is_named(tmp_path, line, words):
    file = tmp_path / "cat-vs-dog-stand_in-reviewer-threeclass.jsonl"
    file.write_text(f"{line}\n")
    with stand_in() as server, pytest.raises(ValueError, match=words):
        judge(PAIRS, endpoint(server), tmp_path)
    with pytest.raises(ValueError, match=words):
        read_ratings([file])


@pytest.mark.parametrize("form", ["scores", "choice"])
@pytest.mark.parametrize("category", ["generic", "coding", "math"])
def test_a_prompt_shows_both_answers_in_the_order_given(form, category):
    system, user = judge_messages(form, "Why?", "because", "therefore", category)
    assert (system["role"], user["role"]) == ("system", "user")
    places = [
        user["content"].index(text)
        for text in ("Why?", "because", "therefore", "Mark" if form == "scores" else "one digit")
    ]
    assert places == sorted(places)


def test_categories_are_judged_by_what_matters_there():
    texts = {
        category: judge_messages("choice", "q", "a", "b", category)[1]["content"]
        for category in ("generic", "roleplay", "coding", "math")
    }
    assert texts["generic"] == texts["roleplay"]
    assert "program" in texts["coding"]
    assert "solve it yourself" in texts["math"]


def test_pairings():
    assert len(PAIRS) == 6
    three = {**ANSWERS, "eel": ANSWERS["cat"]}
    assert len(pairings(QUESTIONS, three)) == 18
    relative = pairings(QUESTIONS, three, reference="dog")
    assert {pair.systems for pair in relative} == {
        ("cat", "dog"),
        ("dog", "cat"),
        ("eel", "dog"),
        ("dog", "eel"),
    }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pairings(QUESTIONS, {"cat": {}}), "needs two systems"),
        (lambda: pairings(QUESTIONS, {**ANSWERS, "eel": {}}), "eel has no answer to 3 of 3"),
        (lambda: pairings(QUESTIONS, ANSWERS, reference="eel"), "reference is 'eel'"),
        (lambda: pairings(QUESTIONS, {**ANSWERS, " ": ANSWERS["cat"]}), "a system is called ' '"),
        (
            lambda: pairings(QUESTIONS, dict.fromkeys(("a/b", "a_b"), ANSWERS["cat"])),
            r"two systems are called a_b here \(a/b, a_b\): give one",
        ),
        (lambda: Budget(cost=1.0), "limits nothing without prices"),
        (lambda: Budget(calls=-1), "calls=-1 must be a finite number, 0 or more"),
        (lambda: Budget(cost=float("nan"), prompt_price=1.0), "cost=nan must be a finite"),
        (lambda: Endpoint("localhost:8000", "m"), "expected http://"),
        (lambda: Endpoint("http://x", "m", timeout=float("nan")), "timeout is nan"),
        (lambda: Endpoint("http://x", "m", timeout=0.0), "timeout is 0.0"),
        (lambda: judge(PAIRS, Endpoint("http://x", "m"), Path("."), attempts=0), "1 or more"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
