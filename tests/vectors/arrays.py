"""Reading the reference arrays: bfloat16 is stored as its bit pattern in .npz files."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np


def bf16(bits: np.ndarray) -> np.ndarray:
    """The bfloat16 numbers whose bit patterns these uint16 are; other arrays pass unchanged."""
    return bits.view(jnp.bfloat16) if bits.dtype == np.uint16 else bits


def load_npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as archive:
        return {name: archive[name] for name in archive.files}


def assert_same_numbers(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal bit for bit, but for the sign of zero."""
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual.astype(np.float32), expected.astype(np.float32))
