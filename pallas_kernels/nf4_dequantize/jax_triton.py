"""`nf4_dequantize` in Triton proper, called through `jax_triton`: the way out of Pallas' lowering.

JAX has deprecated Pallas' own lowering to Triton and points to the official bindings. This is the
same kernel as `triton.py` in that language, needs the extra `[triton]`, and shows that the kernels
here survive the day when the lowering goes. Under `jax.vmap` it runs once per weight, because
`jax_triton` has no batching rule of its own.

Importing this module imports triton; the dispatch does so only where it is asked for.
"""

import functools
from typing import no_type_check

import jax
import jax.numpy as jnp
import jax_triton
import triton
import triton.language as tl
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels._arguments import Layout
from pallas_kernels._batching import in_turn
from pallas_kernels._sharding_types import vary_alike
from pallas_kernels._triton_config import RUN, TritonConfig
from pallas_kernels.codebooks import CODEBOOKS, DYNAMIC_SIGNED, NESTED_BLOCKSIZE

PTX_VERSION = 87
"""PTX 8.7, of CUDA 12.8: the oldest that knows every card of `cards.py`, and all the kernel needs.
Triton writes for an assembler of its own; XLA takes the first `ptxas` on the path, often older."""


@triton.jit
@no_type_check  # Triton reads the function itself, not what jaxtyping's hook wraps around it.
def dequantize_kernel(
    codes,
    absmax,
    nested_absmax,
    offset,
    dynamic_map,
    table,
    out,
    nbytes: tl.constexpr,
    size: tl.constexpr,
    blocks: tl.constexpr,
    run_bytes: tl.constexpr,
    runs_per_block: tl.constexpr,
    nested_blocksize: tl.constexpr,
    double_quant: tl.constexpr,
    width: tl.constexpr,
):
    """One program turns `width` bytes into 2 * `width` weights, as `triton.py` beside it."""
    tile = tl.program_id(0)
    byte = tile * width + tl.arange(0, width)
    run = tile * (width // run_bytes) + tl.arange(0, width // run_bytes)
    element = tile * width * 2 + tl.arange(0, width * 2)
    packed = tl.load(codes + byte, mask=byte < nbytes, other=0).to(tl.int32)
    block = run // runs_per_block
    inside = block < blocks
    if double_quant:
        code = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        nested = tl.load(nested_absmax + block // nested_blocksize, mask=inside, other=0.0)
        # Two roundings: the launch turns off the fusing of products and sums.
        scale = tl.load(dynamic_map + code) * nested + tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    by_byte = tl.reshape(tl.broadcast_to(scale[:, None], (width // run_bytes, run_bytes)), (width,))
    high = tl.load(table + (packed >> 4)) * by_byte
    low = tl.load(table + (packed & 15)) * by_byte
    weight = tl.interleave(high, low).to(out.dtype.element_ty)
    tl.store(out + element, weight, mask=element < size)


@functools.partial(jax.jit, static_argnames=("layout", "dtype", "config"))
def nf4_dequantize_jax_triton(
    codes: UInt8[Array, "..."],
    absmax: UInt8[Array, " blocks"] | Float32[Array, " blocks"],
    nested_absmax: Float32[Array, " nested"] | None,
    offset: Float32[Array, ""] | None,
    *,
    layout: Layout,
    dtype: DTypeLike,
    config: TritonConfig,
) -> Float[Array, "..."]:
    """The weight itself, of any shape and any 4-bit type; `block_k` elements per program."""

    def run(codes: Array, absmax: Array, *nested: Array) -> Array:
        unused = jnp.zeros((1,), jnp.float32)
        return jax_triton.triton_call(
            codes.reshape(-1),
            absmax,
            *((nested[0], nested[1].reshape(1)) if nested else (unused, unused)),
            jnp.asarray(DYNAMIC_SIGNED),
            jnp.asarray(CODEBOOKS[layout.quant_type]),
            kernel=dequantize_kernel,
            out_type=jax.ShapeDtypeStruct((layout.size,), jnp.dtype(dtype)),
            grid=(-(-layout.size // config.block_k),),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            backend_options={"enable_fp_fusion": False, "ptx_version": PTX_VERSION},
            name="nf4_dequantize_jax_triton",
            **kernel_constants(layout, config.block_k // 2),
        ).reshape(layout.shape)

    parts = [w for w in (codes, absmax, nested_absmax, offset) if w is not None]
    return vary_alike(in_turn(run)(*parts), *parts)[0]


def kernel_constants(layout: Layout, width: int) -> dict[str, int | bool]:
    """The compile-time arguments of `dequantize_kernel` for tiles of `width` bytes."""
    return {
        "nbytes": layout.nbytes,
        "size": layout.size,
        "blocks": layout.blocks,
        "run_bytes": RUN,
        "runs_per_block": layout.blocksize // (2 * RUN),
        "nested_blocksize": NESTED_BLOCKSIZE,
        "double_quant": layout.double_quant,
        "width": width,
    }
