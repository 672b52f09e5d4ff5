"""Layers updated in the backward pass end where the ordinary step ends."""

import dataclasses
import io
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from rich.console import Console

from qlora_jax.models import Decoder, DecoderConfig, streaming, unfreeze
from qlora_jax.nn import LoraConfig
from qlora_jax.optim import eight_bit, paged
from qlora_jax.quant import QuantConfig
from qlora_jax.train import TrainConfig, fit, init_state, make_train_step
from tests.train.toy import Toy, ToyBatches, toy_loss

CONFIG = DecoderConfig(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
IDS = np.random.default_rng(0).integers(0, 32, (2, 6)).astype(np.int32)
LABELS = np.where(np.arange(6) < 2, -100, IDS)
PLAIN: dict[str, Any] = {"max_grad_norm": None, "page_min_size": 0, "learning_rate": 1e-2}


class Batch(NamedTuple):
    input_ids: Any
    labels: Any


BATCH = Batch(IDS[None], LABELS[None])


def decoder(dtype=jnp.float32, *, outside: bool = False, host: bool = False, **lora) -> Decoder:
    """With a B that is not zero, so that A takes a gradient."""
    options = LoraConfig(r=2, lora_dropout=0.2, dtype=dtype, **lora)
    model = Decoder(CONFIG, quant=QuantConfig(), lora=options, matmul="xla", rngs=nnx.Rngs(0))
    if outside:
        unfreeze(model.norm)
        unfreeze(model.lm_head)
        unfreeze(model.layers.input_layernorm)
    state = nnx.state(model, nnx.LoRAParam)
    rng = np.random.default_rng(1)
    moved = jax.tree.map(lambda x: (x + 0.1 * rng.normal(size=x.shape)).astype(x.dtype), state)
    nnx.update(model, moved)
    if host:
        streaming.move_to_host(model.layers)
        model.stream_weights = True
    return model


def trained(model: Decoder, config: TrainConfig, *, steps: int = 2, batch: Any = BATCH):
    graphdef, lora, frozen = nnx.split(model, nnx.LoRAParam, ...)
    tx = config.optimizer()
    state = init_state(lora, tx, seed=0)
    step = make_train_step(
        graphdef,
        tx,
        learning_rate=config.learning_rates(),
        update_in_backward=config.update_in_backward,
        state=state,
    )
    metrics = []
    for _ in range(steps):
        state, told = step(state, frozen, batch)
        metrics.append(jax.device_get(told))
    return state._replace(rng=jax.random.key_data(state.rng)), metrics


def same(found: Any, expected: Any, **tolerance: float) -> None:
    """The same structure, dtypes, memory, and numbers: to the bit where no tolerance is given."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if isinstance(a, jax.Array):
            assert a.sharding.memory_kind == b.sharding.memory_kind
        a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
        np.testing.assert_allclose(a, b, **({"rtol": 0.0} | tolerance))


# A float32 number may end one unit in its last place away: XLA fuses the arithmetic of a layer's
# update otherwise than that of the whole stack's.
ROUNDING = {"rtol": 1e-5, "atol": 1e-7}


@pytest.mark.parametrize(
    ("model", "options", "tolerance"),
    [
        ({"outside": True}, {"weight_decay": 0.1, "schedule": "cosine", "warmup_steps": 1}, ROUNDING),
        pytest.param({"use_dora": True}, {"paged": False}, ROUNDING, marks=pytest.mark.slow),
        (
            {"dtype": jnp.bfloat16},
            {"optim": "lion", "master_weights": True, "weight_decay": 0.1},
            {},
        ),
    ],
    ids=["adamw, head trained", "dora, unpaged", "lion, master weights"],
)
def test_it_ends_where_the_ordinary_step_ends(model, options, tolerance):
    config = TrainConfig(**PLAIN, **options)
    expected, told = trained(decoder(**model), config)
    in_backward = dataclasses.replace(config, update_in_backward=True)
    found, tells = trained(decoder(**model), in_backward)
    same(found, expected, **tolerance)
    for a, b in zip(tells, told, strict=True):
        assert a.tokens == b.tokens
        assert a.learning_rate == b.learning_rate
        np.testing.assert_allclose(a.loss, b.loss, rtol=1e-6)
        # The ordinary one adds bfloat16 gradients' squares in bfloat16.
        narrow = model.get("dtype") == jnp.bfloat16
        np.testing.assert_allclose(a.grad_norm, b.grad_norm, rtol=1e-2 if narrow else 1e-5)


def test_streamed_weights_and_offloaded_inputs_give_the_same_bits(monkeypatch):
    monkeypatch.setattr(streaming, "MIN_STREAM_BYTES", 256)
    config = TrainConfig(**PLAIN, update_in_backward=True)
    expected = trained(decoder(), config)
    streamed = decoder(host=True)
    streamed.remat = "offload"
    same(trained(streamed, config), expected)
