"""Folders of runs on disk: made where they can be written, deleted where they are runs."""

import shutil
import tempfile
from pathlib import Path

from experiments.report import ERROR
from qlora_jax.train.run_folder import LOCK, locked_run_folder, told_if_unwritable


def check_writable(folder: Path) -> None:
    """Makes the folder of several runs, which several processes may share.

    Raises:
        OSError: the folder cannot be made or written.
    """
    with told_if_unwritable("folder", folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def delete_run(folder: Path) -> None:
    """Deletes a run folder, if it is one.

    Raises:
        ValueError: it holds something else.
        OSError, RuntimeError: as `locked_run_folder`.
    """
    if not folder.exists():
        return
    there = {path.name for path in folder.iterdir()}
    # A run that ended before it began has left no more than these.
    if "config.json" not in there and not there <= {LOCK, ERROR}:
        raise ValueError(f"{folder} is not empty and no run folder: it is not deleted.")
    with locked_run_folder(folder):
        shutil.rmtree(folder)
