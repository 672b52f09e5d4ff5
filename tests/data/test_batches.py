"""Batches as properties: every example once, few shapes, any step from (seed, step) alone."""

import hashlib

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qlora_jax.data import (
    IGNORE,
    Batches,
    ClassificationBatches,
    Examples,
    Labelled,
    PackedBatches,
    Pair,
    Pairs,
    Seq2SeqBatches,
    length_buckets,
)

BUCKETS = (4, 8, 16)


def make(lengths: list[int]) -> Examples:
    """Example i consists of tokens i + 1, its first third without loss."""
    pairs = []
    for i, length in enumerate(lengths):
        ids = [i + 1] * length
        pairs.append((ids, [IGNORE] * max(1, length // 3) + ids[max(1, length // 3) :]))
    return Examples.of(pairs)


@st.composite
def cases(draw) -> tuple[list[int], dict]:
    """Lengths and options; objects are made in the test, where beartype may draw its samples."""
    lengths = draw(st.lists(st.integers(1, 16), min_size=1, max_size=60))
    options = {
        "batch_size": draw(st.integers(1, 5)),
        "accumulation": draw(st.integers(1, 3)),
        "drop_last": draw(st.booleans()),
        "shuffle": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**63)),
        "buckets": BUCKETS,
    }
    assume(
        not options["drop_last"] or len(lengths) >= options["batch_size"] * options["accumulation"]
    )
    return lengths, {**options, "group_by_length": options["shuffle"] and draw(st.booleans())}


def build(case: tuple[list[int], dict]) -> tuple[Examples, Batches]:
    examples = make(case[0])
    return examples, Batches(examples, **case[1])


@settings(max_examples=200)
@given(cases(), st.integers(0, 5))
def test_every_example_exactly_once_per_epoch(case, epoch):
    examples, source = build(case)
    order = source.epoch(epoch)
    assert len(order) == source.steps_per_epoch
    seen = np.concatenate(order).tolist()
    assert len(set(seen)) == len(seen)
    size = source.batch_size * source.accumulation
    full, rest = divmod(len(examples), size)
    if source.steps_per_epoch == full:
        # Nothing is left over, or what is left over is dropped.
        assert len(seen) == full * size
    else:
        assert rest > 0
        assert sorted(seen) == list(range(len(examples)))
        assert [len(step) for step in order] == [size] * full + [rest]


@settings(max_examples=200)
@given(cases(), st.integers(0, 3))
def test_batches_hold_their_examples_padded_on_the_right(case, epoch):
    examples, source = build(case)
    trained = 0
    for position, indices in enumerate(source.epoch(epoch)):
        batch = source.at(epoch * source.steps_per_epoch + position)
        assert batch.input_ids.shape in source.shapes
        assert batch.input_ids.shape == batch.labels.shape == batch.attention_mask.shape
        assert (batch.input_ids.dtype, batch.labels.dtype) == (np.int32, np.int32)
        assert batch.attention_mask.dtype == np.bool_
        longest = examples.lengths[indices].max()
        assert batch.input_ids.shape[-1] == min(b for b in BUCKETS if b >= longest)
        ids, labels, mask = (a.reshape(-1, a.shape[-1]) for a in batch)
        for row, index in enumerate(indices):
            example = examples[int(index)]
            length = len(example.input_ids)
            assert (ids[row, :length] == example.input_ids).all()
            assert (labels[row, :length] == example.labels).all()
            assert (ids[row, length:] == 0).all()
            assert (labels[row, length:] == IGNORE).all()
            assert mask[row].tolist() == [True] * length + [False] * (mask.shape[1] - length)
        # Rows that only fill the shape: without loss, and attending to themselves at one position.
        assert (labels[len(indices) :] == IGNORE).all()
        assert (mask[len(indices) :].sum(axis=1) == 1).all()
        assert (labels[:, 0] == IGNORE).all()
        assert batch.trained_tokens == (labels[:, 1:] != IGNORE).sum()
        trained += batch.trained_tokens
    if sum(map(len, source.epoch(epoch))) == len(examples):
        assert trained == examples.trained_tokens


@settings(max_examples=100)
@given(cases(), st.lists(st.integers(0, 200), min_size=1, max_size=8))
def test_any_step_is_a_pure_function_of_seed_and_step(case, steps):
    _, source = build(case)
    # Asked in any order, and by an object that was never asked anything else.
    for step in steps:
        _, fresh = build(case)
        for left, right in zip(source.at(step), fresh.at(step), strict=True):
            assert (left == right).all()


@settings(max_examples=100)
@given(cases())
def test_the_announced_shapes_can_occur(case):
    _, source = build(case)
    assert list(source.shapes) == sorted(set(source.shapes))
    seen = {batch.input_ids.shape for epoch in range(20) for batch in source.one_epoch(epoch)}
    assert seen <= set(source.shapes)
    if not case[1]["shuffle"] or (source.steps_per_epoch == 1 and not case[1]["drop_last"]):
        assert seen == set(source.shapes)


def test_epochs_and_seeds_differ():
    examples = make([5] * 100)
    first, second = (Batches(examples, batch_size=4, seed=seed) for seed in (0, 1))
    orders = [np.concatenate(b.epoch(e)) for b in (first, second) for e in (0, 1)]
    assert len({order.tobytes() for order in orders}) == 4
    assert np.concatenate(Batches(examples, batch_size=4, shuffle=False).epoch(7)).tolist() == list(
        range(100)
    )


def test_the_order_never_changes_between_versions():
    # A run resumed under another NumPy must see the same batches: the order is pinned here.
    grouped = Batches(
        make([i % 13 + 1 for i in range(1000)]), batch_size=4, seed=3, group_by_length=True
    )
    plain = Batches(make([3] * 10), batch_size=5, seed=3)
    assert [step.tolist() for step in plain.epoch(1)] == [[0, 6, 2, 1, 3], [7, 4, 9, 8, 5]]
    digest = hashlib.sha256(np.concatenate(grouped.epoch(2)).astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "69851eed89805c35"


def test_grouping_by_length_saves_padding_and_stays_random():
    lengths = np.random.default_rng(0).integers(1, 500, 5000)
    examples = make(lengths.tolist())
    real = {}
    for grouped in (False, True):
        source = Batches(examples, batch_size=16, group_by_length=grouped, seed=1)
        positions = sum(batch.input_ids.size for batch in source.one_epoch())
        real[grouped] = lengths.sum() / positions
    assert real[True] > 0.7 > real[False]
    # Neither long nor short steps come first.
    means = [lengths[step].mean() for step in source.epoch(0)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2


def test_micro_batches_share_one_bucket():
    source = Batches(make([2] * 7 + [15]), batch_size=2, buckets=BUCKETS, accumulation=4)
    assert source.shapes == ((4, 2, 16),)
    assert source.steps_per_epoch == 1
    assert source.at(0).input_ids.shape == (4, 2, 16)


def test_plain_pairs_are_examples_too():
    pairs = [(np.arange(3, dtype=np.int32), np.arange(3, dtype=np.int32))]
    batch = Batches(pairs, batch_size=2, pad_token_id=9).at(0)
    assert batch.input_ids.tolist() == [[0, 1, 2, 9, 9, 9, 9, 9], [9] * 8]
    # Nothing predicts a first token, whatever its label says.
    assert batch.labels[0].tolist() == [IGNORE, 1, 2, *[IGNORE] * 5]


def test_default_buckets():
    assert length_buckets(300) == (64, 128, 256, 304)
    assert length_buckets(64) == (64,)
    assert length_buckets(5) == (8,)
    assert length_buckets(1000, smallest=256) == (256, 512, 1000)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        length_buckets(0)


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([], {}, "the dataset is empty"),
        ([3, 17], {"buckets": BUCKETS}, "example 1 has 17 tokens, but the largest bucket holds 16"),
        ([3], {"batch_size": 0}, r"batch_size \(0\) and accumulation \(1\) must be at least 1"),
        ([3], {"accumulation": 0}, r"accumulation \(0\)"),
        ([3], {"seed": -1}, "seed must not be negative"),
        ([3], {"buckets": []}, "buckets must be positive lengths"),
        ([3], {"buckets": [0, 8]}, "buckets must be positive lengths"),
        ([3], {"drop_last": True}, "1 examples do not fill one step of 2"),
        ([3], {"group_by_length": True, "shuffle": False}, "it needs shuffle=True"),
    ],
)
def test_bad_input_is_refused(lengths, options, message):
    with pytest.raises(ValueError, match=message):
        Batches(make(lengths), **{"batch_size": 2, **options})


def test_an_example_without_tokens_is_refused():
    pairs = [(np.ones(length, np.int32),) * 2 for length in (3, 0)]
    with pytest.raises(ValueError, match="example 1 has no tokens: leave it out"):
        Batches(pairs, batch_size=1)


def test_negative_steps_are_refused():
    source = Batches(make([3]), batch_size=1)
    with pytest.raises(ValueError, match="step must not be negative"):
        source.at(-1)
    with pytest.raises(ValueError, match="epoch must not be negative"):
        source.epoch(-1)


def test_they_are_told_by_their_counts():
    examples = make([3, 5, 8])
    pairs = Pairs([Pair(ids, labels) for ids, labels in examples])
    labelled = [Labelled(ids, 0) for ids, _ in examples]
    assert [
        repr(examples),
        repr(pairs),
        repr(Batches(examples, batch_size=2, accumulation=2, buckets=BUCKETS)),
        repr(PackedBatches(examples, batch_size=2, length=8)),
        repr(Seq2SeqBatches(pairs, batch_size=2, source_buckets=(8,), target_buckets=(4, 8))),
        repr(ClassificationBatches(labelled, batch_size=2, pad_token_id=0, buckets=(8,))),
    ] == [
        "Examples(examples=3, tokens=16, trained_tokens=12)",
        "Pairs(pairs=3, tokens=32)",
        "Batches(examples=3, tokens=16, batch_size=2, accumulation=2, buckets=(4, 8, 16), "
        "steps_per_epoch=1)",
        "PackedBatches(examples=3, tokens=16, rows=2, length=8, batch_size=2, accumulation=1, "
        "steps_per_epoch=1)",
        "Seq2SeqBatches(pairs=3, batch_size=2, accumulation=1, source_buckets=(8,), "
        "target_buckets=(4, 8), steps_per_epoch=2)",
        "ClassificationBatches(examples=3, batch_size=2, accumulation=1, buckets=(8,), "
        "steps_per_epoch=2)",
    ]
