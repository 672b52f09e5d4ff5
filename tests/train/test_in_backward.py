"""Layers updated in the backward pass end where the ordinary step ends."""

import dataclasses
import functools
import io
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from rich.console import Console

from qlora_jax.data import Seq2SeqBatch
from qlora_jax.evaluate import causal_lm_loss, seq2seq_lm_loss
from qlora_jax.models import (
    Decoder,
    DecoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    streaming,
    unfreeze,
)
from qlora_jax.nn import LoraConfig
from qlora_jax.optim import eight_bit, paged
from qlora_jax.quant import QuantConfig
from qlora_jax.train import TrainConfig, fit, init_state, make_train_step
from tests.random_decoder import random_decoder
from tests.train.toy import Toy, ToyBatches, toy_loss

# Two programs are compared to the last bits, so they are compiled as a user's are.
pytestmark = pytest.mark.optimized

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
QUIET = Console(file=io.StringIO())


def decoder(
    dtype=jnp.float32,
    *,
    quant: QuantConfig | None = None,
    outside: bool = False,
    host: bool = False,
    **lora,
) -> Decoder:
    """With a B that is not zero, so that A takes a gradient."""
    options = LoraConfig(
        r=2, lora_dropout=0.2, dtype=dtype, target_modules=("q_proj", "down_proj"), **lora
    )
    made: dict[str, Any] = {"quant": quant, "lora": options, "matmul": "xla"}
    if options.use_dora:
        model = Decoder(CONFIG, **made, rngs=nnx.Rngs(0))
    else:
        model = random_decoder(CONFIG, **made)
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


def trained(model: Any, config: TrainConfig, *, batch: Any = BATCH, loss_fn: Any = causal_lm_loss):
    """The state after two steps, and their metrics."""
    graphdef, lora, frozen = nnx.split(model, nnx.LoRAParam, ...)
    tx = config.optimizer()
    state = init_state(lora, tx, seed=0)
    step = make_train_step(
        graphdef,
        tx,
        loss_fn,
        learning_rate=config.learning_rates(),
        update_in_backward=config.update_in_backward,
        state=state,
    )
    metrics = []
    for _ in range(2):
        state, told = step(state, frozen, batch)
        metrics.append(jax.device_get(told))
    return state._replace(rng=jax.random.key_data(state.rng)), metrics


# AdamW where more is between than one rounding of the second moment: a longer run, or T5.
ROUNDING = {"rtol": 5e-7, "atol": 5e-7}


def same(found: Any, expected: Any, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    """The same structure, dtypes and memory; the same bits, where no tolerance is given."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if isinstance(a, jax.Array):
            assert a.sharding.memory_kind == b.sharding.memory_kind
        a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


@functools.cache
def ordinary_and_in_backward(name: str):
    """(model, configuration) of a case, trained either way."""
    model, options = CASES[name]
    config = TrainConfig(**PLAIN, **options)
    in_backward = dataclasses.replace(config, update_in_backward=True)
    return trained(decoder(**model), config), trained(decoder(**model), in_backward)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "adamw, a head trained beside": ({"quant": QuantConfig(), "outside": True}, {}),
    "lion, 16 bits with master weights": (
        {"dtype": jnp.bfloat16},
        {"optim": "lion", "master_weights": True, "weight_decay": 0.1, "loraplus_lr_ratio": 4.0},
    ),
    "adamw, dora, decay, not paged": (
        {"use_dora": True},
        {"paged": False, "weight_decay": 0.1, "schedule": "cosine", "warmup_steps": 1},
    ),
}
FAST = {"adamw, a head trained beside"}


def within_one_rounding(found: Any, expected: Any) -> None:
    """After two steps of AdamW, whose second moment is rounded otherwise (`in_backward.py`)."""
    adam, ordinary = found.opt_state[0], expected.opt_state[0]
    same(adam._replace(nu=None), ordinary._replace(nu=None))
    for a, b in zip(jax.tree.leaves(adam.nu), jax.tree.leaves(ordinary.nu), strict=True):
        np.testing.assert_array_max_ulp(np.asarray(a), np.asarray(b), maxulp=1)
    # An update is at most some learning rates long, and so is what its last place comes to.
    ulp, rate = 2.0**-23, PLAIN["learning_rate"]
    same(found.lora, expected.lora, rtol=ulp, atol=4 * rate * ulp)


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_it_ends_where_the_ordinary_step_ends(name):
    (expected, told), (found, tells) = ordinary_and_in_backward(name)
    if "lion" in name:
        same(found, expected)
    else:
        within_one_rounding(found, expected)
    for a, b in zip(tells, told, strict=True):
        assert (a.tokens, a.learning_rate) == (b.tokens, b.learning_rate)
        np.testing.assert_allclose(a.loss, b.loss, rtol=1e-6)
        # Squares are added up layer by layer, always in float32: the ordinary norm of bfloat16
        # gradients adds them in bfloat16.
        np.testing.assert_allclose(a.grad_norm, b.grad_norm, rtol=1e-2 if "16" in name else 1e-6)


def test_streamed_weights_and_offloaded_inputs_give_the_same_bits(monkeypatch):
    monkeypatch.setattr(streaming, "MIN_STREAM_BYTES", 256)
    name = "adamw, a head trained beside"
    model, options = CASES[name]
    streamed = decoder(**model, host=True)
    streamed.remat = "offload"
    config = TrainConfig(**PLAIN, **options, update_in_backward=True)
    same(trained(streamed, config)[0], ordinary_and_in_backward(name)[1][0])


@pytest.mark.slow
def test_an_encoder_decoder_learns_in_both_stacks():
    def run(in_backward: bool):
        config = EncoderDecoderConfig(
            vocab_size=32,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=2,
        )
        lora = LoraConfig(r=2, target_modules=("q",))
        model = EncoderDecoder(config, lora=lora, rngs=nnx.Rngs(0))
        real = np.ones(IDS.shape, bool)
        batch = Seq2SeqBatch(*(x[None] for x in (IDS, real, LABELS)))
        options = TrainConfig(**PLAIN, update_in_backward=in_backward)
        return trained(model, options, batch=batch, loss_fn=seq2seq_lm_loss)[0]

    same(run(True), run(False), **ROUNDING)


class Cut(Exception):
    pass


@pytest.mark.slow
def test_a_run_is_resumed_with_the_switch_turned(tmp_path):
    class Batches:
        def __init__(self, start: int, end: int):
            self.start, self.end = start, end

        def at(self, step: int) -> Batch:
            # The first is looked at whenever a run goes on: it tells a folder's run from others.
            assert step == 0 or step >= self.start, "the run began anew"
            if step >= self.end:
                raise Cut
            ids = (IDS + step) % 32
            return Batch(ids, np.where(LABELS < 0, -100, ids))

    def run(folder: str, start: int, end: int, in_backward: bool) -> Any:
        config = TrainConfig(
            **PLAIN, steps=4, save_every=2, micro_batch_size=2, update_in_backward=in_backward
        )
        model = decoder()
        fit(model, Batches(start, end), config, run_folder=tmp_path / folder, console=QUIET)
        return nnx.state(model, nnx.LoRAParam)

    with pytest.raises(Cut):
        run("cut", 0, 2, False)
    same(run("cut", 2, 4, True), run("whole", 0, 4, False), **ROUNDING)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": 0.3}, "max_grad_norm=0.3 needs all gradients first: set it to None"),
        ({"max_grad_norm": None, "gradient_accumulation_steps": 2}, "set it to 1"),
        ({"max_grad_norm": None, "optim": "lion_8bit"}, "set it to 'lion'"),
    ],
)
def test_a_configuration_that_needs_all_gradients_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(update_in_backward=True, **options)


def traced(model: Any, tx: optax.GradientTransformation, loss_fn=causal_lm_loss, batch=BATCH):
    graphdef, lora, frozen = nnx.split(model, nnx.LoRAParam, ...)
    state = jax.eval_shape(lambda lora: init_state(lora, tx, seed=0), lora)
    make_train_step(graphdef, tx, loss_fn, update_in_backward=True).trace(state, frozen, batch)


def twice(model, batch, key, /):
    total, count = causal_lm_loss(model, batch, key)
    return total + causal_lm_loss(model, batch, key)[0], count


def weighted(model, batch, key, /):
    total, _ = causal_lm_loss(model, batch, key)
    return total, (total > 0).astype(jnp.int32)


def has_three_axes(tree):
    return jax.tree.map(lambda leaf: leaf.ndim == 3, tree)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tx": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))},
            "treats every number alone",
        ),
        ({"tx": optax.lamb(1e-3)}, "treats every number alone"),
        # Decays stacks, and not their layers.
        ({"tx": optax.adamw(1e-3, mask=has_three_axes)}, "treats every number alone"),
        ({"tx": eight_bit(optax.adamw(1e-3), min_size=1)}, "take AdamW or Lion in 32 bits"),
        ({"remat": "dots"}, "give remat='full' or 'offload', or leave update_in_backward out"),
        ({"loss_fn": twice}, "exactly once, but the given one runs some 2 times"),
        ({"loss_fn": weighted}, "count them from the batch alone"),
        ({"batch": Batch(*(np.stack([x, x]) for x in (IDS, LABELS)))}, "2 micro-batches"),
    ],
)
def test_what_does_not_go_with_it_is_refused_while_tracing(change, message):
    change = dict(change)
    model = decoder()
    model.remat = change.pop("remat", "full")
    with pytest.raises(ValueError, match=message):
        traced(model, **({"tx": paged(optax.adamw(1e-3))} | change))


def test_a_model_without_stacked_layers_is_refused():
    with pytest.raises(ValueError, match="no trained parameter lies in a stack of layers"):
        traced(Toy(), optax.adamw(1e-3), toy_loss, ToyBatches(1, 4).at(0))
