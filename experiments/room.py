"""Is there room for the run? Asked before any weight is loaded (`qlora_jax.plan.check_fits`).

What is planned is the run's own step: its TrainConfig, its adapters, its way of storing, attending
and recomputing, and the longest rows that its data will be batched to. Of a run on several devices
it is what each of them holds.
"""

import os
from pathlib import Path

from experiments.config import DataConfig, RunConfig
from qlora_jax.data import Examples, Pairs, length_buckets
from qlora_jax.models import DecoderConfig, EncoderDecoderConfig
from qlora_jax.plan import Workload, check_fits, find_config

OVERRIDE = "QLORA_JAX_NO_MEMORY_CHECK"
"""Environment variable; set to anything, a run that does not fit is tried all the same."""


def row_lengths(data: DataConfig, examples: Examples | Pairs) -> tuple[int, int | None]:
    """Tokens of the longest row that training reads, padding included, and of its target where
    source and target are two rows (an encoder–decoder's)."""
    if isinstance(examples, Pairs):
        source = max(len(pair.source) for pair in examples)
        target = max(len(pair.target) for pair in examples)
        # As `Seq2SeqBatches` chooses them.
        longest = length_buckets(target, smallest=32)[-1]
        return max(data.buckets or length_buckets(source)), longest
    return row_length(data, int(examples.lengths.max())), None


def row_length(data: DataConfig, longest: int) -> int:
    """Tokens of the row that a decoder's longest example is padded to, or packed into."""
    if data.packing:
        return data.packed_length or -(-longest // 64) * 64
    return max(data.buckets or length_buckets(longest))


def check_lengths(data: DataConfig, train: Examples | Pairs, validation: Examples | Pairs) -> None:
    """Refuses rows that are longer than what they are to be padded to or packed into.

    Raises:
        ValueError: how long, how much room there is, and how to mend it.
    """
    bucket = None if data.buckets is None else ("buckets", max(data.buckets))
    packed = None if data.packed_length is None else ("packed_length", data.packed_length)
    for what, examples, given in (
        ("training", train, packed if data.packing else bucket),
        ("validation", validation, bucket),
    ):
        lengths = (
            [len(pair.source) for pair in examples]
            if isinstance(examples, Pairs)
            else examples.lengths
        )
        longest = int(max(lengths))
        if given is not None and longest > given[1]:
            raise ValueError(
                f"the longest {what} row has {longest} tokens, but data.{given[0]} holds at most "
                f"{given[1]}: raise that, or lower data.source_max_len or data.target_max_len."
            )


def workload(
    run: RunConfig,
    config: DecoderConfig | EncoderDecoderConfig,
    sequence: int,
    target: int | None = None,
) -> Workload:
    """The run's training step, for `qlora_jax.plan`.

    Args:
        run: what is to be trained.
        config: the shape of its base model.
        sequence, target: of the longest rows, as `row_lengths` gives them.
    """
    return Workload(
        config,
        sequence=sequence,
        target=target,
        train=run.train,
        lora=run.lora,
        quant=run.quant,
        compute_dtype=run.model.compute_dtype,
        param_dtype=run.model.param_dtype,
        embedding_bits=run.model.embedding_bits,
        remat=run.model.remat,
        stream_weights=run.model.stream_weights,
        mlp_tile=run.model.mlp_tile,
        attention=run.model.attention,
        packed=run.data.packing,
        loss_chunk=run.model.loss_chunk,
        devices=run.devices.count,
        cut_weights=run.devices.parts > 1,
    )


def check_room(
    run: RunConfig,
    folder: Path,
    sequence: int,
    target: int | None = None,
    *,
    memory: int | None = None,
) -> None:
    """Raise where the device's memory is known and the run's longest step does not fit it.

    Args:
        run: what is to be trained.
        folder: its base model.
        sequence, target: of the longest rows, as `row_lengths` gives them.
        memory: bytes; None asks the device (a CPU does not tell, and nothing is checked).

    Raises:
        ValueError: by how much, and what would make it fit.
    """
    if os.environ.get(OVERRIDE):
        return
    try:
        check_fits(workload(run, find_config(folder), sequence, target), memory=memory)
    except ValueError as error:
        raise ValueError(f"{error} ({OVERRIDE}=1 in the environment.)") from error
