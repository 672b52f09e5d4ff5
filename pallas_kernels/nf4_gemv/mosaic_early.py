"""What a block of the Hopper gemv does before the kernel in front of it has ended.

A product of one row is over in the time that a kernel takes to start, to wait for its first bytes
and to run out. With `GemvConfig(early=True)` the kernels of a stream overlap there (programmatic
dependent launch): a block starts as soon as a multiprocessor has room, asks for its first rows of W
and only then waits for the kernel in front of it, whose result x may be. Every block lets the next
kernel start at once: it will wait by itself.

What is asked for comes into the second-level cache, no further. That is where all writes meet, so a
row that the kernel in front were still to write would be read rightly after the wait; a load into
registers or shared memory would not see it.
"""

from pallas_kernels._mosaic import BLOCK
from pallas_kernels.codebooks import NESTED_BLOCKSIZE

PIECE = 16
"""Bytes: what a prefetch asks for starts and ends at multiples of it."""

MOST = 1 << 18
"""Bytes of codes that a block asks for: 132 blocks fill two thirds of an H200's second-level cache.
(An instruction can ask for less than 1 MiB.)"""


def ask_for_first_unit(m, plan, x, codes, absmax, nested, *rest):
    """Ask for the rows of the block's first unit: their codes, and what their scales are made of.

    Blocks with different parts of the columns ask for the same.
    """
    block = m.cta if plan.split == 1 else m.cta % plan.blocks
    first, of_row = block * plan.rows, plan.k // BLOCK
    scales, width = first * of_row, 1 if plan.double_quant else 4

    def ask(buffer, start, nbytes, size):
        """For the bytes from `start` on in whole pieces, as far as those of the buffer go."""
        whole = 0x100000000 - PIECE
        at, end = start & whole, m.minimum(start + (nbytes + PIECE - 1), size) & whole
        m.prefetch(buffer, at, end - at, when=(m.thread == 0) & (at < end))

    row_bytes = plan.k // 2
    ask(codes, first * row_bytes, min(plan.rows * row_bytes, MOST), plan.n * row_bytes)
    ask(absmax, scales * width, plan.rows * of_row * width, plan.n * of_row * width)
    if plan.double_quant:
        wanted = -(-plan.rows * of_row // NESTED_BLOCKSIZE) + 1
        size = -(-plan.n * of_row // NESTED_BLOCKSIZE)
        ask(nested, scales // NESTED_BLOCKSIZE * 4, 4 * wanted, 4 * size)
