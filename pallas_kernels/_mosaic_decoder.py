"""From a byte of codes to its two weights on Hopper: a look-up in shared memory, or selects.

**The look-up.** The table has an entry of 256 bytes for each of the 256 bytes: 32 copies of the
float16 *pair* that the byte stands for (before scaling), then 32 copies of the 8-bit dynamic map's
value for it, which undoes the second level of quantization. Lane l reads the l-th copy, in its own
bank, so no two lanes ever collide. `prmt` makes the address: the byte moves into the second place,
above the lane's own offset, in one instruction.

**Selects in registers**, for a share of the bytes where the path to shared memory is the narrow
one. `prmt` picks four bytes at once out of eight, by the low three bits of its selector's nibbles,
and the codes *are* nibbles: so the 16 float16 stand in registers as four tables of eight bytes, low
and high bytes of codes 0 to 7 and of codes 8 to 15. Four codes take four `prmt`, two choices by the
codes' fourth bits, and two `prmt` that put low and high bytes together: with the selectors and the
mask about 10 instructions, where two look-ups are two `prmt` and two reads.
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


@functools.cache
def byte_planes(quant_type: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Low bytes and high bytes of the 16 float16, four words each: codes 0–3, 4–7, 8–11, 12–15."""
    half = CODEBOOKS[quant_type].astype("<f2").view(np.uint8).reshape(16, 2)
    low, high = (tuple(int(w) for w in half[:, i].copy().view("<u4")) for i in (0, 1))
    return low, high


def select_pairs(m, codes, upper, planes):
    """The float16 pairs of two bytes of a word: its lower ones, or its upper ones.

    `planes`: the machine's words of `byte_planes`.
    """
    selector = codes & 0x77777777
    if upper:
        selector = selector >> 16
    # Byte i of the mask is nibble i's fourth bit, eight times: `prmt` repeats the sign of a byte.
    fourth = m.prmt(codes << 4, codes, 0xFBEA if upper else 0xD9C8)
    low, high = (
        (m.prmt(p[0], p[1], selector) & (fourth ^ 0xFFFFFFFF))
        | (m.prmt(p[2], p[3], selector) & fourth)
        for p in planes
    )
    # Nibble 1 is the even column, nibble 0 the odd one.
    return m.prmt(low, high, 0x4051), m.prmt(low, high, 0x6273)


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
