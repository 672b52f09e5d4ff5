"""What crosses the bus: the count from the traced step, by hand from shapes, and in the compiled
program's own copies."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.cards import CARDS
from pallas_kernels.compile_for import compile_lowered, lower_for, with_memory_kinds
from qlora_jax.nn import LoraConfig
from qlora_jax.plan import Workload, find_config
from qlora_jax.plan.workload import training_step
from qlora_jax.train import Crossing, HostTraffic, TrainConfig, host_traffic
from tests.memory.goals import needs_compiler

LAYERS, EMBED, INNER, RANK, ROWS, TOKENS, MICRO = 3, 512, 1024, 8, 2, 64, 4
CONFIG = find_config(
    {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": EMBED,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
    }
)
ADAPTERS = LAYERS * RANK * (4 * 2 * EMBED + 3 * (EMBED + INNER))
WEIGHTS = 4 * EMBED * EMBED + 3 * EMBED * INNER
INPUT = ROWS * TOKENS * EMBED * 2  # what enters a layer, in bfloat16


def step_of(*, micro_batches=1, **options):
    train = TrainConfig(
        micro_batch_size=ROWS,
        gradient_accumulation_steps=micro_batches,
        gradients_on_host=micro_batches > 1,
        page_min_size=1,
        optim=options.pop("optim", "adamw"),
        master_weights=options.pop("master_weights", False),
        paged=options.pop("paged", True),
    )
    lora = LoraConfig(r=RANK, dtype=jnp.float32)
    work = Workload(CONFIG, sequence=TOKENS, train=train, lora=lora, matmul="xla", **options)
    return training_step(work)


def counted(**options) -> HostTraffic:
    step = step_of(**options)
    return host_traffic(step.program.fn, *step.placed)


@pytest.mark.parametrize(
    ("options", "copies"),
    [
        pytest.param({}, 2, marks=pytest.mark.slow),
        pytest.param({"optim": "lion"}, 1, marks=pytest.mark.slow),
        ({"master_weights": True}, 3),
        ({"paged": False}, 0),
    ],
)
def test_paged_state_comes_in_and_goes_out_once(options, copies):
    size = 4 * copies * ADAPTERS
    assert counted(**options) == HostTraffic(paged_state=Crossing(size, size))


def test_sums_of_gradients_cross_with_every_micro_batch():
    # Zeros go out once, and the mean takes the sums in once more.
    size = (MICRO + 1) * 4 * ADAPTERS
    assert counted(micro_batches=MICRO, paged=False) == HostTraffic(
        gradient_sums=Crossing(size, size)
    )


def test_offloaded_inputs_cross_with_every_micro_batch():
    size = MICRO * LAYERS * INPUT
    found = counted(micro_batches=MICRO, paged=False, remat="offload")
    assert found.activations == Crossing(size, size)
    assert found.to_device == found.activations.to_device + found.gradient_sums.to_device


def test_streamed_weights_come_in_twice_and_one_layer_more():
    found = counted(paged=False, stream_weights=True)
    # Codes alone are large enough here to be worth a transfer: 4 bits a weight.
    assert found == HostTraffic(streamed_weights=Crossing((2 * LAYERS + 1) * WEIGHTS // 2, 0))
    # The last layer's input is fetched before the backward loop, and the first one's twice.
    offloaded = step_of(paged=False, stream_weights=True, remat="offload")
    found = host_traffic(offloaded.program.fn, *offloaded.placed)
    assert found.activations == Crossing((LAYERS + 1) * INPUT, LAYERS * INPUT)
    stays = step_of(paged=False, stream_weights=True)
    assert stays.saved - offloaded.saved == LAYERS * INPUT


@needs_compiler
@pytest.mark.slow
def test_the_compiled_program_copies_as_much():
    step = step_of(micro_batches=MICRO, stream_weights=True, remat="offload")
    found = host_traffic(step.program.fn, *step.placed)
    lowered = lower_for(CARDS["l40"], step.program.fn, *step.program.args)
    marked = with_memory_kinds(lowered, *step.program.kinds)
    compiled = compile_lowered(marked, dict(step.program.options))
    to_device, to_host = copies_in(compiled.as_text())
    assert to_device == found.to_device
    # Sums that begin as the same zeros, of one shape, go out but once.
    assert found.to_host - 4 * ADAPTERS < to_host <= found.to_host


_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_COPY = re.compile(r"\s+(?:ROOT )?%?(\S+) = \((.*?)\) (copy|fusion)-start\(")


def copies_in(text: str) -> tuple[int, int]:
    """(bytes to the device, bytes to the host) of a compiled program's asynchronous copies.

    Host memory has the colour 5. A copy is of a whole array, or a slice of a stack: then it is an
    asynchronous fusion, which either reads a slice of its first operand or writes its second one
    into that. What a loop's body copies counts for every turn.
    """
    bodies = {}
    for part in re.split(r"\n(?=%?\S+ \(|ENTRY )", text):
        if head := re.match(r"(ENTRY )?%?(\S+) ", part):
            bodies["ENTRY" if head[1] else head[2]] = part

    def walk(name: str, turns: int) -> tuple[int, int]:
        into = out = 0
        for line in bodies[name].splitlines():
            if loop := re.search(r" while\(.*body=%?([\w.-]+)", line):
                count = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                inner = walk(loop[1], turns * int(count[1]))
                into, out = into + inner[0], out + inner[1]
            elif copy := _COPY.match(line):
                arrays = [(_bytes(m), "S(5)" in (m[3] or "")) for m in _SHAPE.finditer(copy[2])]
                if copy[3] == "copy":
                    (size, to_host), (_, from_host) = arrays[:2]
                elif "update" in copy[1]:
                    (_, to_host), (size, from_host) = arrays[:2]
                else:
                    (_, from_host), (size, to_host) = arrays[0], arrays[-2]
                if to_host and not from_host:
                    out += turns * size
                elif from_host and not to_host:
                    into += turns * size
        return into, out

    return walk("ENTRY", 1)


def _bytes(shape: re.Match) -> int:
    kind = {"f": "float", "s": "int", "u": "uint"}.get(shape[1][0])
    if shape[1] in ("pred", "bf16"):
        width = {"pred": 1, "bf16": 2}[shape[1]]
    else:
        width = jax.numpy.dtype(f"{kind}{shape[1][1:]}").itemsize
    return width * math.prod(int(n) for n in shape[2].split(",") if n)
