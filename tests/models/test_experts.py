"""A layer's experts stay in the stack of all layers, and are taken out of it one at a time."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.generate import GenerationConfig, generate
from qlora_jax.models import Decoder, stack
from qlora_jax.models.cache import start
from qlora_jax.models.moe import MixtureOfExperts
from qlora_jax.models.stack import Storage
from qlora_jax.nn import FrozenParam, LoraConfig, QuantDense, add_lora
from qlora_jax.quant import QuantConfig, QuantizedTensor
from tests.models.test_cache import PLAIN
from tests.random_decoder import random_decoder

CONFIG = replace(PLAIN, num_local_experts=4, num_experts_per_tok=2)
NF4 = QuantConfig(blocksize=32)
DORA = LoraConfig(r=2, alpha=3, use_dora=True)


def decoder(quant: QuantConfig | None) -> Decoder:
    """No two layers or experts of it are alike in any of their parts."""
    return moved(random_decoder(CONFIG, quant=quant, lora=LoraConfig(r=2)), ...)


def moved(model: Decoder, parts: Any) -> Decoder:
    """The model with something added to each float32 number of some of its parts."""
    rng = np.random.default_rng(0)

    def move(leaf: jax.Array) -> jax.Array:
        return leaf + 0.02 * rng.normal(size=leaf.shape) if leaf.dtype == jnp.float32 else leaf

    graphdef, state, *rest = nnx.split(model, *dict.fromkeys([parts, ...]))
    return nnx.merge(graphdef, jax.tree.map(move, state), *rest)


def decoding(model: Decoder) -> Any:
    """Logits and cache after one more token of two texts."""
    cache = start(*jnp.ones((2, 3, 2, 2, 8, 8)), jnp.ones((2, 5), bool))
    return model.decode_step(jnp.asarray([3, 7], jnp.int32), cache)


def training(model: Decoder) -> Any:
    """The adapters' gradients of something, for two texts of six tokens."""
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)

    def total(lora: Any) -> jax.Array:
        return jnp.square(nnx.merge(graphdef, lora, rest).hidden(tokens)).sum()

    return jax.grad(total)(lora)


def in_slices(program: Callable[[Decoder], Any]) -> Callable[[Decoder], Any]:
    """The program with each layer sliced out of all of its stacks."""

    def run(model: Decoder) -> Any:
        with mock.patch.object(stack, "_stay", return_value=set()):
            return program(model)

    return run


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("program", "quant"),
    [
        (decoding, NF4),
        (decoding, None),
        pytest.param(training, NF4, marks=pytest.mark.slow),
    ],
)
def test_the_same_to_the_bit_as_in_slices(program, quant):
    model = decoder(quant)
    got, expected = (jax.jit(run)(model) for run in (program, in_slices(program)))
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize(
    ("program", "quant", "of"),
    [(decoding, NF4, (FrozenParam, nnx.LoRAParam)), (training, None, FrozenParam)],
)
def test_no_value_is_a_layers_part_of_the_experts(program, quant, of):
    """Which XLA would copy for the loop over the experts."""
    model = decoder(quant)
    stacks = jax.tree.leaves(nnx.state(model.layers.mlp.experts, of))
    parts = {jax.typeof(leaf[0]).str_short(short_dtypes=True) for leaf in stacks if leaf.ndim == 4}
    here, sliced = (str(jax.make_jaxpr(run)(model)) for run in (program, in_slices(program)))
    assert len(parts) == (6 if program is decoding else 2)
    assert all(part in sliced for part in parts)
    assert not any(part in here for part in parts)


def dense_of(model: Decoder) -> Decoder:
    """Without adapters; each weight is the one that DoRA means, m · (W + s·B·A) / ‖W + s·B·A‖."""
    dense = nnx.clone(model)
    for _, layer in nnx.iter_graph(dense):
        if isinstance(layer, QuantDense):
            weight = layer.kernel.get_value()
            if isinstance(weight, QuantizedTensor):
                weight = weight.dequantize(jnp.float32)
            a, b, m = layer.lora_A, layer.lora_B, layer.lora_magnitude_vector
            whole = np.asarray(weight, np.float64) + DORA.scaling * np.matmul(b[...], a[...])
            length = np.linalg.norm(whole, axis=-1)
            layer.kernel = FrozenParam(jnp.float32((m[...] / length)[..., None] * whole))
            layer.adapt([None], nnx.Rngs(0))
    return dense


def all_experts(self: MixtureOfExperts, x: jax.Array, *, dropout_keys: Any) -> jax.Array:
    """Each expert on every token."""
    graphdef, stacked = nnx.split(self.experts)
    share, chosen = jax.lax.top_k(jax.nn.softmax(x @ self.gate[...].T), 2)
    share /= share.sum(axis=-1, keepdims=True)
    total = jnp.zeros_like(x)
    for index in range(CONFIG.num_local_experts):
        expert = nnx.merge(graphdef, jax.tree.map(lambda leaf, i=index: leaf[i], stacked))
        own = jnp.where(chosen == index, share, 0).sum(axis=-1, keepdims=True)
        total += own * expert(x, dropout_keys=dropout_keys)
    return total


@pytest.mark.parametrize("quant", [pytest.param(NF4, marks=pytest.mark.slow), None])
def test_dora_on_experts_is_that_of_dense_weights_one_expert_after_another(quant):
    base = random_decoder(CONFIG, quant=quant, lora=None, compute_dtype=jnp.float32)
    model = moved(add_lora(base, DORA, rngs=nnx.Rngs(0)), nnx.LoRAParam)
    prompt = [3, 7, 5]
    (written, _), *_ = generate(model, [prompt], GenerationConfig(max_new_tokens=8))
    tokens = jnp.asarray([[*prompt, *written]])
    with mock.patch.object(MixtureOfExperts, "__call__", all_experts):
        expected = in_slices(lambda dense: dense(tokens))(dense_of(model))
    np.testing.assert_allclose(model(tokens), expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(expected[0, len(prompt) - 1 : -1].argmax(axis=-1), written)


def test_blocks_of_one_expert_drop_other_units():
    lora = LoraConfig(r=2, lora_dropout=0.5)
    storage = Storage(None, lora, jnp.float32, jnp.float32, None)
    moe = moved(MixtureOfExperts(CONFIG, storage, "mlp", nnx.Rngs(0)), ...)
    # One token many times: eight pairs with each of two experts, in blocks of four.
    x = jnp.broadcast_to(jax.random.normal(jax.random.key(1), (CONFIG.hidden_size,)), (1, 8, 32))
    keys = dict.fromkeys(CONFIG.mlp_linears, jax.random.key(2))
    (out,) = moe(x, dropout_keys=keys)
    assert len(np.unique(np.asarray(out), axis=0)) == 8
    (still,) = moe(x, dropout_keys=dict.fromkeys(CONFIG.mlp_linears))
    np.testing.assert_allclose(still, jnp.broadcast_to(still[0], still.shape), rtol=1e-5)
