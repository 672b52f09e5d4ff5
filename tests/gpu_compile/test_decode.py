"""A decode step, compiled for cards: of each weight the codes are read once, where they lie."""

import dataclasses
import re

import pytest

from pallas_kernels import compile_for as harness
from pallas_kernels.cards import CARDS
from qlora_jax.plan import Workload, find_config
from qlora_jax.plan.workload import decoding_step

pytestmark = pytest.mark.skipif(
    not harness.gpu_compiler_available(), reason=f"no GPU compiler here. {harness.PLUGIN_HINT}"
)

LINEARS = 7


@pytest.mark.parametrize(
    ("card", "batch"),
    [
        ("l40", 1),
        pytest.param("a100-80", 1, marks=pytest.mark.slow),
        pytest.param("rtx-4090", 8, marks=pytest.mark.slow),
    ],
)
def test_layers_are_read_in_their_stacks(card, batch):
    """XLA would copy a layer's slice for a Triton-lowered kernel: read, write, read again."""
    config = dataclasses.replace(find_config("llama-2-7b"), num_hidden_layers=2)
    step = decoding_step(Workload(config, 512), CARDS[card], batch=batch, length=512)
    compiled, kernels = harness.inspect_kernels(CARDS[card], step.fn, *step.args)
    hlo = compiled.as_text()
    assert len(re.findall("__gpu[$]xla.gpu.triton", hlo)) == LINEARS
    assert not re.findall(r"u8\[[\d,]*\]\S* dynamic-slice", hlo)
    # Less than the codes of the smallest weight.
    assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 4096 // 2
    own = [code for code in kernels if code.name.startswith("nf4")]
    assert own
    for code in own:
        assert code.spill_bytes in (0, None)
        if batch == 1:
            assert re.search(r"ld\.global[\w.:]*\.v4\.[bu]32", code.ptx)
