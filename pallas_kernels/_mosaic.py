"""What the Mosaic GPU kernels (Hopper) take, asked before anything is traced, and their call."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from pallas_kernels._arguments import Layout
from pallas_kernels._batching import in_turn
from pallas_kernels._sharding_types import vary_alike
from pallas_kernels.cards import CARDS

BLOCK = 64
"""The blocksize these kernels are written for."""

SMS = CARDS["h200"].cores
"""Blocks of threads that run side by side, one to a multiprocessor: an H100's as well."""

SHARED_LIMIT = CARDS["h200"].multiprocessor.smem_optin - 2048
"""Bytes of shared memory that a block can have, less what Mosaic takes for itself."""


def why_not_mosaic(op: str, rows: int, layout: Layout, dtype: DTypeLike) -> str | None:
    """Why the Hopper kernel of `op` cannot take this call; None where it can.

    Args:
        op: "nf4_gemv", "nf4_matmul" or "nf4_matmul_transposed".
        rows: rows of x (or dy).
        layout: the weight.
        dtype: of x (or dy).
    """
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16 activations, not {jnp.dtype(dtype).name}"
    if layout.codes_per_byte != 2 or layout.blocksize != BLOCK or len(layout.shape) != 2:
        return (
            "it takes 4-bit matrices in blocks of 64, "
            f"not {layout.quant_type} {layout.shape} in blocks of {layout.blocksize}"
        )
    n, k = layout.shape
    if op == "nf4_matmul_transposed":
        # The copy engine's tiles of codes are 64 bytes wide.
        if k % 128 or n % 64:
            return f"it takes n in multiples of 64 and k in multiples of 128, not {layout.shape}"
    else:
        # The matmul's tiles of codes are 8 pairs of rows high.
        multiple = 16 if op == "nf4_matmul" else 2
        if k % 64 or n % multiple:
            return (
                f"it takes n in multiples of {multiple} and k in multiples of 64, "
                f"not {layout.shape}"
            )
    if max(layout.nbytes, 2 * rows * max(n, k)) >= 1 << 32:
        return f"it takes less than 4 GiB of codes and of activations, not {rows} rows of {n, k}"
    return None


def check_mosaic(op: str, rows: int, layout: Layout, dtype: DTypeLike) -> None:
    """Raise a ValueError with the reason of `why_not_mosaic`, if there is one."""
    problem = why_not_mosaic(op, rows, layout, dtype)
    if problem:
        raise ValueError(
            f"implementation is 'mosaic_gpu', but {problem}: use implementation='triton' or 'xla'"
        )


def filled_up(matrix: Array, rows: int, columns: int = 1) -> Array:
    """Zeros at the ends until both sizes are multiples."""
    return jnp.pad(matrix, ((0, -matrix.shape[0] % rows), (0, -matrix.shape[1] % columns)))


def call(kernel: Callable[..., Array], *operands: Array) -> Array:
    """kernel(*operands), for a kernel of `plgpu.kernel`.

    `jax.vmap` runs it once per element: Pallas cannot batch a kernel that copies from transformed
    references. Its loops count in 32 bits, in a program in 64-bit mode as well.
    """
    with jax.enable_x64(False):
        return vary_alike(in_turn(kernel)(*operands), *operands)[0]
