"""The frozen corpus and datasets keep the promises of `experiments/embedded/README.md`."""

import json
import re

import pytest

from experiments.embedded import DATASETS, ROOT
from experiments.embedded.make_corpus import (
    SPECIAL_TOKENS,
    Document,
    chat_row,
    describe_row,
    functions_of,
    implement_row,
    make_datasets,
    read_corpus,
    split_of,
    squeezed,
)
from qlora_jax.data import get_format, load_tokenizer, tokenize_rows


@pytest.fixture(scope="module")
def earlier() -> dict[str, str]:
    """What a split must not share with its rows: the text of the splits before it."""
    texts = {"pretrain": "", "finetune": "", "held_out": ""}
    for document in read_corpus():
        texts[document.split] += document.text + "\n"
    pretrain = squeezed(texts["pretrain"])
    return {"train": pretrain, "validation": pretrain + squeezed(texts["finetune"])}


def rows(name: str, part: str) -> list[dict]:
    path = DATASETS[name].folder / f"{part}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("part", [pytest.param("train", marks=pytest.mark.slow), "validation"])
def test_no_row_repeats_what_came_before_it(part, earlier):
    for row in rows("describe", part):
        assert squeezed(row["output"].rstrip(".")) not in earlier[part]
    for row in rows("implement", part):
        assert squeezed(row["output"]) not in earlier[part]
    for row in rows("chat", part):
        assert squeezed(row["messages"][1]["content"].rstrip(".")) not in earlier[part]


@pytest.mark.parametrize("name", list(DATASETS))
def test_parts_are_disjoint_and_without_copies(name):
    train, validation = (
        {json.dumps(row) for row in rows(name, part)} for part in ("train", "validation")
    )
    assert len(train) == len(rows(name, "train")) >= 900
    assert len(validation) == len(rows(name, "validation")) >= 200
    assert not train & validation


@pytest.mark.parametrize("name", list(DATASETS))
def test_rows_are_read_by_the_named_format_and_fit_the_models(name):
    tokenizer = load_tokenizer(ROOT / "tokenizer")
    some = rows(name, "train")[:200]
    examples = tokenize_rows(some, get_format(DATASETS[name].format), tokenizer, max_len=512)
    assert len(examples) == len(some)
    assert examples.trained_tokens > 5 * len(some)


def test_the_corpus_is_split_by_path_and_small_enough_for_git():
    documents = read_corpus()
    assert all(d.split in ("pretrain", split_of(d.path)) for d in documents)
    assert len({squeezed(d.text) for d in documents}) == len(documents)
    size = sum(file.stat().st_size for file in ROOT.rglob("*") if file.is_file())
    assert size < 20e6


def test_tokenizer_gives_every_text_back():
    tokenizer = load_tokenizer(ROOT / "tokenizer")
    named = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert named == tuple(range(len(SPECIAL_TOKENS)))
    for text in ("def f(x):\n    return x + 1\n", "naïve — 日本 🙂 \t\x00"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_rows_of_a_function():
    source = '''
def scale(x, factor=2, *, limit=None, **rest):
    """Multiply x by a factor of one's choice.

    More words.
    """
    y = x * factor
    return y if limit is None else min(y, limit)
'''
    (function,) = functions_of(Document("pkg/mod.py", "finetune", source))
    assert describe_row(function) == {
        "instruction": "Describe what this Python function does in one sentence.",
        "input": "def scale(x, factor=2, *, limit=None, **rest):\n    y = x * factor\n"
        "    return y if limit is None else min(y, limit)",
        "output": "Multiply x by a factor of one's choice.",
    }
    assert implement_row(function)["input"].endswith(
        '"""Multiply x by a factor of one\'s choice."""\n'
    )
    assert implement_row(function)["output"].startswith("    y = x * factor\n    return")
    contents = [turn["content"] for turn in chat_row(function)["messages"]]
    assert contents[3] == (
        "It takes `x`, `factor` (default `2`), `limit` (default `None`) and `**rest`."
    )
    assert contents[5] == "`scale` is in the module `pkg.mod`."


def test_a_copied_function_is_left_out_of_the_datasets():
    body = '"""Do a thing that no other function does."""\n    a = 1\n    return a + {}\n'
    texts = [
        Document("p.py", "pretrain", "def f():\n    " + body.format(1)),
        Document("t.py", "finetune", "def g():\n    " + body.format(2)),
        Document("v.py", "held_out", "def h():\n    " + re.sub("thing", "job", body.format(3))),
    ]
    datasets = make_datasets(texts)
    assert datasets["describe"]["train"] == []
    assert len(datasets["describe"]["validation"]) == 1
