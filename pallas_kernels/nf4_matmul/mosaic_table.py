"""The Hopper matmuls' tables in shared memory: a byte of codes becomes two unscaled weights.

Where bytes come one to a word (from shared memory, that is), the address of a look-up is one
multiply-add, and the table needs no room for anything else between its entries, as the gemv's does
(`_mosaic_decoder`): each of the 256 pairs 32 times, a copy for each lane in a bank of its own. The
pairs are float16, which must be made float32 before they are scaled, or with `config.wide` float32.
Teams, which decode seldom, have 8 copies of float32 pairs. Behind them stands the 8-bit dynamic
map, once: the feeding warpgroup alone reads it, once a step.
"""

import functools

import numpy as np

from pallas_kernels._mosaic_decoder import lookup_tables
from pallas_kernels.codebooks import CODEBOOKS, DYNAMIC_SIGNED
from pallas_kernels.nf4_matmul.mosaic_plan import COMPUTE, TABLE_ENTRIES

THREADS = 128 * (COMPUTE + 1)


@functools.cache
def _wide_tables(quant_type: str) -> np.ndarray:
    """[256, 4] words: a byte's two float32 weights, the dynamic map's float32, and a zero."""
    table, byte = CODEBOOKS[quant_type].astype(np.float32).view(np.uint32), np.arange(256)
    columns = (table[byte >> 4], table[byte & 15], DYNAMIC_SIGNED.view(np.uint32))
    return np.stack([*columns, np.zeros(256, np.uint32)], 1)


def tables_of(config, quant_type):
    """The kernel's argument that `fill_table` copies from: words by byte, see these two."""
    return _wide_tables(quant_type) if config.float_pairs else lookup_tables(quant_type)


def fill_table(m, config, tables):
    """Write the tables to the start of shared memory, `THREADS` threads at 16 bytes each."""
    words = 2 if config.float_pairs else 1
    chunks, row = config.pair_bytes // 16, 8 * words
    for first in range(0, chunks, THREADS):
        at = m.thread + first
        when = at < chunks
        entry = (at << 4) // (config.pair_bytes // TABLE_ENTRIES)
        pair = m.load(tables, entry * row, words, when=when)
        m.shared_store(at << 4, pair * (4 // words), when=when)
    when = m.thread < TABLE_ENTRIES
    value = m.load(tables, m.thread * row, offset=4 * words, when=when)
    m.shared_store(m.thread << 2, value, offset=config.pair_bytes, when=when)
    m.barrier()


def look_up_ahead(m, config, codes):
    """The float16 pairs of a step's codes, a byte to a word; they may be under way for a while.

    Wide look-ups are left to `weights_of`: what is made of them could not be kept from being made
    at once, between the instructions that start `wgmma`.
    """
    return list(codes) if config.float_pairs else [_look_up(m, config, code)[0] for code in codes]


def weights_of(m, config, found):
    """Of each byte of `look_up_ahead` its two weights in float32, the even column's first."""
    if not config.float_pairs:
        return [m.half_pair(pair) for pair in found]
    return [tuple(map(m.as_float, _look_up(m, config, code))) for code in found]


def _look_up(m, config, byte):
    copy, words = m.thread & (config.copies - 1), 2 if config.float_pairs else 1
    return m.shared_load(byte * (4 * words * config.copies) + copy * (4 * words), words)


def look_up_absmax(m, config, byte):
    """The dynamic map's float32 of a byte."""
    return m.as_float(m.shared_load(byte << 2, offset=config.pair_bytes)[0])
