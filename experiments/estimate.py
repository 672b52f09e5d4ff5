"""What a run will cost, from its shape alone: tokens, FLOPs, device memory, hours on a card.

Arithmetic, not measurement: it needs no weights, no card and a millisecond, and is meant for
choosing what to rent. Memory is the sum of what must be there (base, adapters, gradients, saved
activations, the largest temporaries); the compiler's own count of the whole step is
`qlora-jax plan`. How far the sums are off where the compiler or a card has been asked stands in
tests/experiments/test_estimate.py.

FLOPs of a QLoRA step, per token: a frozen weight of P parameters costs 2P forward, 2P for the
gradient of its input and none for its own, and 2P once more where remat recomputes the layer; an
adapter's costs 2P, 4P and 2P. Hours are FLOPs over `UTILISATION` of the card's dense bf16 rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp

from experiments.config import RunConfig
from pallas_kernels.cards import Card
from pallas_kernels.codebooks import NESTED_BLOCKSIZE
from qlora_jax.models import DecoderConfig
from qlora_jax.nn import LoraConfig
from qlora_jax.optim.eight_bit import BLOCKSIZE
from qlora_jax.quant import QuantConfig, row_config
from qlora_jax.train import TrainConfig

UTILISATION = 0.4
"""Of a card's dense rate: the 7B steps measured on an H200 reach 0.20 at 1 × 512, 0.50 at 4 × 1024
and 0.54 at 8 × 1024 (benchmarks/results/h200/training.md)."""

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def _linears(config: DecoderConfig) -> dict[str, tuple[int, int, int]]:
    """Path of each linear weight of a layer -> (inputs, outputs, copies: one per expert)."""
    names, experts = config.names, max(config.num_local_experts, 1)
    mlp = f"layers.{names.mlp}.experts" if config.num_local_experts else f"layers.{names.mlp}"
    counts = {
        f"layers.{names.attention}.{name}": (linear.inputs, linear.outputs, 1)
        for name, linear in config.attention_linears.items()
    }
    counts |= {
        f"{mlp}.{name}": (linear.inputs, linear.outputs, experts)
        for name, linear in config.mlp_linears.items()
    }
    return counts


def linear_parameters(config: DecoderConfig) -> int:
    """Parameters of all layers' linear weights: what is quantized."""
    one = sum(inputs * outputs * copies for inputs, outputs, copies in _linears(config).values())
    return config.num_hidden_layers * one


def vocabulary_parameters(config: DecoderConfig) -> int:
    """Parameters of embedding and head."""
    return (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size


def other_parameters(config: DecoderConfig) -> int:
    """Parameters of embedding, head and the norms over the residual stream: what stays in 16 bits.

    Biases, routers and the norms of heads are left out: they are too few to matter.
    """
    norms = len(config.layer_norms) * config.num_hidden_layers + 1
    return vocabulary_parameters(config) + norms * config.hidden_size


def adapter_parameters(config: DecoderConfig, lora: LoraConfig) -> int:
    """Parameters of the adapters on the layers' linear weights."""
    one = sum(
        lora.r * (inputs + outputs) * copies
        for path, (inputs, outputs, copies) in _linears(config).items()
        if lora.targets(path)
    )
    return config.num_hidden_layers * one


def _active(config: DecoderConfig, parameters: int) -> float:
    """Of the layers' parameters, those that one token meets: with experts, its own only."""
    if not config.num_local_experts:
        return float(parameters)
    mlp = sum(linear.inputs * linear.outputs for linear in config.mlp_linears.values())
    idle = config.num_local_experts - config.num_experts_per_tok
    share = 1 - idle * mlp * config.num_hidden_layers / linear_parameters(config)
    return parameters * share


def bits_per_weight(quant: QuantConfig) -> float:
    """Of a quantized weight, its share of all constants included: 4.127 by default."""
    code = 8 if quant.quant_type == "int8" else 4
    if not quant.double_quant:
        return code + 32 / quant.blocksize
    return code + 8 / quant.blocksize + 32 / (quant.blocksize * NESTED_BLOCKSIZE)


def flops_per_token(config: DecoderConfig, lora: LoraConfig, length: int, remat: str) -> float:
    """FLOPs of one token's share of a training step, in sequences of `length` tokens."""
    again = 0 if remat in ("dots", "none") else 1
    frozen = _active(config, linear_parameters(config)) * 2 * (2 + again)
    adapters = _active(config, adapter_parameters(config, lora)) * 2 * (3 + again)
    head = config.vocab_size * config.hidden_size * 2 * 2
    width = config.num_attention_heads * config.head_dim
    # Scores and mixture: two products forward, four backward; nothing is spared for causality.
    attention = config.num_hidden_layers * 2 * length * width * 2 * (3 + again)
    return float(frozen + adapters + head + attention)


@dataclass(frozen=True)
class Memory:
    """Bytes on each device in a training step, and in host memory.

    Attributes:
        base: the frozen weights.
        adapters: their values and gradients, and sums of gradients.
        optimizer: its state, where that stays on the device.
        activations: what is saved for the backward pass, and the largest temporaries.
        host: what rests there, of all devices: optimizer state, sums of gradients, weights that
            stream, layers' inputs that are offloaded.
    """

    base: int
    adapters: int
    optimizer: int
    activations: int
    host: int

    @property
    def device(self) -> int:
        """All of it, on the device."""
        return self.base + self.adapters + self.optimizer + self.activations


def kept_numbers(config: DecoderConfig, remat: str) -> float:
    """Of one token, how many numbers all layers keep on the device for the backward pass."""
    per_token = config.num_experts_per_tok
    products = sum(out * min(copies, per_token) for _, out, copies in _linears(config).values())
    hidden = config.hidden_size
    kept = {
        "full": hidden,
        "offload": 0,
        "attention": 2 * hidden,
        "dots": products,
        # 3.2 to 3.4 in plans of Llama 7B, Llama 3 8B and Qwen 2.5 0.5B.
        "none": 3.3 * products,
    }
    return config.num_hidden_layers * kept[remat]


def state_bytes(train: TrainConfig, width: int) -> float:
    """Bytes of an optimizer's state for each trained parameter of `width` bytes."""
    master = 4 if train.master_weights else 0
    # Codes, and an absmax for every 256 of them; of parameters in 16 bits there are none.
    coded = train.optim.endswith("_8bit") and (width == 4 or master)
    moment = 1 + 4 / BLOCKSIZE if coded else 4 if master else width
    return master + moment * (1 if train.optim.startswith("lion") else 2)


def memory(config: DecoderConfig, run: RunConfig, length: int) -> Memory:
    """What a run's step holds, at its longest sequence of `length` tokens.

    Of weights that are cut, each device is taken to hold its part: what stays whole (norms) is
    little.
    """
    parts = run.devices.parts
    compute = _BYTES[run.model.compute_dtype]
    stored = _BYTES[run.model.param_dtype or run.model.compute_dtype]
    linear, depth = linear_parameters(config), config.num_hidden_layers
    base = linear * stored if run.quant is None else linear * bits_per_weight(run.quant) / 8
    streamed = base if run.model.stream_weights else 0
    # Of weights that stream two layers' are here.
    base += streamed * (2 / depth - 1)
    others = other_parameters(config) * stored
    if run.model.embedding_bits is not None:
        rows = row_config(run.model.embedding_bits, config.hidden_size)
        narrower = stored - bits_per_weight(rows) / 8
        others -= math.floor(vocabulary_parameters(config) * narrower)
    trained = adapter_parameters(config, run.lora) / parts
    # Bytes of each: values, gradients (all of them, or one layer's), their sums over micro-batches.
    width = jnp.dtype(run.lora.dtype).itemsize
    layers = depth if run.train.update_in_backward else 1
    sums = 4 if run.train.gradient_accumulation_steps > 1 else 0
    state = state_bytes(run.train, width)
    summed_here = 0 if run.train.gradients_on_host else sums
    paged = (state if run.train.paged else 0) + sums - summed_here
    batch = run.train.micro_batch_size // run.devices.count
    tokens = batch * length
    in_mlp, in_loss = (min(tokens, n or tokens) for n in (run.model.mlp_tile, run.model.loss_chunk))
    hidden, widest = config.hidden_size, max(config.intermediate_size, config.hidden_size)
    inner = 6 * tokens * hidden + 3 * in_mlp * config.intermediate_size
    inputs = depth * tokens * hidden * compute
    offloaded = inputs if run.model.remat == "offload" else 0
    # In 16 bits a GPU's attention is cuDNN's, which holds no scores.
    scores = 0
    if compute == 4:
        scores = batch * config.num_attention_heads * length**2 * 4
    # In a layer: its activations and their gradients, one decoded weight. At the head: logits and
    # their gradient in float32. The two are not there at once.
    layer = 2 * inner * compute + 2 * scores + widest * hidden * compute
    logits = 2 * in_loss * config.vocab_size * 4
    return Memory(
        base=math.ceil((math.ceil(base) + others) / parts),
        adapters=math.ceil((width + width / layers + summed_here) * trained),
        optimizer=0 if run.train.paged else math.ceil(state * trained),
        activations=math.ceil(kept_numbers(config, run.model.remat) * tokens * compute)
        + max(layer, logits),
        host=math.ceil(paged * trained + streamed / parts + offloaded) * run.devices.count,
    )


def hours(flops: float, card: Card) -> float:
    """Time on one card."""
    return flops / (UTILISATION * card.matmul_flops) / 3600
