"""A model on several devices writes what it writes on one, in batches that divide or do not."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from qlora_jax.generate import GenerationConfig, generate
from qlora_jax.models import Decoder, DecoderConfig, spread
from qlora_jax.quant import QuantConfig

CONFIG = DecoderConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
)
PROMPTS = [[3], [5, 6, 7, 8, 9], [1, 2], [10, 11, 12], [40] * 7]
MESH = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.mark.slow
def test_a_spread_model_writes_the_same():
    model = Decoder(
        CONFIG, quant=QuantConfig(), lora=None, compute_dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    config = GenerationConfig(max_new_tokens=6)
    seen = []

    def watch(index, tokens):
        seen.append(index)
        return index == 0 and len(tokens) > 2

    def write(batch_size):
        options = {"batch_size": batch_size, "on_tokens": watch, "every": 2}
        return generate(model, PROMPTS, config, **options)

    one = write(4)
    spread(model, MESH, over="data")
    assert write(4) == one
    assert write(3) == one
    assert len(one[0].tokens) < 6
    assert set(seen) == set(range(len(PROMPTS)))
