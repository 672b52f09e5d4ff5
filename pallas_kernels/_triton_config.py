"""How the Triton-lowered Pallas kernels are cut, and what they take, asked before they are traced.

Nothing here needs Pallas, whose Triton lowering JAX has deprecated: without it, all but these
kernels would still run.
"""

import dataclasses

from pallas_kernels._arguments import Layout, check_fields, check_kinds

DECODERS = ("pairs", "table")
"""The ways from a byte to two weights, see `pallas_kernels._triton_decoder`."""

RUN = 16
"""Bytes of codes per vector load: 32 weights of one block."""

MAX_INDEX = 2**31 - 1
"""The kernels count in signed 32-bit numbers."""


def stack_is_addressable(nbytes: int) -> bool:
    """Whether Pallas' Triton lowering finds an element of a stack of so many codes: by a signed
    32-bit offset, or, from 4 GiB on, by a wider one."""
    return nbytes <= MAX_INDEX or nbytes > 2**32


@dataclasses.dataclass(frozen=True)
class TritonConfig:
    """Tile sizes and compiler hints of one kernel launch.

    block_m, block_n, block_k: rows of x, rows of the weight and columns of the weight per program.
    num_warps, num_stages: warps per program, and depth of the load pipeline.
    split_k: programs that share one output tile, each with a part of the sum.
    decoder: how a byte becomes two weights, see `pallas_kernels._triton_decoder`.
    fused: whether the weight is decoded inside the matmul; False dequantizes it first, with the
        block_k and warps given here, and leaves the product to XLA: for very many rows.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3
    split_k: int = 1
    decoder: str = "pairs"
    fused: bool = True

    def __post_init__(self) -> None:
        """A ValueError for what the compiler answers with an abort, or not at all."""
        check_kinds(self)
        block, several = "a power of 2", "1 or more"
        check_fields(
            self,
            block_m=(_is_power_of_2(self.block_m), block),
            block_n=(_is_power_of_2(self.block_n), block),
            block_k=(_is_power_of_2(self.block_k) and self.block_k >= 2 * RUN, "32, 64, 128, …"),
            num_warps=(_is_power_of_2(self.num_warps) and self.num_warps <= 32, "1, 2, 4, … 32"),
            num_stages=(self.num_stages >= 1, several),
            split_k=(self.split_k >= 1, several),
            decoder=(self.decoder in DECODERS, f"one of {DECODERS}"),
        )


def _is_power_of_2(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def why_not_triton(layout: Layout, by_rows: bool) -> str | None:
    """Why the Triton kernels cannot take this weight, or None where they can.

    `by_rows`: whether it is read row by row, as the matmuls do, or as flat bytes.
    """
    if layout.quant_type == "int8":
        return "quant_type is 'int8', and the Triton kernels decode 4-bit codes"
    if layout.size > MAX_INDEX:
        return f"a weight of shape {layout.shape} has more elements than 31 bits count"
    if by_rows and not layout.rows_are_whole_blocks:
        return (
            f"blocks of {layout.blocksize} cross the rows of a weight of shape {layout.shape}, "
            "and the Triton matmuls need rows of whole blocks"
        )
    return None
