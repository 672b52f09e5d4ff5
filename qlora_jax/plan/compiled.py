"""How many bytes does the compiler give a program? Asked once per program, then remembered.

XLA knows every buffer of a program before it runs. `program_bytes` compiles for a card that need
not be here (`pallas_kernels.compile_for`), or for this machine's own device, and returns the totals
of the buffer assignment. A compile of a 65B step takes ten seconds to a minute, so its answer is
kept in a small JSON file under the user's cache folder, named by a hash of the program itself, of
the target and of the compiler's version: change a line of the model and it is asked anew.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

import jax
import jaxlib

import pallas_kernels
from pallas_kernels.cards import Card
from pallas_kernels.compile_for import compile_lowered, lower_for, with_memory_kinds
from qlora_jax.files import write_whole
from qlora_jax.plan.workload import Program

CACHE_VARIABLE = "QLORA_JAX_CACHE"
"""Environment variable that names another folder than ~/.cache/qlora-jax."""


@dataclasses.dataclass(frozen=True)
class ProgramBytes:
    """A program's buffers, in bytes. Host bytes lie in pinned host memory."""

    arguments: int
    outputs: int
    aliased: int
    """Outputs that are written into the memory of donated arguments."""
    temporaries: int
    host_arguments: int
    host_outputs: int
    host_aliased: int
    host_temporaries: int

    @property
    def device(self) -> int:
        """What the program needs on the device, its arguments included."""
        return self.arguments + self.outputs - self.aliased + self.temporaries

    @property
    def host(self) -> int:
        """What it needs in pinned host memory."""
        return self.host_arguments + self.host_outputs - self.host_aliased + self.host_temporaries


def cudnn_available() -> bool:
    """Whether cuDNN's attention can be compiled here: the wheel nvidia-cudnn-cu13 (0.9 GB)."""
    found = importlib.util.find_spec("nvidia")
    folders = [] if found is None else list(found.submodule_search_locations or [])
    return any(list(Path(folder).glob("cudnn/lib/libcudnn.so*")) for folder in folders)


def program_bytes(program: Program, card: Card | None) -> ProgramBytes:
    """The program's bytes on `card`; None compiles for this process's default device.

    Raises:
        RuntimeError: a card is given and XLA's GPU compiler is missing (says how to get it).
    """
    if card is None:
        lowered = program.fn.lower(*program.args)
        target = f"{jax.default_backend()} {jax.devices()[0].device_kind}"
    else:
        lowered = lower_for(card, program.fn, *program.args, count=program.devices)
        if program.kinds is not None:
            lowered = with_memory_kinds(lowered, *program.kinds)
        target = card.target_config()
    options = dict(program.options) if card is not None else {}
    text = lowered.as_text()
    if program.devices > 1:
        # An op that says how it is cut stands in the program by the address of what says so, and
        # what it runs not at all (`pallas_kernels._mesh`).
        text = re.sub(r'backend_config = "\d+"', "", text) + _kernel_sources()
    key = _hash(text, target, repr(options), *_versions())
    file = cache_folder() / f"{key}.json"
    known = _read(file)
    if known is not None:
        return known
    compiled = lowered.compile() if card is None else compile_lowered(lowered, options)
    memory: Any = compiled.memory_analysis()
    found = ProgramBytes(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        host_arguments=memory.host_argument_size_in_bytes,
        host_outputs=memory.host_output_size_in_bytes,
        host_aliased=memory.host_alias_size_in_bytes,
        host_temporaries=memory.host_temp_size_in_bytes,
    )
    _write(file, found)
    return found


def cache_folder() -> Path:
    """Where answers are kept: $QLORA_JAX_CACHE, or qlora-jax in the user's cache folder."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named) / "plan"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora-jax" / "plan"


def _versions() -> tuple[str, ...]:
    packages = ("jax-cuda13-pjrt", "jax-cuda12-pjrt", "nvidia-cudnn-cu13")
    installed = []
    for package in packages:
        try:
            installed.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    flags = os.environ.get("XLA_FLAGS", "")
    return (jax.__version__, jaxlib.__version__, flags, *installed)


@functools.cache
def _kernel_sources() -> str:
    folder = Path(pallas_kernels.__file__).parent
    return "".join(file.read_text(encoding="utf-8") for file in sorted(folder.rglob("*.py")))


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _read(file: Path) -> ProgramBytes | None:
    """A kept answer; None where there is none, or none that can be read."""
    try:
        return ProgramBytes(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _write(file: Path, found: ProgramBytes) -> None:
    """Whole or not at all, since several plans may run at once; a full disk costs only time."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(dataclasses.asdict(found)))
