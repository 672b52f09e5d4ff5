"""Costs from shapes: parameters against real models, memory and speed against the measured."""

import io
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from rich.console import Console

from experiments.cells import build_sweep
from experiments.config import DataConfig, ModelConfig, RunConfig
from experiments.dry_run import _epochs, dry_run, estimate
from experiments.estimate import (
    UTILISATION,
    adapter_parameters,
    bits_per_weight,
    flops_per_token,
    hours,
    kept_numbers,
    linear_parameters,
    memory,
    other_parameters,
)
from experiments.presets import SHAPES, preset
from experiments.room import workload
from pallas_kernels.cards import CARDS
from qlora_jax.models import REMAT, Decoder, DecoderConfig
from qlora_jax.nn import FrozenParam, LoraConfig
from qlora_jax.plan import find_config
from qlora_jax.plan.workload import training_step
from qlora_jax.quant import QuantConfig, quantize
from qlora_jax.train import OPTIMIZERS, TrainConfig
from tests.models.variants import VARIANTS

MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "h200" / "training.json"


def llama(source: str) -> DecoderConfig:
    return find_config(SHAPES[source])


def measured() -> list[dict]:
    return json.loads(MEASURED.read_text())["cases"]


@pytest.mark.parametrize("kind", ["tied", "fused"])
def test_parameters_are_those_of_the_model(kind):
    config = DecoderConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=kind == "tied",
        fused_gate_up=kind == "fused",
    )
    lora = LoraConfig(r=5, target_modules=("q_proj", "down_proj"))
    model = nnx.eval_shape(lambda: Decoder(config, lora=lora, rngs=nnx.Rngs(0)))
    frozen = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, FrozenParam)))
    adapters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.LoRAParam)))
    assert frozen == linear_parameters(config) + other_parameters(config)
    assert adapters == adapter_parameters(config, lora)


@pytest.mark.parametrize("targets", [("experts.down_proj",), r".*\.experts\.(gate|up)_proj"])
def test_experts_are_adapted_by_their_own_names(targets):
    config, lora = VARIANTS["qwen3_moe-normed"], LoraConfig(r=5, target_modules=targets)
    model = nnx.eval_shape(lambda: Decoder(config, lora=lora, rngs=nnx.Rngs(0)))
    adapters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.LoRAParam)))
    assert adapter_parameters(config, lora) == adapters > 0


def test_llamas_have_the_parameters_that_they_are_named_for():
    # LLaMA's paper, table 2: 6.7, 13.0, 32.5 and 65.2 billion.
    counts = [linear_parameters(llama(s)) + other_parameters(llama(s)) for s in SHAPES]
    assert [round(count / 1e9, 1) for count in counts] == [6.7, 13.0, 32.5, 65.3]


def test_of_mixtrals_experts_a_token_meets_two():
    # Mixtral's paper (2401.04088): 47 billion parameters, of which a token uses 13.
    mixtral = DecoderConfig(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    linear, other = linear_parameters(mixtral), other_parameters(mixtral)
    assert round((linear + other) / 1e9) == 47
    # Short sequences, an adapter of next to nothing: 6 FLOPs a frozen parameter, 4 for the head.
    lora = LoraConfig(r=1, target_modules=("q_proj",))
    flops = flops_per_token(mixtral, lora, 1, "full") - 4 * 32_000 * 4096
    assert round((flops / 6 + other) / 1e9) == 13


@pytest.mark.parametrize(
    "quant",
    [QuantConfig(), QuantConfig("fp4", double_quant=False), QuantConfig("int8", blocksize=128)],
)
def test_bits_are_those_of_a_quantized_weight(quant):
    weight = quantize(jnp.ones((256, 256)), quant)
    # A real tensor has an offset of 32 bits besides.
    assert weight.bits_per_weight == pytest.approx(bits_per_weight(quant), abs=1e-3)


def test_memory_is_near_what_the_compiler_and_the_card_say():
    checked = 0
    for line in measured():
        if line["matmul"] == "xla" and line["base"] != "bf16":
            continue  # the slower product, which holds a decoded weight more
        run = RunConfig(
            model=ModelConfig(compute_dtype="bfloat16"),
            quant=None if line["base"] == "bf16" else QuantConfig(),
            train=TrainConfig(micro_batch_size=line["batch"]),
        )
        held = memory(llama("huggyllama/llama-7b"), run, line["seq"])
        assert held.device == pytest.approx(line["planned_device_bytes"], rel=0.05)
        checked += 1
    assert checked == 5


@pytest.mark.parametrize("remat", REMAT)
def test_what_waits_for_the_backward_pass_is_near_what_the_compiler_is_given(remat):
    config = find_config("llama-3-8b")
    run = RunConfig(
        model=ModelConfig(remat=remat, attention="chunked", loss_chunk=256),
        train=TrainConfig(micro_batch_size=1),
    )
    saved = training_step(workload(run, config, 1024)).saved
    estimated = kept_numbers(config, remat) * 1024 * 2
    # Beside it what the loss leaves, of the size of one layer's input or two.
    assert estimated == pytest.approx(saved, rel=0.15, abs=2**26)


def test_weights_that_stream_and_inputs_that_are_offloaded_are_on_the_host():
    """`qlora-jax plan llama-7b --card h200 --stream-weights`: 2.20 GiB, and 4.30 on the host."""
    config = find_config("llama-7b")

    def held(**options):
        run = RunConfig(model=ModelConfig(**options), train=TrainConfig(micro_batch_size=1))
        return memory(config, run, 512)

    plain, streamed, offloaded = held(), held(stream_weights=True), held(remat="offload")
    assert streamed.device / 2**30 == pytest.approx(2.20, abs=0.05)
    assert streamed.host / 2**30 == pytest.approx(4.30, abs=0.05)
    inputs = config.num_hidden_layers * 512 * config.hidden_size * 2
    assert offloaded.host - plain.host == plain.device - offloaded.device == inputs
    # A layer that is computed again costs as much, wherever its input waited.
    flops = [flops_per_token(config, LoraConfig(), 512, r) for r in ("full", "offload", "none")]
    assert flops[0] == flops[1] > flops[2]


def test_a_long_sequence_holds_a_chunk_of_logits_and_a_tile_of_the_mlp():
    """`qlora-jax plan llama-3-8b`, 1 × 32,768 tokens, `--mlp-tile 4096`: 17.6 GiB in all."""
    run = RunConfig(model=ModelConfig(mlp_tile=4096), train=TrainConfig(micro_batch_size=1))
    held = memory(find_config("llama-3-8b"), run, 32768)
    assert held.device / 2**30 == pytest.approx(17.6, rel=0.05)


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize(("dtype", "master"), [("float32", False), ("bfloat16", True)])
def test_an_optimizers_state_has_the_bytes_of_the_real_one(optim, dtype, master):
    lora = LoraConfig(r=8, dtype=jnp.dtype(dtype))
    options = {"optim": optim, "master_weights": master, "micro_batch_size": 2}
    config = find_config("llama-7b")
    for more in ({}, {"gradient_accumulation_steps": 2, "gradients_on_host": True}):
        train = TrainConfig(**options, **more)
        held = memory(config, RunConfig(lora=lora, train=train), 512)
        # One parameter of as many numbers.
        count = adapter_parameters(config, lora)
        state = jax.eval_shape(
            train.optimizer().init, {"a": jax.ShapeDtypeStruct((count,), lora.dtype)}
        )
        bytes_ = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        assert held.host == pytest.approx(bytes_ + 4 * count * bool(more), rel=1e-4)
        assert held.adapters == 2 * lora.dtype.itemsize * count


def test_a_packed_vocabulary_takes_the_compilers_bytes():
    """`qlora-jax plan llama-3-8b`: 1.96 GiB in 16 bits, 1.04 in 8, 0.55 in 4."""
    config = find_config("llama-3-8b")

    def base(bits):
        run = RunConfig(model=ModelConfig(embedding_bits=bits))
        return memory(config, run, 512).base / 2**30

    assert base(None) - base(8) == pytest.approx(1.96 - 1.04, abs=0.01)
    assert base(None) - base(4) == pytest.approx(1.96 - 0.55, abs=0.01)


@pytest.mark.parametrize(("remat", "products"), [("full", 4), ("none", 3)])
def test_of_an_adapters_weights_the_gradient_is_computed_too(remat, products):
    config = llama("huggyllama/llama-7b")
    flops = [flops_per_token(config, LoraConfig(r=r), 512, remat) for r in (64, 32)]
    half = adapter_parameters(config, LoraConfig(r=32))
    assert flops[0] - flops[1] == pytest.approx(half * 2 * products)


def test_utilisation_is_within_what_was_measured():
    config = llama("huggyllama/llama-7b")
    reached = [
        line["tokens_per_s"]
        * flops_per_token(config, LoraConfig(r=64), line["seq"], "full")
        / CARDS["h200"].matmul_flops
        for line in measured()
    ]
    assert min(reached) < UTILISATION < max(reached)
    assert hours(UTILISATION * 312e12 * 3600, CARDS["a100-80"]) == pytest.approx(1.0)


def test_guanaco_65b_takes_a_day_on_one_48_gb_card():
    """The paper's abstract: 24 hours of finetuning on a single GPU."""
    run = RunConfig(train=TrainConfig(micro_batch_size=1, gradient_accumulation_steps=16))
    config = llama("huggyllama/llama-65b")
    tokens = 1_875 * 16 * 512
    flops = tokens * flops_per_token(config, run.lora, 512, "full")
    assert 12 < hours(flops, CARDS["a6000"]) < 36
    assert memory(config, run, 512).device < CARDS["a6000"].memory


def test_a_run_with_rows_at_hand_counts_their_tokens():
    run = RunConfig(model=ModelConfig(compute_dtype="float32"), train=TrainConfig(steps=3))
    packed = RunConfig(data=DataConfig(packing=True))
    found = estimate(run)
    assert found.rows is not None
    assert found.tokens is not None
    assert found.rows > 700
    assert 3 * 16 * 20 < found.tokens < 3 * 16 * 512
    assert found.device_bytes is not None
    assert _epochs(run, found.rows) == f"{3 / -(-found.rows // 16):.2f}"
    assert _epochs(run, None) == _epochs(packed, 700) == "?"
    unknown = estimate(RunConfig(model=ModelConfig(source="some/model")))
    assert (unknown.rows, unknown.flops, unknown.device_bytes) == (None, None, None)


@pytest.mark.parametrize("there", [True, False])
def test_a_dry_run_counts_rows_as_long_as_batches_have_them(there):
    """Packed ones are nearly full, and padded ones as long as their bucket."""

    def found(**data):
        model = ModelConfig() if there else ModelConfig(source="huggyllama/llama-7b")
        return estimate(RunConfig(model, DataConfig(**data), train=TrainConfig(steps=3)))

    packed, padded, plain = found(packing=True, packed_length=512), found(buckets=(512,)), found()
    assert 0.9 * 3 * 16 * 512 < packed.tokens <= 3 * 16 * 512
    assert (packed.rows, padded.tokens) == (plain.rows, plain.tokens)
    assert packed.device_bytes == padded.device_bytes
    assert (plain.device_bytes < padded.device_bytes) == there  # all of 512 are allowed
    with pytest.raises(ValueError, match=r"but data\.buckets holds at most 8"):
        estimate(RunConfig(data=DataConfig(buckets=(8,))))


def test_a_dry_run_fetches_nothing(tmp_path, tiny_model):
    run = RunConfig(data=DataConfig(validation_source="some/rows", validation_split="test"))
    assert estimate(run).rows is None
    shutil.copy(tiny_model / "config.json", tmp_path)
    bare = estimate(RunConfig(ModelConfig(source=str(tmp_path))))
    assert (bare.rows, bare.tokens) == (None, 1_000 * 16 * 512)
    assert bare.flops is not None


@pytest.mark.parametrize(("width", "tables"), [(80, 2), (140, 1)])
def test_a_dry_run_names_each_cell_and_all_numbers_in_narrow_terminals(width, tables, tmp_path):
    console = Console(file=io.StringIO(), width=width)
    sweep = build_sweep(preset("paper-table5"), "paper-table5")
    dry_run(sweep, tmp_path, console, [CARDS["rtx-4090"], CARDS["h100"]])
    shown = console.file.getvalue()
    lines = shown.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in shown
    assert sum("7B " in line for line in lines) == 8 * tables
    (heads,) = [line.split() for line in lines if "steps" in line]
    assert {"dataset", "model", "FLOP", "status"} <= set(heads)
    (heads,) = [line.split() for line in lines if "host" in line and "rtx-4090" in line]
    assert {"dataset", "model", "device", "h100"} <= set(heads)
