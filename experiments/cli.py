"""What the commands share: how a mistake is told, where compiled programs are kept."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from experiments.config import RunConfig
from experiments.tree import parse_setting, to_tree
from qlora_jax.checkpoints import open_checkpoint
from qlora_jax.cli import in_one_sentence
from qlora_jax.quant import QuantConfig
from qlora_jax.train import Callback, WandB

COMPUTE_DTYPES = ("bfloat16", "float16", "float32")
"""What `--compute-dtype` may be."""

CONFIGS = Path(__file__).resolve().parent / "configs"


def refuse(error: Exception) -> int:
    """Says in one sentence what is wrong, on standard error; returns the exit status."""
    print(f"error: {in_one_sentence(error)}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def termination_interrupts() -> Iterator[None]:
    """SIGTERM, which a scheduler sends before it kills, interrupts as Ctrl-C does: a run folder is
    given back, for a process on any host to go on with. (Signals come to the main thread alone.)

    While garbage is collected Python drops what is raised, and JAX has a function of its own called
    then: an interrupt that is lost so is sent again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ended, hook = threading.Event(), sys.unraisablehook

    def send() -> None:
        if not ended.is_set():
            signal.raise_signal(signal.SIGTERM)

    def dropped(what: Any) -> None:
        if what.exc_type is KeyboardInterrupt:
            threading.Timer(0.05, send).start()
        else:
            hook(what)

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.unraisablehook = dropped
    try:
        yield
    finally:
        ended.set()
        sys.unraisablehook = hook
        signal.signal(signal.SIGTERM, before)


def interrupted(folder: Path | None = None) -> int:
    """Says so on standard error, and that the command goes on with what is in a folder, if there is
    one; returns the exit status, a shell's own for SIGINT."""
    how = "" if folder is None else f": the same command goes on with what is in {folder}"
    print(f"interrupted{how}", file=sys.stderr)
    return 130


def run_command(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace, Console], int],
    arguments: Sequence[str] | None,
) -> int:
    """Runs a command whose mistakes are told in one sentence; returns its exit status, 2: refused,
    130: interrupted.

    Args:
        parser: the command line.
        run: does the work, given the options and standard output; returns the exit status.
        arguments: the command line's words; None: the process' own.
    """
    options = parser.parse_args(arguments)
    try:
        return run(options, make_console())
    except (ValueError, OSError, ModuleNotFoundError, MemoryError) as error:
        return refuse(error)
    except KeyboardInterrupt:
        return interrupted()


def read_settings(
    texts: Iterable[str], others: Mapping[str, Any] | None = None, flag: str = "--set"
) -> dict[str, Any]:
    """`--set key=value` flags as dotted options, beside those that other flags set.

    Args:
        texts: the values of all `--set`; the last one about an option counts.
        others: dotted options that other flags have set.
        flag: what gave the texts, for the message of a ValueError.

    Raises:
        ValueError: a text is no setting; it says something else about an option than another flag;
            or it is about a part of what another one sets as a whole, which one of them would lose.
    """
    others = others or {}
    settings = dict(others)
    for key, value in (parse_setting(text, flag) for text in texts):
        for other, was in settings.items():
            part = key.startswith(f"{other}.") or other.startswith(f"{key}.")
            if part or (key == other and key in others and value != was):
                raise ValueError(
                    f"{other}={was} and {key}={value} are both given, which are about one option: "
                    "leave one of them out."
                )
        settings[key] = value
    return settings


QUANT_HELP = "how its weights are stored: nf4, fp4 … or none (as a 4-bit folder holds them, or nf4)"


def read_quant(named: str | None, folder: Path) -> QuantConfig | None:
    """How `--quant` has the model in a folder stored; None for 16 bits.

    Args:
        named: a data type, "none", or None where nothing was given.
        folder: the model's.

    Raises:
        ValueError, OSError: there is no such data type, or no model.
    """
    if named == "none":
        return None
    return (open_checkpoint(folder).quant if named is None else None) or QuantConfig(named or "nf4")


def join_cluster(where: str) -> None:
    """Makes this process one of several, before JAX has started its backend.

    Args:
        where: "HOST:PORT/INDEX/COUNT": where the first process listens, which one this is (from
            0), and how many there are. "" has JAX ask the cluster: SLURM, Open MPI, Kubernetes or
            Cloud TPU.

    Raises:
        ValueError: another form.
        RuntimeError: JAX finds no cluster, or the others do not come.
    """
    if not where:
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise ValueError(
                "JAX finds no cluster here (SLURM, Open MPI, Kubernetes or Cloud TPU): say "
                "--cluster HOST:PORT/INDEX/COUNT"
            ) from error
        return
    found = re.fullmatch(r"(.+:\d+)/(\d+)/(\d+)", where)
    if found is None or not int(found[2]) < int(found[3]):
        raise ValueError(
            f"--cluster is {where!r}; expected HOST:PORT/INDEX/COUNT, such as node0:9876/0/2 for "
            "the first process of two"
        )
    jax.distributed.initialize(found[1], int(found[3]), int(found[2]))


def keep_compiled_programs(folder: Path) -> None:
    """Compile once per program and machine, not once per cell: XLA's results are kept in a folder.

    Where a cache is configured already (JAX_COMPILATION_CACHE_DIR), that one is used.
    """
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def wandb_callbacks(project: str | None, folder: Path, run: RunConfig) -> list[Callback]:
    """What `--wandb PROJECT` asks for; ValueError where the package is missing. The run has its
    folder's name, and its id in `folder`/wandb-id."""
    if project is None:
        return []
    if importlib.util.find_spec("wandb") is None:
        raise ValueError("--wandb needs the package wandb: pip install 'qlora-jax[wandb]'.")
    id_file = folder / "wandb-id"
    return [WandB(project, name=folder.name, config=to_tree(run), id_file=id_file)]


def make_console() -> Console:
    """Standard output; a file gets lines long enough for the tables."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 140))
