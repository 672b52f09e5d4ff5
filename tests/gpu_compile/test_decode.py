"""A decode step, compiled for cards: of each weight the codes are read once, where they lie."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from pallas_kernels import compile_for as harness
from pallas_kernels._table import TABLE, using_table
from pallas_kernels.cards import CARDS
from qlora_jax.evaluate import split_adapters
from qlora_jax.generate import GenerationConfig
from qlora_jax.generate.decode import advance, start
from qlora_jax.models import attend, attention, stack
from qlora_jax.nn import LoraConfig, QuantDense
from qlora_jax.plan import Workload, find_config
from qlora_jax.plan.workload import decoding_step, model_shapes, traced_for

pytestmark = pytest.mark.skipif(
    not harness.gpu_compiler_available(), reason=f"no GPU compiler here. {harness.PLUGIN_HINT}"
)

LINEARS = 7

COPIED = jax.__version_info__ < (0, 11)
"""Whether XLA copies the slice of a stack that a Mosaic GPU kernel reads."""


def compiled_step(card, batch, model="llama-2-7b", layers=2):
    """The program for one token of a model's first layers, its kernels, and its slices of codes.

    Adapters are in the compute dtype: a step by itself would hold others twice.
    """
    config = dataclasses.replace(find_config(model), num_hidden_layers=layers)
    work = Workload(config, 512, lora=LoraConfig(dtype=jnp.bfloat16), attention="chunked")
    step = decoding_step(work, CARDS[card], batch=batch, length=512)
    compiled, kernels = harness.inspect_kernels(CARDS[card], step.fn, *step.args)
    hlo = compiled.as_text()
    assert len(re.findall("__gpu[$]xla.gpu.triton|mosaic_gpu_v2", hlo)) == LINEARS
    own = [code for code in kernels if code.name.startswith("nf4")]
    assert own
    assert all(code.spill_bytes in (0, None) for code in own)
    return compiled, own, re.findall(r"u8\[([\d,]*)\]\S* dynamic-slice", hlo)


@pytest.mark.parametrize(
    ("card", "batch"),
    [
        ("l40", 1),
        ("h200", 1),
        pytest.param("a100-80", 1, marks=pytest.mark.slow),
        pytest.param("rtx-4090", 8, marks=pytest.mark.slow),
    ],
)
def test_layers_are_read_in_their_stacks(card, batch):
    """XLA would copy a layer's slice for a Triton-lowered kernel, and before jax 0.11 for any:
    read, write, read again. Since then, what it slices for a Hopper kernel it does not copy."""
    compiled, kernels, slices = compiled_step(card, batch)
    assert not slices or (card == "h200" and not COPIED)
    # Less than the codes of the smallest weight; of one row, less than a tenth of a megabyte, and
    # with newer JAX the MLP's two vectors beside one another.
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    newer = jax.__version_info__ >= ((0, 11) if card == "a100-80" else (0, 12))
    vectors = 2 * 2 * 11008 if newer else 0
    assert temporaries < (10**5 + vectors if batch == 1 else 4096 * 4096 // 2)
    if batch == 1:
        assert all(re.search(r"ld\.global[\w.:]*\.v4\.[bu]32", code.ptx) for code in kernels)


@pytest.mark.slow
def test_slices_would_be_copied(monkeypatch):
    """What the test above is against: codes and absmax codes of each weight, copied."""
    monkeypatch.setattr(QuantDense, "stays_in_stack", lambda *_: False)
    compiled, _, slices = compiled_step("l40", 1)
    assert len(slices) == 2 * LINEARS
    assert compiled.memory_analysis().temp_size_in_bytes > 11008 * 4096 // 2


IN_PLACE = pytest.mark.skipif(COPIED, reason="XLA copies a layer's adapters for a kernel, then")


@pytest.mark.parametrize(
    ("card", "adapter", "most"),
    [
        ("l40", "after", 31),
        pytest.param("h200", "after", 31 if COPIED else 30, marks=pytest.mark.slow),
        pytest.param("h200", "inside", 23, marks=IN_PLACE),
        pytest.param("l40", "inside", 23, marks=[IN_PLACE, pytest.mark.slow]),
    ],
)
def test_launches_of_a_layer(card, adapter, most, tmp_path):
    """Of one layer of Llama-2-7B in the loop that writes, by XLA's account of it.

    Seven are products with W. The adapters are neither cast nor scaled for every token.
    """
    rules = [rule | {"fuse_lora": adapter == "inside"} for rule in json.loads(TABLE.read_text())]
    told = tmp_path / "rules.json"
    told.write_text(json.dumps(rules))
    config = dataclasses.replace(find_config("llama-2-7b"), num_hidden_layers=2)
    graphdef, *states = split_adapters(
        model_shapes(Workload(config, 512, attention="chunked"), None)
    )
    asked, row = GenerationConfig(max_new_tokens=32), jax.ShapeDtypeStruct((1,), jnp.bool_)
    ids = jax.ShapeDtypeStruct((1, 32), jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))

    def begin(state, ids, keys, ended):
        real = jnp.ones(ids.shape, bool)
        return start(graphdef, state, ids, real, keys, ended, config=asked, cache_length=64)

    def go_on(state, written):
        return advance(graphdef, state, written, jnp.int32(8), config=asked)

    state = nnx.merge_state(*states)
    with using_table(told), traced_for(CARDS[card], 1):
        written = jax.eval_shape(begin, state, ids, keys, row)
        compiled, _ = harness.inspect_kernels(CARDS[card], go_on, state, written)
    loops = {
        computation: len(re.findall(r" (?:fusion|custom-call|copy|dynamic-slice)\(", computation))
        for computation in compiled.as_text().split("\n\n")
        if computation.strip().startswith("%region")
    }
    layer = max(loops, key=loops.__getitem__)
    assert LINEARS < loops[layer] <= most
    # Stacks of A and B, of rank 64, in the loop that reads them.
    adapters = re.findall(r"(\w+)\[2,(?:64,\d{4,}|\d{4,},64)\]", layer)
    assert set(adapters) == {"bf16"}


EXPERT = 14336 * 4096 // 2
"""Bytes of codes of one of an expert's three weights, in Mixtral 8x7B."""


def of_experts(slices):
    """Those that are cut out of stacks of experts: of one expert, or of a layer's eight."""
    return [shape for shape in slices if re.search("14336|7168|917504", shape)]


@pytest.mark.parametrize(
    ("card", "batch", "layers"),
    [
        ("l40", 1, 2),
        ("h200", 1, 2),
        pytest.param("rtx-4090", 8, 2, marks=pytest.mark.slow),
        # Stacks of 7.5 GB: more than 32 bits count.
        pytest.param("l40", 1, 32, marks=pytest.mark.slow),
        pytest.param("h200", 16, 32, marks=pytest.mark.slow),
    ],
)
def test_experts_are_read_in_their_stacks(card, batch, layers):
    """Though the loop over a layer's experts is in the loop over layers."""
    compiled, kernels, slices = compiled_step(card, batch, "mixtral-8x7b", layers)
    assert not of_experts(slices)
    # Of one row less than a layer's keys and values, 2.1 MB.
    most = 2 * 10**6 if batch == 1 else 1.25 * EXPERT
    assert compiled.memory_analysis().temp_size_in_bytes < most
    if layers == 32:
        in_64_bits = rf"m(ul|ad)\.(wide\.[us]32|lo\.[us]64)[^;]*, {EXPERT}\b"
        assert any(re.search(in_64_bits, code.ptx) for code in kernels)


@pytest.mark.slow
def test_an_expert_is_copied_where_its_stack_is_too_large_to_count_in():
    """2.8 GB. What is copied is an expert's, codes and absmax codes."""
    compiled, _, slices = compiled_step("l40", 1, "mixtral-8x7b", layers=12)
    assert sorted(of_experts(slices)) == sorted(
        ["1,14336,2048"] * 2 + ["1,4096,7168"] + ["1,917504"] * 3
    )
    assert compiled.memory_analysis().temp_size_in_bytes < 1.25 * EXPERT


@pytest.mark.slow
@pytest.mark.parametrize("card", ["l40", "h200"])
def test_all_experts_of_a_layer_would_be_copied(card, monkeypatch):
    """What the tests above are against: the inner loop would be handed the layer's part."""
    monkeypatch.setattr(stack, "_stay", lambda *_: set())
    compiled, _, slices = compiled_step(card, 1, "mixtral-8x7b")
    assert of_experts(slices).count("1,8,14336,2048") == 2
    assert compiled.memory_analysis().temp_size_in_bytes > 3 * 8 * EXPERT


@pytest.mark.parametrize(
    ("card", "apart"),
    [
        ("l40", True),
        pytest.param("h200", True, marks=pytest.mark.slow),
        pytest.param("l40", False, marks=pytest.mark.slow),
    ],
)
def test_grouped_keys_and_values_are_read_in_the_cache(card, apart, monkeypatch):
    """XLA would copy a layer's for the product with a group's four heads."""
    if not apart:
        monkeypatch.setattr(attention, "APART", 0)
    config = dataclasses.replace(find_config("llama-3-8b"), num_hidden_layers=2)
    work = Workload(config, 4096, lora=LoraConfig(dtype=jnp.bfloat16), attention="chunked")
    step = decoding_step(work, CARDS[card], batch=8, length=4096)
    temporaries = harness.compile_for(CARDS[card], step.fn, *step.args).memory_analysis()
    of_a_layer = 2 * 2 * 8 * 4096 * config.num_key_value_heads * config.head_dim
    assert (temporaries.temp_size_in_bytes < of_a_layer / 3) is apart


@pytest.mark.parametrize(
    ("card", "dtype", "implementation", "groups"),
    [("t4", jnp.bfloat16, "chunked", 4), ("a100-40", jnp.float16, "cudnn", 8)],
)
def test_one_query_is_mixed_where_xla_lacks_the_product_that_jax_names(
    card, dtype, implementation, groups
):
    query = jax.ShapeDtypeStruct((2, 1, 8, 64), dtype)
    keys = jax.ShapeDtypeStruct((2, 256, groups, 64), dtype)

    def mixed(query, key, value):
        return attend(query, key, value, causal=False, implementation=implementation)

    harness.compile_for(CARDS[card], mixed, query, keys, keys)
