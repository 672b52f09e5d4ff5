"""ROUGE-L of a run: what is asked, what is refused before training, and what the score is of."""

import csv
import json
import re
import shutil
import statistics
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
import yaml
from rich.console import Console
from rouge_score.rouge_scorer import RougeScorer

from experiments import answering, finetune, rouge, run, sweep
from experiments.config import build_run
from experiments.embedded import MODELS
from experiments.paper.superni import tiny_t5
from experiments.rouge import exercise_of
from qlora_jax.checkpoints import load_adapter, read_adapter_config
from qlora_jax.data import load_tokenizer
from qlora_jax.generate import Generation, GenerationConfig, generate, generate_text
from qlora_jax.pretrained import load_pretrained
from qlora_jax.quant import QuantConfig
from tests.experiments.test_bad_input import sentence, write_rows
from tests.experiments.test_sweep import check_page, fast

TALK = [
    ("user", "What is three and four?"),
    ("assistant", "It is seven."),
    ("user", "And five more?"),
    ("assistant", "That is twelve."),
    ("user", "Thank you."),
]
OPENINGS = {"user": "### Human: ", "assistant": "### Assistant: "}


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def score_of(folder: Path) -> float:
    return json.loads((folder / "result.json").read_text())["rouge_l"]


def check_scores(score: float, lines: list[dict]) -> None:
    """Of five answers, by the library alone."""
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    each = [scorer.score(line["reference"], line["answer"])["rougeL"].fmeasure for line in lines]
    assert [line["score"] for line in lines] == each
    assert len(each) == 5
    assert score == pytest.approx(statistics.fmean(each))


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["false", "true"])
def test_the_score_is_of_what_the_saved_adapter_answers(packing, tmp_path, capsys):
    rouge = "rouge={limit: 5, max_new_tokens: 16, batch_size: 2}"
    data = ["data.source_max_len=320", "data.buckets=[512]", "data.validation_rows=8"]
    settings = fast(rouge, f"data.packing={packing}", *data)
    command = ["--model", "stdlib-1m", "--data", "describe", "--out", str(tmp_path), *settings]
    assert finetune.main(command) == 0
    score, lines = score_of(tmp_path), lines_of(tmp_path)
    check_scores(score, lines)
    assert score > 0
    assert f"ROUGE-L {100 * score:.1f}" in capsys.readouterr().out

    lora = read_adapter_config(tmp_path / "adapter")
    model, tokenizer = load_pretrained(
        MODELS["stdlib-1m"], quant=QuantConfig(), lora=lora, compute_dtype=jnp.float32
    )
    load_adapter(tmp_path / "adapter", model)
    prompts = [line["prompt"] for line in lines]
    assert all(prompt.endswith("### Response:") for prompt in prompts)
    how = GenerationConfig(max_new_tokens=16)
    again = generate_text(model, tokenizer, prompts, how, special=True, bos=False)
    assert [answer.text.strip() for answer in again] == [line["answer"] for line in lines]


@pytest.mark.slow
def test_a_run_killed_while_it_answers_goes_on(tiny_model, tmp_path, monkeypatch, capsys):
    flags = ["--model", str(tiny_model), "--data", "describe", "--out", str(tmp_path)]
    asking = "rouge={limit: 5, max_new_tokens: 4, batch_size: 2}"
    command = [*flags, *fast(asking, "data.validation_rows=5")]
    result, answers, config = (tmp_path / f for f in ("result.json", rouge.ANSWERS, "config.yaml"))
    partial = tmp_path / answering.PARTIAL
    assert finetune.main(command) == 0
    assert "answered 5 of 5" in capsys.readouterr().out
    score, written = score_of(tmp_path), answers.read_text()
    check_scores(score, lines_of(tmp_path))
    assert not partial.exists()

    asked: list[int] = []

    def stop_in_the_second(model, prompts, *arguments, **options):
        asked.append(len(prompts))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return generate(model, prompts, *arguments, **options)

    result.unlink()
    answers.unlink()
    monkeypatch.setattr(answering, "generate", stop_in_the_second)
    assert finetune.main(command) == 130
    assert not answers.exists()
    assert not result.exists()
    # As a kill while a line is written would leave it.
    partial.write_text(partial.read_text() + '{"prompt": "1", "tok')
    assert finetune.main(command) == 0
    assert asked == [2, 2, 2, 1]
    assert "resumed after step 3 of 3" in capsys.readouterr().out
    assert (score_of(tmp_path), answers.read_text()) == (score, written)
    assert not partial.exists()

    # As a version without the option would have left it.
    settings = yaml.safe_load(config.read_text())
    del settings["rouge"]
    config.write_text(yaml.safe_dump(settings))
    assert finetune.main(command) == 2
    assert "rouge.limit: 5, was absent" in capsys.readouterr().err
    assert finetune.main([*command, "--set", "rouge=null"]) == 0
    assert "finished; --overwrite repeats it" in capsys.readouterr().out


def test_kept_answers_are_those_of_the_same_question_way_and_model(tmp_path, monkeypatch):
    def answered(model, prompts, how, *, batch_size):
        return [Generation((len(prompt),), "stop") for prompt in prompts]

    monkeypatch.setattr(answering, "generate", answered)

    def answers(prompts=((1, 2), (3,), (4, 5, 6)), new=4, adapter="a"):
        how = GenerationConfig(max_new_tokens=new)
        rest = {"folder": tmp_path, "identity": {"adapter": adapter}}
        console = Console(quiet=True)
        return answering.greedy_answers(None, prompts, how, batch_size=2, console=console, **rest)

    assert answers() == [[2], [1], [3]]
    for other in ({"prompts": ((1, 2),)}, {"new": 5}, {"adapter": "b"}):
        with pytest.raises(ValueError, match="holds the answers of another examination"):
            answers(**other)
    assert answers() == [[2], [1], [3]]


def asked(tmp_path, tiny_model, rows, **data):
    """(prompt, reference) of each of some held-out rows."""
    file = write_rows(tmp_path / "rows.jsonl", [*rows, *rows])
    held_out = {"source": str(file), "validation_rows": len(rows), "target_max_len": None, **data}
    tree = {"data": held_out, "rouge": {}}
    exercise = exercise_of(build_run(tree, "a test"), tiny_model, 512)
    decode = load_tokenizer(tiny_model).decode
    return list(zip(map(decode, exercise.prompts), exercise.references, strict=True))


@pytest.mark.parametrize("train_on", ["response", "last", "all"])
def test_of_a_conversation_the_last_answer_is_asked_for(train_on, tmp_path, tiny_model):
    row = {"messages": [{"role": role, "content": text} for role, text in TALK]}
    flat = " ".join(OPENINGS[role] + text for role, text in TALK)
    before = flat[: flat.index(" That is twelve.")]
    found = asked(tmp_path, tiny_model, [row], train_on=train_on, format="messages")
    assert found == [(before, "That is twelve.")]
    rows = [{"text": flat}]
    assert asked(tmp_path, tiny_model, rows, train_on=train_on, format="guanaco") == found


def test_of_a_conversation_that_is_cut_the_last_answer_left_is(tmp_path, tiny_model):
    row = {"messages": [{"role": role, "content": text} for role, text in TALK]}
    flat = " ".join(OPENINGS[role] + text for role, text in TALK[:3])
    tokens = len(load_tokenizer(tiny_model).encode(flat))
    cut = {"format": "messages", "target_max_len": tokens}
    ((prompt, reference),) = asked(tmp_path, tiny_model, [row], **cut)
    assert (prompt[-14:], reference) == ("### Assistant:", "It is seven.")


def test_an_answer_ends_where_the_template_ends_turns(tmp_path, tiny_model):
    """Whose token is not eos: what is written behind it is no part of the answer."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer = load_tokenizer(model).with_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(model)
    row = {"messages": [{"role": role, "content": text} for role, text in TALK]}
    file = write_rows(tmp_path / "rows.jsonl", [row, row])
    data = {"source": str(file), "format": "messages-chatml", "validation_rows": 1}
    exercise = exercise_of(build_run({"data": data, "rouge": {}}, "a test"), model, 512)
    assert exercise.references == ["That is twelve."]
    assert tokenizer.token_id("<|im_end|>") in exercise.generation.eos_token_ids
    (prompt,) = exercise.prompts
    asked = "<|im_start|>user\nAnd five more?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(prompt, skip_special=False).endswith(asked)


def test_fewer_rows_are_of_all_lengths(tmp_path, tiny_model):
    rows = [{"input": f"{n} is", "output": "so " * n} for n in range(1, 9)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    data = {"source": str(file), "validation_source": str(file), "validation_split": "train"}
    tree = {"data": {**data, "validation_rows": 8}, "rouge": {"limit": 4}}
    exercise = exercise_of(build_run(tree, "a test"), tiny_model, 512)
    assert [len(text.split()) for text in exercise.references] == [1, 3, 5, 7]
    # As long as the longest of the answers, with its eos, and ended by that.
    tokenizer = load_tokenizer(tiny_model)
    longest = len(tokenizer.encode("so " * 7, continues=True, eos=True, bos=False))
    assert exercise.generation.max_new_tokens == longest
    assert exercise.generation.eos_token_ids == (tokenizer.eos_token_id,)


def test_what_cannot_be_scored_is_refused_before_training(
    tiny_model, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(run, "load_pretrained", lambda *_, **__: pytest.fail("was loaded"))
    text = write_rows(tmp_path / "text.jsonl", [{"text": "a b c"}] * 9)
    foreign = write_rows(tmp_path / "foreign.jsonl", [{"input": "a", "output": "你好"}] * 9)
    plain = write_rows(tmp_path / "plain.jsonl", [{"input": "a", "output": "b"}] * 9)
    cases = [
        ([text, "data.format=text", "rouge={}"], "are answers alone, without a prompt"),
        (
            [text, "data.format=guanaco", "data.train_on=all", "rouge={}"],
            "rouge is set, which asks for the rows' answers: ",
        ),
        ([foreign, "rouge={}"], "has a word of Latin letters or digits"),
        ([plain, "rouge.max_new_tokens=512"], "max_new_tokens=512 leaves no room for a prompt"),
        ([plain, "rouge.limit=0"], "rouge in the command line: limit=0 must be 1 or more"),
        ([plain, "rouge.beams=4"], "there is no option rouge.beams"),
    ]
    out = str(tmp_path / "out")
    for (data, *settings), words in cases:
        flags = [flag for setting in settings for flag in ("--set", setting)]
        flags += ["--set", "data.validation_rows=4", "--out", out]
        assert finetune.main(["--model", str(tiny_model), "--data", str(data), *flags]) == 2
        assert words in sentence(capsys)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    flags = ["--set", "data.validation_rows=4", "--set", "rouge={}", "--out", out]
    for command, model in ((finetune.main, "--model"), (sweep.main, "--models")):
        data = model.replace("model", "dataset") if command is sweep.main else "--data"
        assert command([model, str(tiny_model), data, str(plain), *flags]) == 2
        assert "pip install 'qlora-jax[scores]'" in sentence(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_t5_answers_its_sources(tmp_path):
    folder = tiny_t5(tmp_path / "t5")
    tree = {"model": str(folder), "data": "implement", "rouge": {"limit": 2, "max_new_tokens": 4}}
    exercise = exercise_of(build_run(tree, "a test"), folder, None)
    model, tokenizer = load_pretrained(folder)
    found = rouge.score(model, tokenizer, exercise, tmp_path, {}, Console(quiet=True))
    lines = lines_of(tmp_path)
    assert all(line["prompt"].startswith("def ") for line in lines)
    assert all(line["reference"] and line["answer"] for line in lines)
    assert found == {"rouge_l": statistics.fmean(line["score"] for line in lines)}


@pytest.mark.slow
def test_a_sweep_shows_it(tiny_model, tmp_path, capsys):
    file, out = tmp_path / "sweep.yaml", tmp_path / "out"
    file.write_text(
        f"models: {{tiny: {tiny_model}}}\ndatasets: [describe]\n"
        "axes: {method: {asked: {rouge: {limit: 2}}, LoRA: {quant: null, rouge: {}}, not: {}}}\n"
    )
    assert sweep.main([str(file), "--out", str(out), *fast("train.steps=1")]) == 0
    printed = capsys.readouterr().out
    asked, lora = (score_of(out / f"describe--tiny--{name}--seed0") for name in ("asked", "LoRA"))
    with (out / "results.csv").open(newline="") as file:
        rows = [row["rouge_l"] for row in csv.DictReader(file)]
    assert rows == [str(asked), str(lora), ""]
    table, matrix = printed.split("ROUGE-L, %")
    assert re.search(r"perplexity +┃ +ROUGE-L +┃ +tokens/s", table)
    for method, score in (
        ("asked", f"{100 * asked:.1f}"),
        ("LoRA", f"{100 * lora:.1f}"),
        ("not", "–"),
    ):
        assert re.search(rf"{method} .* │ +{re.escape(score)} │ +[\d,]+ │", table)
        assert re.search(rf"│ {method} +│ +{re.escape(score)} │", matrix)
    page = (out / "report.html").read_text()
    check_page(page, cells=3)
    assert "ROUGE-L, % of held-out answers" in page
    assert page.count('<th class="number">ROUGE-L</th>') == 1
