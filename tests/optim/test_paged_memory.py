"""Where XLA puts paged state on a card, from its own buffer assignment (no card needed)."""

import jax
import jax.numpy as jnp
import optax
import pytest

from pallas_kernels.cards import CARDS
from pallas_kernels.compile_for import PLUGIN_HINT, compile_for, gpu_compiler_available
from qlora_jax.evaluate import split_adapters
from qlora_jax.optim import paged
from qlora_jax.train import TrainConfig, init_state, make_train_step
from tests.train.toy import Toy, ToyBatches, toy_loss

pytestmark = pytest.mark.skipif(
    not gpu_compiler_available(), reason=f"no GPU compiler here. {PLUGIN_HINT}"
)

COUNT, SHAPE = 12, (1024, 1024)
LEAF = 4 * SHAPE[0] * SHAPE[1]


def _compile(card: str, inner: optax.GradientTransformation):
    tx = optax.chain(optax.clip_by_global_norm(0.3), inner)
    params = {f"p{i:02d}": jax.ShapeDtypeStruct(SHAPE, jnp.float32) for i in range(COUNT)}
    state = jax.eval_shape(tx.init, params)

    def step(params, state, scale):
        grads = jax.tree.map(lambda p: jnp.sin(p * scale), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    scale = jax.ShapeDtypeStruct((), jnp.float32)
    return compile_for(CARDS[card], jax.jit(step, donate_argnums=(0, 1)), params, state, scale)


@pytest.mark.parametrize("card", ["l40", "h200"])
def test_state_lies_on_the_host_and_only_a_leaf_or_two_visit_the_card(card):
    memory = _compile(card, paged(optax.adamw(1e-3))).memory_analysis()
    moments = 2 * COUNT * LEAF
    assert memory.host_argument_size_in_bytes == moments
    # Updated in place: no second copy of the state on the host.
    assert memory.host_alias_size_in_bytes == moments
    assert memory.host_temp_size_in_bytes == 0
    assert memory.argument_size_in_bytes == pytest.approx(COUNT * LEAF, rel=1e-3)
    # Beside what the unpaged step needs: two parameters' pairs of moments, of twelve.
    unpaged = _compile(card, optax.adamw(1e-3)).memory_analysis()
    assert memory.temp_size_in_bytes <= unpaged.temp_size_in_bytes + 4 * LEAF
    assert unpaged.argument_size_in_bytes - memory.argument_size_in_bytes == moments


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
