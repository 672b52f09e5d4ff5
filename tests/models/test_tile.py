"""An MLP in tiles of tokens gives what it gives in one piece."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.models import Decoder, DecoderConfig, next_token_loss
from qlora_jax.models.tile import by_tile
from qlora_jax.nn import LoraConfig
from qlora_jax.quant import QuantConfig
from tests.random_decoder import random_decoder

CONFIG = DecoderConfig(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 7)), jnp.int32)


def decoder(dtype=jnp.float32, **options):
    lora = LoraConfig(r=2, lora_dropout=0.3, target_modules=("up_proj", "down_proj"), dtype=dtype)
    model = random_decoder(CONFIG, lora=lora, **options)
    rng = np.random.default_rng(1)
    # With a B that is not zero, so that A takes a gradient.
    drawn = jax.tree.map(
        lambda x: (x + 0.1 * rng.normal(size=x.shape)).astype(x.dtype),
        nnx.state(model, nnx.LoRAParam),
    )
    nnx.update(model, drawn)
    return model


def loss_and_gradient(model):
    """A jitted function of the dropout key."""
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)

    @jax.jit
    def both(lora, rest, key):
        def loss(lora):
            whole = nnx.merge(graphdef, lora, rest)
            return next_token_loss(whole, IDS, IDS, dropout_key=key).mean

        return jax.value_and_grad(loss)(lora)

    return lambda key=None: leaves(both(lora, rest, key))


def leaves(tree):
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]


# 2 × 7 tokens: tiles of 2 × 2, of which the last is padded, and of 2 × 1.
@pytest.mark.parametrize(("tile", "quant"), [(4, QuantConfig()), (1, None)])
def test_loss_and_gradients_are_those_without_tiles(tile, quant):
    one = loss_and_gradient(decoder(quant=quant))()
    other = loss_and_gradient(decoder(quant=quant, mlp_tile=tile))()
    for ours, theirs in zip(other, one, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_gradients_of_16_bit_adapters_are_summed_over_tiles_in_float32():
    whole, tiled = (loss_and_gradient(decoder(jnp.bfloat16, mlp_tile=each))() for each in (None, 2))
    for one, other in zip(whole, tiled, strict=True):
        # A rounding at the end, and none at each of the seven tiles.
        assert np.abs(other - one).max() <= 2**-8 * np.abs(one).max()


def test_two_tiles_of_the_same_tokens_drop_other_units():
    half = jax.random.normal(jax.random.key(2), (1, 4, 32))
    layer = jax.tree.map(lambda leaf: leaf[0], nnx.state(decoder().layers))
    mlp = nnx.merge(nnx.graphdef(decoder().layers), layer).mlp
    keys = {name: jax.random.key(i) for i, name in enumerate(CONFIG.mlp_linears)}
    found = by_tile(mlp, jnp.tile(half, (1, 2, 1)), dropout_keys=keys, tile=4)
    assert np.abs(found[:, :4] - found[:, 4:]).max() > 1e-3
    same = by_tile(mlp, jnp.tile(half, (1, 2, 1)), dropout_keys=dict.fromkeys(keys), tile=4)
    np.testing.assert_array_equal(same[:, :4], same[:, 4:])


def test_tiles_drop_units_by_the_key():
    function = loss_and_gradient(decoder(mlp_tile=4))
    first, again, other = (function(jax.random.key(seed)) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert first[0] != other[0]


def test_a_tile_of_nothing_is_refused():
    with pytest.raises(ValueError, match="mlp_tile is 0, but at least 1 token is needed"):
        decoder(mlp_tile=0).hidden(IDS)


def test_a_mixture_of_experts_is_refused():
    config = dataclasses.replace(CONFIG, num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(ValueError, match="mlp_tile is 4, but a mixture of experts"):
        Decoder(config, lora=None, mlp_tile=4, rngs=nnx.Rngs(0))
