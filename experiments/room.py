"""Is there room for the run? Asked before any weight is loaded (`qlora_jax.plan.check_fits`)."""

import os
from pathlib import Path

from experiments.config import RunConfig
from qlora_jax.data import length_buckets
from qlora_jax.models import DecoderConfig
from qlora_jax.plan import Workload, check_fits, find_config

OVERRIDE = "QLORA_JAX_NO_MEMORY_CHECK"
"""Environment variable; set to anything, a run that does not fit is tried all the same."""


def check_room(run: RunConfig, folder: Path, longest: int, *, memory: int | None = None) -> None:
    """Raise where the device's memory is known and the run's longest step does not fit it.

    Args:
        run: what is to be trained.
        folder: its base model.
        longest: tokens of the longest example.
        memory: bytes; None asks the device (a CPU does not tell, and nothing is checked).

    Raises:
        ValueError: by how much, and what would make it fit.
    """
    if os.environ.get(OVERRIDE):
        return
    config = find_config(folder)
    if not isinstance(config, DecoderConfig):
        return
    work = Workload(
        config,
        sequence=max(run.data.buckets or length_buckets(longest)),
        train=run.train,
        lora=run.lora,
        quant=run.quant,
        compute_dtype=run.model.compute_dtype,
        embedding_bits=run.model.embedding_bits,
        remat=run.model.remat,
    )
    try:
        check_fits(work, memory=memory)
    except ValueError as error:
        raise ValueError(f"{error} ({OVERRIDE}=1 in the environment.)") from error
