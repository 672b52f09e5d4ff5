"""One program in several processes: what each does itself, and what the first does for all.

JAX runs on several machines (and on a TPU slice of more than one host) as a process on each, which
all run the same program: they read the same model and the same rows, a mesh spans the devices of
them all, and XLA exchanges what a step needs. An array on such a mesh lies in parts, of which a
process sees its own. So three things are done together, by all processes alike:

- `distribute` lays out an array that every process has; each brings its own devices their parts.
- `whole` is the way back: NumPy's array of all parts, in every process.
- `on_first` runs something in the first process alone, such as reading or writing the run folder,
  and tells the others what came of it, also where it failed.

`jax.distributed.initialize()` comes before all of it. In a single process they are
`jax.device_put`, `numpy.asarray` and a call.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def are_several() -> bool:
    """Whether this process is one of several (without starting JAX's backend where it is not)."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process reads and writes the run folder and talks to the user."""
    return not are_several() or jax.process_index() == 0


def distribute(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array that every process has alike, on the devices of a sharding that may span them."""
    if sharding.is_fully_addressable or not _is_here(array):
        return jax.device_put(array, sharding)
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        data = distribute(jax.random.key_data(array), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    here = np.asarray(array)
    return jax.make_array_from_callback(here.shape, sharding, lambda part: here[part])


def whole(array: Any) -> np.ndarray:
    """All of an array in host memory, wherever its parts lie; not to be written to.

    Every process asks for the same arrays in the same order; one array at a time is whole on each
    device meanwhile.
    """
    if _is_here(array) or array.is_fully_replicated:
        return np.asarray(array)
    on_device = jax.device_put(array, array.sharding.with_memory_kind("device"))
    return np.asarray(multihost_utils.process_allgather(on_device, tiled=True))


def _is_here(array: Any) -> bool:
    return not isinstance(array, jax.Array) or array.is_fully_addressable


def on_first(do: Callable[[], Any]) -> Any:
    """`do()` in the first process alone; every process gets its result, which JSON can hold.

    Raises:
        RuntimeError: in the others, where it raised in the first.
    """
    if not are_several():
        return do()
    if not is_first():
        found = json.loads(_told(b"").decode())
        if "error" in found:
            raise RuntimeError(f"the first process stopped: {found['error']}")
        return found["result"]
    try:
        result = do()
    except BaseException as error:
        _told(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        raise
    _told(json.dumps({"result": result}).encode())
    return result


def from_first(array: np.ndarray) -> np.ndarray:
    """The first process's array, in all of them; the others give one of its shape and dtype."""
    if not are_several() or not array.size:
        return array
    # As bytes, since what is told is added to zeros: of floats, a negative zero would not survive.
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    told = np.asarray(multihost_utils.broadcast_one_to_all(flat))
    return told.view(array.dtype).reshape(array.shape)


def _told(text: bytes) -> bytes:
    length = int(from_first(np.array(len(text))))
    return from_first(np.frombuffer(text.ljust(length), np.uint8)[:length]).tobytes()
