"""Block-wise quantization: from numbers to codes, in the arithmetic of bitsandbytes' CUDA kernels.

A tensor is read as one long row-major vector and cut into blocks. Each block is divided by its
largest magnitude (absmax), and every quotient s in [-1, 1] is replaced by the code of the nearest
number in a table (`pallas_kernels.codebooks`):

    s = x · (1 / absmax)            two roundings, as on the card, not x / absmax
    code = #{midpoints m_i < s}     m_i between neighbours of the sorted table; a tie goes down

Double quantization does the same once more to the absmax constants: their mean is taken off, and
the rest is quantized to 8 bits with the signed dynamic map, 256 to a block.

The rule is CUDA's wherever bitsandbytes' own backends disagree (all-zero blocks, FP4's ties, the
8-bit search): see ../shared/facts/bitsandbytes.md and tests/vectors. The last block of a tensor
may be short; it too is multiplied by the reciprocal, where bitsandbytes' CPU fallback divides.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels.codebooks import CODEBOOKS, DYNAMIC_SIGNED, NESTED_BLOCKSIZE

# FP4 by magnitude: bitsandbytes compares |s| with these literals, not with the exact midpoints.
_FP4_THRESHOLDS = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)
_FP4_BY_MAGNITUDE = (0, 1, 6, 7, 4, 5, 2, 3)


def _midpoints(ascending: np.ndarray) -> np.ndarray:
    return (ascending[:-1] + ascending[1:]) * np.float32(0.5)


def _above(s: Float32[Array, "..."], thresholds: np.ndarray) -> UInt8[Array, "..."]:
    """How many thresholds lie strictly below s; none for NaN."""
    count = jnp.zeros(s.shape, jnp.uint8)
    for threshold in thresholds:
        count += (s > threshold).astype(jnp.uint8)
    return count


def _by_magnitude(
    s: Float32[Array, "..."], thresholds: tuple[float, ...] | np.ndarray, codes: tuple[int, ...]
) -> UInt8[Array, "..."]:
    """Sign bit, then the code of |s|'s rank among the thresholds: a tie goes towards zero."""
    magnitude = jnp.abs(s)
    code = jnp.full(s.shape, codes[0], jnp.uint8)
    for threshold, above in zip(thresholds, codes[1:], strict=True):
        code = jnp.where(magnitude > np.float32(threshold), jnp.uint8(above), code)
    return code | jnp.where(s < 0, jnp.uint8(8), jnp.uint8(0))


def _evenly(s: Float32[Array, "..."], bits: int) -> UInt8[Array, "..."]:
    """Symmetric integers, offset binary: the nearest of 2^bits − 1 levels, ties to even."""
    half = 2 ** (bits - 1)
    levels = jnp.round(jnp.nan_to_num(s) * (half - 1)).astype(jnp.int32)
    return (levels + half).astype(jnp.uint8)


def encode(s: Float32[Array, "..."], quant_type: str) -> UInt8[Array, "..."]:
    """The codes of scaled values.

    Args:
        s: float32 in [-1, 1], any shape.
        quant_type: a key of `CODEBOOKS`.

    Returns:
        uint8 of the same shape: 0–15, or 0–255 for int8. A NaN (from an all-zero block: 0 · inf)
        takes the code that bitsandbytes' comparisons leave it, which reads back as zero.
    """
    match quant_type:
        case "nf4":
            return _above(s, _midpoints(CODEBOOKS["nf4"]))
        case "fp4":
            return _by_magnitude(s, _FP4_THRESHOLDS, _FP4_BY_MAGNITUDE)
        case "fp4_e3m0":
            return _by_magnitude(s, _midpoints(CODEBOOKS["fp4_e3m0"][:8]), tuple(range(8)))
        case "int4" | "int8":
            return _evenly(s, int(quant_type.removeprefix("int")))
    raise ValueError(f"quant_type is {quant_type!r}; choose one of {', '.join(CODEBOOKS)}")


def quantize_blocks(
    flat: Float[Array, " n"], blocksize: int, quantizer: Callable[[jax.Array], jax.Array]
) -> tuple[UInt8[Array, "..."], Float32[Array, " blocks"]]:
    """Divides each block by its absmax and quantizes the quotients.

    Args:
        flat: at least one element.
        blocksize: elements to a block; the last may be shorter.
        quantizer: quotients float32 [blocks, size] in [-1, 1] (NaN in all-zero blocks) to codes
            uint8 [blocks, bytes].

    Returns:
        The codes in order, as [blocks, bytes] where no block is short and flat where one is, and
        absmax, float32 [ceil(n / blocksize)].
    """
    whole = flat.size // blocksize * blocksize
    parts = [flat[:whole].reshape(-1, blocksize)] if whole else []
    if whole < flat.size:
        parts.append(flat[whole:].reshape(1, -1))
    codes, absmax = zip(*(_quantize_rows(part, quantizer) for part in parts), strict=True)
    if len(parts) == 1:
        return codes[0], absmax[0]
    return jnp.concatenate([c.reshape(-1) for c in codes]), jnp.concatenate(absmax)


def _quantize_rows(
    blocks: Float[Array, "blocks size"], quantizer: Callable[[jax.Array], jax.Array]
) -> tuple[UInt8[Array, "blocks bytes"], Float32[Array, " blocks"]]:
    blocks = blocks.astype(jnp.float32)
    # max(|x|) written as max and min: XLA:CPU vectorises these and not the former (0.5 against
    # 5 G elements/s).
    absmax = jnp.maximum(jnp.max(blocks, axis=1), -jnp.min(blocks, axis=1))
    return quantizer(blocks * (1 / absmax)[:, None]), absmax


def pack_nibbles(codes: UInt8[Array, "blocks size"]) -> UInt8[Array, "blocks half"]:
    """Two 4-bit codes to a byte, the first in the high nibble, as bitsandbytes does; size even."""
    return (codes[:, 0::2] << 4) | codes[:, 1::2]


def accurate_mean(x: Float32[Array, " n"]) -> Float32[Array, ""]:
    """The mean as if summed exactly: float32 pairs (sum, rounding error) added in a tree.

    The offset of double quantization is a mean over up to millions of constants, and a plain
    float32 sum depends on the order of the reduction, which differs between machines.
    """
    count = x.size
    width = 1 << max(count - 1, 0).bit_length()
    total, error = jnp.pad(x, (0, width - count)), jnp.zeros(width, jnp.float32)
    while total.size > 1:
        half = total.size // 2
        a, b = total[:half], total[half:]
        total = a + b
        virtual = total - a
        # Knuth's two-sum: what rounding took from a + b.
        lost = (a - (total - virtual)) + (b - virtual)
        error = error[:half] + error[half:] + lost
    # Behind a barrier, or XLA multiplies by a rounded reciprocal instead of dividing.
    return (total + error)[0] / jax.lax.optimization_barrier(jnp.float32(count))


def quantize_absmax(
    absmax: Float32[Array, " blocks"],
) -> tuple[UInt8[Array, " blocks"], Float32[Array, " nested"], Float32[Array, ""]]:
    """Double quantization of absmax constants (QLoRA, section 3).

    Returns:
        codes uint8 [blocks] into `DYNAMIC_SIGNED`, nested absmax float32 [ceil(blocks / 256)], and
        the offset, float32: the mean that was taken off.
    """
    offset = accurate_mean(absmax)
    codes, nested_absmax = quantize_blocks(
        absmax - offset, NESTED_BLOCKSIZE, functools.partial(encode_dynamic, table=DYNAMIC_SIGNED)
    )
    return codes.reshape(-1), nested_absmax, offset


def encode_dynamic(s: Float32[Array, "..."], *, table: np.ndarray) -> UInt8[Array, "..."]:
    """Nearest entry of a dynamic map. CUDA's binary search ends on even entries, so a tie goes to
    the even code; NaN (from an all-zero block: 0 · inf) goes to 0.

    Args:
        s: float32 within the table's range, any shape.
        table: float32 [256], ascending (`pallas_kernels.codebooks`).
    """
    midpoints = jnp.asarray(_midpoints(table))
    below = jnp.searchsorted(midpoints, s, side="left").astype(jnp.int32)
    tie = s == midpoints[jnp.minimum(below, midpoints.size - 1)]
    code = jnp.where(tie & (below % 2 == 1), below + 1, below)
    return jnp.where(jnp.isnan(s), 0, code).astype(jnp.uint8)
