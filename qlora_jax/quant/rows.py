"""A matrix quantized row by row: its rows are taken out, put in and appended as codes.

The vocabulary matrix is never needed whole: a text looks up a few rows, a head multiplies all of
them but can do so some at a time. So no block may cross a row, and no constant may depend on
another row: absmax stays float32, because double quantization would tie every row to the mean of
them all. What a row stands for then depends on that row alone, to the last bit: rows that are
quantized as they are read, in pieces, or appended later equal those of `quantize(whole)`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int

from qlora_jax.quant.config import QuantConfig
from qlora_jax.quant.tensor import QuantizedTensor

ROW_BITS = {8: "int8", 4: "nf4"}
"""Bits of a code -> quant_type. On normally distributed weights in blocks of 64, evenly spaced INT8
has less than two thirds of the error of the dynamic 8-bit map (root mean square), which is made for
numbers over many magnitudes and coarse where most weights are."""

PIECE = 2**24
"""Weights that are decoded at once: 32 MiB in 16 bits, and a thousand rows or more, so that a
product with them is bound by arithmetic and not by its start."""


def row_config(bits: int, width: int) -> QuantConfig:
    """How rows of `width` numbers are kept in `bits` bits: 8.5 or 4.5 with the float32 absmax.

    Raises:
        ValueError: bits that there are not, or rows that blocks of 32 do not fill.
    """
    if bits not in ROW_BITS:
        choices = " or ".join(map(str, ROW_BITS))
        raise ValueError(f"embedding_bits is {bits!r}, but {choices} is needed, or None for dense.")
    blocksize = next((size for size in (64, 32) if width % size == 0), None)
    if blocksize is None:
        raise ValueError(
            f"embedding_bits is {bits}, but the embedding's rows have {width} numbers, which are "
            "not whole blocks of 32: leave embedding_bits out."
        )
    return QuantConfig(ROW_BITS[bits], blocksize, double_quant=False)


def rows_at_once(width: int) -> int:
    """How many rows of `width` numbers are a `PIECE`."""
    return max(1, PIECE // width)


def take_rows(w: QuantizedTensor, ids: Int[Array, "*batch"]) -> QuantizedTensor:
    """The rows of `ids`, still packed: a tensor [batch..., width]. An id that there is no row for
    gives a row of NaN."""
    _check(w)
    return _like(
        w,
        jnp.take(w.codes, ids, axis=0, mode="fill"),
        # The filler of floats is NaN, and NaN times any entry of the table is NaN.
        jnp.take(_absmax(w), ids, axis=0, mode="fill"),
        (*ids.shape, w.shape[1]),
    )


def slice_rows(w: QuantizedTensor, start: Int[Array, ""], count: int) -> QuantizedTensor:
    """`count` rows from `start` on, still packed; a start too near the end is moved back."""
    _check(w)
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=count)
    return _like(w, cut(w.codes), cut(_absmax(w)), (count, w.shape[1]))


def put_rows(w: QuantizedTensor, ids: Int[Array, " n"], rows: QuantizedTensor) -> QuantizedTensor:
    """w with other rows in the places of `ids`, each named once."""
    _check(w)
    return _like(
        w,
        w.codes.at[ids].set(rows.codes, unique_indices=True),
        _absmax(w).at[ids].set(_absmax(rows), unique_indices=True),
        w.shape,
    )


def append_rows(w: QuantizedTensor, rows: QuantizedTensor) -> QuantizedTensor:
    """w with more rows below it; its own keep every bit."""
    _check(w)
    codes = jnp.concatenate([w.codes, rows.codes])
    absmax = jnp.concatenate([_absmax(w), _absmax(rows)])
    return _like(w, codes, absmax, (w.shape[0] + rows.shape[0], w.shape[1]))


@functools.partial(jax.jit, static_argnums=1)
def mean_row(w: QuantizedTensor, count: int) -> Float32[Array, " width"]:
    """The mean of the first `count` rows, or of all if there are fewer, a piece at a time."""
    rows, width = w.shape
    count, size = min(count, rows), min(rows, rows_at_once(width))

    def add(piece: Array, total: Array) -> Array:
        start, fresh = piece_of(piece, size, rows)
        wanted = fresh & (start + jnp.arange(size) < count)
        values = slice_rows(w, start, size).dequantize(jnp.float32, implementation="xla")
        return total + jnp.where(wanted[:, None], values, 0).sum(axis=0)

    return jax.lax.fori_loop(0, -(-rows // size), add, jnp.zeros(width, jnp.float32)) / count


def piece_of(
    piece: Int[Array, ""], size: int, rows: int
) -> tuple[Int[Array, ""], Bool[Array, " size"]]:
    """The first row of a piece, and which of its rows no earlier piece had: pieces are of one size,
    so the last one begins early where they do not divide the rows."""
    start = jnp.minimum(piece * size, rows - size)
    return start, start + jnp.arange(size) >= piece * size


def _check(w: QuantizedTensor) -> None:
    if w.ndim != 2 or w.stack_shape or w.double_quant or w.shape[1] % w.blocksize:
        raise ValueError(
            f"w is {w!r}, but rows can be taken from one matrix alone whose blocks do not cross "
            "rows and whose absmax is float32: quantize it as row_config says."
        )


def _absmax(w: QuantizedTensor) -> Array:
    """absmax by row, [rows, blocks of a row]."""
    return w.absmax.reshape(w.shape[0], w.shape[1] // w.blocksize)


def _like(
    w: QuantizedTensor, codes: Array, absmax: Array, shape: tuple[int, ...]
) -> QuantizedTensor:
    return QuantizedTensor(
        codes,
        absmax.reshape(-1),
        shape=shape,
        dtype=w.dtype,
        quant_type=w.quant_type,
        blocksize=w.blocksize,
    )
