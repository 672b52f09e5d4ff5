"""A step whose frozen layers stream from the host, as compiled for cards too small for them."""

import re

import jax.numpy as jnp
import pytest

from pallas_kernels.cards import CARDS
from pallas_kernels.compile_for import compile_lowered, lower_for, with_memory_kinds
from qlora_jax.models import streaming
from qlora_jax.models.stream_cost import PCIE, stream_cost
from qlora_jax.nn import LoraConfig
from qlora_jax.plan import USABLE, Workload, find_config
from qlora_jax.plan.workload import model_shapes, training_step
from tests.memory.goals import GIB, needs_compiler


def workload(model: str, rank: int) -> Workload:
    """One example of 512 tokens, bfloat16 adapters, layers and Adam's moments on the host."""
    return Workload(
        find_config(model),
        lora=LoraConfig(r=rank, dtype=jnp.bfloat16),
        stream_weights=True,
        attention="xla",
        matmul="xla",
    )


def compile_step(model: str, card: str, rank: int):
    step = training_step(workload(model, rank))
    lowered = lower_for(CARDS[card], step.program.fn, *step.program.args)
    marked = with_memory_kinds(lowered, *step.program.kinds)
    return compile_lowered(marked, dict(step.program.options))


def device_bytes(compiled) -> int:
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def schedules(compiled) -> list[str]:
    """The loops that fetch weights, in the order they run: < starts a copy, > awaits it, M is a
    product."""
    found = []
    for body in re.split(r"\n(?=%?\S+ \(|ENTRY )", compiled.as_text()):
        names = re.findall(r"^\s+(?:ROOT )?%([\w.-]+) = ", body, re.MULTILINE)
        marks = "".join(
            mark
            for name in names
            for mark, pattern in (
                ("<", r"dynamic-slice-start"),
                (">", r"dynamic-slice-done"),
                ("M", r"gemm|custom-call"),
            )
            if re.match(pattern, name)
        )
        # The entry fetches the first layer, before any product.
        if marks.count("<") >= 7 and not body.startswith("ENTRY"):
            found.append(marks)
    return found


@needs_compiler
@pytest.mark.slow
def test_65b_fits_a_12_gb_card():
    compiled = compile_step("llama-65b", "rtx-3060", rank=64)
    # Resident, the frozen layers alone are 31.1 GiB.
    assert device_bytes(compiled) <= 7 * GIB < USABLE * CARDS["rtx-3060"].memory
    memory = compiled.memory_analysis()
    moments = memory.host_alias_size_in_bytes
    assert memory.host_argument_size_in_bytes - moments == pytest.approx(31.1 * GIB, rel=0.01)
    # Two loops, forward and backward. In each, every copy begins before the layer's last product
    # and none is awaited before it: the next layer's weights come in while this one computes.
    loops = schedules(compiled)
    assert len(loops) == 2
    for marks in loops:
        assert marks.rindex("<") < marks.rindex("M") < marks.index(">")
    assert loops[0].index("<") < loops[0].index("M")


@needs_compiler
@pytest.mark.slow
def test_405b_fits_a_24_gb_card():
    compiled = compile_step("llama-3-405b", "rtx-4090", rank=16)
    assert device_bytes(compiled) <= 18 * GIB < USABLE * CARDS["rtx-4090"].memory
    memory = compiled.memory_analysis()
    host = memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes
    assert host <= 196 * GIB
    with pytest.raises(ValueError, match=streaming.HOST_LIMIT):
        streaming.check_host_memory_limit(host, "gpu")


def test_the_cost_of_streaming_65b():
    cost = stream_cost(model_shapes(workload("llama-65b", 64)), sequence=512)
    assert cost.host == pytest.approx(31.1 * GIB, rel=0.01)
    # Twice, and one layer more.
    assert cost.transfer == pytest.approx(cost.host * (2 + 1 / 80), rel=1e-6)
    # By hand: 64.8e9 frozen weights thrice, 0.8e9 adapter weights four times, the head's
    # 0.26e9 twice, attention of 256 keys on average; two operations each.
    by_hand = 2 * (3 * 64.76e9 + 4 * 0.8e9 + 2 * 0.262e9 + 4 * 2 * 256 * 8192 * 80)
    assert cost.flops_per_token == pytest.approx(by_hand, rel=0.01)
    needed = [cost.tokens_to_hide(CARDS["rtx-4090"], PCIE[generation]) for generation in (3, 4, 5)]
    assert needed == sorted(needed, reverse=True)
    card, bandwidth = CARDS["rtx-4090"], PCIE[4]
    assert cost.seconds_of_compute(needed[1], card) >= cost.seconds_of_transfer(bandwidth)
    assert cost.seconds_of_compute(needed[1] - 1, card) < cost.seconds_of_transfer(bandwidth)
