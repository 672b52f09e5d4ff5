"""The tensors of one safetensors file, copied out one at a time, whatever their number."""

from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors needs)
import numpy as np
from safetensors import safe_open

_MAPPED = 64 * 2**20
"""Bytes read through one mapping of a file."""


class TensorFile:
    """Reads tensors by name.

    A file that stays mapped counts every page that was read as resident memory; one that is opened
    for each tensor has its header, which names all of them, read as often: with the experts of
    Qwen3-30B-A3B, 18,867 tensors, that is the square of a large number. So a mapping serves for
    `_MAPPED` bytes, or for the one tensor that is larger.
    """

    def __init__(self, path: Path) -> None:
        """`path` names a file that `open_safetensors` has opened before, and so checked."""
        self.path = path
        self._mapping: Any = None
        self._read = 0

    def read(self, name: str) -> np.ndarray:
        """A tensor's numbers (bfloat16 as `ml_dtypes.bfloat16`)."""
        if self._mapping is None:
            self._mapping, self._read = safe_open(self.path, framework="np"), 0
        tensor: np.ndarray = self._mapping.get_tensor(name)
        self._read += tensor.nbytes
        if self._read >= _MAPPED:
            self._mapping = None
        return tensor
