"""One training step: token-weighted, the same however it is cut, compiled once per shape."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.evaluate import perplexity
from qlora_jax.nn import LoraConfig
from qlora_jax.optim import paged
from qlora_jax.train import TrainConfig, init_state, make_train_step
from tests.train.toy import Toy, ToyBatch, ToyBatches, toy_loss


def _split(model):
    return nnx.split(model, nnx.LoRAParam, ...)


def _one_step(batch: ToyBatch, *, dropout: float = 0.0, seed: int = 0):
    graphdef, lora, frozen = _split(Toy(dropout=dropout))
    # Plain descent by -1 makes the change of the adapters the gradient itself.
    tx = optax.sgd(1.0)
    before = jax.tree.map(np.array, lora)
    state = init_state(lora, tx, seed=seed)
    state, metrics = make_train_step(graphdef, tx, toy_loss)(state, frozen, batch)
    gradient = jax.tree.map(lambda a, b: a - np.asarray(b), before, state.lora)
    return gradient, metrics, state


@settings(max_examples=2)
@given(step=st.integers(0, 10_000), cut=st.sampled_from([2, 4]))
def test_accumulation_equals_the_large_batch(step, cut):
    whole = ToyBatches(1, 8).at(step)
    pieces = jax.tree.map(lambda leaf: leaf.reshape(cut, 8 // cut, *leaf.shape[2:]), whole)
    expected, one, _ = _one_step(whole)
    found, many, _ = _one_step(pieces)
    assert int(one.tokens) == int(many.tokens) == int((whole.labels != -100).sum())
    np.testing.assert_allclose(many.loss, one.loss, rtol=1e-6)
    # Float32 sums in another order: a few units in the last place of the largest term.
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("trained", [1, 32])
def test_loss_and_gradient_are_those_of_the_mean_over_trained_tokens(trained):
    batch = ToyBatches(1, 4).at(3)
    labels = np.where(np.arange(32).reshape(1, 4, 8) < trained, batch.input_ids, -100)
    batch = batch._replace(labels=labels.astype(np.int32))
    graphdef, lora, frozen = _split(Toy())

    def mean(lora):
        total, count = toy_loss(
            nnx.merge(graphdef, lora, frozen), jax.tree.map(lambda x: x[0], batch), None
        )
        return total / count

    loss, gradient = jax.value_and_grad(mean)(lora)
    found, metrics, _ = _one_step(batch)
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-6)
    np.testing.assert_allclose(metrics.grad_norm, optax.tree.norm(gradient), rtol=1e-5)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


class _WithStreams(Toy):
    """Drops out by streams of random keys of its own: Flax's, the layer's, and one for each row."""

    def __init__(self):
        super().__init__()
        rngs = nnx.Rngs(7, rows=8)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head.adapt([LoraConfig(r=4, lora_dropout=0.5)], rngs, rngs)
        self.rows = rngs.rows.split(4)

    def __call__(self, input_ids, *, dropout_key=None):
        embedded = self.dropout(self.embed(input_ids))
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.9, embedded.shape[1:]))
        if not self.dropout.deterministic:
            embedded *= kept(self.rows.key[...])
        return self.head(embedded)


def test_a_modules_own_dropout_goes_by_seed_and_step():
    batch = ToyBatches(2, 4).at(0)
    graphdef, lora, frozen = _split(_WithStreams())
    tx = optax.sgd(0.0)
    step = make_train_step(graphdef, tx, toy_loss)

    def losses(steps, seed=0, begin=0):
        state = init_state(jax.tree.map(jnp.copy, lora), tx, seed=seed)
        state = state._replace(step=state.step + begin)
        found = []
        for _ in range(steps):
            state, metrics = step(state, frozen, batch)
            found.append(float(metrics.loss))
        return found

    first = losses(3)
    assert len(set(first)) == 3
    assert losses(3) == first
    assert losses(1, begin=2) == first[2:]
    assert losses(1, seed=1)[0] not in first
    # Micro-batches of the same rows drop different units.
    alike = jax.tree.map(lambda leaf: leaf[[0, 0]], batch)
    state = init_state(jax.tree.map(jnp.copy, lora), tx, seed=0)
    _, twice = step(state, frozen, alike)
    state = init_state(jax.tree.map(jnp.copy, lora), tx, seed=0)
    _, once = step(state, frozen, jax.tree.map(lambda leaf: leaf[:1], batch))
    assert float(twice.loss) != float(once.loss)


def test_nothing_drops_out_in_an_evaluation():
    model = _WithStreams()
    batches = [ToyBatches(4).at(0)]
    found = [perplexity(model, batches, loss_fn=toy_loss).loss for _ in range(2)]
    assert not model.dropout.deterministic
    model.eval()
    total, count = toy_loss(model, batches[0], None)
    assert found[0] == found[1] == pytest.approx(float(total) / int(count), rel=1e-6)


def test_a_count_may_be_pythons_own():
    batch = ToyBatch(*(leaf[:, :, :1] for leaf in ToyBatches(1, 4).at(3)))
    graphdef, lora, frozen = _split(Toy())

    def counted(model, batch, key):
        return toy_loss(model, batch, key)[0], len(batch.labels)

    tx = optax.sgd(1.0)
    _, found = make_train_step(graphdef, tx, counted)(init_state(lora, tx, seed=0), frozen, batch)
    assert int(found.tokens) == 4


def test_a_loss_without_its_count_is_refused():
    graphdef, lora, frozen = _split(Toy())
    tx = optax.sgd(1.0)
    step = make_train_step(graphdef, tx, lambda *given: toy_loss(*given)[0])
    with pytest.raises(TypeError, match=r"\(sum of losses, their count\) is needed.*mean \* n"):
        step(init_state(lora, tx, seed=0), frozen, ToyBatches(1, 4).at(3))


def test_a_step_without_trained_tokens_changes_nothing():
    batch = ToyBatches(2, 4).at(0)
    batch = batch._replace(labels=np.full_like(batch.labels, -100))
    gradient, metrics, state = _one_step(batch)
    assert float(metrics.loss) == 0.0
    assert int(metrics.tokens) == 0
    assert int(state.step) == 1
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


def test_dropout_follows_seed_step_and_micro_batch():
    once = ToyBatches(1, 4).at(0)
    twice = jax.tree.map(lambda leaf: np.concatenate([leaf, leaf]), once)
    graphdef, lora, frozen = _split(Toy(dropout=0.5))
    tx = optax.sgd(1.0)
    step = make_train_step(graphdef, tx, toy_loss)

    def gradient_of_b(batch, *, seed, at=0):
        # B is zero before the first update, so its gradient is what dropout shows in.
        state = init_state(jax.tree.map(jnp.copy, lora), tx, seed=seed)
        state, _ = step(state._replace(step=state.step + at), frozen, batch)
        return np.asarray(state.lora["head"]["lora_B"][...])

    first = gradient_of_b(once, seed=0)
    np.testing.assert_array_equal(gradient_of_b(once, seed=0), first)
    # Twice the same tokens as two micro-batches: the second drops other elements.
    for other in (
        gradient_of_b(once, seed=1),
        gradient_of_b(once, seed=0, at=1),
        gradient_of_b(twice, seed=0),
    ):
        assert np.abs(other - first).max() > 1e-4


def test_one_trace_and_one_compile_per_bucket_shape():
    traces = []

    def counted(model, batch, key, /):
        traces.append(batch.input_ids.shape)
        return toy_loss(model, batch, key)

    graphdef, lora, frozen = _split(Toy(dropout=0.1))
    config = TrainConfig(steps=10, page_min_size=0, warmup_steps=2, schedule="cosine")
    tx = config.optimizer()
    state = init_state(lora, tx, seed=0)
    step = make_train_step(
        graphdef, tx, counted, learning_rate=config.learning_rates(), state=state
    )
    batches = ToyBatches(1, 4, lengths=(8, 16))
    for i in range(10):
        before = state
        state, metrics = step(state, frozen, batches.at(i))
        # No second copy of adapters or moments is there.
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((before.lora, before.opt_state)))
        assert float(metrics.learning_rate) == pytest.approx(
            float(config.learning_rates()(i)), rel=1e-6
        )
    assert sorted(traces) == [(4, 8), (4, 16)]
    assert step._cache_size() == 2


def test_paged_state_stays_on_the_host_and_only_adapters_change():
    graphdef, lora, frozen = _split(Toy())
    tx = optax.chain(optax.clip_by_global_norm(0.3), paged(optax.adamw(1e-2), min_size=0))
    state = init_state(lora, tx, seed=0)
    frozen_before = jax.tree.map(np.array, frozen)
    step = make_train_step(graphdef, tx, toy_loss, state=state)
    for i in range(2):
        state, _ = step(state, frozen, ToyBatches(2, 4).at(i))
    moments = jax.tree.leaves(state.opt_state[1][0].mu)
    assert {leaf.sharding.memory_kind for leaf in moments} == {"pinned_host"}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.lora)} == {"device"}
    for a, b in zip(jax.tree.leaves(frozen_before), jax.tree.leaves(frozen), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bfloat16_adapters_are_accumulated_in_float32():
    graphdef, lora, frozen = _split(Toy(dtype=jnp.bfloat16))
    tx = optax.sgd(1e-2)
    state = init_state(lora, tx, seed=0)
    state, metrics = make_train_step(graphdef, tx, toy_loss)(state, frozen, ToyBatches(4, 2).at(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.lora)} == {jnp.dtype(jnp.bfloat16)}
    assert np.isfinite(float(metrics.grad_norm))


def test_adapters_spread_over_a_mesh_train_as_on_one_device():
    mesh = jax.make_mesh((8,), ("shard",), axis_types=(jax.sharding.AxisType.Auto,))
    named = jax.sharding.NamedSharding

    def run(place):
        graphdef, lora, frozen = _split(Toy(dropout=0.1))
        tx = TrainConfig(page_min_size=0, learning_rate=1e-2).optimizer()
        state = init_state(place(lora), tx, seed=0)
        step = make_train_step(graphdef, tx, toy_loss, state=state)
        for i in range(3):
            state, _ = step(state, frozen, ToyBatches(2, 4).at(i))
        return state

    def spread(lora):
        # A [r, in] over its inputs, B [out, r] over its outputs.
        specs = {"lora_A": (None, "shard"), "lora_B": ("shard", None)}
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: jax.device_put(
                leaf,
                named(
                    mesh,
                    jax.sharding.PartitionSpec(
                        *next(s for n, s in specs.items() if n in jax.tree_util.keystr(path))
                    ),
                ),
            ),
            lora,
        )

    one, many = run(lambda lora: lora), run(spread)
    for a, b in zip(jax.tree.leaves(one.lora), jax.tree.leaves(many.lora), strict=True):
        assert len(b.sharding.device_set) == 8
        assert not b.sharding.is_fully_replicated
        # Sums over inputs are split over devices: another order of addition.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    moments = jax.tree.leaves(many.opt_state[1][0].mu)
    assert {leaf.sharding.memory_kind for leaf in moments} == {"pinned_host"}


@pytest.mark.parametrize("meshed", [False, True])
def test_a_model_that_lies_on_another_device_than_jaxs_default_trains_there(meshed):
    device = jax.devices()[5]
    mesh = jax.sharding.Mesh([device], ("data",))
    there = jax.sharding.NamedSharding(mesh, jax.P()) if meshed else device

    def run(place):
        graphdef, lora, frozen = _split(Toy())
        tx = TrainConfig(page_min_size=0).optimizer()
        state = init_state(place(lora), tx, seed=0)
        step = make_train_step(graphdef, tx, toy_loss, state=state)
        return step(state, place(frozen), ToyBatches(1, 4).at(0))[0]

    one, other = run(lambda tree: tree), run(lambda tree: jax.device_put(tree, there))
    for a, b in zip(jax.tree.leaves(one.lora), jax.tree.leaves(other.lora), strict=True):
        assert b.devices() == {device}
        np.testing.assert_array_equal(a, b)
    moments = jax.tree.leaves(other.opt_state[1][0].mu)
    assert {leaf.sharding.memory_kind for leaf in moments} == {"pinned_host"}
