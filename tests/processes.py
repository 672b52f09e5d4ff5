"""A command as several processes of one run, on this machine."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple


class Ended(NamedTuple):
    """How a process ended."""

    status: int
    out: str
    err: str


def run_together(
    module: str, arguments: Sequence[str], *, processes: int = 2, devices: int = 2
) -> list[Ended]:
    """Runs `python -m module arguments --cluster …` in so many processes of so many devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-m", module, *arguments, "--cluster"]
    started = [
        subprocess.Popen(
            [*command, f"{address}/{index}/{processes}"],
            env=os.environ | flags,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]
    told = [process.communicate(timeout=600) for process in started]
    return [Ended(process.returncode, *t) for process, t in zip(started, told, strict=True)]
