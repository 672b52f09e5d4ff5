"""Answers, a judge, ratings and tables, end to end on a tiny model; Tables 1 and 6 as commands."""

import csv
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.paper import elo, generations, judge, mmlu, vicuna
from experiments.paper.generations import STYLES
from qlora_jax.cli import main as quantize
from qlora_jax.evaluate import (
    Elo,
    MmluResult,
    Percent,
    Rating,
    Ratings,
    make_matches,
    read_answers,
    read_questions,
)
from qlora_jax.generate import Answer
from tests.evaluate.released import released
from tests.evaluate.stand_in import stand_in

QUESTIONS = [
    {"question_id": 1, "text": "What is a list?", "category": "generic"},
    {"question_id": 2, "text": "Sort two numbers.", "category": "coding"},
    {"question_id": 3, "text": "Who opens a file?", "category": "generic"},
]


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return file


def answer(model, questions, out, *options):
    return generations.main(
        [
            *("--model", str(model), "--questions", str(questions), "--out", str(out)),
            *("--max-new-tokens", "6", "--batch-size", "2", "--compute-dtype", "float32"),
            *options,
        ]
    )


def test_from_questions_to_tables(tiny_model, questions, tmp_path, capsys):
    answers = {name: tmp_path / "answers" / f"{name}.jsonl" for name in ("cold", "warm")}
    assert answer(tiny_model, questions, answers["warm"], "--limit", "2") == 0
    first = answers["warm"].read_text()
    # Killed while a row was written: the same command goes on, and the first answers stand.
    answers["warm"].write_text(first + '{"question_id"')
    assert answer(tiny_model, questions, answers["warm"]) == 0
    assert answers["warm"].read_text().startswith(first)
    assert answer(tiny_model, questions, answers["cold"], "--temperature", "0") == 0
    assert answer(tiny_model, questions, answers["cold"], "--temperature", "0") == 0
    assert "holds all 3 answers" in capsys.readouterr().out
    assert answer(tiny_model, questions, answers["cold"], "--temperature", "1") == 2
    assert "holds answers of" in capsys.readouterr().err

    rows = [json.loads(line) for line in answers["warm"].read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [1, 2, 3]
    assert rows[0]["prompt"].endswith(" ### Human: What is a list? ### Assistant:")
    assert read_answers(answers["cold"]).keys() == {"1", "2", "3"}

    def rated(form, reply, *options):
        with stand_in(lambda _: reply) as server:
            return judge.main(
                [
                    *("--url", server.url, "--judge", "stand-in", "--questions", str(questions)),
                    *("--answers", *map(str, answers.values()), "--form", form),
                    *("--out", str(tmp_path / form), *options),
                ]
            )

    assert rated("choice", "The first.\n1", "--max-calls", "2") == 1
    assert "2 pairs judged, 0 were judged before, 0 without a verdict, 4 not asked" in " ".join(
        capsys.readouterr().out.split()
    )
    assert rated("choice", "The first.\n1") == 0
    again = ("--answers", str(answers["cold"]), str(answers["cold"]))
    assert rated("choice", "1", *again) == 2
    assert "two systems are called cold here (cold, cold)" in capsys.readouterr().err
    named = [tmp_path / "30b-cold.jsonl", tmp_path / "cold-33b.jsonl"]
    assert rated("choice", "1", "--answers", *map(str, named)) == 2
    assert "two systems are called cold-33B here (30b-cold, cold-33b)" in capsys.readouterr().err
    assert rated("scores", "9 6\nSo.", "--reference", "cold") == 0

    out = tmp_path / "tables"
    assert (
        elo.main(["--ratings", str(tmp_path / "choice"), "--orders", "50", "--out", str(out)]) == 0
    )
    told = json.loads((out / "result.json").read_text())["own"]
    assert told["judgements"] == 6
    # Whoever is read first wins: nobody is better, and the two orders never agree.
    assert told["elo"]["question"]["cold"]["mean"] == pytest.approx(1000)
    assert told["order_agreement"] == {"fleiss_kappa": pytest.approx(-1), "pairs": 3}
    assert (out / "elo-own.png").stat().st_size > 1000
    assert "cold" in (out / "wins-own.csv").read_text()

    ratings = ["--ratings", str(tmp_path / "scores"), "--reference", "cold", "--out", str(out)]
    assert vicuna.main(ratings) == 0
    warm = json.loads((out / "result.json").read_text())["percent"]["warm"]
    assert warm["reference_first"] == pytest.approx(100 * 6 / 9)
    assert warm["system_first"] == pytest.approx(100 * 9 / 6)
    assert warm["mean"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("style", "stop", "reading"),
    [
        ("guanaco", ("### Human",), {"special": False, "bos": None}),
        # A template writes bos itself, and its turns end with a token.
        ("chat", (), {"special": True, "bos": False}),
    ],
)
def test_answers_are_the_adapters_and_as_asked(
    style, stop, reading, tiny_model, questions, tmp_path, monkeypatch
):
    done = []

    def load(folder, **options):
        done.append(options["lora"])
        return "model", "tokenizer"

    def write(model, tokenizer, prompts, config, *, key, batch_size, **given):
        drawn = (config.temperature, config.top_p, jax.random.key_data(key).tolist())
        done.append((model, len(prompts), *drawn, config.stop, given))
        return [Answer(" text ", 1, "stop")] * len(prompts)

    for name, fake in (
        ("prompt_writer", lambda style, folder: lambda question: question.text),
        ("check_adapter", lambda folder: "lora"),
        ("adapter_digest", lambda folder: "d" * 64),
        ("load_pretrained", load),
        ("load_adapter", lambda *given: done.append(given)),
        ("generate_text", write),
        ("keep_compiled_programs", lambda folder: None),
    ):
        monkeypatch.setattr(generations, name, fake)
    adapter, out = tmp_path / "adapter", tmp_path / "answers.jsonl"
    flags = ["--adapter", str(adapter), "--seed", "5", "--top-p", "0.8", "--limit", "1"]
    assert answer(tiny_model, questions, out, "--format", style, *flags) == 0
    written = ("model", 1, 0.7, 0.8, [0, 5], stop, reading)
    assert done == ["lora", (adapter, "model"), written]
    (row,) = map(json.loads, out.read_text().splitlines())
    assert f"{tiny_model}, adapter {'d' * 12}, nf4, float32, {style}, " in row["model_id"]
    assert row["model_id"].endswith(", T=0.7, p=0.8, 6 tokens, seed 5")
    assert row["generation_truncated"] == "text"
    # What goes on asks what has no answer yet, in whatever order the questions are now.
    questions.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS[::-1]))
    assert answer(tiny_model, questions, out, "--format", style, *flags[:-2]) == 0
    rows = map(json.loads, out.read_text().splitlines())
    assert [row["question_id"] for row in rows] == [1, 3, 2]


def test_a_kill_while_a_half_line_is_taken_off_costs_no_answer(tmp_path, monkeypatch):
    file = tmp_path / "answers.jsonl"
    file.write_text('{"question_id": 1, "model_id": "m"}\n{"question_id"')

    def killed(path, text, **options):
        path.write_bytes(text.encode()[:9])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            generations.answered(file, "m")
    assert generations.answered(file, "m") == {"1"}
    assert file.read_text() == '{"question_id": 1, "model_id": "m"}\n'


def test_a_question_is_put_in_the_style_asked_for(questions, tmp_path):
    question = read_questions(questions)[0]
    (tmp_path / "chat_template.jinja").write_text("<{{ messages[0].content }}>")
    asked = {style: generations.prompt_writer(style, tmp_path)(question) for style in STYLES}
    assert asked["text"] == "What is a list?"
    assert asked["chat"] == "<What is a list?>"
    assert "### Instruction:\nWhat is a list?\n\n### Response:" in asked["alpaca"]
    assert asked["guanaco"].endswith("questions. ### Human: What is a list? ### Assistant:")
    # The OA questions bring the whole conversation.
    conversation = question._replace(row={"prompt": "### Human: Hi ### Assistant:"})
    assert generations.prompt_writer("guanaco", tmp_path)(conversation).startswith("### Human: Hi")


def test_the_tables_hold_what_elo_found(tmp_path, monkeypatch):
    def row(question, first, second, score):
        return {
            "question_id": question,
            "answer1_id": first,
            "answer2_id": second,
            "metadata": {"system1": first, "system2": second},
            "score": score,
        }

    rows = [row(1, "a", "b", 1), row(1, "b", "a", 3), row(1, "a", "c", 1), row(2, "c", "b", -1)]
    (tmp_path / "ratings").mkdir()
    file = tmp_path / "ratings" / "own-reviewer.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = []

    def played(matches, **options):
        asked.append((len(matches.result), options))
        ratings = np.float32([[1000, 1000, 990], [1010, 1040, 960]])
        return Elo(matches.systems, ratings)

    monkeypatch.setattr(elo, "elo", played)
    monkeypatch.setattr(elo, "can_draw", lambda: False)
    out = tmp_path / "out"
    flags = ["--orders", "2", "--length", "2", "--k", "16", "--seed", "5"]
    assert elo.main(["--ratings", str(file.parent), "--out", str(out), *flags]) == 0
    options = {"orders": 2, "length": 2, "k": 16.0, "seed": 5}
    # Of three readable judgements, two are of one question.
    assert asked == [(3, options), (2, options)]
    told = json.loads((out / "result.json").read_text())["own"]
    assert (told["judgements"], told["unreadable"]) == (3, {file.name: 1})
    assert told["order_agreement"]["pairs"] == 1
    best = told["elo"]["judgement"]["b"]
    assert (best["mean"], best["standard_error"]) == pytest.approx((1020, 20))
    assert best["interval_95"] == pytest.approx([1001, 1039])
    # The best first, by the mean over orders.
    with (out / "elo-own.csv").open(newline="") as table:
        lines = list(csv.DictReader(table))
    assert [line["system"] for line in lines] == ["b", "a", "c"]
    assert float(lines[0]["per judgement"]) == float(lines[0]["per question"]) == 1020
    rated = [Rating("1", first, second, (1, 0)) for first, second in ("ab", "bc")]
    assert not elo.judged_twice(Ratings(tuple(rated), {}))
    table = elo.elo_table("own", "", {"b": 1030}, {"judgement": played(make_matches(rated))})
    assert table.rows[0][:2] == ("b", 1030)
    assert table.rows[0][2:] == (1020.0, pytest.approx(1.96 * 20), "1001 to 1039", "-10.0")
    assert table.rows[1][1::4] == (None, None)
    # Percent of the points that a row took from a column; a draw is half.
    assert (out / "wins-own.csv").read_text().splitlines() == [
        "system,b,a,c", "b,nan,25.0,nan", "a,75.0,nan,100.0", "c,nan,0.0,nan"
    ]  # fmt: skip
    assert "| b | – | 25 | – |" in (out / "tables.md").read_text()


def test_tables_1_and_6_on_the_released_ratings(tmp_path, capsys):
    data = str(released())
    assert elo.main(["--data", data, "--orders", "100", "--out", str(tmp_path / "elo")]) == 0
    assert vicuna.main(["--data", data, "--out", str(tmp_path / "vicuna")]) == 0
    shown = capsys.readouterr().out
    assert "Table 7 is left out" in shown or "OA questions" in shown
    assert "5700 judgements, 60 more without readable scores (in 20 files)" in shown
    told = json.loads((tmp_path / "vicuna" / "result.json").read_text())
    assert len(told["percent"]) == 36
    for name in ("tables.md", "percent-of-chatgpt.csv", "percent-of-chatgpt.png"):
        assert (tmp_path / "vicuna" / name).stat().st_size > 1000


def test_percents_stand_beside_the_papers_of_the_same_order():
    found = {"7b-guanaco": Percent(84.5, 90.5, 87.5, 2.5, 160), "mine": Percent(1, 2, 3, 4, 5)}
    guanaco, mine = vicuna.percent_table(found, "ChatGPT").rows
    assert guanaco == ("Guanaco-7B", 84.1, 84.5, 89.8, 90.5, 87.0, 87.5, 2.5, 160)
    assert mine == ("mine", None, 1, None, 2, None, 3, 4, 5)


def test_percents_of_another_system_do_not_stand_beside_the_papers(tmp_path, capsys):
    data, out = str(released("")), tmp_path / "out"
    assert vicuna.main(["--data", data, "--reference", "7b-guanaco", "--out", str(out)]) == 0
    told = json.loads((out / "result.json").read_text())
    assert told["reference"] == "Guanaco-7B"
    # All were judged beside ChatGPT alone.
    assert told["percent"].keys() == {"ChatGPT"}
    text = (out / "tables.md").read_text()
    assert "Percent of Guanaco-7B's score, Vicuna questions" in text
    assert "Guanaco-7B first" in text
    assert "Table 6" not in text
    assert (out / "percent-of-guanaco-7b.png").is_file()


@pytest.mark.parametrize("command", [elo, vicuna])
def test_two_systems_that_a_table_would_call_alike_are_refused(command, tmp_path, capsys):
    def row(first, second):
        ids = {"answer1_id": first, "answer2_id": second, "question_id": 1}
        return ids | {
            "metadata": {"system1": first, "system2": second},
            "text": "",
            "score": [8, 7],
        }

    rows = [row("30b-guanaco", "gpt35"), row("gpt35", "guanaco-33b")]
    file = tmp_path / "own-reviewer.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert command.main(["--ratings", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "two systems are called Guanaco-33B here (30b-guanaco, guanaco-33b): give one" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (elo, ["--data", "nowhere"], "clone of https://github.com/artidoro/qlora"),
        (vicuna, ["--ratings", "nowhere"], "holds no rating file"),
        (generations, ["--questions", "nowhere.jsonl"], "nowhere.jsonl does not exist: give --que"),
        (
            judge,
            ["--url", "here", "--judge", "j", "--answers", "a.jsonl"],
            "expected http:// or https://",
        ),
    ],
)
def test_bad_input_is_one_sentence(command, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_answers_that_cannot_be_written_leave_no_file(tiny_model, questions, tmp_path, capsys):
    out = tmp_path / "answers" / "a.jsonl"
    with questions.open("a") as file:
        file.write(json.dumps({"question_id": 4, "text": "a " * 600}) + "\n")
    for options, words in (
        (("--temperature", "nan"), "temperature=nan"),
        (("--quant", "nf5"), "quant_type is 'nf5'"),
        (("--adapter", str(tmp_path)), "adapter_config.json does not exist"),
        # The first batch could be answered, the second could not.
        ((), "prompt 3 has"),
    ):
        assert answer(tiny_model, questions, out, *options) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        answer(tiny_model, questions, out, "--batch-size", "-1")
    assert "-1 is too few" in capsys.readouterr().err
    assert not out.parent.exists()


def test_a_file_that_holds_something_else_stays_as_it_is(tiny_model, questions, tmp_path, capsys):
    out = tmp_path / "notes.jsonl"
    for text, words in (
        ('{"model_id": "another"}\n{"a": 1}', "holds answers of another"),
        ("[]\n", "line 1 holds a JSON list"),
        ("years of work\nand more", "line 1 is not JSON"),
    ):
        out.write_text(text)
        assert answer(tiny_model, questions, out) == 2
        assert words in capsys.readouterr().err
        assert out.read_text() == text


def test_a_folder_in_4_bits_is_asked_as_it_is(tiny_model, questions, tmp_path, capsys):
    packed, out = tmp_path / "packed", tmp_path / "answers.jsonl"
    options = ("--quant-type", "fp4", "--blocksize", "32", "--no-double-quant")
    assert quantize(["quantize", str(tiny_model), str(packed), *options]) == 0
    assert answer(packed, questions, out) == 0
    assert ", fp4, float32" in json.loads(out.read_text().splitlines()[0])["model_id"]
    assert answer(packed, questions, tmp_path / "other.jsonl", "--quant", "nf4") == 2
    assert "is quantized already" in capsys.readouterr().err
    assert not (tmp_path / "other.jsonl").exists()


@pytest.mark.parametrize("command", [judge, generations, mmlu])
def test_no_questions_at_all_are_no_limit(command, capsys):
    with pytest.raises(SystemExit):
        command.main(["--limit", "0"])
    assert "argument --limit: 0 is too few: give 1 or more" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_told_before_questions_are_fetched(monkeypatch, capsys):
    monkeypatch.setattr(mmlu, "check_questions", lambda _: pytest.fail("fetched"))
    assert mmlu.main(["stdlib-2m"]) == 2
    assert "the nearest of these is stdlib-" in capsys.readouterr().err


@pytest.mark.parametrize(("context", "length"), [(512, 512), (8192, 2048)])
def test_mmlu_tells_how_long_a_prompt_may_be(context, length, tmp_path, monkeypatch, capsys):
    """Which is no more than the paper's, however much a model reads."""
    result = MmluResult({"virology": 1}, {"virology": 4}, shortened=3, cut=1)
    for name, found in (("decoder_context", context), ("check_questions", None), ("ask", result)):
        monkeypatch.setattr(mmlu, name, lambda *_, found=found, **__: found)
    monkeypatch.setattr(mmlu, "load_pretrained", lambda *_, lora, **__: (lora, None))
    monkeypatch.setattr(mmlu, "keep_compiled_programs", lambda folder: None)
    loaded = []
    monkeypatch.setattr(mmlu, "check_adapter", lambda folder: "lora")
    monkeypatch.setattr(mmlu, "load_adapter", lambda *given: loaded.append(given))
    monkeypatch.setattr(mmlu, "adapter_digest", lambda folder: "d" * 64)
    flags = ["--adapter", "trained", "--out", str(tmp_path)]
    assert mmlu.main(["stdlib-1m", *flags]) == 0
    assert loaded == [(Path("trained"), "lora")]
    assert json.loads((tmp_path / "mmlu.json").read_text())["adapter"] == "d" * 64
    printed = " ".join(capsys.readouterr().out.split())
    assert f"3 questions were shown with fewer shots to fit {length} tokens, 1 of" in printed
