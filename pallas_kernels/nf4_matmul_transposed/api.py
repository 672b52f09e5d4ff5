"""`nf4_matmul_transposed`: dy · W against a packed weight, the backward pass of a QLoRA layer."""

from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels import dispatch
from pallas_kernels._arguments import check_matmul, check_packed
from pallas_kernels._mesh import Parts
from pallas_kernels._run import Asked, run


def nf4_matmul_transposed(
    dy: Float[Array, "*batch n"],
    codes: UInt8[Array, "..."],
    absmax: UInt8[Array, " blocks"] | Float32[Array, " blocks"],
    nested_absmax: Float32[Array, " nested"] | None = None,
    offset: Float32[Array, ""] | None = None,
    *,
    shape: tuple[int, int] | None = None,
    quant_type: str = "nf4",
    blocksize: int = 64,
    implementation: str | None = None,
    config: dispatch.Config | None = None,
    interpret: bool = False,
) -> Float[Array, "*batch k"]:
    """dy · W, with W [n, k] packed as in `nf4_dequantize`: the gradient of `nf4_matmul` in x.

    W counts in dy's dtype, sums are float32, and the result is rounded once to dy's dtype; where
    devices have parts of W's rows, each rounds its part of the sum. It has no gradients;
    `qlora_jax.quantized_matmul` has, also twice.

    Args:
        dy: [..., n] in bfloat16, float16 or float32.
        codes, absmax, nested_absmax, offset, shape, quant_type, blocksize: as in `nf4_dequantize`.
        implementation: None (see `pallas_kernels.dispatch`), "xla", "triton" or "mosaic_gpu".
        config: how the kernel cuts its work, a `TritonConfig` for "triton", for "mosaic_gpu" a
            `MatmulConfig`; None takes the table's. "xla" takes none.
        interpret: run the kernel in Pallas' interpreter, on any machine: for tests.

    Returns:
        [..., k] in dy's dtype.

    Raises:
        ValueError: parts that do not belong together, or an implementation that cannot run.
        TypeError: an argument of another kind.
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
    check_matmul("dy", dy, 0, None, layout)
    return run(
        nf4_matmul_transposed,
        Parts(dy, codes, absmax, nested_absmax, offset),
        op="transposed",
        layout=layout,
        dtype=dy.dtype,
        asked=Asked(implementation, config, interpret),
    )
