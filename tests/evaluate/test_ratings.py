"""Rating files: who was read first, and verdicts read as the paper's authors read them."""

import json

import pytest

from qlora_jax.evaluate import parse_choice, parse_scores, read_answers, read_ratings
from tests.evaluate.released import released


def write(folder, name, rows):
    file = folder / name
    file.write_text(
        "".join(
            json.dumps({"question_id": q, "answer1_id": a, "answer2_id": b, "score": score}) + "\n"
            for q, a, b, score in rows
        )
    )
    return file


def test_the_order_is_that_of_the_ids_not_of_the_name(tmp_path):
    x = [(1, "G1", "X1", [9, 4]), (2, "G2", "X2", [8, 8])]
    y = [(1, "Y1", "G1", [7, 7]), (2, "Y2", "G2", [-1, -1])]
    write(tmp_path, "x-vs-gpt-3.5-gpt4-reviewer.jsonl", x)
    write(tmp_path, "gpt-3.5-vs-x-gpt4-reviewer.jsonl", [(1, "X1", "G1", [0, 9])])
    write(tmp_path, "y-vs-gpt-3.5-gpt4-reviewer.jsonl", y)
    found = read_ratings(tmp_path.iterdir())
    # G1 and G2 are gpt-3.5's, which x's files and y's have in common; the rest follows.
    assert {(r.question, r.first, r.second, r.points) for r in found.ratings} == {
        ("1", "gpt-3.5", "x", (9.0, 4.0)),
        ("2", "gpt-3.5", "x", (8.0, 8.0)),
        ("1", "x", "gpt-3.5", (0.0, 9.0)),
        ("1", "y", "gpt-3.5", (7.0, 7.0)),
    }
    assert found.unreadable == {"y-vs-gpt-3.5-gpt4-reviewer.jsonl": 1}
    assert found.systems == ("gpt-3.5", "x", "y")


def test_two_systems_that_say_the_same_decide_nothing(tmp_path):
    # "No." is the answer of both x and y, so both files' ids share it as they share gpt's.
    write(tmp_path, "x-vs-gpt-gpt4-reviewer.jsonl", [(1, "G1", "no", 1), (2, "G2", "X2", 1)])
    write(tmp_path, "y-vs-gpt-gpt4-reviewer.jsonl", [(1, "G1", "no", 1), (2, "G2", "Y2", 1)])
    assert {(r.first, r.second) for r in read_ratings(tmp_path.iterdir()).ratings} == {
        ("gpt", "x"),
        ("gpt", "y"),
    }


def test_metadata_names_the_systems_where_it_does(tmp_path):
    row = {
        "question_id": 1, "answer1_id": "a", "answer2_id": "b", "score": 2, "text": "2",
        "metadata": {"system1": "cat", "system2": "dog"},
    }  # fmt: skip
    row["text"] = "One line\u2028to Unicode, another\x85to Python.\n2"
    (tmp_path / "anything.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "not-begun.jsonl").touch()
    rating = read_ratings(tmp_path.iterdir()).ratings[0]
    assert (rating.first, rating.second, rating.points) == ("cat", "dog", (0.0, 1.0))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a-vs-b-gpt4-reviewer.jsonl", "{", "line 1 is not JSON"),
        ("a-vs-b-gpt4-reviewer.jsonl", "\n5\n", "line 2 holds a JSON int, but an object"),
        ("a-vs-b-gpt4-reviewer.jsonl", '{"answer_id": "x", "text": "hi"}', "file of answers"),
        (
            "notes.jsonl",
            '{"answer1_id": "x", "answer2_id": "y", "score": 1}',
            "does not name two systems",
        ),
        (
            "a-vs-b-gpt4-reviewer.jsonl",
            '{"answer1_id": "x", "answer2_id": "y", "score": 1}',
            "in no order that their ids tell",
        ),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_ratings(tmp_path.iterdir())


@pytest.mark.parametrize("score", [None, "1", {"a": 1}, [9, None], ["9", "8"], [9], 4])
def test_what_is_no_score_is_unreadable(tmp_path, score):
    row = {"question_id": 1, "answer1_id": "a", "answer2_id": "b", "score": score, "text": None}
    named = row | {"metadata": {"system1": "s", "system2": "t"}}
    file = tmp_path / "s-vs-t-gpt4-reviewer.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in (named, named | {"score": 1})))
    found = read_ratings([file], reread=True)
    assert found.unreadable == {file.name: 1}
    assert len(found.ratings) == 1
    file.write_text(json.dumps(row | {"metadata": None}))
    with pytest.raises(ValueError, match="in no order that their ids tell"):
        read_ratings([file])


def test_no_file_is_refused():
    with pytest.raises(ValueError, match="no rating to read"):
        read_ratings([])


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("8 9\nBoth are fine.", (8, 9)),
        ("7.5, 10", (7.5, 10)),
        ("9/10 4/10\nWell.", (9, 4)),
        ("(2, 8)", (2, 8)),
        ("I solve it.\nThe midpoint is (10, 4).\n\n(3, 9)", (3, 9)),
        ("The point (10, 4).\nAssistant 1: 10 (right)\nAssistant 2: 1 (wrong)\nSo.", (10, 1)),
        ("Assistant 1: 5 for the start.\nAssistant 1: 7\nAssistant 2: 8", (7, 8)),
        ("I give Assistant 1 a score of 4 and Assistant 2 a score of 10.", (4, 10)),
        ("Nothing to say", None),
        ("11 12", None),
        ("", None),
    ],
)
def test_scores_of_a_text(text, scores):
    assert parse_scores(text) == scores


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("Because.\n\n2", 2),
        ("Because.\n\n**1**", 1),
        ("Because.\n3.\n", 3),
        ("Assistant 1: 5/5\nBest answer: 2", 2),
        ("The best answer is the one provided by Assistant 1.", 1),
        ("I choose option 3, as both assistants are equivalent.", 3),
        ("Both are equally good.", 3),
        ("Assistant 1: 5/5\nAssistant 2: 4/5", None),
        ("My verdict: 2/10", None),
        ("error", None),
        ("", None),
    ],
)
def test_choice_of_a_text(text, choice):
    assert parse_choice(text) == choice


def test_every_released_score_is_read_from_its_text():
    """All 10,240 texts; those whose score the authors put right by hand among them."""
    missing = {"pairwise": 0, "relative-gpt-3.5": 0}
    reread = dict(missing)
    for kind in missing:
        for file in released(f"ratings-gpt4/vicuna/{kind}").glob("*.jsonl"):
            for line in file.read_text().splitlines():
                row = json.loads(line)
                text, score = row["text"], row["score"]
                found = parse_choice(text) if kind == "pairwise" else parse_scores(text)
                if score in (-1, [-1, -1]):
                    missing[kind] += 1
                    reread[kind] += found is not None
                else:
                    assert found == (score if kind == "pairwise" else tuple(score)), text
    assert missing == {"pairwise": 13, "relative-gpt-3.5": 60}
    assert reread == {"pairwise": 3, "relative-gpt-3.5": 59}


def test_rereading_finds_more():
    files = list(released("ratings-gpt4/vicuna/relative-gpt-3.5").glob("*.jsonl"))
    plain, again = read_ratings(files), read_ratings(files, reread=True)
    assert (len(plain.ratings), len(again.ratings)) == (5700, 5759)


def test_ids_are_made_of_the_released_answers():
    """Of 37 files of answers, 36 are the ones that were judged (and one answer was replaced)."""
    rated: dict[str, set[str]] = {}
    for file in released("ratings-gpt4/vicuna").glob("*/*.jsonl"):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            ids = rated.setdefault(str(row["question_id"]), set())
            ids |= {row["answer1_id"], row["answer2_id"]}
    answers = {
        file.stem: read_answers(file) for file in released("generations/vicuna").glob("*.jsonl")
    }
    known = {
        name: sum(answer.id in rated[question] for question, answer in given.items())
        for name, given in answers.items()
    }
    assert len(known) == 37
    second_round = next(name for name in known if name.endswith("secondround"))
    del known[second_round]
    assert sorted(known.values()) == [79] + [80] * 35


def test_a_file_of_anything_else_is_refused(tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text('["a"]\n')
    with pytest.raises(ValueError, match="line 1 holds a JSON list, but an object"):
        read_answers(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"answers.jsonl is no text in UTF-8"):
        read_answers(file)


def test_a_file_without_answers_is_refused(tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text('{"question_id": 1, "text": "Why?"}\n')
    with pytest.raises(ValueError, match="needs answer_id and text, or generation"):
        read_answers(file)
    file.write_text('{"id": 1, "text": "Why?"}\n')
    with pytest.raises(ValueError, match="needs question_id"):
        read_answers(file)
    file.write_text("")
    with pytest.raises(ValueError, match="is empty"):
        read_answers(file)
