"""`quantize`: an array in, a `QuantizedTensor` out."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Shaped

from pallas_kernels import axes_of, in_auto_axes, spec_entries
from qlora_jax.quant.blockwise import encode, pack_nibbles, quantize_absmax, quantize_blocks
from qlora_jax.quant.config import QuantConfig
from qlora_jax.quant.tensor import QuantizedTensor, codes_shape


def quantize(
    weight: Shaped[ArrayLike, "*shape"], config: QuantConfig = QuantConfig()
) -> QuantizedTensor:
    """Quantizes an array block by block, bit for bit as bitsandbytes' CUDA kernels do.

    Args:
        weight: float32, bfloat16 or float16 of any shape with at least one element; NumPy arrays
            are taken too. `jax.vmap(quantize)` quantizes a stack, each of its tensors on its own.
        config: data type, blocksize and double quantization.

    Returns:
        The quantized tensor; `dtype` and `shape` are the weight's. Of a weight on a mesh with
        Explicit axes, codes and absmax are cut as its rows are, where that cuts no block.

    A NaN or an infinity is not looked for (`load_model` does): what its block, or with double
    quantization the tensor, stands for then depends on the device.

    Raises:
        TypeError: the weight is no array of one of these dtypes (float64 is never narrowed
            unasked), or `config` is no `QuantConfig`.
        ValueError: it is empty or has no dimension.
    """
    if not isinstance(config, QuantConfig):
        raise TypeError(f"config is {config!r}; give a QuantConfig, such as QuantConfig('nf4')")
    # Not jnp.result_type, to which NumPy's float64 is float32.
    dtype = getattr(weight, "dtype", None)
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        given = f"of type {type(weight).__name__}" if dtype is None else dtype.name
        raise TypeError(
            f"weight is {given}; quantize takes float32, bfloat16 or float16: cast it first, as "
            "jax.numpy.asarray(weight, 'float32') does"
        )
    if jnp.ndim(weight) == 0 or jnp.size(weight) == 0:
        raise ValueError(
            f"weight has shape {jnp.shape(weight)}; quantize takes an array of at least one element"
        )
    weight = jnp.asarray(weight)
    codes, *constants = in_auto_axes(
        partial(_packed, config=config), weight, result=partial(_cut, config=config)
    )
    return QuantizedTensor(
        codes,
        *constants,
        shape=weight.shape,
        dtype=weight.dtype,
        quant_type=config.quant_type,
        blocksize=config.blocksize,
    )


def _packed(weight: Float[Array, "*shape"], config: QuantConfig) -> tuple[Array, ...]:
    """The leaves of the quantized tensor."""
    codes, *constants = _quantize(weight, config)
    # Outside the jitted part, or XLA draws this reshape into the loop over blocks, and XLA:CPU no
    # longer vectorises it (a fifth of the speed, benchmarks/cpu_quantize.py).
    return codes.reshape(codes_shape(weight.shape, config.quant_type)), *constants


def _cut(weight: Any, config: QuantConfig) -> tuple[jax.P, ...]:
    """How the leaves are cut, from the type of the weight."""
    rows = spec_entries(weight)[0]
    part = weight.size // math.prod(weight.sharding.mesh.shape[axis] for axis in axes_of(rows))
    matrix = len(codes_shape(weight.shape, config.quant_type)) > 1
    codes = jax.P(rows) if matrix else jax.P()
    absmax = codes if part % config.blocksize == 0 else jax.P()
    return codes, absmax, *[jax.P()] * (2 * config.double_quant)


@partial(jax.jit, static_argnames="config")
def _quantize(weight: Float[Array, "*shape"], config: QuantConfig) -> tuple[Array, ...]:
    """Codes, in order but of no particular shape, and the constants."""
    flat = weight.reshape(-1)
    if config.quant_type == "int8":
        codes, absmax = quantize_blocks(flat, config.blocksize, lambda s: encode(s, "int8"))
    else:
        # An odd tensor gets one zero, so that its last byte is full; bitsandbytes does the same.
        even = jnp.pad(flat, (0, 1)) if flat.size % 2 else flat
        codes, absmax = quantize_blocks(
            even, config.blocksize, lambda s: pack_nibbles(encode(s, config.quant_type))
        )
    return codes, *(quantize_absmax(absmax) if config.double_quant else (absmax,))
