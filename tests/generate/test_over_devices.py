"""Writing on several devices: what they send each other for a token."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.generate import GenerationConfig, decode, generate
from qlora_jax.models import DecoderConfig, spread, spread_rows
from qlora_jax.nn import LoraConfig
from qlora_jax.quant import QuantConfig
from tests.random_decoder import random_decoder

DEVICES, BATCH, LENGTH = 4, 8, 40
CONFIG = DecoderConfig(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=64,
)
MESH = jax.make_mesh(
    (DEVICES,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:DEVICES]
)
GREEDY = GenerationConfig(max_new_tokens=8, temperature=0.0)
SAMPLED = GenerationConfig(max_new_tokens=8, temperature=0.7, top_k=20, top_p=0.9)


def model():
    return random_decoder(CONFIG, quant=QuantConfig(), lora=LoraConfig(r=4))


@pytest.mark.parametrize(
    ("over", "config"),
    [
        (None, GREEDY),
        ("data", GREEDY),
        pytest.param("data", SAMPLED, marks=pytest.mark.slow),
    ],
)
def test_caches_and_vocabulary_stay_where_they_lie(over, config):
    """Each device has the cache of its own rows; a cut vocabulary is read by columns."""
    spread_model = model()
    spread(spread_model, MESH, over=over)
    graphdef, state = nnx.split(spread_model)
    ids, mask = np.ones((BATCH, 16), np.int32), np.ones((BATCH, 16), bool)
    given = (ids, mask, jax.random.split(jax.random.key(0), BATCH), np.zeros(BATCH, bool))
    written = decode.start(
        graphdef, state, *spread_rows(given, state), cache_length=LENGTH, config=config
    )
    assert written.cache.key.sharding.spec == jax.P(None, "data")
    program = decode.advance.lower(graphdef, state, written, jnp.int32(8), config=config).compile()
    sent = re.findall(
        r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-reduce|all-to-all)\(", program.as_text()
    )
    sizes = [math.prod(int(size) for size in shape.split(",") if size) for shape in sent]
    if over is None:
        assert sizes == [1], "whether all rows have ended"
    # The least of what must not be sent is one layer's keys, of all rows.
    assert max(sizes) < BATCH * 256 * LENGTH


@pytest.mark.slow
def test_the_same_tokens_as_on_one_device():
    """Beside `test_devices`: with adapters, whole and cut weights."""
    prompts = [list(range(5, 5 + length)) for length in (3, 9, 4, 7)]
    alone = generate(model(), prompts, GREEDY, batch_size=4)
    for over in (None, "data"):
        spread_model = model()
        spread(spread_model, MESH, over=over)
        assert generate(spread_model, prompts, GREEDY, batch_size=4) == alone
