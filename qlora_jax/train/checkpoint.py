"""Checkpoints of the whole training state, through Orbax: written whole or not at all.

A checkpoint holds adapters, optimizer state, step (which is also the data position) and the random
key. It is what resuming needs to be bit-exact, and nothing that can be had elsewhere: the frozen
base stays where it came from.

Arrays are copied to NumPy before they are handed to Orbax, and come back as NumPy before they are
put where the fresh state's arrays lie. That costs one host copy of adapters and optimizer state,
and buys three things: the next step may overwrite (donate) the arrays while Orbax still writes in
the background; a state saved with its moments in pinned host memory restores on a machine or
version that keeps them elsewhere; and paged and unpaged runs read each other's checkpoints.
"""

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from qlora_jax.processes import distribute, from_first, is_first, on_first, whole
from qlora_jax.train.step import TrainState, committed


class Checkpoints:
    """The checkpoints of one run folder. Close it, or use it as a context manager.

    Of several processes all call it, and the first alone reads and writes the folder.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        """Open (and create) `folder`; after each save only the `keep` latest steps remain."""
        self.folder = folder
        self._manager: Any = None  # Orbax's, in the first process alone
        on_first(lambda: self._open(keep))

    def _open(self, keep: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        # Orbax would have every process write, and wait for the others.
        alone = ocp.options.MultiprocessingOptions(active_processes={0})
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=False, multiprocessing_options=alone
        )
        self._manager = ocp.CheckpointManager(self.folder.absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait until everything is on disk and end Orbax's threads. Raises as `save`."""
        if self._manager is None:
            return
        try:
            with self._writing():
                self._manager.wait_until_finished()
        finally:
            self._manager.close()

    def latest_step(self) -> int | None:
        """The step of the latest complete checkpoint, or None."""
        return on_first(lambda: self._manager.latest_step())

    def save(self, state: TrainState) -> None:
        """Save the state under its step; returns once the state's arrays may be overwritten.

        Raises:
          OSError: the disk is full, perhaps since an earlier save, which went on in the background.
        """
        arrays = {}
        for name, leaf in _named(state).items():
            array = whole(leaf)
            if is_first():
                # A copy: a view would see what the next step writes into the donated buffer.
                arrays[name] = np.array(array)
        step = int(state.step)
        on_first(lambda: self._write(step, arrays))

    def _write(self, step: int, arrays: dict[str, np.ndarray]) -> None:
        with self._writing():
            self._manager.save(step, args=ocp.args.StandardSave(arrays))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Orbax tells a full disk as a ValueError that holds the operating system's words."""
        try:
            yield
        except (ValueError, OSError) as error:
            if os.strerror(errno.ENOSPC) not in str(error):
                raise
            raise OSError(
                errno.ENOSPC,
                f"a checkpoint in {self.folder} cannot be written, for the disk is full: free some "
                "room and run the same again, which goes on from the last whole checkpoint",
            ) from error

    def restore(self, like: TrainState) -> TrainState:
        """The latest state, every array in the memory and sharding of its namesake in `like`.

        Raises:
          FileNotFoundError: if there is no checkpoint.
          ValueError: if the saved arrays are not those of `like`, by name, shape or dtype.
        """
        step = self.latest_step()
        if step is None:
            raise FileNotFoundError(f"{self.folder} holds no checkpoint to resume from.")
        expected, saved = _named(like), {}
        on_first(lambda: saved.update(self._read(step, expected)))
        leaves, treedef = jax.tree.flatten(like)
        placed = []
        for (name, there), leaf in zip(expected.items(), leaves, strict=True):
            array = saved[name] if is_first() else np.zeros(there.shape, there.dtype)
            placed.append(_placed(from_first(array), leaf))
        return committed(jax.tree.unflatten(treedef, placed))

    def _read(self, step: int, expected: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
        """The arrays of a checkpoint, which are those expected."""
        saved = self._manager.restore(step, args=ocp.args.StandardRestore())
        wrong = [
            f"{name} (saved {_shape(saved.get(name))}, expected {_shape(expected.get(name))})"
            for name in dict.fromkeys((*saved, *expected))
            if _shape(saved.get(name)) != _shape(expected.get(name))
        ]
        if wrong:
            raise ValueError(
                f"Checkpoint {step} in {self.folder} does not fit this model and optimizer: "
                f"{', '.join(wrong[:3])}{' …' if len(wrong) > 3 else ''}; resume with the model, "
                "adapters and optimizer it was made with, or choose another folder."
            )
        return saved


def _placed(array: np.ndarray, like: jax.Array) -> jax.Array:
    if not _is_key(like):
        return distribute(array, like.sharding)
    return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(like))


def _named(state: TrainState) -> dict[str, Any]:
    """The state's arrays by dotted path, in tree order; random keys as their uint32 data."""
    named = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        # How Flax calls the inside of a Variable differs by version.
        steps = [s for p in path if (s := jax.tree_util.keystr((p,), simple=True)) not in _INSIDE]
        named[".".join(steps)] = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    return named


_INSIDE = ("value", "raw_value")


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _shape(array: PyTree | None) -> str:
    return "nothing" if array is None else f"{np.dtype(array.dtype).name}{list(array.shape)}"
