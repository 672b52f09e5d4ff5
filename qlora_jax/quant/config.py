"""How a weight is quantized: the data type, the block, and whether the scales are quantized too."""

from dataclasses import dataclass
from numbers import Integral

from pallas_kernels.codebooks import BLOCKSIZES, CODEBOOKS
from qlora_jax.fields import check_numbers


@dataclass(frozen=True)
class QuantConfig:
    """The quantization of a weight; names and defaults as in bitsandbytes and the QLoRA paper.

    Attributes:
        quant_type: "nf4" (the paper's), "fp4" (E2M1 in bitsandbytes' bit patterns), "fp4_e3m0",
            "int4" or "int8".
        blocksize: consecutive weights, in row-major order, that share one absmax.
        double_quant: quantize the absmax constants to 8 bits, 256 to a block (0.127 instead of 0.5
            bits per weight at blocksize 64).
    """

    quant_type: str = "nf4"
    blocksize: int = 64
    double_quant: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.quant_type, str) or self.quant_type not in CODEBOOKS:
            raise ValueError(
                f"quant_type is {self.quant_type!r}; choose one of {', '.join(CODEBOOKS)}"
            )
        if not isinstance(self.blocksize, Integral) or self.blocksize not in BLOCKSIZES:
            raise ValueError(
                f"blocksize is {self.blocksize}; choose one of {', '.join(map(str, BLOCKSIZES))}"
            )
        check_numbers(self)
