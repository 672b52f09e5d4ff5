"""A decoding step writes one slot of its cache, and holds nothing of the cache's size beside it."""

import jax.numpy as jnp
import pytest

from pallas_kernels.cards import CARDS
from qlora_jax.nn import LoraConfig
from qlora_jax.plan import Workload, find_config, program_bytes
from qlora_jax.plan.workload import decoding_step, tree_bytes
from tests.memory.goals import GIB, needs_compiler


@needs_compiler
@pytest.mark.parametrize(
    ("model", "batch"),
    [
        ("llama-3-8b", 1),
        ("llama-65b", 8),
        pytest.param("llama-65b", 1, marks=pytest.mark.slow),
        pytest.param("t5-11b", 1, marks=pytest.mark.slow),
    ],
)
def test_the_cache_is_read_where_it_lies(model, batch):
    # Several heads to a key, one, several texts, two caches: XLA would like another order of axes
    # for each.
    lora = LoraConfig(dtype=jnp.bfloat16)
    work = Workload(find_config(model), attention="xla", lora=lora)
    program = decoding_step(work, batch=batch, length=2048)
    lora, frozen, _, cache = program.args
    found = program_bytes(program, CARDS["l40"])
    assert found.aliased >= tree_bytes(cache) - 2**20
    # One decoded weight of a head or a layer, at most; twice the cache would be 5, 0.5, 40 and 7.5.
    assert found.temporaries < 0.1 * GIB
    assert found.device < tree_bytes((lora, frozen, cache)) + 0.1 * GIB


@needs_compiler
def test_float32_adapters_are_there_in_16_bits_as_well():
    program = decoding_step(
        Workload(find_config("llama-3-8b"), attention="xla"), batch=1, length=64
    )
    found = program_bytes(program, CARDS["l40"])
    cast = tree_bytes(program.args[0]) / 2
    assert cast > 0.3 * GIB
    assert cast <= found.temporaries < cast + 0.1 * GIB
