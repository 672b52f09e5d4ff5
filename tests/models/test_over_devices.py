"""Models of every kind, their weights cut over devices: loss and gradients of one device.

`tests/train/test_devices.py` trains one of them, and looks at what is exchanged.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from qlora_jax.data import Batch, Seq2SeqBatch
from qlora_jax.evaluate import loss_for
from qlora_jax.models import (
    Decoder,
    DecoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    spread,
    spread_rows,
    streaming,
)
from qlora_jax.nn import LoraConfig
from qlora_jax.quant import QuantConfig

MESH = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
QUANT = QuantConfig()
LORA = LoraConfig(r=4)
VOCAB = 48
DECODER = DecoderConfig(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
)
T5 = EncoderDecoderConfig(
    vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_decoder_layers=2, num_heads=4
)


def streamed() -> Decoder:
    model = Decoder(DECODER, quant=QUANT, lora=LORA, stream_weights=True, rngs=nnx.Rngs(0))
    streaming.move_to_host(model.layers)
    return model


def experts() -> Decoder:
    config = dataclasses.replace(DECODER, num_local_experts=4, num_experts_per_tok=2)
    return Decoder(config, quant=QUANT, lora=LORA, rngs=nnx.Rngs(0))


def dora() -> Decoder:
    lora = dataclasses.replace(LORA, use_dora=True)
    return Decoder(DECODER, quant=QUANT, lora=lora, rngs=nnx.Rngs(0))


def alibi() -> Decoder:
    config = dataclasses.replace(DECODER, rope=None, alibi=True, embedding_norm=True)
    model = Decoder(config, quant=QUANT, lora=LORA, stream_weights=True, rngs=nnx.Rngs(0))
    streaming.move_to_host(model.layers)
    return model


def heads_normalised_as_one() -> Decoder:
    config = dataclasses.replace(
        DECODER,
        qk_norm="all",
        residual="after",
        rope_layers=(True, False),
        residual_multiplier=0.5,
        logits_scaling=3.0,
    )
    model = Decoder(config, quant=QUANT, lora=LORA, stream_weights=True, rngs=nnx.Rngs(0))
    streaming.move_to_host(model.layers)
    return model


def dense() -> Decoder:
    return Decoder(DECODER, lora=LORA, rngs=nnx.Rngs(0))


def encoder_decoder() -> EncoderDecoder:
    return EncoderDecoder(T5, quant=QUANT, lora=LORA, rngs=nnx.Rngs(0))


def a_batch(model: Any) -> Any:
    rng = np.random.default_rng(0)
    ids = rng.integers(2, VOCAB, (8, 12)).astype(np.int32)
    # Rows of 5, 6, … tokens.
    mask = np.arange(12) < np.arange(5, 13)[:, None]
    if isinstance(model, EncoderDecoder):
        return Seq2SeqBatch(ids, mask, np.where(mask, ids, -100)[:, ::-1][:, :9])
    return Batch(ids, np.where(mask & (np.arange(12) > 0), ids, -100), mask)


def loss_and_gradient(model: Any) -> tuple[Any, Any]:
    step, arguments = of_loss(model)
    return step(*arguments)


def of_loss(model: Any) -> tuple[Any, tuple[Any, Any, Any]]:
    # With a B that is not zero, so that A takes a gradient.
    rng = np.random.default_rng(1)
    adapters = nnx.state(model, nnx.LoRAParam)
    moved = jax.tree.map(
        lambda x: jax.device_put(np.asarray(x) + 0.1 * rng.normal(size=x.shape), x.sharding),
        adapters,
    )
    graphdef, _, rest = nnx.split(model, nnx.LoRAParam, ...)
    batch = spread_rows(a_batch(model), rest)
    loss_fn = loss_for(model)

    @jax.jit
    def run(lora: Any, rest: Any, batch: Any) -> tuple[Any, Any]:
        def mean(lora: Any) -> Any:
            total, count = loss_fn(nnx.merge(graphdef, lora, rest), batch, None)
            return total / count

        return jax.value_and_grad(mean)(lora)

    return run, (moved, rest, batch)


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(experts, marks=pytest.mark.slow),
        dense,
        alibi,
        pytest.param(streamed, marks=pytest.mark.slow),
        pytest.param(dora, marks=pytest.mark.slow),
        pytest.param(heads_normalised_as_one, marks=pytest.mark.slow),
        pytest.param(encoder_decoder, marks=pytest.mark.slow),
    ],
)
def test_as_on_one_device(build: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "MIN_STREAM_BYTES", 256)
    loss, gradient = loss_and_gradient(build())
    model = build()
    spread(model, MESH, over="data")
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(nnx.state(model)))
    found, ours = loss_and_gradient(model)
    np.testing.assert_allclose(found, loss, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_each_device_routes_its_own_tokens() -> None:
    model = experts()
    spread(model, MESH)
    step, arguments = of_loss(model)
    program = step.lower(*arguments).compile().as_text()
    # Two experts for each of 96 tokens, 24 a device, in blocks of a fourth of them for an expert.
    assert "f32[12,128]" in program
    assert "f32[48,128]" not in program
