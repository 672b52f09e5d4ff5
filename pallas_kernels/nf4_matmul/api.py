"""`nf4_matmul`: x · Wᵀ against a packed weight, the forward pass of a QLoRA layer."""

from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels import dispatch
from pallas_kernels._arguments import check_matmul, check_packed, rows_of
from pallas_kernels._triton import TritonConfig
from pallas_kernels.nf4_gemv.api import MAX_ROWS, nf4_gemv
from pallas_kernels.nf4_matmul.reference import nf4_matmul_xla
from pallas_kernels.nf4_matmul.triton import nf4_matmul_triton


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
    config: TritonConfig | None = None,
    interpret: bool = False,
) -> Float[Array, "*batch n"]:
    """x · Wᵀ + bias, with W [n, k] packed as in `nf4_dequantize`.

    W counts in x's dtype (one rounding of table[code] · absmax; kernels for few rows keep the
    float32 product), sums are float32, and the result is rounded once to x's dtype.

    Args:
        x: [..., k] in bfloat16, float16 or float32.
        codes, absmax, nested_absmax, offset, shape, quant_type, blocksize: as in `nf4_dequantize`.
        bias: [n], added in float32 before the last rounding.
        implementation: None (see `pallas_kernels.dispatch`), "xla", "triton" or "mosaic_gpu".
        config: tile sizes for "triton"; None takes the table's.
        interpret: run the kernel in Pallas' interpreter, on any machine: for tests.

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
    if 1 <= rows_of(x) <= MAX_ROWS and (config is None or config.block_m < MAX_ROWS):
        return nf4_gemv(
            x,
            codes,
            absmax,
            nested_absmax,
            offset,
            bias,
            shape=(layout.shape[0], layout.shape[1]),
            quant_type=quant_type,
            blocksize=blocksize,
            implementation=implementation,
            config=config,
            interpret=interpret,
        )
    choice = dispatch.which_implementation(
        "nf4_matmul",
        rows_of(x),
        layout,
        implementation=implementation,
        interpret=interpret,
        dtype=x.dtype,
    )
    weight = (codes, absmax, nested_absmax, offset)
    if choice.implementation == "triton":
        return nf4_matmul_triton(
            x, *weight, bias, layout=layout, config=config or choice.config, interpret=interpret
        )
    if choice.implementation == "mosaic_gpu":
        # Imported where it runs: it loads Mosaic, which no other implementation needs.
        from pallas_kernels.nf4_matmul.mosaic_sm90 import nf4_matmul_mosaic

        return nf4_matmul_mosaic(x, *weight, bias, layout=layout)
    return nf4_matmul_xla(x, *weight, bias, layout=layout)
