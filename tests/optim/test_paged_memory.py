"""Where XLA puts paged state on a card, from its own buffer assignment (no card needed)."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

from pallas_kernels.cards import CARDS
from pallas_kernels.compile_for import (
    PLUGIN_HINT,
    compile_for,
    compile_lowered,
    gpu_compiler_available,
    lower_for,
    with_memory_kinds,
)
from qlora_jax.evaluate import split_adapters
from qlora_jax.optim import paged
from qlora_jax.train import TrainConfig, init_state, make_train_step
from tests.train.toy import Toy, ToyBatches, toy_loss

pytestmark = pytest.mark.skipif(
    not gpu_compiler_available(), reason=f"no GPU compiler here. {PLUGIN_HINT}"
)

COUNT, SHAPE = 12, (1024, 1024)
LEAF = 4 * SHAPE[0] * SHAPE[1]


def _compile(card: str, inner: optax.GradientTransformation, *, host: bool = False):
    tx = optax.chain(optax.clip_by_global_norm(0.3), inner)
    params = {f"p{i:02d}": jax.ShapeDtypeStruct(SHAPE, jnp.float32) for i in range(COUNT)}
    state = jax.eval_shape(tx.init, params)

    def step(params, state, scale):
        grads = jax.tree.map(lambda p: jnp.sin(p * scale), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    scale = jax.ShapeDtypeStruct((), jnp.float32)
    lowered = lower_for(CARDS[card], jax.jit(step, donate_argnums=(0, 1)), params, state, scale)
    if not host:
        return compile_lowered(with_memory_kinds(lowered))
    kinds = jax.tree.map(lambda leaf: "pinned_host" if leaf.shape == SHAPE else "device", state)
    marked = with_memory_kinds(lowered, ("device", kinds, "device"), ("device", kinds))
    return compile_lowered(marked)


@pytest.mark.parametrize("card", ["l40", "h200"])
def test_state_lies_on_the_host_and_only_a_leaf_or_two_visit_the_card(card):
    compiled = _compile(card, paged(optax.adamw(1e-3)), host=True)
    memory = compiled.memory_analysis()
    moments = 2 * COUNT * LEAF
    assert memory.host_argument_size_in_bytes == moments
    # Updated in place: no second copy of the state on the host.
    assert memory.host_alias_size_in_bytes == moments
    assert memory.host_temp_size_in_bytes == 0
    # Beside what the unpaged step needs: the moments and updates of two parameters, of twelve.
    unpaged = _compile(card, optax.adamw(1e-3)).memory_analysis()
    assert memory.temp_size_in_bytes <= unpaged.temp_size_in_bytes + 6 * LEAF + 2**16
    assert unpaged.argument_size_in_bytes - memory.argument_size_in_bytes == moments
    # Every moment crosses in both directions by a copy of its own that computation may overlap.
    starts = re.findall(
        r"= \((f32\[1024,1024\]\S+), (f32\[1024,1024\]\S+), .*copy-start\(", compiled.as_text()
    )
    to_card = [pair for pair in starts if "S(5)" in pair[1] and "S(5)" not in pair[0]]
    to_host = [pair for pair in starts if "S(5)" in pair[0] and "S(5)" not in pair[1]]
    assert len(to_card) == len(to_host) == 2 * COUNT


def test_small_leaves_stay_on_the_card():
    memory = _compile("l40", paged(optax.adamw(1e-3), min_size=SHAPE[0] * SHAPE[1] + 1))
    assert memory.memory_analysis().host_argument_size_in_bytes == 0


def test_the_whole_training_step_pages_its_state():
    graphdef, lora, frozen = split_adapters(Toy())
    config = TrainConfig(micro_batch_size=4, gradient_accumulation_steps=2, page_min_size=0)
    tx = config.optimizer()
    state = jax.eval_shape(lambda lora: init_state(lora, tx, seed=0), lora)
    step = make_train_step(graphdef, tx, toy_loss)
    memory = compile_for(CARDS["l40"], step, state, frozen, ToyBatches(2, 4).at(0))
    moments = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(lora))
    assert memory.memory_analysis().host_argument_size_in_bytes == moments
    assert memory.memory_analysis().host_alias_size_in_bytes == moments
