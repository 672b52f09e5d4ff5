"""Everything that a plan tells about one model on one card, and how it reads on paper."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.cards import Card, find_card
from qlora_jax.models import Decoder, DecoderConfig
from qlora_jax.models.stream_cost import PCIE, StreamCost, stream_cost
from qlora_jax.plan.advice import Advice, advise
from qlora_jax.plan.compiled import program_bytes
from qlora_jax.plan.devices import mesh_of
from qlora_jax.plan.memory import Plan, plan
from qlora_jax.plan.search import largest_that_fits
from qlora_jax.plan.workload import (
    Workload,
    decoding_step,
    largest_dense,
    largest_load,
    model_shapes,
    tree_bytes,
)

SEQUENCE_STEP = 256
"""Sequences are searched in multiples of this many tokens."""

LARGEST_BATCH = 4096
LONGEST_SEQUENCE = 2**18
"""Where the searches end. XLA's time to compile attention grows with the square of the sequence
(`qlora-jax plan experiments/embedded/models/stdlib-1m --card l40 --no-search --sequence N`, on two
cores: 12 s for 262144, 77 s for 1048576)."""

LABELS = {
    "base": "base",
    "embeddings": "embedding and head",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "temporaries": "temporaries",
}
"""Field of `Components` -> its name in tables and plots."""


class Streaming(NamedTuple):
    """What it takes to hide streamed weights behind arithmetic (`models.stream_cost`)."""

    cost: StreamCost
    card: Card
    tokens: int
    """Of a micro-batch."""

    @property
    def compute_seconds(self) -> float:
        """Of a micro-batch, at the card's full rate."""
        return self.cost.seconds_of_compute(self.tokens, self.card)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; by generation of PCIe."""
        return {
            "transfer_bytes": self.cost.transfer,
            "flops": self.tokens * self.cost.flops_per_token,
            "flops_per_second": self.card.matmul_flops,
            "compute_seconds": self.compute_seconds,
            "tokens": self.tokens,
            "pcie": {
                str(generation): {
                    "bytes_per_second": rate,
                    "transfer_seconds": self.cost.seconds_of_transfer(rate),
                    "tokens_to_hide": self.cost.tokens_to_hide(self.card, rate),
                }
                for generation, rate in PCIE.items()
            },
        }

    def lines(self) -> list[str]:
        """For people."""
        rates = " / ".join(f"{rate / 1e9:.0f}" for rate in PCIE.values())
        times = " / ".join(f"{self.cost.seconds_of_transfer(rate):.1f}" for rate in PCIE.values())
        hidden = " / ".join(
            f"{self.cost.tokens_to_hide(self.card, rate):,}" for rate in PCIE.values()
        )
        return [
            f"  streaming, a micro-batch of {self.tokens:,} tokens: {gib(self.cost.transfer)} GiB "
            f"come in, {times} s at PCIe 3 / 4 / 5 ({rates} GB/s);",
            f"    {self.tokens * self.cost.flops_per_token:.2e} FLOP are "
            f"{self.compute_seconds:.1f} s at {self.card.matmul_flops / 1e12:.0f} TFLOP/s; "
            f"copies hide from {hidden} tokens on",
        ]


@dataclasses.dataclass(frozen=True)
class Report:
    """A model on a card. Sizes in bytes; None where it was not asked for or does not apply."""

    name: str
    plan: Plan
    decode: int | None
    """Device bytes of one decoding step at `decode_batch` texts of `decode_length` tokens."""
    decode_batch: int
    decode_length: int
    load: int
    """Largest number of device bytes while the model loads."""
    largest_batch: int | None
    """Largest micro-batch at the plan's sequence that fits, over all cards, up to LARGEST_BATCH."""
    largest_sequence: int | None
    """Longest sequence that fits at one example a card, in steps of SEQUENCE_STEP, up to
    LONGEST_SEQUENCE or the model's learned positions; None where not even one step does."""
    advice: tuple[Advice, ...] | None
    """Switches that make it fit, if it does not; None where they were not looked for."""
    streaming: Streaming | None = None
    """Where weights stream, on a card of the table."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        made = self.plan
        return {
            "model": self.name,
            "card": made.card,
            "sequence": made.work.sequence,
            "target": made.work.target_length,
            "batch": made.work.train.micro_batch_size,
            "devices": made.work.devices,
            "cut_weights": made.work.cut_weights,
            "accumulation": made.work.train.gradient_accumulation_steps,
            "rank": made.work.lora.r,
            "adapter_dtype": jnp.dtype(made.work.lora.dtype).name,
            "quant": None if made.work.quant is None else dataclasses.asdict(made.work.quant),
            "embedding_bits": made.work.embedding_bits,
            "attention": made.work.attention,
            "matmul": made.work.matmul,
            "remat": made.work.remat,
            "mlp_tile": made.work.mlp_tile,
            "paged": made.work.train.paged,
            "update_in_backward": made.work.train.update_in_backward,
            "unit": "bytes",
            "memory": made.memory,
            "usable": made.usable,
            "fits": made.fits,
            "device": dataclasses.asdict(made.device) | {"total": made.device.total},
            "host": made.host,
            "traffic": made.traffic.as_dict(),
            "streaming": None if self.streaming is None else self.streaming.as_dict(),
            "decode": {
                "batch": self.decode_batch,
                "length": self.decode_length,
                "device": self.decode,
            },
            "load": self.load,
            "largest_batch": self.largest_batch,
            "largest_sequence": self.largest_sequence,
            "advice": [
                {
                    "switch": item.switch.name,
                    "cost": item.switch.cost,
                    "saves": item.saves,
                    "device": item.plan.device.total,
                    "host": item.plan.host,
                    "fits": item.plan.fits,
                }
                for item in self.advice or ()
            ],
            "notes": list(made.notes),
        }


def report(
    name: str,
    work: Workload,
    card: str | Card | None = None,
    *,
    memory: int | None = None,
    search: bool = True,
    decode_batch: int = 1,
    decode_length: int = 2048,
) -> Report:
    """Plan the training step, the decoding step and the load, and search for the largest that fit.

    Args:
        name: what the model is called in the report.
        work: what is trained.
        card, memory: as in `plan`.
        search: whether to look for the largest batch and sequence, and, where the step does not
            fit, for the switches that make it fit. Each costs a few compiles.
        decode_batch, decode_length: texts decoded at once, and slots of their key-value cache.
    """
    target = find_card(card) if isinstance(card, str) else card
    made = plan(work, target, memory=memory)
    work = made.work
    batch = sequence = None
    if search and made.usable is not None:
        batch, sequence = _largest(made, target)
    mesh = mesh_of(target, work.devices) if work.devices > 1 else None
    load = largest_load(work, mesh)
    written = program_bytes(load, target)
    # Where weights stream, loading puts them on the host one by one.
    resident = made.device.base + made.device.embeddings + made.device.adapters
    # Decoding is planned with the weights on the card.
    resting = dataclasses.replace(work, stream_weights=False)
    decoding = decoding_step(resting, target, batch=decode_batch, length=decode_length, mesh=mesh)
    return Report(
        name=name,
        plan=made,
        decode=program_bytes(decoding, target).device,
        decode_batch=decode_batch,
        decode_length=decode_length,
        load=resident
        + max(tree_bytes(load.args[1]) + written.temporaries, largest_dense(work, mesh)),
        largest_batch=batch,
        largest_sequence=sequence,
        advice=_advice(made, target) if search else None,
        streaming=_stream_cost(made, target),
    )


def _advice(made: Plan, card: Card | None) -> tuple[Advice, ...]:
    return advise(made, card) if made.fits is False else ()


def _largest(made: Plan, card: Card | None) -> tuple[int | None, int | None]:
    """The largest micro-batch at the plan's sequence, and the longest sequence at one example a
    card."""
    work, total, usable = made.work, made.device.total, made.usable
    assert usable is not None

    def with_batch(rows: int) -> int:
        return plan(work.at(rows), card, memory=made.memory).device.total

    def with_sequence(tokens: int) -> int:
        return plan(work.at(least, tokens), card, memory=made.memory).device.total

    # What is kept for the backward pass grows with the tokens for certain, what a layer needs
    # perhaps: half of the room by that alone lies near the answer.
    rows, least = work.train.micro_batch_size, work.devices
    growth = 1 + (usable - total) / (2 * max(made.device.activations, 1))
    batch = largest_that_fits(
        with_batch,
        usable,
        start=least,
        step=least,
        most=LARGEST_BATCH,
        known={rows: total},
        second=int(growth * rows),
    )
    alone = work.sequence % SEQUENCE_STEP == 0 and rows == least
    sequence = largest_that_fits(
        with_sequence,
        usable,
        most=_positions(work),
        start=SEQUENCE_STEP,
        step=SEQUENCE_STEP,
        known={work.sequence: total} if alone else None,
        second=int(growth * work.sequence * rows / least),
    )
    return batch, sequence


def _positions(work: Workload) -> int:
    """Tokens of the longest sequence that is looked at; of learned positions there are so many."""
    config = work.config
    if isinstance(config, DecoderConfig) and config.learned_positions:
        return min(config.max_position_embeddings, LONGEST_SEQUENCE)
    return LONGEST_SEQUENCE


def _stream_cost(made: Plan, card: Card | None) -> Streaming | None:
    """Where weights stream through a card whose rates are known."""
    if not made.work.stream_weights or card is None:
        return None
    model = model_shapes(made.work)
    assert isinstance(model, Decoder), "a Workload of no other streams"
    cost = stream_cost(model, sequence=made.work.sequence)
    if made.work.cut_weights:
        # A card brings in its part and gathers the rest from the others.
        ways = made.work.devices
        cost = dataclasses.replace(cost, host=cost.host // ways, transfer=cost.transfer // ways)
    tokens = made.work.of_one_device.train.micro_batch_size * made.work.sequence
    return Streaming(cost, card, tokens)


def text(reports: list[Report]) -> str:
    """The reports, one below the other."""
    return "\n\n".join(_one(item) for item in reports)


def gib(size: int | None) -> str:
    """Bytes as GiB, 2^30."""
    return "?" if size is None else f"{size / 2**30:.2f}"


def _one(item: Report) -> str:
    made = item.plan
    lines = [_title(item), ""]
    total = made.device.total
    unit, size = ("GiB", 2**30) if total >= 2**30 else ("MiB", 2**20)
    device = "device" if made.work.devices == 1 else "each device"
    held = {label: getattr(made.device, part) for part, label in LABELS.items()}
    for label, count in {**held, device: total, "pinned host": made.host}.items():
        also = f"  ({total / 1e9:.2f} GB)" if label == device and unit == "GiB" else ""
        lines.append(f"  {label:<20}{count / size:>8.2f} {unit}{also}")
    lines.append(f"  host traffic a step: {made.traffic}")
    if item.streaming is not None:
        lines += item.streaming.lines()
    lines.append("")
    if made.fits is not None:
        verdict = "fits" if made.fits else f"does not fit: {gib(-(made.spare or 0))} GiB too much"
        lines.append(
            f"  {verdict}; {gib(made.usable)} of the card's {gib(made.memory)} GiB are usable "
            "(XLA_PYTHON_CLIENT_MEM_FRACTION=0.95)"
        )
    if item.largest_batch is not None:
        more = " or more" if item.largest_batch == LARGEST_BATCH else ""
        lines.append(f"  largest batch at {made.work.sequence} tokens: {item.largest_batch}{more}")
    if item.largest_sequence is not None:
        least = made.work.devices
        more = " or more" if item.largest_sequence == LONGEST_SEQUENCE else ""
        lines.append(f"  longest sequence at batch {least}: {item.largest_sequence:,} tokens{more}")
    resident = ", weights on the card" if made.work.stream_weights else ""
    lines.append(
        f"  decoding {item.decode_batch} × {item.decode_length} tokens{resident}: "
        f"{gib(item.decode)} GiB; "
        f"loading: at most {gib(item.load)} GiB"
    )
    lines += [f"  note: {note}" for note in made.notes]
    if item.advice:
        lines.append("  what would make it fit, cheapest first, each with those before it:")
        for number, advice in enumerate(item.advice, 1):
            lines.append(
                f"    {number}. {advice.switch.name}: -{gib(advice.saves)} → "
                f"{gib(advice.plan.device.total)} GiB. Cost: {advice.switch.cost}."
            )
        if not item.advice[-1].plan.fits:
            lines.append("    Even so it does not fit: take a larger card, or a shorter sequence.")
    elif made.fits is False and item.advice is not None:
        lines.append("  No switch helps: take a larger card, or a shorter sequence.")
    return "\n".join(lines)


def _title(item: Report) -> str:
    work, made = item.plan.work, item.plan
    base = "16-bit base" if work.quant is None else work.quant.quant_type.upper()
    if work.quant is not None and work.quant.double_quant:
        base += " + double quantization"
    if work.embedding_bits is not None:
        base += f", vocabulary in {work.embedding_bits} bits"
    accumulation = work.train.gradient_accumulation_steps
    times = f"{accumulation} × " if accumulation > 1 else ""
    state = ("paged " if work.train.paged else "") + work.train.optim
    if work.train.update_in_backward:
        state += " in the backward pass"
    tokens = f"{work.sequence}"
    if work.target_length is not None:
        tokens += f" → {work.target_length}"
    tiled = f", MLP in tiles of {work.mlp_tile}" if work.mlp_tile else ""
    where = made.card or "this device"
    if work.devices > 1:
        where = f"{work.devices} × {where}, weights {'cut' if work.cut_weights else 'whole'}"
    return (
        f"{item.name} on {where}: {base}, r={work.lora.r} "
        f"({jnp.dtype(work.lora.dtype).name}), {state}, batch {times}"
        f"{work.train.micro_batch_size} × {tokens}, remat {work.remat}"
        f"{', weights streamed' if work.stream_weights else ''}, attention {work.attention}{tiled}"
    )
