"""Outputs that appear whole or not at all: written beside their place, then moved there."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` at the end, and vanishes where something is raised.

    Args:
        path: must not exist yet, unless it is an empty folder.

    Raises:
        FileExistsError: there is something already.
    """
    path = Path(path)
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield partial
        # mkdtemp makes folders for its owner's eyes alone.
        partial.chmod(0o755)
        if path.is_dir():
            path.rmdir()
        partial.replace(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """A file to write, which becomes `path` at the end, and vanishes where something is raised.

    Raises:
        FileExistsError: there is something already.
    """
    path = Path(path)
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Writes beside a file, whose one writer this process is, and moves the result into its place:
    what a kill leaves, the next call overwrites."""
    partial = path.with_name(f"{path.name}.partial")
    write(partial)
    partial.replace(path)


def write_whole(path: Path, text: str) -> None:
    """Puts a text in the place of a file, in UTF-8, whoever else writes it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def refuse_existing(path: str | Path) -> None:
    """Raises FileExistsError where something but an empty folder lies at the path."""
    path = Path(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileExistsError(f"{path} exists already: give a new name, or remove it first.")
