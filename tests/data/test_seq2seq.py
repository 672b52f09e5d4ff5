import numpy as np
import pytest

from experiments.embedded import ROOT
from qlora_jax.data import (
    FORMATS,
    IGNORE,
    Batches,
    Pair,
    PairFormat,
    Seq2SeqBatches,
    TokenizeReport,
    load_tokenizer,
    tokenize_pairs,
)
from tests.shared import shared_path

FORM = PairFormat("pairs", "input", "output")
ROWS = [
    {"input": "Translate to German: house", "output": "Haus"},
    {"input": "Translate to German: the garden behind the house", "output": " der Garten"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ROOT / "tokenizer")


def test_pairs_end_with_eos_and_read_back(tokenizer):
    pairs = tokenize_pairs(ROWS, FORM, tokenizer)
    for row, pair in zip(ROWS, pairs, strict=True):
        assert pair.source[-1] == pair.target[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(pair.source) == row["input"]
        assert tokenizer.decode(pair.target) == row["output"].strip()
    assert pairs.tokens == sum(len(p.source) + len(p.target) for p in pairs)


def test_a_cut_source_keeps_its_eos_and_a_cut_target_does_not(tokenizer):
    all_whole, all_cut = (
        tokenize_pairs(ROWS, FORM, tokenizer, source_max_len=n, target_max_len=m)
        for n, m in ((None, None), (6, 2))
    )
    assert all_whole.report == TokenizeReport(len(ROWS), 0, 0, 0)
    assert all_cut.report == TokenizeReport(
        len(ROWS),
        sum(len(pair.source) > 6 for pair in all_whole),
        sum(len(pair.target) > 2 for pair in all_whole),
        0,
    )
    # One token less than a text has, its eos included, cuts it; as many do not.
    for length in (len(pair.source) for pair in all_whole):
        for limit in (length - 1, length):
            report = tokenize_pairs(ROWS, FORM, tokenizer, source_max_len=limit).report
            assert report.cut_sources == sum(len(pair.source) > limit for pair in all_whole)
    for length in (len(pair.target) for pair in all_whole):
        for limit in (length - 1, length):
            report = tokenize_pairs(ROWS, FORM, tokenizer, target_max_len=limit).report
            assert report.cut_targets == sum(len(pair.target) > limit for pair in all_whole)
    whole, cut = all_whole[1], all_cut[1]
    eos = tokenizer.eos_token_id
    assert cut.source.tolist() == [*whole.source[:5].tolist(), eos]
    assert cut.target.tolist() == whole.target[:2].tolist()
    assert eos not in cut.target


def test_t5s_own_tokenizer():
    tokenizer = load_tokenizer(shared_path("data/tokenizers/t5/spiece.model"))
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.add_bos) == (0, 1, False)
    pair = tokenize_pairs(ROWS, FORM, tokenizer)[0]
    assert pair.source[-1] == 1
    assert tokenizer.decode(pair.source) == ROWS[0]["input"]
    # What transformers' T5Tokenizer gives for "translate English to German: Hello" is well known.
    known = [13959, 1566, 12, 2968, 10, 8774]
    assert tokenizer.encode("translate English to German: Hello") == known


def test_rows_that_have_no_source(tokenizer):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(ValueError, match=r"row 0 of .* has no source in format 'messages'"):
        tokenize_pairs([row], FORMATS["messages"], tokenizer)
    with pytest.raises(ValueError, match="is empty"):
        tokenize_pairs([], FORM, tokenizer)
    with pytest.raises(ValueError, match="source_max_len must be at least 1 token"):
        tokenize_pairs(ROWS, FORM, tokenizer, source_max_len=0)


def pairs(count: int) -> list[Pair]:
    rng = np.random.default_rng(0)
    return [
        Pair(*(rng.integers(3, 90, rng.integers(1, n)).astype(np.int32) for n in (30, 12)))
        for _ in range(count)
    ]


def test_every_pair_once_an_epoch_and_reachable_by_step():
    examples = pairs(11)
    batches = Seq2SeqBatches(
        examples,
        batch_size=2,
        accumulation=2,
        source_buckets=(16, 32),
        target_buckets=(8, 16),
        seed=3,
        group_by_length=True,
    )
    seen = []
    for step in range(batches.steps_per_epoch):
        batch = batches.at(step)
        assert batch.input_ids.shape[:2] == batch.labels.shape[:2] == (2, 2)
        assert batch.input_ids.shape[2] in (16, 32)
        assert batch.labels.shape[2] in (8, 16)
        again = batches.at(step + batches.steps_per_epoch)
        assert again.labels.shape[:2] == (2, 2)
        for ids, mask, labels in zip(
            *(x.reshape(4, -1) for x in (batch.input_ids, batch.attention_mask, batch.labels)),
            strict=True,
        ):
            judged = labels != IGNORE
            assert not judged[judged.sum() :].any(), "padding is on the right"
            if judged.any():
                seen.append((tuple(ids[mask]), tuple(labels[judged])))
    assert sorted(seen) == sorted((tuple(p.source), tuple(p.target)) for p in examples)
    assert batches.at(0).trained_tokens == (batches.at(0).labels != IGNORE).sum()


def test_which_sources_a_step_sees_is_decided_as_in_batches():
    examples = pairs(11)
    options = {"batch_size": 2, "seed": 3, "pad_token_id": 1, "drop_last": True}
    options |= {"accumulation": 2, "group_by_length": True}
    batches = Seq2SeqBatches(examples, source_buckets=(16, 32), **options)
    plain = Batches([(p.source, p.source) for p in examples], buckets=(16, 32), **options)
    assert batches.steps_per_epoch == plain.steps_per_epoch == 2
    for step in range(4):
        np.testing.assert_array_equal(batches.at(step).input_ids, plain.at(step).input_ids)


def test_in_order_for_evaluation_and_targets_too_long():
    examples = pairs(5)
    batches = Seq2SeqBatches(examples, batch_size=2, shuffle=False)
    targets = [row[row != IGNORE].tolist() for b in batches.one_epoch() for row in b.labels]
    assert targets == [*(p.target.tolist() for p in examples), []]
    # A target as long as a bucket fills it.
    full = [pair for pair in pairs(20) if len(pair.target) == 8][:1]
    assert Seq2SeqBatches(full, batch_size=1, target_buckets=(8, 16)).at(0).labels.shape == (1, 8)
    with pytest.raises(ValueError, match="but the largest bucket holds 2"):
        Seq2SeqBatches(examples, batch_size=2, target_buckets=(2,))
