"""A decode step, compiled for cards: of each weight the codes are read once, where they lie."""

import dataclasses
import re

import pytest

from pallas_kernels import compile_for as harness
from pallas_kernels.cards import CARDS
from qlora_jax.nn import QuantDense
from qlora_jax.plan import Workload, find_config
from qlora_jax.plan.workload import decoding_step

pytestmark = pytest.mark.skipif(
    not harness.gpu_compiler_available(), reason=f"no GPU compiler here. {harness.PLUGIN_HINT}"
)

LINEARS = 7


def compiled_step(card, batch):
    """The program for one token of two layers of Llama-2-7B, its kernels, and its slices of
    codes."""
    config = dataclasses.replace(find_config("llama-2-7b"), num_hidden_layers=2)
    step = decoding_step(Workload(config, 512), CARDS[card], batch=batch, length=512)
    compiled, kernels = harness.inspect_kernels(CARDS[card], step.fn, *step.args)
    hlo = compiled.as_text()
    assert len(re.findall("__gpu[$]xla.gpu.triton", hlo)) == LINEARS
    return compiled, kernels, re.findall(r"u8\[[\d,]*\]\S* dynamic-slice", hlo)


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
    compiled, kernels, slices = compiled_step(card, batch)
    assert not slices
    # Less than the codes of the smallest weight; of one row, less than a tenth of a megabyte.
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    assert temporaries < (10**5 if batch == 1 else 4096 * 4096 // 2)
    own = [code for code in kernels if code.name.startswith("nf4")]
    assert own
    for code in own:
        assert code.spill_bytes in (0, None)
        if batch == 1:
            assert re.search(r"ld\.global[\w.:]*\.v4\.[bu]32", code.ptx)


@pytest.mark.slow
def test_slices_would_be_copied(monkeypatch):
    """What the test above is against: codes and absmax codes of each weight, copied."""
    monkeypatch.setattr(QuantDense, "stays_in_stack", lambda *_: False)
    compiled, _, slices = compiled_step("l40", 1)
    assert len(slices) == 2 * LINEARS
    assert compiled.memory_analysis().temp_size_in_bytes > 11008 * 4096 // 2
