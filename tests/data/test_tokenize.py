"""From rows to ids and labels: what is trained on, what is cut, what is refused."""

import dataclasses
import json

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.data import (
    FORMATS,
    IGNORE,
    Examples,
    Tokenizer,
    load_tokenizer,
    tokenize_pairs,
    tokenize_rows,
)
from tests.shared import shared_path


@pytest.fixture(scope="module")
def stories() -> Tokenizer:
    return load_tokenizer(shared_path("data/models/stories260K"))


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return load_tokenizer(shared_path("data/models/smollm2-135m-instruct"))


@pytest.fixture(scope="module")
def alpaca() -> list[dict]:
    return json.loads(shared_path("data/instruct/alpaca.json").read_text())[:300]


def trained_text(tokenizer: Tokenizer, example) -> str:
    return tokenizer.decode(example.input_ids[example.labels != IGNORE], skip_special=False)


@pytest.mark.parametrize("which", ["stories", "smollm2"])
def test_alpaca_rows_round_trip(which, alpaca, request):
    tokenizer = request.getfixturevalue(which)
    form = FORMATS["alpaca"]
    examples = tokenize_rows(alpaca, form, tokenizer)
    assert len(examples) == len(alpaca)
    for row, example in zip(alpaca, examples, strict=True):
        source, target = form.segments(row)
        assert tokenizer.decode(example.input_ids) == source.text + target.text
        prompt = tokenizer.encode(source.text)
        # The prompt has the ids that it has when the model is asked, and no loss.
        assert example.input_ids[: len(prompt)].tolist() == prompt
        assert (example.labels[: len(prompt)] == IGNORE).all()
        answer = example.input_ids[len(prompt) :]
        assert (example.labels[len(prompt) :] == answer).all()
        assert answer[-1] == tokenizer.eos_token_id
    assert examples.report == dataclasses.replace(
        examples.report, rows=300, cut_sources=0, cut_targets=0, left_out=0
    )


def test_train_on_all_trains_on_all_but_the_first(stories, smollm2, alpaca):
    response = tokenize_rows(alpaca[:20], FORMATS["alpaca"], stories)
    everything = tokenize_rows(alpaca[:20], FORMATS["alpaca"], stories, train_on="all")
    for left, right in zip(response, everything, strict=True):
        assert (left.input_ids == right.input_ids).all()
        assert right.labels[0] == IGNORE
        assert (right.labels[1:] == right.input_ids[1:]).all()
    assert everything.trained_tokens == everything.tokens - 20
    # Where no bos begins a text, the first token is the text's own.
    (bare,) = tokenize_rows([{"text": "a b"}], FORMATS["text"], smollm2)
    assert bare.labels.tolist() == [IGNORE, *bare.input_ids[1:].tolist()]


def test_what_is_as_long_as_allowed_is_not_told_as_cut(stories, alpaca):
    form = FORMATS["alpaca"]
    (whole,) = tokenize_rows(alpaca[:1], form, stories)
    prompt = len(stories.encode(form.source(alpaca[0])))
    answer = len(whole.input_ids) - prompt
    for less in (0, 1):
        limits = {"source_max_len": prompt - less, "target_max_len": answer - less}
        report = tokenize_rows(alpaca[:1], form, stories, **limits).report
        assert (report.cut_sources, report.cut_targets) == (less, less)


@settings(max_examples=60)
@given(source=st.integers(1, 300), target=st.integers(1, 200))
def test_cutting_is_the_papers(stories, alpaca, source, target):
    rows = alpaca[:5]
    whole = tokenize_rows(rows, FORMATS["alpaca"], stories)
    cut = tokenize_rows(
        rows, FORMATS["alpaca"], stories, source_max_len=source, target_max_len=target
    )
    for row, full, short in zip(rows, whole, cut, strict=True):
        prompt = len(stories.encode(FORMATS["alpaca"].source(row)))
        kept = [*range(min(prompt, source)), *range(prompt, len(full.input_ids))[:target]]
        assert (short.input_ids == full.input_ids[kept]).all()
        assert (short.labels == full.labels[kept]).all()
        # A target that is cut does not end.
        ends = short.input_ids[-1] == stories.eos_token_id
        assert ends == (len(full.input_ids) - prompt <= target)


def test_a_conversation_is_all_target_and_ends_once(smollm2):
    turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "Bye"), ("assistant", "Bye!")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (example,) = tokenize_rows([row], FORMATS["messages-chatml"], smollm2)
    assert trained_text(smollm2, example) == "Hello.<|im_end|>Bye!<|im_end|>"
    assert example.input_ids.tolist().count(smollm2.eos_token_id) == 4
    assert example.input_ids[-1] == smollm2.eos_token_id
    (example,) = tokenize_rows([row], FORMATS["messages"], smollm2)
    assert trained_text(smollm2, example) == " Hello. Bye!<|im_end|>"
    # Cut to six tokens the first answer is in, the second is not; cut to three nothing is left.
    cut = tokenize_rows([row, row], FORMATS["messages"], smollm2, target_max_len=12)
    assert cut.report.cut_targets == 2
    with pytest.raises(ValueError, match=r"none of the 1 rows of the dataset has a token to train"):
        tokenize_rows([row], FORMATS["messages"], smollm2, target_max_len=3)


def test_rows_without_loss_are_left_out_and_counted(stories):
    long = {"messages": [{"role": "user", "content": "a " * 50}]}
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    examples = tokenize_rows([long, good, long], FORMATS["messages"], stories, target_max_len=40)
    assert len(examples) == 1
    assert examples.report.left_out == 2
    assert examples.report.rows == 3


def test_oasst_rows_in_many_scripts(stories):
    lines = shared_path("data/instruct/oasst1_best_replies.jsonl").read_text().split("\n")
    rows = [{"text": json.loads(line)["guanaco_text"]} for line in lines[:100]]
    response = tokenize_rows(rows, FORMATS["guanaco"], stories)
    everything = tokenize_rows(rows, FORMATS["guanaco"], stories, train_on="all")
    assert response.trained_tokens < everything.trained_tokens
    for row, left, right in zip(rows, response, everything, strict=True):
        assert stories.decode(left.input_ids) == row["text"] == stories.decode(right.input_ids)


def test_pairs_give_the_ids_of_the_papers_code_on_a_llama_tokenizer():
    llama = load_tokenizer(shared_path("data/tokenizers/llama2/tokenizer.model"))
    rows = json.loads(shared_path("data/instruct/longform_train.json").read_text())
    rows = [{"input": r["input"].strip(), "output": r["output"].strip()} for r in rows]
    # Nothing is asked: the output begins the text, and has SentencePiece's space all the same.
    rows.append({"input": "", "output": rows[0]["output"]})
    rows.append({"input": rows[0]["input"], "output": ""})
    examples = tokenize_rows(
        rows, FORMATS["input-output"], llama, source_max_len=512, target_max_len=1024
    )
    for row, example in zip(rows, examples, strict=True):
        # qlora.py: bos and input, output and eos, each tokenized as a text of its own and cut.
        source = [1, *llama.encode(row["input"], bos=False)][:512]
        target = [*llama.encode(row["output"], bos=False), 2][:1024]
        assert example.input_ids.tolist() == source + target
        assert example.labels.tolist() == [IGNORE] * len(source) + target


def test_empty_answers_teach_to_stop(stories):
    (example,) = tokenize_rows([{"instruction": "a", "output": ""}], FORMATS["alpaca"], stories)
    assert trained_text(stories, example) == "</s>"


def test_no_eos_is_trained_behind_a_question(stories):
    asked = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
    rows = [{"messages": [*asked, *more]} for more in ([], asked[:1])]
    for train_on, trained in (("response", False), ("all", True)):
        answered, open_ended = tokenize_rows(rows, FORMATS["messages"], stories, train_on=train_on)
        for example in (answered, open_ended):
            assert example.input_ids[-1] == stories.eos_token_id
        assert answered.labels[-1] == stories.eos_token_id
        assert open_ended.labels[-1] == (stories.eos_token_id if trained else IGNORE)
    # Of a question alone, there is nothing to train on.
    examples = tokenize_rows([*rows, {"messages": asked[:1]}], FORMATS["messages"], stories)
    assert (len(examples), examples.report.left_out) == (2, 1)


def test_without_eos(stories):
    (example,) = tokenize_rows([{"text": "ab"}], FORMATS["text"], stories, append_eos=False)
    assert example.input_ids.tolist() == stories.encode("ab")
    blind = dataclasses.replace(stories, eos_token_id=None)
    assert len(tokenize_rows([{"text": "ab"}], FORMATS["text"], blind, append_eos=False)) == 1
    with pytest.raises(ValueError, match="no end-of-sequence token to append: give load_tokenizer"):
        tokenize_rows([{"text": "ab"}], FORMATS["text"], blind)


def test_bad_input_is_refused(stories):
    form = FORMATS["text"]
    with pytest.raises(ValueError, match=r"things.json is empty: there is not one row"):
        tokenize_rows([], form, stories, source="things.json")
    rows = [{"text": "a"}, {"text": "word " * 100}]
    with pytest.raises(
        ValueError,
        match=r"row 1 of x has \d+ tokens, but at most 64 are allowed: set source_max_len",
    ):
        tokenize_rows(rows, form, stories, max_len=64, source="x")
    assert len(tokenize_rows(rows, form, stories, max_len=64, target_max_len=63)) == 2
    with pytest.raises(ValueError, match="format 'alpaca' needs instruction, output"):
        tokenize_rows(rows, FORMATS["alpaca"], stories)
    many = [{"text": "a"}] * 1024  # a chunk, which the number counts, too
    with pytest.raises(ValueError, match=r"^row 1024 of x: format 'text' expects text.*holds None"):
        tokenize_rows([*many, {"text": None}], form, stories, source="x")
    with pytest.raises(ValueError, match="target_max_len must be at least 1 token"):
        tokenize_rows(rows, form, stories, target_max_len=0)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("tokenize", [tokenize_rows, tokenize_pairs])
def test_a_slice_of_a_dataset_is_told_to_be_columns(stories, tokenize):
    rows = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    with pytest.raises(ValueError, match=r"dict of columns \(text\).*rows.select\(range\(n\)\)"):
        tokenize(rows[:1], FORMATS["alpaca"], stories)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("tokenize", [tokenize_rows, tokenize_pairs])
def test_a_name_is_no_format(stories, tokenize):
    message = r"^form is 'alpaca', but a prompt format is needed: give FORMATS\[name\], .* alpaca, "
    with pytest.raises(TypeError, match=message):
        tokenize([{"text": "a"}], "alpaca", stories)


def test_many_rows_show_a_bar_and_keep_their_order(stories, capsys):
    rows = [{"text": f"story {i}"} for i in range(3000)]
    plain = tokenize_rows(rows, FORMATS["text"], stories)
    assert "tokenizing" not in capsys.readouterr().out
    shown = tokenize_rows(iter(rows), FORMATS["text"], stories, progress=True)
    assert (plain.lengths == shown.lengths).all()
    for i in (0, 1023, 1024, 2999):
        assert stories.decode(shown[i].input_ids) == f"story {i}"


def test_examples_are_a_sequence():
    pairs = [([1, 2], [IGNORE, 2]), ([3], [IGNORE]), ([4, 5, 6], [IGNORE, 5, 6])]
    examples = Examples.of(pairs)
    assert len(examples) == 3
    assert examples.lengths.tolist() == [2, 1, 3]
    assert (examples.tokens, examples.trained_tokens) == (6, 3)
    assert [(i.tolist(), m.tolist()) for i, m in examples] == pairs
    assert examples[-1].input_ids.dtype == np.int32
    assert [len(e.input_ids) for e in examples[1:]] == [1, 3]
    with pytest.raises(IndexError):
        examples[3]
    assert len(Examples.of([])) == 0
    with pytest.raises(ValueError, match="do not belong together"):
        Examples(np.zeros(2, np.int32), np.zeros(2, np.int32), np.array([3]))
