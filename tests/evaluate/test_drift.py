"""Two models side by side."""

import math
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.evaluate import drift, token_logits, windows


class Table(nnx.Module):
    """Scores by token; notes each time it is traced."""

    traced: ClassVar[list[tuple[int, ...]]] = []

    def __init__(self, table):
        self.table = nnx.Param(jnp.asarray(table, jnp.float32))

    def __call__(self, input_ids):
        self.traced.append(input_ids.shape)
        return self.table[...][input_ids]


def test_models_of_one_kind_compile_once():
    ids = windows(range(8), 4, limit=8)
    first, second = (token_logits(Table(np.eye(8) * scale), ids) for scale in (1, 2))
    assert Table.traced == [(1, 4)]
    np.testing.assert_array_equal(second[1], 2 * first[1])


def test_drift_by_hand():
    # Probabilities 1/2, 1/2 beside 1/4, 3/4, whatever was read.
    ids = np.array([[0, 1, 0]], np.int32)
    before = [np.zeros((3, 2), np.float32)]
    after = [np.tile(np.log(np.float32([1, 3])), (3, 1))]
    found = drift(before, after, ids)
    assert found.tokens == 2
    assert found.max_abs == pytest.approx(math.log(3))
    assert found.mean_abs == pytest.approx(math.log(3) / 2)
    assert found.kl == pytest.approx(math.log(2) - math.log(3) / 2)
    assert found.perplexity_before == pytest.approx(2)
    assert found.perplexity_after == pytest.approx(math.sqrt(4 / 3 * 4))


def test_drift_is_of_all_windows_and_of_the_tokens_that_follow():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 5, (3, 4)).astype(np.int32)
    before, after = ([rng.normal(size=(4, 5)).astype(np.float32) for _ in ids] for _ in range(2))
    # The largest difference lies in the first window.
    after[0][1, 2] += 9
    found = drift(before, after, ids)
    x, y = (np.float64(logits) - np.log(np.exp(np.float64(logits)).sum(-1, keepdims=True))
            for logits in (before, after))  # fmt: skip
    gap = np.abs(np.float64(before) - np.float64(after))
    assert found.max_abs == pytest.approx(gap.max())
    assert found.mean_abs == pytest.approx(gap.mean())
    assert found.kl == pytest.approx((np.exp(x) * (x - y)).sum(-1).mean())
    for scores, perplexity in ((x, found.perplexity_before), (y, found.perplexity_after)):
        follow = np.take_along_axis(scores[:, :-1], ids[:, 1:, None], -1)
        assert perplexity == pytest.approx(np.exp(-follow.mean()))


def test_a_text_is_cut_into_as_many_windows_as_the_limit_allows():
    assert windows(range(10), 4, limit=100).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows(range(10), 4, limit=7).tolist() == [[0, 1, 2, 3]]
    assert windows(range(3), 4, limit=100).tolist() == [[0, 1, 2]]
    assert windows(range(10), 4, limit=3).tolist() == [[0, 1, 2]]


def test_other_vocabularies_and_short_texts_are_refused():
    with pytest.raises(ValueError, match="vocabularies of 2 and 3 tokens"):
        drift([np.zeros((2, 2), np.float32)], [np.zeros((2, 3), np.float32)], np.zeros((1, 2), int))
    with pytest.raises(ValueError, match="1 tokens, but at least 2"):
        windows([7], 4, limit=8)
