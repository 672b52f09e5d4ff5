"""Weights that stream give the bits of weights that stay."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.models import REMAT, Decoder, DecoderConfig, next_token_loss, streaming, unfreeze
from qlora_jax.nn import FrozenParam, LoraConfig, add_lora
from qlora_jax.quant import QuantConfig
from qlora_jax.train import TrainConfig, init_state, make_train_step
from tests.random_decoder import random_decoder

CONFIG = DecoderConfig(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 6)), jnp.int32)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    # So that a tiny model's codes stream and its norms and offsets stay, as a large one's do.
    monkeypatch.setattr(streaming, "MIN_STREAM_BYTES", 256)


@functools.cache
def _base() -> Decoder:
    lora = LoraConfig(r=2, lora_dropout=0.2)
    model = random_decoder(CONFIG, quant=QuantConfig(), lora=lora)
    state = nnx.state(model, nnx.LoRAParam)
    rng = np.random.default_rng(1)
    # With a B that is not zero, so that A takes a gradient.
    nnx.update(model, jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape), state))
    return model


def model(*, remat: str = "full", host: bool = False) -> Decoder:
    copy = nnx.clone(_base())
    # A training step donates the adapters: each model gets its own.
    nnx.update(copy, jax.tree.map(jnp.copy, nnx.state(copy, nnx.LoRAParam)))
    copy.remat = remat
    if host:
        streaming.move_to_host(copy.layers)
        copy.stream_weights = True
    return copy


@functools.cache
def resident(remat: str, dropout_seed: int | None = None):
    """Loss and gradients of weights that stay."""
    key = None if dropout_seed is None else jax.random.key(dropout_seed)
    return loss_and_gradient(model(remat=remat), key)


def loss_and_gradient(model: Decoder, dropout_key=None):
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)

    @jax.jit
    def both(lora, rest):
        def loss(lora):
            whole = nnx.merge(graphdef, lora, rest)
            return next_token_loss(whole, IDS, IDS, dropout_key=dropout_key).mean

        return jax.value_and_grad(loss)(lora)

    return both(lora, rest)


def same_bits(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_large_frozen_leaves_rest_on_the_host_and_nothing_else_does():
    layers = model(host=True).layers
    state = nnx.state(layers)
    kinds = {
        jax.tree_util.keystr(path): leaf.sharding.memory_kind
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
    }
    hosted = {name for name, kind in kinds.items() if kind == "pinned_host"}
    assert len(hosted) == 7
    assert all("kernel" in name and "codes" in name for name in hosted)
    codes = [x for x in jax.tree.leaves(nnx.state(model().layers, FrozenParam)) if x.ndim == 3]
    assert streaming.host_bytes(layers) == sum(x.nbytes for x in codes)


@pytest.mark.parametrize(
    "remat",
    [
        pytest.param(remat, marks=[pytest.mark.slow] * (remat == "attention"))
        for remat in sorted(set(REMAT) - {"none"})
    ],
)
def test_remat_changes_nothing_beyond_rounding(remat):
    (expected, gradient), (found, ours) = (resident(each) for each in ("none", remat))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_gradients_reach_what_a_layer_closes_over_and_what_it_puts_out():
    rng = np.random.default_rng(0)
    weights, adapters, source, x = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((4, 8, 8), (4, 8), (3, 8), (3, 8))
    )

    def total(run):
        def loss(x, adapters, source):
            def step(x, weight, adapter):
                y = jnp.tanh(x @ weight + adapter + source)
                return y, y.sum(-1)

            y, outputs = run(step, x, weights, adapters)
            return jnp.sum(y**2) + jnp.sum(outputs**3)

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(x, adapters, source)

    def scanned(step, x, weights, adapters):
        return jax.lax.scan(lambda x, layer: step(x, *layer), x, (weights, adapters))

    expected, found = total(scanned), total(streaming.stream_layers)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    for a, b in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_weights_that_stay_are_not_moved():
    """Where layers are updated in the backward pass, of a model that is on the device."""
    weights = jnp.zeros((2, 8, 8))

    def step(x, weight, _):
        return x @ weight, None

    def run(x, stay):
        return streaming.stream_layers(step, x, weights, None, stay=stay)[0]

    for stay in (False, True):
        program = str(jax.make_jaxpr(run, static_argnums=1)(jnp.zeros((3, 8)), stay))
        assert ("host" in program.lower()) is not stay


@pytest.mark.parametrize("remat", ["none", "dots", "attention"])
def test_a_policy_that_keeps_what_streams_is_refused(remat):
    with pytest.raises(ValueError, match="'full' or 'offload'"):
        loss_and_gradient(model(remat=remat, host=True))


def test_a_host_pool_that_is_too_small_is_refused(monkeypatch):
    monkeypatch.delenv(streaming.HOST_LIMIT, raising=False)
    streaming.check_host_memory_limit(64 * 2**30, "gpu")
    streaming.check_host_memory_limit(600 * 2**30, "cpu")
    with pytest.raises(ValueError, match=f"{streaming.HOST_LIMIT}=208"):
        streaming.check_host_memory_limit(200 * 2**30, "gpu")
    monkeypatch.setenv(streaming.HOST_LIMIT, "208")
    streaming.check_host_memory_limit(200 * 2**30, "gpu")


# Bits of two programs are compared, so they are compiled as a user's are.
as_users_do = pytest.mark.optimized


@as_users_do
@pytest.mark.slow  # each day a training step's are compared
@pytest.mark.parametrize("remat", ["full", "offload"])
def test_loss_and_gradients_are_the_residents_bit_for_bit(remat):
    expected = resident("full", dropout_seed=3)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(expected[1]))
    same_bits(loss_and_gradient(model(remat=remat, host=True), jax.random.key(3)), expected)


@as_users_do
def test_training_steps_are_the_residents_bit_for_bit():
    def trained(host: bool):
        graphdef, lora, frozen = nnx.split(model(host=host), nnx.LoRAParam, ...)
        tx = TrainConfig(page_min_size=0).optimizer()
        state = init_state(lora, tx, seed=0)
        step = make_train_step(graphdef, tx, state=state)
        batch = Batch(jnp.stack([IDS, IDS[::-1]]), jnp.stack([IDS, IDS[::-1]]))
        for _ in range(2):
            state, metrics = step(state, frozen, batch)
        return state.lora, state.opt_state, metrics

    same_bits(trained(host=True), trained(host=False))


@jax.tree_util.register_pytree_node_class
class Batch:
    def __init__(self, input_ids, labels):
        self.input_ids, self.labels = input_ids, labels

    def tree_flatten(self):
        return (self.input_ids, self.labels), None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls(*leaves)


@as_users_do
def test_evaluation_streams_too():
    def logits(model):
        graphdef, state = nnx.split(model)
        return jax.jit(lambda state: nnx.merge(graphdef, state)(IDS))(state)

    same_bits(logits(model(host=True)), logits(model()))


@as_users_do
def test_generation_streams_too():
    def written(model):
        graphdef, state = nnx.split(model)

        @jax.jit
        def some(state):
            whole = nnx.merge(graphdef, state)
            logits, cache = whole.prefill(IDS, cache_length=8)
            return logits, whole.decode_step(jnp.argmax(logits, -1).astype(jnp.int32), cache)

        return some(state)

    same_bits(written(model(host=True)), written(model()))


@pytest.mark.parametrize("whole", [False, True])
def test_what_is_trained_of_the_base_does_not_stream(whole, monkeypatch):
    """A bias that is as large as what streams, and a base that is trained whole."""
    monkeypatch.setattr(streaming, "MIN_STREAM_BYTES", 64)
    config = dataclasses.replace(CONFIG, qkv_bias=True)
    trained = random_decoder(config, quant=None if whole else QuantConfig())
    streaming.move_to_host(trained.layers)
    bias = trained.layers.self_attn.q_proj.bias
    assert bias.get_value().sharding.memory_kind == "pinned_host"
    names = {"layers.self_attn.q_proj": ["q_proj"] * 3}
    lora = LoraConfig(r=2, target_modules=("q_proj",), bias="lora_only")
    add_lora(trained, lora, rngs=nnx.Rngs(0), names=names)
    if whole:
        unfreeze(trained)
    kinds = [x.sharding.memory_kind for x in jax.tree.leaves(nnx.state(trained, nnx.LoRAParam))]
    assert kinds == ["device"] * len(kinds)
    assert len(kinds) > 2
