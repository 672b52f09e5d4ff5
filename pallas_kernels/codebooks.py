"""The code tables: what a 4- or 8-bit code stands for, before its block's absmax multiplies it.

Every data type of the QLoRA paper is a *lookup type*: a code of b bits is an index into a table of
2^b numbers in [-1, 1], and a block of weights shares one scale, its largest magnitude (absmax):

    weight ≈ table[code] · absmax

What differs is only where the numbers of the table stand:

- **NF4** (QLoRA, section 3 and appendix E): quantiles of a standard normal, so that each code is
  used about equally often by normally distributed weights, with an exact zero.
- **FP4** (E2M1: 2 exponent bits, 1 mantissa bit) in bitsandbytes' bit patterns, and **FP4 (E3M0)**,
  3 exponent bits and no mantissa: powers of two.
- **INT4**, **INT8**: evenly spaced, symmetric about zero; code c of b bits stands for
  (c − 2^(b−1)) / (2^(b−1) − 1).
- **dynamic** 8-bit maps (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"): the
  signed one holds the absmax constants in double quantization, the unsigned one Adam's second
  moment.

The values agree with bitsandbytes 0.50 bit for bit (tests/vectors/test_codebooks.py). They stand
here once, for the kernels and for `qlora_jax.quant` alike.
"""

import numpy as np

# QLoRA, appendix E; the literals of bitsandbytes' kernels.
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# bitsandbytes' E2M1 by bit pattern (sign, then three bits); code 8 is a second zero.
_FP4_TWELFTHS = (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3)

# The paper's E3M0 by bit pattern: sign, then an exponent of three bits, of which 0 means zero.
_E3M0 = (0.0, *(2.0**-e for e in range(6, -1, -1)))


def _integer(bits: int) -> np.ndarray:
    half = 2 ** (bits - 1)
    return ((np.arange(2 * half) - half) / (half - 1)).astype(np.float32)


def _linspace(start: float, stop: float, count: int) -> np.ndarray:
    """Evenly spaced float32, each half counted from its own end and rounded once (a fused
    multiply-add), as torch does it: the map's published values carry these roundings."""
    first, last = np.float32(start), np.float32(stop)
    step = np.float64((last - first) / np.float32(count - 1))
    index = np.arange(count)
    ascending, descending = first + step * index, last - step * (count - 1 - index)
    return np.where(index < count // 2, ascending, descending).astype(np.float32)


def _dynamic(signed: bool) -> np.ndarray:
    """The 256 values of the dynamic 8-bit map, ascending.

    Each decade 10^-6 … 10^0 holds evenly spaced fractions, the midpoints of linspace(0.1, 1); the
    number of fraction bits grows with the decade, so that the largest values are the finest.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        count = 2**decade if signed else 2 ** (decade + 1)
        edges = _linspace(0.1, 1.0, count + 1)
        fractions = (edges[:-1] + edges[1:]) / np.float32(2)
        magnitudes = np.float32(10.0 ** (decade - 6)) * fractions
        values += [*magnitudes, *(-magnitudes if signed else ())]
    return np.sort(np.asarray(values, np.float32))


CODEBOOKS: dict[str, np.ndarray] = {
    "nf4": np.asarray(_NF4, np.float32),
    "fp4": (np.asarray(_FP4_TWELFTHS, np.float32) / np.float32(12)),
    "fp4_e3m0": np.asarray(_E3M0 + tuple(-v for v in _E3M0), np.float32),
    "int4": _integer(4),
    "int8": _integer(8),
}
"""quant_type -> float32 table indexed by the code's bit pattern (16 entries, or 256 for int8)."""

DYNAMIC_SIGNED: np.ndarray = _dynamic(signed=True)
"""float32[256], ascending, in [-0.993, 1]: the absmax codes of double quantization."""

DYNAMIC_UNSIGNED: np.ndarray = _dynamic(signed=False)
"""float32[256], ascending, in [0, 1]: the second moment of 8-bit Adam."""

NESTED_BLOCKSIZE = 256
"""Absmax constants that share one nested absmax in double quantization (QLoRA, section 3)."""

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""The block sizes bitsandbytes writes and this project reads."""
