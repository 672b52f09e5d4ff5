"""What would make it fit? The switches of training that save memory, cheapest first.

Each is tried on top of those before it and compiled; one that saves next to nothing is left out
again. What is printed was therefore verified by the compiler, not guessed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.cards import Card
from qlora_jax.models import MLP_TILE, STREAMABLE, DecoderConfig
from qlora_jax.plan.memory import Plan, plan
from qlora_jax.plan.workload import Workload


class Switch(NamedTuple):
    """One way to need less memory.

    Attributes:
        name: how to set it.
        cost: what is given up.
        apply: the workload with it on; None where it is on already or does not apply.
    """

    name: str
    cost: str
    apply: Callable[[Workload], Workload | None]


class Advice(NamedTuple):
    """A switch that helped, and the plan with it and all before it on."""

    switch: Switch
    plan: Plan
    saves: int
    """Bytes of device memory, beside the switches before it."""


def advise(start: Plan, card: str | Card | None) -> tuple[Advice, ...]:
    """The cheapest switches, in order, until the step fits; all that help where it never does.

    Args:
        start: a plan that does not fit.
        card: what it was planned for.
    """
    found: list[Advice] = []
    best = start
    for switch in SWITCHES:
        if best.fits:
            break
        changed = switch.apply(best.work)
        if changed is None:
            continue
        tried = plan(changed, card, memory=start.memory)
        saves = best.device.total - tried.device.total
        if saves > _WORTH * best.device.total:
            found.append(Advice(switch, tried, saves))
            best = tried
    return tuple(found)


_WORTH = 0.002
"""Part of the total below which a switch is not worth naming."""


def _train(work: Workload, **changes: Any) -> Workload:
    return dataclasses.replace(work, train=dataclasses.replace(work.train, **changes))


def _full_remat(work: Workload) -> Workload | None:
    return None if work.remat == "full" else dataclasses.replace(work, remat="full")


def _linear_attention(work: Workload) -> Workload | None:
    return dataclasses.replace(work, attention=None) if work.attention == "xla" else None


def _paged(work: Workload) -> Workload | None:
    return None if work.train.paged else _train(work, paged=True)


def _quantized(work: Workload) -> Workload | None:
    # A 16-bit base is what the user asked for: 4 bits are another experiment, not a switch.
    if work.quant is None or work.quant.double_quant:
        return None
    return dataclasses.replace(work, quant=dataclasses.replace(work.quant, double_quant=True))


def _accumulated(work: Workload) -> Workload | None:
    rows, least = work.train.micro_batch_size, work.devices
    # An update in the backward pass takes all its rows in one.
    if rows == least or work.train.update_in_backward:
        return None
    return _train(
        work,
        micro_batch_size=least,
        gradient_accumulation_steps=rows // least * work.train.gradient_accumulation_steps,
    )


def _narrow_adapters(work: Workload) -> Workload | None:
    if jnp.dtype(work.lora.dtype) != jnp.float32:
        return None
    narrow = dataclasses.replace(work.lora, dtype=jnp.bfloat16)
    return _train(dataclasses.replace(work, lora=narrow), master_weights=True)


def _host_sums(work: Workload) -> Workload | None:
    if work.train.gradients_on_host or work.train.gradient_accumulation_steps == 1:
        return None
    return _train(work, gradients_on_host=True)


def _tiled(work: Workload) -> Workload | None:
    tokens = work.of_one_device.train.micro_batch_size * work.sequence
    if work.mlp_tile is not None or tokens <= MLP_TILE or not _decoder(work):
        return None
    if getattr(work.config, "num_local_experts", None):
        return None
    return dataclasses.replace(work, mlp_tile=MLP_TILE)


def _in_backward(work: Workload) -> Workload | None:
    train = work.train
    if train.update_in_backward or train.gradient_accumulation_steps > 1:
        return None
    if train.optim.endswith("_8bit") or work.remat not in STREAMABLE:
        return None
    return _train(work, update_in_backward=True, max_grad_norm=None)


def _offloaded(work: Workload) -> Workload | None:
    return None if work.remat == "offload" else dataclasses.replace(work, remat="offload")


def _cut(work: Workload) -> Workload | None:
    if work.devices == 1 or work.cut_weights:
        return None
    return dataclasses.replace(work, cut_weights=True)


def _packed_vocabulary(bits: int) -> Callable[[Workload], Workload | None]:
    def apply(work: Workload) -> Workload | None:
        # A 16-bit base stays one: packing its vocabulary would be another experiment.
        if work.quant is None or (work.embedding_bits or 16) <= bits:
            return None
        # Rows that are trained stay dense, and rows have to fill blocks.
        if work.lora.modules_to_save is not None or _row_width(work) % 32:
            return None
        return dataclasses.replace(work, embedding_bits=bits)

    return apply


def _row_width(work: Workload) -> int:
    config = work.config
    if isinstance(config, DecoderConfig):
        return config.word_embed_proj_dim or config.hidden_size
    return config.d_model


def _streamed(work: Workload) -> Workload | None:
    if work.stream_weights or not _decoder(work):
        return None
    remat = work.remat if work.remat in STREAMABLE else "full"
    return dataclasses.replace(work, stream_weights=True, remat=remat)


def _decoder(work: Workload) -> bool:
    """Whether the switches that a `Decoder` alone has apply."""
    return isinstance(work.config, DecoderConfig)


SWITCHES = (
    Switch("attention: cudnn or chunked", "none", _linear_attention),
    Switch(
        "double_quant: true",
        "none measured: absmax constants in 8 bits (the paper's own default)",
        _quantized,
    ),
    Switch(
        "paged: true",
        "the optimizer's state crosses PCIe twice per update",
        _paged,
    ),
    Switch("remat: full", "one more forward pass per step, a third more compute", _full_remat),
    Switch(
        "micro_batch_size: one example a device, the rest by accumulation",
        "the same update; weights are decoded once per example",
        _accumulated,
    ),
    Switch(
        "gradients_on_host: true",
        "gradient sums cross PCIe twice per micro-batch",
        _host_sums,
    ),
    Switch(
        f"mlp_tile: {MLP_TILE}",
        "weights are decoded once a tile; LoRA dropout drops other units",
        _tiled,
    ),
    Switch(
        "devices.weights: cut",
        "each layer's are gathered, packed, up to three times per micro-batch",
        _cut,
    ),
    Switch(
        "embedding_bits: 8",
        "embedding and head rounded to INT8: 0.00001 nats a token where it was measured",
        _packed_vocabulary(8),
    ),
    Switch(
        "LoRA dtype: bfloat16, master_weights: true",
        "products see adapters of 8 bits of precision; their float32 copies rest on the host, 4 "
        "bytes a trained parameter",
        _narrow_adapters,
    ),
    Switch(
        "update_in_backward: true, max_grad_norm: null",
        "no clipping by the global norm",
        _in_backward,
    ),
    Switch("remat: offload", "each layer's input crosses PCIe twice per micro-batch", _offloaded),
    Switch(
        "embedding_bits: 4",
        "embedding and head rounded to NF4: 0.05 to 0.15 nats a token in small tied models",
        _packed_vocabulary(4),
    ),
    Switch(
        "stream_weights: true",
        "the base crosses PCIe twice per micro-batch: slow below some thousand tokens",
        _streamed,
    ),
)
"""Cheapest first."""
