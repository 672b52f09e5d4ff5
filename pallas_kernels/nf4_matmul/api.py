"""`nf4_matmul`: x · Wᵀ against a packed weight, the forward pass of a QLoRA layer."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, UInt8

from pallas_kernels import dispatch
from pallas_kernels._arguments import (
    Layout,
    LowRank,
    check_lora,
    check_matmul,
    check_packed,
    is_symbolic,
    rows_of,
)
from pallas_kernels._mesh import Parts
from pallas_kernels._run import Asked, run
from pallas_kernels._triton_config import TritonConfig, stack_is_addressable
from pallas_kernels.dispatch import MAX_ROWS
from pallas_kernels.nf4_gemv.api import nf4_gemv
from pallas_kernels.nf4_matmul.mosaic_plan import MatmulConfig


def nf4_matmul(
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
    """x · Wᵀ + xa · bᵀ + bias, with W [n, k] packed as in `nf4_dequantize`.

    W counts in x's dtype (one rounding of table[code] · absmax; kernels for few rows keep the
    float32 product, those of Hopper take the table in float16), sums are float32, and the result is
    rounded once to x's dtype. It has no gradients; `qlora_jax.quantized_matmul` has.

    Args:
        x: [..., k] in bfloat16, float16 or float32.
        codes, absmax, nested_absmax, offset, shape, quant_type, blocksize: as in `nf4_dequantize`.
        bias: [n], added in float32 before the last rounding.
        lora: an adapter's (xa, b), or None: xa [..., r] is s · x · Aᵀ and b [n, r] is B, both in
            x's dtype.
        layer: which weight, where codes, absmax, nested_absmax and offset are stacks with a leading
            axis, counted from 0: the Triton-lowered kernels and the Hopper gemv read it where it
            lies. One that is traced is not checked.
        implementation: None (see `pallas_kernels.dispatch`), "xla", "triton" or "mosaic_gpu", which
            is the Hopper gemv up to 16 rows and the Hopper matmul beyond.
        fuse_lora: add xa · bᵀ inside the kernel, to its float32 sums, instead of by a product of
            its own that is rounded and added afterwards; None lets the table choose.
        config: how the kernel cuts its work, a `TritonConfig` for "triton", for "mosaic_gpu" a
            `MatmulConfig` (up to 16 rows a `GemvConfig`); None takes the table's. "xla" takes none.
        interpret: run the kernel in Pallas' interpreter, on any machine: for tests.

    Returns:
        [..., n] in x's dtype.

    Raises:
        ValueError: parts that do not belong together, or an implementation that cannot run.
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
    if _is_gemv(x, config):
        return nf4_gemv(
            x,
            *weight,
            bias,
            lora,
            layer,
            shape=(layout.shape[0], layout.shape[1]),
            quant_type=quant_type,
            blocksize=blocksize,
            implementation=implementation,
            fuse_lora=fuse_lora,
            config=config,
            interpret=interpret,
        )
    return run(
        nf4_matmul,
        Parts(x, *weight, bias, lora, layer),
        op="forward",
        layout=layout,
        dtype=x.dtype,
        asked=Asked(implementation, config, interpret, fuse_lora),
    )


def reads_layers(
    rows: int,
    layout: Layout,
    layers: int,
    *,
    implementation: str | None = None,
    dtype: DTypeLike = jnp.bfloat16,
) -> bool:
    """Whether a layer of a stack had better be told to `nf4_matmul` by number than be sliced.

    It had for the Triton-lowered kernels, in stacks in which they find an element, and for the
    Hopper gemv where XLA would copy the slice: see `_stack`.

    Args:
        rows, layout, implementation, dtype: as of `which_implementation`.
        layers: weights in the stack.
    """
    few = rows <= MAX_ROWS
    choice = dispatch.choose(
        "nf4_gemv" if few else "nf4_matmul",
        rows,
        layout,
        implementation=implementation,
        dtype=dtype,
    )
    if choice.implementation == "mosaic_gpu":
        return few and jax.__version_info__ < (0, 11)
    fused = isinstance(choice.config, TritonConfig) and choice.config.fused
    return fused and stack_is_addressable(layers * layout.nbytes)


def _is_gemv(x: Array, config: dispatch.Config | None) -> bool:
    """Whether `nf4_gemv` is to run: few rows, and no config of this op's own kernels."""
    if is_symbolic(x) or not 1 <= rows_of(x) <= MAX_ROWS or isinstance(config, MatmulConfig):
        return False
    return not isinstance(config, TritonConfig) or config.block_m < MAX_ROWS
