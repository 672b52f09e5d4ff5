"""What a 4-bit tensor is: packed codes, and the constants that turn them back into numbers.

    weight[i] ≈ table[code[i]] · absmax[i // blocksize]
    absmax[j] = DYNAMIC_SIGNED[absmax_code[j]] · nested_absmax[j // 256] + offset

(the second line where the constants are quantized too).

A `QuantizedTensor` is a pytree. Its arrays are leaves, so jit, vmap, scan, sharding and Orbax see
ordinary arrays; its logical shape, dtype, quant_type and blocksize are static. A *stack* of
tensors (the layers of a model) is one whose leaves carry leading axes: `jax.vmap(quantize)` makes
it, `jax.lax.scan` slices it, and `shape` stays that of one tensor.
"""

import math
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from pallas_kernels import Layout, layer_of, nf4_dequantize

_LEAVES = ("codes", "absmax", "nested_absmax", "offset")
_STATIC = ("shape", "dtype", "quant_type", "blocksize")


def codes_shape(shape: tuple[int, ...], quant_type: str) -> tuple[int, ...]:
    """The shape of the codes of one tensor: halved along the last axis where that is even."""
    if quant_type == "int8":
        return shape
    if shape[-1] % 2 == 0:
        return (*shape[:-1], shape[-1] // 2)
    return ((math.prod(shape) + 1) // 2,)


@jax.tree_util.register_pytree_with_keys_class
class QuantizedTensor:
    """A block-wise quantized array in bitsandbytes' byte layout.

    Attributes:
        codes: uint8, two codes to a byte, high nibble first: [..., k/2] where the logical last
            dimension k is even, else flat [(n + 1) // 2]. int8 keeps one byte a code, [..., k].
        absmax: one constant per block of the row-major flattened tensor: float32 [blocks], or,
            double-quantized, uint8 [blocks].
        nested_absmax: float32 [ceil(blocks / 256)], or None without double quantization.
        offset: float32 scalar, or None.
        shape: the logical shape, without stacking axes.
        dtype: what the tensor was before, and what `dequantize` returns by default.
        quant_type: a key of `pallas_kernels.codebooks.CODEBOOKS`.
        blocksize: weights per absmax.
    """

    codes: Any
    absmax: Any
    nested_absmax: Any
    offset: Any
    shape: tuple[int, ...]
    dtype: jnp.dtype
    quant_type: str
    blocksize: int

    def __init__(
        self,
        codes: Any,
        absmax: Any,
        nested_absmax: Any = None,
        offset: Any = None,
        *,
        shape: tuple[int, ...],
        dtype: Any,
        quant_type: str = "nf4",
        blocksize: int = 64,
    ) -> None:
        # No checks here: JAX rebuilds pytrees with leaves that are no arrays (specs, None, names).
        self.codes, self.absmax = codes, absmax
        self.nested_absmax, self.offset = nested_absmax, offset
        self.shape, self.dtype = tuple(shape), jnp.dtype(dtype)
        self.quant_type, self.blocksize = quant_type, blocksize

    def tree_flatten_with_keys(self) -> tuple[tuple, tuple]:
        """Leaves with their attribute names, and the static part (JAX's pytree protocol)."""
        leaves = tuple((jax.tree_util.GetAttrKey(n), getattr(self, n)) for n in _LEAVES)
        return leaves, tuple(getattr(self, n) for n in _STATIC)

    @classmethod
    def tree_unflatten(cls, static: tuple, leaves: tuple) -> "QuantizedTensor":
        """The inverse of flattening (JAX's pytree protocol)."""
        return cls(*leaves, **dict(zip(_STATIC, static, strict=True)))

    @property
    def double_quant(self) -> bool:
        """Whether the absmax constants are quantized themselves."""
        return self.nested_absmax is not None

    @property
    def layout(self) -> Layout:
        """One tensor of the stack, as `pallas_kernels` describes it."""
        return Layout(self.shape, self.quant_type, self.blocksize, self.double_quant)

    @property
    def size(self) -> int:
        """Weights in one tensor of the stack."""
        return math.prod(self.shape)

    @property
    def ndim(self) -> int:
        """Dimensions of one tensor of the stack."""
        return len(self.shape)

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Leading axes of a stack; () for a single tensor."""
        single = len(codes_shape(self.shape, self.quant_type))
        return tuple(self.codes.shape[: self.codes.ndim - single])

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves, the stack included; the shared code tables are not counted."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        """Storage per weight: 4.127 for NF4, blocksize 64, double-quantized in blocks of 256."""
        return 8 * self.nbytes / (self.size * math.prod(self.stack_shape))

    def dequantize(
        self, dtype: Any = None, *, implementation: str | None = None
    ) -> Shaped[Array, "..."]:
        """The numbers the codes stand for.

        Args:
            dtype: float32, bfloat16 or float16; None for the dtype the tensor had. The product
                table · absmax is taken in float32 and rounded once.
            implementation: of `pallas_kernels.nf4_dequantize`; None lets it choose.

        Returns:
            An array [*stack_shape, *shape].
        """
        dtype = self.dtype if dtype is None else dtype

        def one(leaves: tuple) -> jax.Array:
            return nf4_dequantize(
                *leaves,
                shape=self.shape,
                dtype=dtype,
                quant_type=self.quant_type,
                blocksize=self.blocksize,
                implementation=implementation,
            )

        function: Callable = one
        for _ in self.stack_shape:
            function = jax.vmap(function)
        return function(tuple(getattr(self, n) for n in _LEAVES))

    def __getitem__(self, index: Any) -> "QuantizedTensor":
        """A stack is indexed as an array of tensors would be; `t[...]` is any t itself.

        Raises:
            IndexError: the index reaches into a tensor, or beyond the stack.
        """
        if index is Ellipsis:
            return self
        stack = self.stack_shape
        count = math.prod(stack)
        try:
            chosen = np.arange(count).reshape(stack)[index]
        except IndexError as error:
            raise IndexError(
                f"{self} is indexed with {index}, but only the axes of its stack, {list(stack)}, "
                "can be: for weights, dequantize first"
            ) from error
        return jax.tree.map(
            lambda leaf: leaf.reshape(count, *leaf.shape[len(stack) :])[chosen], self
        )

    def __array__(self, *_args: Any, **_options: Any) -> NoReturn:
        """Refuses to be an array, as which NumPy would otherwise wrap the object itself."""
        raise TypeError(f"{self} holds codes: take the numbers of its dequantize()")

    def at_layer(self, layer: Int[Array, ""]) -> "QuantizedLayer":
        """One tensor of a stack of layers, left where it lies."""
        leaves = (getattr(self, n) for n in _LEAVES)
        return QuantizedLayer.tree_unflatten(self.tree_flatten_with_keys()[1], (*leaves, layer))

    def __repr__(self) -> str:
        stacked = hasattr(self.codes, "ndim") and self.stack_shape
        stack = f"{list(self.stack_shape)} × " if stacked else ""
        double = " double_quant" if self.double_quant else ""
        return (
            f"QuantizedTensor({stack}{list(self.shape)} {self.dtype.name}: "
            f"{self.quant_type} blocksize={self.blocksize}{double})"
        )


@jax.tree_util.register_pytree_with_keys_class
class QuantizedLayer(QuantizedTensor):
    """One tensor of a stack, to be multiplied with (`quantized_matmul`) where it lies.

    A kernel that takes the whole stack and the number of a layer needs no copy of that layer.

    Attributes:
        layer: which one; the other leaves are the stack's.
    """

    layer: Any

    def tree_flatten_with_keys(self) -> tuple[tuple, tuple]:
        """The stack's leaves, then `layer`."""
        leaves, static = super().tree_flatten_with_keys()
        return (*leaves, (jax.tree_util.GetAttrKey("layer"), self.layer)), static

    @classmethod
    def tree_unflatten(cls, static: tuple, leaves: tuple) -> "QuantizedLayer":
        """The inverse of flattening."""
        *stack, layer = leaves
        made = cls(*stack, **dict(zip(_STATIC, static, strict=True)))
        made.layer = layer
        return made

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """(): it is one tensor."""
        return ()

    @property
    def nbytes(self) -> int:
        """Bytes of the one tensor."""
        leaves, _ = super().tree_flatten_with_keys()
        stacks = [stack for _, stack in leaves if stack is not None]
        return sum(stack.size // len(stack) * stack.dtype.itemsize for stack in stacks)

    def taken_out(self) -> QuantizedTensor:
        """A tensor of its own: what is not multiplied where it lies."""
        leaves, static = super().tree_flatten_with_keys()
        own = layer_of(self.layer, *(stack for _, stack in leaves))
        return QuantizedTensor.tree_unflatten(static, own)

    def dequantize(
        self, dtype: Any = None, *, implementation: str | None = None
    ) -> Shaped[Array, "..."]:
        """As of any tensor."""
        return self.taken_out().dequantize(dtype, implementation=implementation)
