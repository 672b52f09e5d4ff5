"""`nf4_gemv`: x · Wᵀ for 1 to 16 rows, where reading the weight is all the work there is."""

from typing import Any

from jaxtyping import Array, Float, Float32, Int, UInt8

from pallas_kernels import dispatch
from pallas_kernels._arguments import LowRank, check_lora, check_matmul, check_packed, rows_of
from pallas_kernels._mesh import Parts
from pallas_kernels._run import Asked, run
from pallas_kernels.dispatch import MAX_ROWS


def nf4_gemv(
    x: Float[Array, "*batch k"],
    codes: UInt8[Array, "..."],
    absmax: UInt8[Array, "*stack blocks"] | Float32[Array, "*stack blocks"],
    nested_absmax: Float32[Array, "*stack nested"] | None = None,
    offset: Float32[Array, "*stack"] | None = None,
    bias: Float[Array, " n"] | None = None,
    lora: LowRank | None = None,
    layer: Int[Array, ""] | None = None,
    *,
    shape: tuple[int, int] | None = None,
    quant_type: str = "nf4",
    blocksize: int = 64,
    implementation: str | None = None,
    fuse_lora: bool | None = None,
    config: dispatch.Config | None = None,
    interpret: bool = False,
) -> Float[Array, "*batch n"]:
    """x · Wᵀ + xa · bᵀ + bias as `nf4_matmul`, for at most 16 rows of x: decoding token by token.

    `nf4_matmul` comes here by itself for so few rows. Arguments, result and errors are its own.
    It has no gradients; `qlora_jax.quantized_matmul` has.

    Raises:
        ValueError: more than 16 rows, parts that do not belong together, or an implementation that
            cannot run.
        TypeError: an argument of another kind.
    """
    weight = codes, absmax, nested_absmax, offset
    layout = check_packed(
        *weight,
        layer,
        shape=shape,
        quant_type=quant_type,
        blocksize=blocksize,
    )
    check_matmul("x", x, 1, bias, layout)
    if lora is not None:
        check_lora(lora, x, layout)
    if rows_of(x) > MAX_ROWS:
        raise ValueError(
            f"x has {rows_of(x)} rows; nf4_gemv takes up to {MAX_ROWS}: use nf4_matmul"
        )
    return run(
        nf4_gemv,
        Parts(x, *weight, bias, lora, layer),
        op="forward",
        layout=layout,
        dtype=x.dtype,
        asked=Asked(implementation, config, interpret, fuse_lora),
        wider=_of_any_rows,
    )


def _of_any_rows(*arrays: Any, **options: Any) -> Array:
    # Imported where it runs, since it imports this file.
    from pallas_kernels.nf4_matmul.api import nf4_matmul

    return nf4_matmul(*arrays, **options)
