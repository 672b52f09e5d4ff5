"""A command as several processes of one run, on this machine."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Ended(NamedTuple):
    """How a process ended."""

    status: int
    out: str
    err: str


def run_together(
    module: str,
    arguments: Sequence[str],
    *,
    folders: Sequence[Path] | None = None,
    slurm: bool = False,
) -> list[Ended]:
    """Runs `python -m module arguments --cluster …` in two processes of two devices each.

    Args:
        module: whose options have --cluster.
        arguments: its other ones.
        folders: where each process runs; None: all here.
        slurm: have the processes find each other by the variables that srun sets.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", module, *arguments, "--cluster"]
    shared = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    if slurm:
        host, port = address.split(":")
        shared |= {"JAX_COORDINATOR_PORT": port, "SLURM_STEP_NODELIST": host}
        shared |= {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
        shared |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_STEP_NUM_NODES": "1"}
    started = [
        subprocess.Popen(
            command if slurm else [*command, f"{address}/{index}/2"],
            env=os.environ | shared | {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)},
            cwd=None if folders is None else folders[index],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    told = [process.communicate(timeout=600) for process in started]
    return [Ended(process.returncode, *t) for process, t in zip(started, told, strict=True)]
