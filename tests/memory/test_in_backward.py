"""Where layers are updated in the backward pass, the compiler holds one layer's gradients."""

import dataclasses
import re

import jax.numpy as jnp
import pytest

from pallas_kernels.cards import CARDS
from pallas_kernels.compile_for import compile_lowered, lower_for, with_memory_kinds
from qlora_jax.nn import LoraConfig
from qlora_jax.plan import Workload, find_config
from qlora_jax.plan.workload import training_step
from qlora_jax.train import TrainConfig
from tests.memory.goals import GIB, needs_compiler, planned

pytestmark = needs_compiler

LAYERS, RANK = 7, 24


def made_whole(in_backward: bool) -> set[str]:
    """What computes, or copies, an array of all layers' adapters in a small compiled step."""
    config = dataclasses.replace(
        find_config("llama-7b"),
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=512,
    )
    train = TrainConfig(
        micro_batch_size=1, max_grad_norm=None, page_min_size=1, update_in_backward=in_backward
    )
    lora = LoraConfig(r=RANK, target_modules=("q_proj", "down_proj"))
    work = Workload(config, sequence=128, train=train, lora=lora, attention="xla", matmul="xla")
    step = training_step(work)
    lowered = lower_for(CARDS["l40"], step.program.fn, *step.program.args)
    lowered = with_memory_kinds(lowered, *step.program.kinds)
    stack = rf"f32\[{LAYERS},(?:{RANK},\d+|\d+,{RANK})\]"
    made = rf"^\s+(?:ROOT )?%?([\w.-]+) = {stack}\S* ([\w-]+)\("
    passed_on = ("parameter", "get-tuple-element", "bitcast")
    return {
        re.sub(r"[\d.]+$", "", name) if code == "fusion" else code
        for name, code in re.findall(made, compile_lowered(lowered).as_text(), re.MULTILINE)
        if code not in passed_on
    }


@pytest.mark.slow
def test_no_array_of_all_layers_is_made():
    # Each layer's slice is written into the parameters and the moments where they lie.
    writes = {"dynamic-update-slice", "loop_dynamic_update_slice_fusion"}
    assert made_whole(in_backward=True) <= writes


@pytest.mark.slow
def test_the_ordinary_step_makes_some():
    # It begins the gradients with zeros, and fetches whole moments.
    assert {"broadcast", "copy-done"} <= made_whole(in_backward=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "limit"), [(jnp.float32, 37), (jnp.bfloat16, 35.5)], ids=["float32", "bfloat16"]
)
def test_65b_updated_in_the_backward_pass_needs_less(dtype, limit):
    made = planned("llama-65b", "l40", lora_dtype=dtype, update_in_backward=True)
    assert made.device.total <= limit * GIB
    assert made.fits
    assert made.device.gradients == made.device.adapters // 80


@pytest.mark.slow
def test_65b_streams_with_float32_adapters_through_7_gib():
    made = planned("llama-65b", "rtx-4090", stream_weights=True, update_in_backward=True)
    assert made.device.total <= 7 * GIB
