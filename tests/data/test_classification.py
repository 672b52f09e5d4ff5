import numpy as np
import pytest

from experiments.embedded import ROOT
from qlora_jax.data import (
    IGNORE,
    Batches,
    ClassificationBatches,
    Labelled,
    load_tokenizer,
    tokenize_texts,
)
from qlora_jax.data.classification import _cut


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ROOT / "tokenizer")


def test_texts_are_framed_as_roberta_reads_them(tokenizer):
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    one, two = ([t for t in tokenizer.encode(x) if t != bos] for x in ("a list", "of numbers"))
    texts = [("a list",), ("a list", "of numbers")]
    single, pair = tokenize_texts(texts, tokenizer, max_len=64)
    assert single.tolist() == [bos, *one, eos]
    assert pair.tolist() == [bos, *one, eos, eos, *two, eos]
    short = tokenize_texts(texts, tokenizer, max_len=6)
    assert [len(ids) for ids in short] == [min(len(single), 6), 6]
    assert all(ids[-1] == eos for ids in short)
    assert tokenize_texts(texts, tokenizer, max_len=4)[1].tolist() == [bos, eos, eos, eos]
    with pytest.raises(ValueError, match="max_len is 3, but the tokens that frame a text are 4"):
        tokenize_texts(texts, tokenizer, max_len=3)


@pytest.mark.parametrize(
    ("lengths", "room", "kept"),
    [
        ([3, 4], 7, [3, 4]),
        ([3, 9], 8, [3, 5]),
        ([9, 3], 8, [5, 3]),
        ([9, 8], 10, [5, 5]),
        ([8, 9], 11, [5, 6]),
        ([8, 8], 11, [5, 6]),
        ([9], 4, [4]),
    ],
)
def test_the_longer_text_is_cut_first(lengths, room, kept):
    assert _cut(lengths, room) == kept


@pytest.mark.parametrize("kind", [int, float, np.float32])
def test_labels_stay_with_their_texts(kind):
    examples = [Labelled(np.full(i + 1, i + 3, np.int32), kind(1.5 * i)) for i in range(5)]
    batches = ClassificationBatches(
        examples, batch_size=2, pad_token_id=1, buckets=(8,), seed=1, accumulation=2
    )
    assert batches.steps_per_epoch == 2
    found = {}
    for batch in batches.one_epoch():
        assert batch.labels.shape == (2, 2)
        assert batch.labels.dtype == (np.int32 if kind is int else np.float32)
        for ids, mask, label in zip(
            batch.input_ids.reshape(4, 8),
            batch.attention_mask.reshape(4, 8),
            batch.labels.reshape(4),
            strict=True,
        ):
            if label == IGNORE or np.isnan(label):
                assert (ids == 1).all()
            else:
                found[float(label)] = ids[mask].tolist()
                assert (ids[~mask] == 1).all()
    assert found == {float(kind(1.5 * i)): [i + 3] * (i + 1) for i in range(5)}


def test_which_texts_a_step_sees_is_decided_as_in_batches():
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, 90, n).astype(np.int32) for n in rng.integers(1, 16, 11)]
    options = {"batch_size": 2, "seed": 3, "pad_token_id": 1, "drop_last": True}
    options |= {"accumulation": 2, "group_by_length": True, "buckets": (8, 16)}
    batches = ClassificationBatches([Labelled(i, len(i)) for i in ids], **options)
    plain = Batches([(i, i) for i in ids], **options)
    assert batches.steps_per_epoch == plain.steps_per_epoch == 2
    for step in range(4):
        batch = batches.at(step)
        np.testing.assert_array_equal(batch.input_ids, plain.at(step).input_ids)
        np.testing.assert_array_equal(batch.labels, batch.attention_mask.sum(axis=-1))
