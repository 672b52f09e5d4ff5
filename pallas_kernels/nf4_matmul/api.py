"""`nf4_matmul`: x · Wᵀ against a packed weight, the forward pass of a QLoRA layer."""

from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels import dispatch
from pallas_kernels._arguments import check_matmul, check_packed
from pallas_kernels.nf4_matmul.reference import nf4_matmul_xla


def nf4_matmul(
    x: Float[Array, "*batch k"],
    codes: UInt8[Array, "..."],
    absmax: UInt8[Array, " blocks"] | Float32[Array, " blocks"],
    nested_absmax: Float32[Array, " nested"] | None = None,
    offset: Float32[Array, ""] | None = None,
    bias: Float[Array, " n"] | None = None,
    *,
    shape: tuple[int, int] | None = None,
    quant_type: str = "nf4",
    blocksize: int = 64,
    implementation: str | None = None,
) -> Float[Array, "*batch n"]:
    """x · Wᵀ + bias, with W [n, k] packed as in `nf4_dequantize`.

    W counts in x's dtype (one rounding of table[code] · absmax; kernels for few rows keep the
    float32 product), sums are float32, and the result is rounded once to x's dtype.

    Args:
        x: [..., k] in bfloat16, float16 or float32.
        codes, absmax, nested_absmax, offset, shape, quant_type, blocksize: as in `nf4_dequantize`.
        bias: [n], added in float32 before the last rounding.
        implementation: None (see `pallas_kernels.dispatch`), "xla", "triton" or "mosaic_gpu".

    Returns:
        [..., n] in x's dtype.

    Raises:
        ValueError: parts that do not belong together, or an implementation that cannot run.
    """
    layout = check_packed(
        codes,
        absmax,
        nested_absmax,
        offset,
        shape=shape,
        quant_type=quant_type,
        blocksize=blocksize,
    )
    check_matmul("x", x, 1, bias, layout)
    dispatch.check_name(implementation)
    return nf4_matmul_xla(x, codes, absmax, nested_absmax, offset, bias, layout=layout)
