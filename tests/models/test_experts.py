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

from qlora_jax.models import Decoder, stack
from qlora_jax.models.cache import start
from qlora_jax.nn import FrozenParam, LoraConfig
from qlora_jax.quant import QuantConfig
from tests.models.test_cache import PLAIN
from tests.random_decoder import random_decoder

CONFIG = replace(PLAIN, num_local_experts=4, num_experts_per_tok=2)
NF4 = QuantConfig(blocksize=32)


def decoder(quant: QuantConfig | None) -> Decoder:
    """No two layers or experts of it are alike in any of their parts."""
    rng = np.random.default_rng(0)

    def moved(leaf: jax.Array) -> jax.Array:
        return leaf + 0.02 * rng.normal(size=leaf.shape) if leaf.dtype == jnp.float32 else leaf

    graphdef, state = nnx.split(random_decoder(CONFIG, quant=quant, lora=LoraConfig(r=2)))
    return nnx.merge(graphdef, jax.tree.map(moved, state))


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
@pytest.mark.parametrize(("program", "quant"), [(decoding, NF4), (decoding, None), (training, NF4)])
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
