"""What each memory switch saves, from the compiler's own report for a card (none is needed)."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from pallas_kernels.cards import CARDS
from pallas_kernels.compile_for import PLUGIN_HINT, compile_for, gpu_compiler_available
from qlora_jax.models import (
    DecoderConfig,
    chunked_attention,
    chunked_cross_entropy,
    cross_entropy,
)
from qlora_jax.models.mlp import MLP
from qlora_jax.models.remat import run_layers
from qlora_jax.models.stack import Storage
from qlora_jax.models.tile import by_tile
from qlora_jax.nn import LoraConfig

pytestmark = pytest.mark.skipif(
    not gpu_compiler_available(), reason=f"no GPU compiler here. {PLUGIN_HINT}"
)


def test_chunked_cross_entropy_holds_one_chunk_of_logits():
    tokens, embed, vocab, chunk = 8192, 256, 32000, 512
    hidden = jax.ShapeDtypeStruct((1, tokens, embed), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((vocab, embed), jnp.bfloat16)
    targets = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

    def head(weight):
        return lambda x: jnp.einsum("...e,ve->...v", x, weight, preferred_element_type=jnp.float32)

    def whole(hidden, weight, targets):
        return cross_entropy(head(weight)(hidden), targets).sum()

    def by_chunk(hidden, weight, targets):
        return chunked_cross_entropy(head(weight), hidden, targets, chunk=chunk)

    def temporaries(function):
        compiled = compile_for(CARDS["l40"], jax.value_and_grad(function), hidden, weight, targets)
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 4 * vocab * chunk
    assert temporaries(whole) >= 4 * vocab * tokens
    # The chunk's logits, their gradient, and arrays of the hidden states' size.
    assert temporaries(by_chunk) <= 3 * logits + 6 * tokens * embed * 2


def test_chunked_attention_is_linear_in_the_sequence():
    def temporaries(length):
        query = jax.ShapeDtypeStruct((1, length, 32, 128), jnp.bfloat16)
        key = jax.ShapeDtypeStruct((1, length, 8, 128), jnp.bfloat16)

        def total(query, key, value):
            return chunked_attention(query, key, value, causal=True).astype(jnp.float32).sum()

        compiled = compile_for(CARDS["l40"], jax.grad(total, (0, 1, 2)), query, key, key)
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(8192), temporaries(32768)
    # Llama 3 8B's heads at 32k tokens: the scores alone would be 64 GiB in bfloat16.
    assert short < long <= 4 * short
    assert long < 2**30


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_recomputed_layers_keep_nothing_of_all_pairs(remat):
    layers, length, heads, dim = 2, 4096, 2, 64

    def total(x, weights):
        def step(x, frozen, weight):
            heads_of_x = (x * weight).reshape(1, length, heads, dim)
            mixed = chunked_attention(heads_of_x, heads_of_x, heads_of_x, causal=True)
            return x + mixed.reshape(x.shape), None

        y, _ = run_layers(step, x, (), weights, remat=remat)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    x = jax.ShapeDtypeStruct((1, length, heads * dim), jnp.bfloat16)
    weights = jax.ShapeDtypeStruct((layers, heads * dim), jnp.bfloat16)
    memory = compile_for(CARDS["l40"], jax.grad(total, 1), x, weights).memory_analysis()
    # 36 pairs of blocks of 512, two heads: 18 MiB of masks, 72 MiB of scores.
    assert memory.temp_size_in_bytes < 20 * 2**20


def test_an_mlp_in_tiles_holds_a_tile():
    tokens, embed, inner, tile = 8192, 256, 2048, 1024
    config = DecoderConfig(
        vocab_size=32,
        hidden_size=embed,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
    )
    storage = Storage(None, LoraConfig(r=4), jnp.bfloat16, jnp.bfloat16, None)
    shapes = nnx.eval_shape(lambda: MLP(config, storage.dense("mlp", nnx.Rngs(0))))
    graphdef, lora, frozen = nnx.split(shapes, nnx.LoRAParam, ...)
    keys = dict.fromkeys(config.mlp_linears)
    x = jax.ShapeDtypeStruct((1, tokens, embed), jnp.bfloat16)

    def temporaries(tiled):
        def total(lora, frozen, x):
            mlp = nnx.merge(graphdef, lora, frozen)
            if tiled:
                y = by_tile(mlp, x, dropout_keys=keys, tile=tile)
            else:
                y = mlp(x, dropout_keys=keys)
            return jnp.sum(y.astype(jnp.float32) ** 2)

        compiled = compile_for(CARDS["l40"], jax.grad(total, (0, 2)), lora, frozen, x)
        return compiled.memory_analysis().temp_size_in_bytes

    whole, part = 2 * tokens * inner, 2 * tile * inner
    assert temporaries(False) >= 3 * whole
    # Gate, up, their product and its kin of one tile, and arrays as large as x.
    assert temporaries(True) <= 8 * part + 6 * 2 * tokens * embed


def test_offloaded_layer_inputs_land_in_host_memory():
    layers, tokens, embed = 8, 2048, 1024

    def temporaries(remat):
        def total(x, weights):
            def step(x, frozen, weight):
                return x + jnp.tanh(x @ weight) @ weight.T, None

            y, _ = run_layers(step, x, (), weights, remat=remat)
            return jnp.sum(y.astype(jnp.float32) ** 2)

        x = jax.ShapeDtypeStruct((1, tokens, embed), jnp.bfloat16)
        weights = jax.ShapeDtypeStruct((layers, embed, embed), jnp.bfloat16)
        memory = compile_for(CARDS["l40"], jax.grad(total, 1), x, weights).memory_analysis()
        return memory.temp_size_in_bytes, memory.host_temp_size_in_bytes

    kept = layers * tokens * embed * 2
    (device, host), (freed, offloaded) = temporaries("full"), temporaries("offload")
    assert (host, offloaded) == (0, kept)
    # All inputs but the two that are on their way.
    assert device - freed >= kept - 2 * kept // layers
