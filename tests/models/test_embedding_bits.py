"""Embedding and head in 8 or 4 bits: the same as a dense model of the numbers that the codes stand
for, in losses, gradients and generation, family by family."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qlora_jax as ql
from qlora_jax.models import (
    FAMILIES,
    Decoder,
    EncoderDecoder,
    next_token_loss,
    seq2seq_loss,
    train_tokens,
    unfreeze,
    vocabularies,
)
from qlora_jax.quant import QuantizedTensor, rows
from tests.checkpoints.tiny import CONFIG
from tests.models.variants import VARIANTS

VOCAB = 40
IDS = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (2, 9)), jnp.int32)
LORA = ql.LoraConfig(r=2, target_modules=("q_proj", "q"))

_T5 = FAMILIES["t5"].read_config(
    {"model_type": "t5", "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48}
    | {"num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
)
CONFIGS = {
    "own head": dataclasses.replace(CONFIG, vocab_size=VOCAB, num_hidden_layers=1),
    "tied": dataclasses.replace(
        CONFIG, vocab_size=VOCAB, num_hidden_layers=1, tie_word_embeddings=True
    ),
    # A scaled embedding, a soft cap over the logits.
    "gemma2": dataclasses.replace(
        VARIANTS["gemma2-plain"], vocab_size=VOCAB, tie_word_embeddings=True
    ),
    "opt": dataclasses.replace(VARIANTS["opt-unbiased"], vocab_size=VOCAB, num_hidden_layers=1),
    # One matrix for encoder, decoder and head; hidden states over √d before it.
    "t5": dataclasses.replace(_T5, tie_word_embeddings=True, scale_decoder_outputs=True),
}


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """Seven rows at a time, so that the last piece of 40 begins early."""
    monkeypatch.setattr(rows, "PIECE", 7 * 32)


def packed(name: str, bits: int):
    return nnx.clone(_built(name, bits))


@functools.cache
def _built(name: str, bits: int):
    build = EncoderDecoder if name == "t5" else Decoder
    options = {"quant": None, "lora": LORA, "embedding_bits": bits, "rngs": nnx.Rngs(0)}
    return build(CONFIGS[name], **options)


def dense_twin(model):
    """The same with dense matrices of the numbers that the codes stand for."""
    twin = nnx.clone(model)
    for embedding in vocabularies(twin).values():
        embedding.weight.set_value(embedding.weight.get_value().dequantize())
    return twin


def loss_and_gradients(model, loss_chunk):
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)

    def loss(lora, rest):
        whole = nnx.merge(graphdef, lora, rest)
        if isinstance(whole, EncoderDecoder):
            return seq2seq_loss(whole, IDS, IDS, loss_chunk=loss_chunk).mean
        return next_token_loss(whole, IDS, IDS, loss_chunk=loss_chunk).mean

    return jax.jit(jax.value_and_grad(loss))(lora, rest)


def assert_equal(model, twin, loss_chunk) -> None:
    (found, ours), (expected, gradients) = (
        loss_and_gradients(each, loss_chunk) for each in (model, twin)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(gradients))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "bits", "loss_chunk"),
    [
        ("own head", 8, 8),
        ("t5", 8, 8),
        pytest.param("gemma2", 4, 8, marks=pytest.mark.slow),
        pytest.param("own head", 4, None, marks=pytest.mark.slow),
        pytest.param("opt", 4, 8, marks=pytest.mark.slow),
    ],
)
def test_losses_and_gradients_are_those_of_the_dense_twin(name, bits, loss_chunk) -> None:
    model = packed(name, bits)
    for embedding in vocabularies(model).values():
        weight = embedding.weight.get_value()
        assert isinstance(weight, QuantizedTensor)
        assert weight.bits_per_weight == bits + 32 / weight.blocksize
    if name == "opt":
        assert isinstance(model.embed_positions.weight.get_value(), jax.Array)
    assert_equal(model, dense_twin(model), loss_chunk)


def test_generation_is_that_of_the_dense_twin() -> None:
    model = packed("own head", 8)

    def scores(model):
        """Behind the prompt, and behind one token more."""
        graphdef, state = nnx.split(model)

        @jax.jit
        def written(state):
            whole = nnx.merge(graphdef, state)
            first, cache = whole.prefill(IDS, cache_length=12)
            return first, whole.decode_step(jnp.asarray([3, 39], jnp.int32), cache)[0]

        return written(state)

    for found, expected in zip(scores(model), scores(dense_twin(model)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_trained_rows_stay_dense() -> None:
    """Grown, then trained: no frozen row moves."""
    model = packed("own head", 8)
    before = model.embed_tokens.weight.get_value()
    ql.resize_token_embeddings(model, VOCAB + 3)
    train_tokens(model, [VOCAB + 1, 5])
    grown = model.embed_tokens.weight.get_value()
    assert (grown.shape, model.config.vocab_size) == ((VOCAB + 3, 32), VOCAB + 3)
    np.testing.assert_array_equal(grown.codes[:VOCAB], before.codes)
    mean = np.asarray(before.dequantize()).mean(0)
    step = np.abs(mean).max() / 127
    np.testing.assert_allclose(grown.dequantize()[VOCAB:], [mean] * 3, atol=0.51 * step)
    moved = model.embed_tokens.token_rows[...] + 0.25
    model.embed_tokens.token_rows.set_value(moved)
    found = model.embed_tokens(jnp.asarray([VOCAB + 1, 5, 6]))
    np.testing.assert_array_equal(found[:2], moved)
    np.testing.assert_array_equal(found[2], before.dequantize()[6])
    # The head has trained rows of its own, beside scores of packed ones.
    assert model.lm_head.shape == (VOCAB + 3, 32)
    hidden = jnp.asarray(np.random.default_rng(1).normal(size=(2, 32)), jnp.float32)
    model.lm_head.token_rows.set_value(moved)
    scores = np.asarray(hidden) @ np.asarray(model.lm_head(jnp.arange(VOCAB + 3))).T
    np.testing.assert_allclose(model.head(hidden), scores, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_gradients_of_trained_rows_are_those_of_the_dense_twin() -> None:
    model = packed("tied", 4)
    train_tokens(model, [7, 5])
    assert_equal(model, dense_twin(model), 8)


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is quantized.*embedding_bits=None"):
        unfreeze(packed("own head", 8))
    with pytest.raises(ValueError, match="is quantized, and codes cannot be trained"):
        ql.add_lora(
            Decoder(CONFIGS["own head"], embedding_bits=8, rngs=nnx.Rngs(0)),
            ql.LoraConfig(target_modules=("q_proj",), modules_to_save=("embed_tokens",)),
            rngs=nnx.Rngs(0),
        )
    narrow = dataclasses.replace(VARIANTS["opt-350m"], word_embed_proj_dim=16)
    with pytest.raises(ValueError, match="rows have 16 numbers"):
        Decoder(narrow, embedding_bits=4, rngs=nnx.Rngs(0))
