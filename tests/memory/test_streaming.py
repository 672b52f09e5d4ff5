"""A step whose frozen layers stream from the host, as compiled for cards too small for them."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from pallas_kernels.cards import CARDS
from pallas_kernels.compile_for import (
    PLUGIN_HINT,
    gpu_compiler_available,
    lower_for,
    with_memory_kinds,
)
from qlora_jax.data import Batch
from qlora_jax.evaluate import causal_lm_loss, split_adapters
from qlora_jax.models import Decoder, DecoderConfig, streaming
from qlora_jax.models.stream_cost import PCIE, stream_cost
from qlora_jax.nn import LoraConfig
from qlora_jax.quant import QuantConfig
from qlora_jax.train import TrainConfig, init_state, make_train_step

needs_compiler = pytest.mark.skipif(
    not gpu_compiler_available(), reason=f"no GPU compiler here. {PLUGIN_HINT}"
)
GIB = 2**30


def llama(vocab: int, hidden: int, inner: int, layers: int, kv_heads: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=kv_heads,
        head_dim=128,
    )


LLAMA_65B = llama(32000, 8192, 22016, 80, 64)
LLAMA_405B = llama(128256, 16384, 53248, 126, 8)


def model_shapes(config: DecoderConfig, rank: int) -> Decoder:
    return nnx.eval_shape(
        lambda: Decoder(
            config,
            quant=QuantConfig(),
            lora=LoraConfig(r=rank, dtype=jnp.bfloat16),
            compute_dtype=jnp.bfloat16,
            stream_weights=True,
            matmul="xla",
            rngs=nnx.Rngs(0),
        )
    )


def compile_step(config: DecoderConfig, card: str, rank: int, sequence: int = 512):
    """The training step at batch 1, its layers and Adam's moments in pinned host memory."""
    graphdef, lora, frozen = split_adapters(model_shapes(config, rank))
    settings = TrainConfig()
    tx = settings.optimizer()
    state = jax.eval_shape(lambda lora: init_state(lora, tx, seed=0), lora)
    shape = (1, 1, sequence)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    batch = Batch(tokens, tokens, jax.ShapeDtypeStruct(shape, jnp.bool_))

    def kinds(tree, on_host):
        return jax.tree.map(lambda leaf: "pinned_host" if on_host(leaf) else "device", tree)

    resting = kinds(state, lambda leaf: False)._replace(
        opt_state=kinds(state.opt_state, lambda leaf: leaf.size >= settings.page_min_size)
    )
    weights = kinds(frozen, lambda leaf: False)
    weights["layers"] = kinds(frozen["layers"], streaming.streams)
    lowered = lower_for(
        CARDS[card], make_train_step(graphdef, tx, causal_lm_loss), state, frozen, batch
    )
    marked = with_memory_kinds(lowered, (resting, weights, "device"), (resting, "device"))
    return marked.compile(compiler_options=streaming.compiler_options("cuda"))


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
def test_65b_takes_a_fifth_of_a_24_gb_card_and_fits_a_12_gb_one():
    compiled = compile_step(LLAMA_65B, "rtx-4090", rank=64)
    # Resident, the frozen layers alone are 31.1 GiB.
    assert device_bytes(compiled) <= 7 * GIB
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
    compiled = compile_step(LLAMA_405B, "rtx-4090", rank=16)
    assert device_bytes(compiled) <= 18 * GIB < CARDS["rtx-4090"].memory
    memory = compiled.memory_analysis()
    host = memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes
    assert host <= 196 * GIB
    with pytest.raises(ValueError, match=streaming.HOST_LIMIT):
        streaming.check_host_memory_limit(host, "gpu")


def test_the_cost_of_streaming_65b():
    cost = stream_cost(model_shapes(LLAMA_65B, 64), sequence=512)
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
