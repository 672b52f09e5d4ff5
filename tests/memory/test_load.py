"""Loading: never more on the device than the model and two of its tensors."""

import jax
import pytest

from pallas_kernels.cards import CARDS
from qlora_jax.plan import Workload, find_config, program_bytes
from qlora_jax.plan.workload import largest_load, tree_bytes
from qlora_jax.quant import QuantConfig
from tests.memory.goals import needs_compiler


@needs_compiler
@pytest.mark.parametrize("quant", [QuantConfig(), None])
def test_a_tensor_goes_into_its_stack_in_place(quant):
    program = largest_load(Workload(find_config("llama-7b"), quant=quant))
    stack, tensor, _ = program.args
    found = program_bytes(program, CARDS["l40"])
    # The stack is updated in place: no second one, not even for a moment.
    assert found.aliased >= tree_bytes(stack)
    # Beside it lie the tensor and, while it is quantized, less than another.
    assert found.temporaries <= tree_bytes(tensor)
    assert found.device <= tree_bytes(stack) + 2 * tree_bytes(tensor)
    assert all(leaf.shape[0] == 32 for leaf in jax.tree.leaves(stack))
