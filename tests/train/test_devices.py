"""Training on several devices ends where training on one ends, with weights cut or whole."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.evaluate import causal_lm_loss
from qlora_jax.models import Decoder, DecoderConfig, spread
from qlora_jax.nn import LoraConfig
from qlora_jax.quant import QuantConfig, rows
from qlora_jax.train import TrainConfig, init_state, make_train_step
from qlora_jax.train.checkpoint import Checkpoints

LAYERS, VOCAB, EMBED = 2, 80, 64
CONFIG = DecoderConfig(
    vocab_size=VOCAB,
    hidden_size=EMBED,
    intermediate_size=96,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
)
IDS = np.random.default_rng(0).integers(0, VOCAB, (1, 8, 12)).astype(np.int32)


class Batch(NamedTuple):
    input_ids: Any
    labels: Any


class Run(NamedTuple):
    start: Any
    state: Any
    losses: list[float]
    step: Any
    """(state) -> (state, metrics)."""
    hlo: str
    frozen: Any


@pytest.fixture(autouse=True)
def several_pieces(monkeypatch):
    """The head's table is decoded 16 rows at a time: a piece is no device's part of the rows."""
    monkeypatch.setattr(rows, "PIECE", 16 * EMBED)


@functools.cache
def run(placing: str) -> Run:
    """Two steps with a packed vocabulary, MLPs in tiles, and updates in the backward pass."""
    lora = LoraConfig(r=4, target_modules=("q_proj", "down_proj"))
    model = Decoder(
        CONFIG,
        quant=QuantConfig(),
        lora=lora,
        embedding_bits=8,
        mlp_tile=32,
        matmul="xla",
        rngs=nnx.Rngs(0),
    )
    rng = np.random.default_rng(1)
    # With a B that is not zero, so that A takes a gradient.
    state = nnx.state(model, nnx.LoRAParam)
    nnx.update(model, jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape), state))
    batch = Batch(IDS, np.where(np.arange(12) < 2, -100, IDS))
    if placing != "one":
        mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        spread(model, mesh, over="data" if placing == "cut" else None)
        by_rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
        batch = jax.device_put(batch, by_rows)
    graphdef, lora, frozen = nnx.split(model, nnx.LoRAParam, ...)
    config = TrainConfig(
        max_grad_norm=None, page_min_size=0, learning_rate=1e-2, update_in_backward=True
    )
    tx = config.optimizer()
    state = init_state(lora, tx, seed=0)
    step = make_train_step(graphdef, tx, causal_lm_loss, update_in_backward=True, state=state)
    compiled = step.lower(state, frozen, batch).compile()
    start = jax.tree.map(jnp.copy, state)
    losses = []
    for _ in range(2):
        state, told = compiled(state, frozen, batch)
        losses.append(float(told.loss))
    hlo = compiled.as_text()
    return Run(start, state, losses, lambda s: compiled(s, frozen, batch), hlo, frozen)


@pytest.mark.slow
@pytest.mark.parametrize("placing", ["cut", "whole"])
def test_losses_and_adapters_are_those_of_one_device(placing, tmp_path):
    one, many = run("one"), run(placing)
    np.testing.assert_allclose(many.losses, one.losses, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(one.state.lora), jax.tree.leaves(many.state.lora), strict=True):
        # Sums over inputs and tokens are split over devices: another order of addition.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        assert b.sharding.is_fully_replicated == (placing == "whole")
    for leaf in jax.tree.leaves(many.state.opt_state):
        assert leaf.sharding.memory_kind == ("pinned_host" if leaf.ndim else "device")
        assert leaf.sharding.is_fully_replicated == (placing == "whole" or not leaf.ndim)
    if placing == "cut":
        _each_device_computes_its_rows(many)
    _resumes(many, tmp_path)


def _each_device_computes_its_rows(run: Run) -> None:
    """Weights come packed, a layer at a time, and no activations of the batch are brought together.

    What is gathered are codes of one layer, its absmax codes and adapters, pieces of the packed
    vocabulary, and the batch itself.
    """
    gathered = {
        (dtype, tuple(map(int, shape.split(","))))
        for dtype, shape in re.findall(r"= (\w+)\[([\d,]+)\]\S* all-gather\(", run.hlo)
    }
    stacks = {leaf.shape for leaf in jax.tree.leaves(run.frozen) if leaf.dtype == jnp.uint8}
    stacks = {shape for shape in stacks if len(shape) == 3}
    assert {("u8", (1, *shape[1:])) for shape in stacks} <= gathered
    assert not {("u8", shape) for shape in stacks} & gathered
    width = CONFIG.intermediate_size
    dense = {(EMBED, EMBED), (width, EMBED), (EMBED, width), (VOCAB, EMBED)}
    batch = (*IDS.shape[1:], EMBED), (*IDS.shape[1:], width)
    floats = {shape for dtype, shape in gathered if dtype in ("f32", "bf16")}
    assert not floats & {*dense, *((1, *shape) for shape in dense), *batch}


def _resumes(run: Run, folder) -> None:
    """A checkpoint is read back to where the state lay, and the next step has the same bits."""
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(run.state)
        restored = checkpoints.restore(run.start)
    for a, b in zip(jax.tree.leaves(run.state), jax.tree.leaves(restored), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
        assert a.sharding.memory_kind == b.sharding.memory_kind
    ahead = [run.step(jax.tree.map(jnp.copy, state))[0].lora for state in (restored, run.state)]
    for a, b in zip(*map(jax.tree.leaves, ahead), strict=True):
        np.testing.assert_array_equal(a, b)
