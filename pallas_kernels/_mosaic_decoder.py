"""From a byte of codes to its two weights on Hopper: one look-up in shared memory.

The table has an entry of 256 bytes for each of the 256 bytes: 32 copies of the float16 *pair* that
the byte stands for (before scaling), then 32 copies of the 8-bit dynamic map's value for it, which
undoes the second level of quantization. Lane l reads the l-th copy, in its own bank, so no two
lanes ever collide. `prmt` makes the address: the byte moves into the second place, above the lane's
own offset, in one instruction.
"""

import functools

import numpy as np

from pallas_kernels.codebooks import CODEBOOKS, DYNAMIC_SIGNED

TABLE_BYTES = 256 * 256


@functools.cache
def lookup_tables(quant_type: str) -> np.ndarray:
    """[256, 2] words: a byte's two float16 weights (even column low), the dynamic map's float32."""
    half = CODEBOOKS[quant_type].astype(np.float16).view(np.uint16).astype(np.uint32)
    byte = np.arange(256)
    pairs = half[byte >> 4] | half[byte & 15] << 16
    return np.stack([pairs, DYNAMIC_SIGNED.view(np.uint32)], 1)


def look_up_pair(m, codes, byte, table_lane):
    """The float16 pair of a word's byte; `byte` is 0 to 3, or such a word per lane.

    `table_lane` is 4 times the lane; the table is at the start of shared memory.
    """
    (pair,) = m.shared_load(m.prmt(codes, table_lane, (byte << 4) + 0x5504))
    return pair


def look_up_absmax(m, codes, byte, table_lane):
    """The dynamic map's float32 for a word's byte; arguments as in `look_up_pair`."""
    (value,) = m.shared_load(m.prmt(codes, table_lane, (byte << 4) + 0x5504), offset=128)
    return m.as_float(value)
