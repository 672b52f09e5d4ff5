"""Decoding through the cache against full forward passes of the same model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.models import Decoder, DecoderConfig, RopeConfig
from qlora_jax.nn import LoraConfig, QuantDense
from qlora_jax.quant import QuantConfig
from tests.random_decoder import random_decoder

PLAIN = DecoderConfig(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=16,
)
MIXED = dataclasses.replace(
    PLAIN,
    sliding_window=3,
    layer_types=("sliding_attention", "full_attention", "sliding_attention"),
    local_rope=RopeConfig(rope_theta=100.0),
    attn_logit_softcapping=5.0,
)
# A Mistral: no layer sees everything.
NEAR = dataclasses.replace(PLAIN, sliding_window=3)
ALIBI = dataclasses.replace(PLAIN, rope=None, alibi=True, embedding_norm=True)
# Norms behind each half, and a layer that does not turn.
BEHIND = dataclasses.replace(
    PLAIN,
    residual="after",
    qk_norm="all",
    rope_layers=(True, False, True),
    residual_multiplier=0.5,
    logits_scaling=3.0,
)
PROMPTS = ([5, 6, 7, 8, 9], [3, 4])
SIDES = ("left", "right")
NEW = 6


def padded(side: str) -> tuple[jax.Array, jax.Array]:
    width = max(map(len, PROMPTS))
    ids, mask = np.full((2, width), 1, np.int32), np.zeros((2, width), np.int32)
    for row, prompt in enumerate(PROMPTS):
        start = width - len(prompt) if side == "left" else 0
        ids[row, start : start + len(prompt)] = prompt
        mask[row, start : start + len(prompt)] = 1
    return jnp.asarray(ids), jnp.asarray(mask)


@jax.jit
def full(model: Decoder, ids: jax.Array) -> jax.Array:
    return model(ids)


@jax.jit
def decode(model: Decoder, tokens: jax.Array, cache) -> tuple:
    return model.decode_step(tokens, cache)


@pytest.mark.parametrize(
    ("config", "side"),
    [
        *((config, side) for config in (PLAIN, MIXED, ALIBI) for side in SIDES),
        (NEAR, "right"),
        (BEHIND, "left"),
    ],
    ids=[
        *(f"{name}-{side}" for name in ("plain", "mixed", "alibi") for side in SIDES),
        "near",
        "behind",
    ],
)
def test_greedy_decoding_equals_full_forward_passes(config, side):
    model = random_decoder(config)
    ids, mask = padded(side)
    prefill = jax.jit(Decoder.prefill, static_argnames="cache_length")
    length = ids.shape[1] + NEW
    logits, cache = prefill(model, ids, mask, cache_length=length)
    texts = [list(prompt) for prompt in PROMPTS]
    for _ in range(NEW):
        # Causality: what follows a text does not matter, so that one shape serves all lengths.
        rows = jnp.asarray([text + [0] * (length - len(text)) for text in texts])
        expected = np.asarray(full(model, rows))[[0, 1], [len(text) - 1 for text in texts]]
        np.testing.assert_allclose(logits, expected, atol=1e-5)
        tokens = expected.argmax(axis=-1)
        np.testing.assert_array_equal(np.asarray(logits).argmax(axis=-1), tokens)
        for text, token in zip(texts, tokens, strict=True):
            text.append(int(token))
        logits, cache = decode(model, jnp.asarray(tokens, jnp.int32), cache)
    assert int(cache.filled) == cache.length == length
    np.testing.assert_array_equal(cache.positions, [5 + NEW, 2 + NEW])
    # A step too many is loud.
    logits, _ = decode(model, jnp.zeros(2, jnp.int32), cache)
    assert np.isnan(logits).all()


def test_decoding_in_float16_on_a_cpu():
    model = random_decoder(PLAIN, compute_dtype=jnp.float16, attention="chunked")
    exact = random_decoder(PLAIN)
    ids, mask = padded("left")
    logits, cache = model.prefill(ids, mask, cache_length=6)
    expected, exact_cache = exact.prefill(ids, mask, cache_length=6)
    np.testing.assert_allclose(logits, expected, atol=5e-3)
    tokens = jnp.asarray([4, 5], jnp.int32)
    logits, _ = decode(model, tokens, cache)
    expected, _ = decode(exact, tokens, exact_cache)
    np.testing.assert_allclose(logits, expected, atol=5e-3)


@pytest.mark.optimized
def test_weights_that_stay_in_their_stacks(monkeypatch):
    """As Triton's kernels read them: the same to the bit, here by XLA."""
    model = random_decoder(PLAIN, quant=QuantConfig(blocksize=32), lora=LoraConfig(r=2))
    prefill = jax.jit(lambda model: model.prefill(*padded("left"), cache_length=8))
    logits, cache = prefill(model)
    tokens = logits.argmax(axis=-1).astype(jnp.int32)
    sliced = jax.jit(lambda model: model.decode_step(tokens, cache))(model)
    asked = []

    def stays(layer: QuantDense, rows: int) -> bool:
        asked.append((layer.stack_shape, rows))
        return True

    monkeypatch.setattr(QuantDense, "stays_in_stack", stays)
    in_place = jax.jit(lambda model: model.decode_step(tokens, cache))(model)
    assert asked == [((3,), len(tokens))] * 7
    jax.tree.map(np.testing.assert_array_equal, in_place, sliced)


def test_the_cache_has_to_hold_the_prompt():
    model = nnx.eval_shape(lambda: Decoder(PLAIN, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="cache_length is 3, but the prompt has 5 slots"):
        jax.eval_shape(lambda model: model.prefill(*padded("left"), cache_length=3), model)


def test_layers_that_slide_have_a_window():
    """Or a step of decoding would read the slots that are not filled yet."""
    for types in (("sliding_attention",) * 3, MIXED.layer_types):
        with pytest.raises(ValueError, match="but sliding_window is None"):
            dataclasses.replace(PLAIN, layer_types=types)


def test_one_program_for_any_depth():
    def length(depth: int) -> int:
        config = dataclasses.replace(PLAIN, num_hidden_layers=depth)
        model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))

        def both(model: Decoder, ids: jax.Array) -> jax.Array:
            logits, cache = model.prefill(ids, cache_length=8)
            return model.decode_step(logits.argmax(axis=-1).astype(jnp.int32), cache)

        return str(jax.make_jaxpr(both)(model, jnp.zeros((1, 4), jnp.int32))).count("\n")

    assert length(2) == length(20)


def test_scalings_by_length_take_the_cache_for_it():
    # 14 slots reach beyond the original 8 positions: all keys are turned by the long factors.
    factors = {"short_factor": (1.0,) * 4, "long_factor": (1.0, 2.0, 3.0, 4.0)}
    rope = RopeConfig(
        rope_type="longrope", factor=2.0, original_max_position_embeddings=8, **factors
    )
    model = random_decoder(dataclasses.replace(PLAIN, rope=rope))
    text = jnp.asarray([[4, 9, 2, 7, 1, 3, 8, 6, 5, 2, 4, 9, 3, 1]], jnp.int32)
    prefill = jax.jit(Decoder.prefill, static_argnames="cache_length")
    logits, cache = prefill(model, text[:, :6], cache_length=14)
    for token in text[0, 6:]:
        logits, cache = decode(model, token[None], cache)
    np.testing.assert_allclose(logits, full(model, text)[:, -1], atol=1e-5)
