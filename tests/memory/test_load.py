"""Loading: never more on the device than the model and two of its tensors."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from pallas_kernels.cards import CARDS
from qlora_jax.checkpoints import fill, load_model, save_model
from qlora_jax.models import Decoder, DecoderConfig
from qlora_jax.nn import LoraConfig
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


@pytest.mark.parametrize("quant", [QuantConfig(), None])
def test_arrays_alive_while_loading_are_the_model_and_two_tensors(quant, tmp_path, monkeypatch):
    config = DecoderConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    save_model(
        tmp_path,
        Decoder(config, compute_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)),
        max_shard_size="1MB",
    )
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    largest = 2 * config.vocab_size * config.hidden_size  # the embedding, in bfloat16
    others = jax.live_arrays()  # kept, so that none of their ids is given to another array
    before = set(map(id, others))
    most = 0

    def alive() -> int:
        nonlocal most
        now = sum(array.nbytes for array in jax.live_arrays() if id(array) not in before)
        most = max(most, now)
        return now

    put = fill.put

    def watched(*args):
        alive()
        result = put(*args)
        alive()
        return result

    monkeypatch.setattr(fill, "put", watched)
    model = load_model(tmp_path, quant=quant, lora=LoraConfig(r=4))
    alive()
    final = tree_bytes(nnx.state(model))
    assert final < most <= final + 2 * largest
