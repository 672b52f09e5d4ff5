"""Refuse a run that cannot fit before anything is loaded.

Running out of memory an hour into a run, or after half an hour of loading, is what a plan is for.
Where the device tells how much memory it has (a GPU; the CPU does not), the step is compiled from
shapes alone and its bytes are compared with that. The program is the one that training runs a
moment later, compiled for the device that is here.
"""

import jax

from qlora_jax.models.streaming import check_host_memory_limit
from qlora_jax.plan.advice import advise
from qlora_jax.plan.memory import Plan, device_memory, plan
from qlora_jax.plan.report import gib
from qlora_jax.plan.workload import Workload


def check_fits(work: Workload, *, memory: int | None = None) -> Plan | None:
    """Raise unless the workload's training step fits this process's default device.

    Args:
        work: what is to be trained.
        memory: bytes that a program can have there; None asks the device.

    Returns:
        The plan; None where the device does not tell its memory, and so nothing was checked.

    Raises:
        ValueError: the step does not fit; says by how much, and what would make it fit. Or it needs
            more of the host than JAX's pinned pool holds; says how to raise that.
    """
    memory = device_memory() if memory is None else memory
    if memory is None:
        return None
    made = plan(work, None, memory=memory)
    # The device's own limit is what its allocator gives out: all of it is usable.
    missing = made.device.total - memory
    if missing <= 0:
        # The plan is of one card; the pool is the process's, and serves all that are here.
        here = min(work.devices, jax.local_device_count())
        check_host_memory_limit(here * made.host, jax.default_backend())
        return made
    helpful = advise(made, None)
    ways = "; ".join(f"{item.switch.name} (-{gib(item.saves)} GiB)" for item in helpful)
    raise ValueError(
        f"The training step needs {gib(made.device.total)} GiB on the device, which has "
        f"{gib(memory)} GiB: {gib(missing)} GiB too much. "
        + (f"Cheapest first, this saves memory: {ways}. " if ways else "")
        + "To run it all the same, switch the check off."
    )
