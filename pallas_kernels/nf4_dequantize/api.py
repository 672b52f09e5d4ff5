"""`nf4_dequantize`: packed codes and block scales in, a 16- or 32-bit weight out."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels._arguments import check_float, check_packed
from pallas_kernels._mesh import Parts
from pallas_kernels._run import Asked, run
from pallas_kernels._triton_config import TritonConfig


def nf4_dequantize(
    codes: UInt8[Array, "..."],
    absmax: UInt8[Array, " blocks"] | Float32[Array, " blocks"],
    nested_absmax: Float32[Array, " nested"] | None = None,
    offset: Float32[Array, ""] | None = None,
    *,
    shape: tuple[int, ...] | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    quant_type: str = "nf4",
    blocksize: int = 64,
    implementation: str | None = None,
    config: TritonConfig | None = None,
    interpret: bool = False,
) -> Float[Array, "..."]:
    """Unpack a weight: `dtype(table[code] · absmax)`, product in float32, rounded once.

    The bytes are bitsandbytes' own. With double quantization `absmax` holds uint8 codes, and block
    b's scale is `DYNAMIC_SIGNED[absmax[b]] · nested_absmax[b // 256] + offset`, product and sum
    each rounded to float32. The kernels have no gradients (codes are integers);
    `qlora_jax.quantized_matmul` has those of x.

    Args:
        codes: packed codes, [n, k/2] (k even; the first of two in the high nibble), or, with
            `shape`, any array of ceil(size / 2) bytes; int8: [n, k].
        absmax: one scale per `blocksize` elements of the row-major flattened weight: float32, or
            uint8 codes.
        nested_absmax: float32[ceil(blocks / 256)]; only with uint8 `absmax`.
        offset: float32 scalar; only with uint8 `absmax`.
        shape: the weight's shape; taken from `codes` when absent.
        dtype: bfloat16, float16 or float32.
        quant_type: a key of `pallas_kernels.CODEBOOKS`.
        blocksize: elements per scale, one of 32, 64, …, 4096.
        implementation: None (see `pallas_kernels.dispatch`), "xla", "triton" or "jax_triton".
        config: tile sizes for "triton" and "jax_triton"; None takes the table's. "xla" takes none.
        interpret: run the kernel in Pallas' interpreter, on any machine: for tests.

    Returns:
        The weight, of `shape` in `dtype`.

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
    check_float("dtype", dtype)
    return run(
        nf4_dequantize,
        Parts(None, codes, absmax, nested_absmax, offset),
        op="dequantize",
        layout=layout,
        dtype=jnp.dtype(dtype),
        asked=Asked(implementation, config, interpret),
    )
