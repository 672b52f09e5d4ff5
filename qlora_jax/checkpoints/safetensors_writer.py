"""safetensors files written tensor by tensor, in shards with an index.

safetensors' own `save_file` wants every tensor of a file at once. Here a file's header is given
room in advance and filled in at the end (the format lets it be padded with spaces), so that only
one tensor is ever held.

    8 bytes: length of the header | header: JSON, names → dtype, shape, offsets | the tensors' bytes

Readers map the file and look at it through the tensor's dtype, so every tensor has to start at a
multiple of its item's size, and the format allows no gaps. Tensors whose length is a multiple of 8
are written as they come; the others, which are small in a model, wait for the end of the file.
"""

import json
import re
from pathlib import Path
from types import TracebackType

import numpy as np

from qlora_jax.checkpoints.checkpoint import DTYPES
from qlora_jax.checkpoints.folder import INDEX, SINGLE

_ALIGNMENT = 8
_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {
    np.dtype(np.uint8): "U8",
    np.dtype(np.int8): "I8",
    np.dtype(np.int32): "I32",
    np.dtype(np.int64): "I64",
    np.dtype(np.bool_): "BOOL",
}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: int | str) -> int:
    """Bytes, from a number or a text such as "2GB" or "500 MiB".

    Raises:
        ValueError: it is no positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(size))
    unit = match and _UNITS.get(match[2].upper())
    if not match or not unit or float(match[1]) * unit < 1:
        raise ValueError(f"The size {size!r} is not understood: give bytes, or such as '2GB'.")
    return int(float(match[1]) * unit)


class SafetensorsFile:
    """One file, being written."""

    def __init__(self, path: Path, header_bytes: int) -> None:
        """Opens the file.

        Args:
            path: to be made.
            header_bytes: room for the header, at least as many as it will need.
        """
        self._file = path.open("wb")
        self._room = -(-header_bytes // _ALIGNMENT) * _ALIGNMENT
        self._file.seek(8 + self._room)
        self._header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        self._waiting: list[tuple[str, np.ndarray]] = []
        self.nbytes = 0

    def add(self, name: str, tensor: np.ndarray) -> None:
        """Writes a tensor, at once or at the end."""
        if tensor.nbytes % _ALIGNMENT:
            self._waiting.append((name, tensor.copy()))
        else:
            self._write(name, tensor)

    def _write(self, name: str, tensor: np.ndarray) -> None:
        offsets = [self.nbytes, self.nbytes + tensor.nbytes]
        dtype = _NAMES[tensor.dtype]
        self._header[name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        self._file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        self.nbytes = offsets[1]

    def close(self) -> None:
        """Writes what waits, then the header."""
        for name, tensor in sorted(self._waiting, key=lambda item: -item[1].dtype.itemsize):
            self._write(name, tensor)
        header = json.dumps(self._header, separators=(",", ":")).encode()
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self._file.close()


class ShardedWriter:
    """Tensors into `model.safetensors`, or into shards of it and their index.

    Used as a context manager; the files are complete at its end.
    """

    def __init__(self, folder: Path, names: list[str], max_shard_size: int | str) -> None:
        """Writes nothing yet.

        Args:
            folder: exists.
            names: of all tensors that will come.
            max_shard_size: a shard is closed before it grows larger; a single larger tensor has
                a shard for itself.
        """
        self._folder, self._limit = folder, parse_size(max_shard_size)
        # dtype, shape and offsets take less than 150 characters.
        self._header_bytes = 100 + sum(len(json.dumps(name)) + 150 for name in names)
        self._file: SafetensorsFile | None = None
        self._shards: list[list[str]] = []
        self._total = self._pending = 0

    def __enter__(self) -> "ShardedWriter":
        return self

    def add(self, tensors: dict[str, np.ndarray]) -> None:
        """Writes tensors that belong together into one shard."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._file is not None and self._pending + size > self._limit:
            self._file.close()
            self._file = None
        if self._file is None:
            self._shards.append([])
            self._file = SafetensorsFile(self._partial(len(self._shards)), self._header_bytes)
            self._pending = 0
        for name, tensor in tensors.items():
            self._file.add(name, tensor)
            self._shards[-1].append(name)
        self._pending += size
        self._total += size

    def _partial(self, number: int) -> Path:
        return self._folder / f"model-{number:05}.safetensors.partial"

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
        if error is not None:
            return
        count = len(self._shards)
        if count == 1:
            self._partial(1).replace(self._folder / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards, 1):
            shard = f"model-{number:05}-of-{count:05}.safetensors"
            self._partial(number).replace(self._folder / shard)
            weight_map |= dict.fromkeys(names, shard)
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
