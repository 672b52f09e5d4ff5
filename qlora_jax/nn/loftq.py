"""Where A and B start when they start from the weight: LoftQ and PiSSA.

LoftQ (Li et al. 2023, arXiv 2310.08659) lets the adapter carry what quantization lost. It seeks
codes Q and factors with Q + s·B·A ≈ W by turns, T times:

    Q ← quantize(W − s·B·A)          s·B·A ← the r largest singular parts of W − Q

PiSSA (Meng et al. 2024, arXiv 2404.02948) trains the largest singular parts of W themselves and
quantizes the rest. Both need the 16-bit weight, so they are done as a checkpoint is read.

With LoftQ's first round alone, Q is what plain quantization gives, and the adapter fits any such
base. In all other cases Q belongs to this adapter.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qlora_jax.nn.lora import LoraConfig
from qlora_jax.quant import QuantConfig, QuantizedTensor, quantize


def start_from_weight(
    weight: Float[Array, "out in"], quant: QuantConfig | None, lora: LoraConfig
) -> tuple[QuantizedTensor | Float[Array, "out in"], Float[Array, "r in"], Float[Array, "out r"]]:
    """The base to store and the adapter to start from.

    Args:
        weight: the original.
        quant: how the base is stored; None keeps it dense (PiSSA alone).
        lora: with `init_lora_weights` "loftq" or "pissa"; r, scaling and dtype are the layer's own.

    Returns:
        The base, A and B. A and B share the singular values evenly, and s is divided out.

    Raises:
        ValueError: LoftQ without quantization, or a rank larger than the weight's.
    """
    if lora.r > min(weight.shape):
        raise ValueError(
            f"r is {lora.r}, but a weight of shape {list(weight.shape)} has no more than "
            f"{min(weight.shape)} singular vectors for init_lora_weights="
            f"{lora.init_lora_weights!r} to start from: lower r"
        )
    wide = weight.astype(jnp.float32)
    if lora.init_lora_weights == "pissa":
        a, b = _largest(wide, lora.r)
        # In float32: another rounding of the rest would be lost to the adapter, too.
        rest = wide - b @ a
        base = rest if quant is None else quantize(rest, quant)
    else:
        if quant is None:
            raise ValueError(
                "init_lora_weights is 'loftq', but the base is not quantized (quant=None), so "
                "nothing was lost: use init_lora_weights=True"
            )
        base = quantize(weight, quant)
        for turn in range(lora.loftq_iter):
            if turn:
                base = quantize(wide - b @ a, quant)
            a, b = _largest(wide - base.dequantize(jnp.float32), lora.r)
    even = lora.scaling**-0.5
    return base, (a * even).astype(lora.dtype), (b * even).astype(lora.dtype)


@partial(jax.jit, static_argnums=1)
def _largest(
    matrix: Float[Array, "out in"], r: int
) -> tuple[Float[Array, "r in"], Float[Array, "out r"]]:
    """The best approximation of rank r, B · A, as its two factors."""
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    root = jnp.sqrt(values[:r])
    return root[:, None] * right[:r], left[:, :r] * root
