"""What a run says of its rows."""

import io
import json
from dataclasses import replace

import datasets
import pytest
from rich.console import Console

from experiments import run as runs
from experiments.config import DataConfig, build_run
from experiments.rows import _format, _held_out, examples_of, longest_allowed, told_of_cuts
from experiments.tree import to_tree
from qlora_jax.data import FORMATS, Examples, Pairs, load_tokenizer, tokenize_rows


def test_rows_that_are_cut_are_told(tiny_model, tmp_path, monkeypatch):
    talk = [
        {"messages": [{"role": role, "content": words} for role in ("user", "assistant")]}
        for words in ("a", "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 3)
    ]
    file = tmp_path / "talk.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in talk * 6))
    data = {
        "source": str(file),
        "format": "messages",
        "target_max_len": 64,
        "validation_split": "train",
        "max_rows": 9,
    }
    run = build_run({"data": data, "model": str(tiny_model)}, "here")
    train, _, _ = examples_of(run.data, tiny_model, None)
    # The prompt alone of four rows is longer than 64 tokens.
    told = (
        "of 9 training rows, responses cut to data.target_max_len=64: 4; "
        "left out, without a token to train on: 4"
    )
    assert told_of_cuts(run.data, train) == told
    assert told_of_cuts(run.data, Examples.of([])) == told_of_cuts(run.data, Pairs()) == ""

    out = io.StringIO()

    def stop(*_):
        raise RuntimeError

    monkeypatch.setattr(runs, "check_room", stop)
    try:
        runs.execute(run, tmp_path / "run", labels={}, console=Console(file=out, width=40))
    except RuntimeError:
        assert out.getvalue().strip() == told
    else:
        raise AssertionError


LONG = "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 60


@pytest.mark.parametrize(
    ("row", "form", "context", "cut_to"),
    [
        ({"input": "", "output": LONG}, "input-output", 1024, 1 + 128),
        ({"instruction": LONG, "output": LONG}, "alpaca", 1024, 384 + 128),
        ({"text": LONG}, "text", 1024, 512),
        ({"text": LONG}, "text", 300, 300),
        ({"messages": [{"role": "assistant", "content": LONG}]}, "messages", None, 512),
    ],
)
def test_limits_by_default(row, form, context, cut_to, tiny_model, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text((json.dumps(row) + "\n") * 2)
    data = build_run({"data": {"source": str(file), "format": form, "validation_rows": 1}}, "").data
    (train,), (held_out,), _ = examples_of(data, tiny_model, context)
    assert len(train.input_ids) == len(held_out.input_ids) == cut_to
    told = told_of_cuts(data, examples_of(data, tiny_model, context)[0])
    assert (
        "data.target_max_len=auto (128 tokens, of conversations and texts at most 512): 1" in told
    )


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({}, 512),
        ({"source_max_len": 512}, 640),
        ({"source_max_len": 64}, 512),
        ({"source_max_len": 64, "format": "alpaca"}, 64 + 128),
        ({"source_max_len": None}, None),
        ({"source_max_len": None, "format": "text"}, 512),
        ({"target_max_len": 32}, 384 + 32),
        ({"target_max_len": 32, "format": "messages"}, 1 + 32),
        ({"target_max_len": None, "format": "messages"}, None),
        ({"source": "oasst1", "source_max_len": None, "target_max_len": 512}, 1 + 512),
        ({"source": "alpaca", "source_max_len": None, "target_max_len": 512}, None),
    ],
)
def test_the_longest_example_that_limits_allow(options, most):
    assert longest_allowed(DataConfig(**{"source": "mine.jsonl", **options})) == most


def test_columns_of_a_dataset_are_named_for_the_format(tiny_model, tmp_path):
    """ShareGPT's names, for the rows and for those that are held out."""
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b c"}]
    file = tmp_path / "talk.jsonl"
    file.write_text((json.dumps({"conversations": turns}) + "\n") * 3)
    data = {
        "source": str(file),
        "validation_source": str(file),
        "columns": {"messages": "conversations"},
        "format": "messages",
    }
    run = build_run({"data": data, "model": str(tiny_model)}, "here")
    assert build_run(to_tree(run), "again") == run
    train, held_out, _ = examples_of(run.data, tiny_model, None)
    plain = tmp_path / "messages.jsonl"
    plain.write_text((json.dumps({"messages": turns}) + "\n") * 3)
    data = {**data, "source": str(plain), "validation_source": str(plain), "columns": {}}
    expected, _, _ = examples_of(build_run({"data": data}, "here").data, tiny_model, None)
    for examples in (train, held_out):
        assert [list(e.labels) for e in examples] == [list(e.labels) for e in expected]


def test_what_is_trained_on_held_out_and_refused(tiny_model, tmp_path):
    talk = [("user", "a b"), ("assistant", "c"), ("user", "d"), ("assistant", "e f g")]
    row = {"messages": [{"role": role, "content": words} for role, words in talk]}
    file = tmp_path / "talk.jsonl"
    file.write_text((json.dumps(row) + "\n") * 4)
    data = DataConfig(source=str(file), format="messages", validation_rows=1)
    tokenizer = load_tokenizer(tiny_model)
    for train_on in ("response", "last", "all"):
        expected = tokenize_rows([row], FORMATS["messages"], tokenizer, train_on=train_on)
        for part in examples_of(replace(data, train_on=train_on), tiny_model, None)[:2]:
            assert list(part[0].labels) == list(expected[0].labels)
    with pytest.raises(ValueError, match="has 4 rows, but 4 are to be held out: lower"):
        examples_of(replace(data, validation_rows=4), tiny_model, None)


def test_a_system_prompt_is_for_conversations_alone(tiny_model):
    for name in ("messages", "messages-chatml"):
        data = DataConfig(format=name, system_prompt="Be brief.")
        assert _format(data, tiny_model, []) == replace(FORMATS[name], system="Be brief.")
    for name in ("alpaca", "auto"):
        data = DataConfig(format=name, system_prompt="Be brief.")
        with pytest.raises(ValueError, match="the format 'alpaca' knows no system turns"):
            _format(data, tiny_model, ["instruction", "output"])


def test_rows_are_held_against_an_embedded_dataset(tiny_model, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"instruction": "a", "input": "", "output": "b c"}) + "\n")
    data = {"source": str(file), "validation_source": "describe", "validation_rows": 5}
    run = build_run({"data": data, "model": str(tiny_model)}, "here")
    assert run.data.validation_split == "validation"
    train, held_out, _ = examples_of(run.data, tiny_model, None)
    described = build_run({"data": {"source": "describe", "validation_rows": 5}}, "here").data
    _, expected, _ = examples_of(described, tiny_model, None)
    assert (len(train), len(held_out)) == (1, 5)
    assert [list(e.labels) for e in held_out] == [list(e.labels) for e in expected]
    # Of like length side by side, or a batch would be mostly padding.
    lengths = held_out.lengths.tolist()
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 1


def test_rows_of_some_files_of_the_hub_are_held_against_rows_of_these(tiny_model, monkeypatch):
    asked = []

    def answer(hub_name, *, split, data_files, **options):
        asked.append((split, data_files))
        return datasets.Dataset.from_list([{"inputs": "a", "targets": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", answer)
    parts = {"split": "train[9:]", "validation_split": "train[:9]"}
    examples_of(DataConfig("flan-v2", hub_files=("cot*",), **parts), tiny_model, None)
    assert asked == [("train[9:]", ["cot*"]), ("train[:9]", ["cot*"])]


def test_the_same_rows_are_held_out_of_a_list_as_of_a_dataset():
    rows = [{"n": n} for n in range(30)]
    of_list = _held_out(rows, 4)
    of_dataset = _held_out(datasets.Dataset.from_list(rows), 4)
    assert of_list == tuple(part.to_list() for part in of_dataset)
    assert sorted(row["n"] for part in of_list for row in part) == list(range(30))
