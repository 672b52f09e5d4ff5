"""A run folder belongs to one process at a time and, from its first checkpoint on, to one run.

    run/config.json     what the run is: its TrainConfig, and whatever else the caller names
    run/run.lock        who writes here now (pid, host), held by an operating-system lock
    run/checkpoints/    Orbax, one folder per saved step
    run/metrics.jsonl   one line per step and evaluation
    run/adapters/       one folder per saved step: the adapter as of then
    run/best/           with keep_best, the one of the lowest held-out loss
    run/adapter/        the trained adapter, written at the end

The lock is `flock` on run.lock: the kernel gives it back when its holder dies, however it dies, so
a lock is stale exactly when it can be taken. The pid and host inside are for the reader, and for
file systems whose locks do not reach other machines. There a lock of another host, which could be
taken, is watched: its holder touches it every few seconds, and one that is not touched any more is
taken over. So a container that is started anew, under a new name, goes on by itself.
"""

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from qlora_jax.files import write_whole
from qlora_jax.train.config import FREE_ON_RESUME, TrainConfig, goes_further

LOCK = "run.lock"
METRICS = "metrics.jsonl"
ADAPTER = "adapter"
ADAPTERS = "adapters"
BEST = "best"
BEAT = 10.0
"""Seconds after which the holder of a lock touches it again."""
SILENCE = 90.0
"""Seconds without a touch after which a holder on another host is dead. NFS may show a file's old
time for a minute."""


@contextlib.contextmanager
def locked_run_folder(folder: Path) -> Iterator[None]:
    """Create the folder if need be and hold it for this process alone.

    Raises:
      RuntimeError: if a living process holds it, naming pid and host; or one of another host may.
      OSError: if the folder cannot be created or written.
    """
    path = folder / LOCK
    try:
        with told_if_unwritable("run folder", folder):
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = _open_locked(path)
    except BlockingIOError as error:
        raise _is_written(folder, path) from error
    try:
        _refuse_other_host(folder, path, descriptor)
        me = {"pid": os.getpid(), "host": socket.gethostname(), "touched_every": BEAT}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(me).encode(), 0)
        try:
            with _touched(descriptor):
                yield
        finally:
            # Unlinked while still held: whoever opened it meanwhile sees that it is gone.
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def told_if_unwritable(what: str, folder: Path) -> Iterator[None]:
    """Turns an OSError inside into one of the same type that names the folder and a way out."""
    try:
        yield
    except OSError as error:
        raise type(error)(
            error.errno,
            f"the {what} {folder} cannot be written ({error.strerror}); choose another one",
        ) from error


def _open_locked(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(descriptor)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        # The holder before us removed the file between our open and our lock.
        os.close(descriptor)


def _read(descriptor_or_path: int | Path) -> dict[str, Any]:
    if isinstance(descriptor_or_path, int):
        text = os.pread(descriptor_or_path, 4096, 0).decode(errors="replace")
    else:
        text = descriptor_or_path.read_text(errors="replace")
    try:
        return json.loads(text) if text else {}
    except json.JSONDecodeError:
        # Its writer died between truncating and writing.
        return {}


def _holder(path: Path) -> str:
    held = _read(path)
    return f"process {held.get('pid', '?')} on host {held.get('host', '?')}"


def _is_written(folder: Path, path: Path) -> RuntimeError:
    return RuntimeError(
        f"{folder} is being written by {_holder(path)}; wait for that run to end, or choose "
        "another run folder."
    )


@contextlib.contextmanager
def _touched(descriptor: int) -> Iterator[None]:
    """Touches an open file now and then, as a sign of life."""
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(BEAT):
            with contextlib.suppress(OSError):  # the next one may arrive
                os.utime(descriptor)

    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _is_touched(path: Path) -> bool:
    """Whether somebody touches the file, or takes it away, within `SILENCE`."""
    until = time.monotonic() + SILENCE
    try:
        before = path.stat().st_mtime_ns
        while time.monotonic() < until:
            time.sleep(BEAT / 10)
            if path.stat().st_mtime_ns != before:
                return True
    except FileNotFoundError:
        return True
    return False


def _refuse_other_host(folder: Path, path: Path, descriptor: int) -> None:
    """Refuses a lock of another host that is touched; of one that is not, says so."""
    held = _read(descriptor)
    if held.get("host") in (None, socket.gethostname()):
        return
    if "touched_every" not in held:  # an older version's
        raise RuntimeError(
            f"{folder} was last written by {_holder(path)}, which did not finish; if no process "
            f"runs there any more, delete {path} and start again."
        )
    told = f"{folder} was last written by {_holder(path)}, which did not finish"
    print(f"{told}: looking {SILENCE:g} s for a sign of life", file=sys.stderr, flush=True)
    if _is_touched(path):
        raise _is_written(folder, path)
    print(f"{told}, and shows no sign of life: going on here", file=sys.stderr, flush=True)


def describe_run(
    config: TrainConfig, identity: Mapping[str, Any], found: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The content of config.json: what must be equal on resuming (of which `fingerprint` has
    `found` a part), and the versions it ran with."""
    versions = {
        name: importlib.metadata.version(name)
        for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    }
    description = {
        "train": dataclasses.asdict(config),
        "run": dict(identity),
        "found": dict(found or {}),
        "versions": {
            "python": platform.python_version(),
            **versions,
            "device": jax.devices()[0].device_kind,
        },
    }
    return json.loads(json.dumps(description, default=str))


def adapters_by_step(folder: Path) -> dict[int, Path]:
    """The adapters beside a run's checkpoints, the latest last."""
    found = (folder / ADAPTERS).glob("*")
    return dict(sorted((int(path.name), path) for path in found if path.name.isdigit()))


def forget_adapters(folder: Path, *, keep: int) -> None:
    """Deletes the adapters beside checkpoints but the latest, and the one of an end after which the
    run went on."""
    for old in list(adapters_by_step(folder).values())[:-keep]:
        shutil.rmtree(old)
    shutil.rmtree(folder / ADAPTER, ignore_errors=True)


def check_or_write_config(
    folder: Path,
    description: dict[str, Any],
    *,
    started: bool,
    defaults: Mapping[str, Any] | None = None,
    free: Collection[str] = (),
    may_go_further: bool = True,
) -> None:
    """Write config.json; or, for a run that has `started`, make sure that it is the same run.

    A run has started once it has a checkpoint. What failed before (a wrong batch shape, a model
    without adapters) left nothing to resume, and does not bind the folder to its configuration.

    A field that there was not yet when the run began did what is its default now, of those that the
    caller names `defaults`, or None. What may differ is `FREE_ON_RESUME` of the TrainConfig, and
    of the rest the dotted names that are `free`. More steps, where there may be more
    (`may_go_further` and `goes_further`), are written.

    Raises:
      ValueError: naming every field that differs, with both values.
    """
    path = folder / "config.json"
    if not (started and path.exists()):
        write_whole(path, json.dumps(description, indent=2) + "\n")
        return
    before = json.loads(path.read_text())
    known = describe_run(TrainConfig(), defaults or {})
    further = may_go_further and goes_further(before.get("train", {}), description["train"])
    may_differ = {
        "train": FREE_ON_RESUME | ({"steps"} if further else set()),
        "run": frozenset(free),
    }
    if "found" in before:  # an older version has not looked
        may_differ["found"] = frozenset(free)
    differing = [
        f"{name} (was {old}, is {new})"
        for section in may_differ
        for name, old, new in _differences(
            before.get(section, {}), description[section], known[section]
        )
        if name not in may_differ[section]
    ]
    if differing:
        raise ValueError(
            f"{folder} holds a run with another configuration; these fields differ: "
            f"{', '.join(differing)}. Set them back to resume it, or choose another run folder."
        )
    if further:
        before["train"]["steps"] = description["train"]["steps"]
        write_whole(path, json.dumps(before, indent=2) + "\n")


def _differences(
    before: Mapping[str, Any], after: Mapping[str, Any], defaults: Any, prefix: str = ""
) -> Iterator[tuple[str, str, str]]:
    defaults = defaults if isinstance(defaults, dict) else {}
    for name in dict.fromkeys((*before, *after)):
        known = defaults.get(name) if name in after else None
        old, new = before.get(name, known), after.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, known, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name}", repr(old), repr(new)
