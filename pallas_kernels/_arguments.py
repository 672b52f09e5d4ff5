"""What a packed weight is, checked once for every op before anything is traced.

A weight of any shape is flattened in row-major order and cut into *blocks* of `blocksize`
consecutive elements, so a block may cross rows and the last one may be short. Two 4-bit codes share
a byte, the first in the high nibble; an 8-bit code is a byte. Each block has one absmax: a float32,
or, with double quantization, a uint8 code into the dynamic map, whose own scale (`nested_absmax`)
is shared by 256 blocks and whose mean (`offset`) was subtracted first.
"""

import dataclasses
import math
import operator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim
from jax.typing import DTypeLike
from jaxtyping import Array

from pallas_kernels._stack import layer_types
from pallas_kernels.codebooks import BLOCKSIZES, CODEBOOKS, NESTED_BLOCKSIZE

FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)

LowRank = tuple[Array, Array]
"""An adapter's part of a product, (xa, b): xa [..., r] is s · x · Aᵀ, and b [n, r] is B."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The static description of a packed weight: everything about it but its bytes."""

    shape: tuple[int, ...]
    quant_type: str
    blocksize: int
    double_quant: bool

    def __post_init__(self) -> None:
        """An error for what no weight can be, naming the field; sizes become Python's integers."""
        quant_type, blocksize = self.quant_type, whole(self.blocksize)
        if not isinstance(quant_type, str) or quant_type not in CODEBOOKS:
            raise ValueError(f"quant_type is {quant_type!r}; expected one of {sorted(CODEBOOKS)}")
        if blocksize not in BLOCKSIZES:
            raise ValueError(f"blocksize is {self.blocksize!r}; expected one of {list(BLOCKSIZES)}")
        try:
            shape = tuple(map(operator.index, self.shape))
        except TypeError:
            raise TypeError(
                f"shape is {self.shape!r}; expected a tuple of whole numbers, such as (n, k)"
            ) from None
        if not shape or min(shape) < 1:
            raise ValueError(f"shape is {shape}; expected one or more dimensions, each at least 1")
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "blocksize", blocksize)

    @property
    def size(self) -> int:
        """Elements of the weight."""
        return math.prod(self.shape)

    @property
    def codes_per_byte(self) -> int:
        """2 for the 4-bit types, 1 for int8."""
        return 1 if self.quant_type == "int8" else 2

    @property
    def nbytes(self) -> int:
        """Bytes of codes."""
        return -(-self.size // self.codes_per_byte)

    @property
    def blocks(self) -> int:
        """Blocks, the short last one included: the length of `absmax`."""
        return -(-self.size // self.blocksize)

    @property
    def nested_blocks(self) -> int:
        """The length of `nested_absmax`."""
        return -(-self.blocks // NESTED_BLOCKSIZE)

    @property
    def rows_are_whole_blocks(self) -> bool:
        """Whether no block crosses a row: what the GPU kernels need."""
        return self.shape[-1] % self.blocksize == 0


def whole(value: Any) -> int | None:
    """A whole number, NumPy's or JAX's too, as Python's; None for anything else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def check_kinds(config: Any) -> None:
    """Refuse a config of which a field that holds a whole number, or a truth value, holds none."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type is int:
            check_fields(config, **{field.name: (whole(value) is not None, "a whole number")})
        elif field.type is bool:
            check_fields(config, **{field.name: (isinstance(value, bool), "True or False")})


def check_fields(config: Any, **right: tuple[bool, str]) -> None:
    """Refuse a config of which a field is not right; `right` says of each whether, and what is."""
    for name, (is_right, wanted) in right.items():
        if not is_right:
            kind, value = type(config).__name__, getattr(config, name)
            raise ValueError(f"{kind}'s {name} is {value!r}; expected {wanted}")


def check_float(name: str, dtype: DTypeLike) -> None:
    """Refuse a dtype that is not bfloat16, float16 or float32."""
    try:
        given = jnp.dtype(dtype)
    except TypeError:
        raise ValueError(f"{name} is {dtype!r}; expected bfloat16, float16 or float32") from None
    if given not in [jnp.dtype(f) for f in FLOATS]:
        raise ValueError(
            f"{name} is {given.name}; expected bfloat16, float16 or float32: cast it first"
        )


def check_array(name: str, value: Any) -> None:
    """Refuse what is no array of JAX or NumPy, nor anything that has shape and dtype."""
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        given = "None" if value is None else f"of type {type(value).__name__}"
        raise TypeError(f"{name} is {given}; expected an array, as jax.numpy.asarray makes one")


def check_flag(name: str, value: Any) -> None:
    """Refuse what is no truth value."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} is {value!r}; expected True or False")


def check_packed(
    codes: Array,
    absmax: Array,
    nested_absmax: Array | None,
    offset: Array | None,
    layer: Any = None,
    *,
    shape: tuple[int, ...] | None,
    quant_type: str,
    blocksize: int,
) -> Layout:
    """Check that the parts of a packed weight, or of a stack of them of which `layer` is one,
    belong together and return the weight's layout.

    Raises:
        ValueError, TypeError: in one sentence, naming the argument that does not fit.
    """
    if isinstance(offset, float):
        offset = np.float32(offset)
    check_array("codes", codes)
    check_array("absmax", absmax)
    for name, value in (("nested_absmax", nested_absmax), ("offset", offset)):
        if value is not None:
            check_array(name, value)
    if layer is not None:
        codes, absmax, nested_absmax, offset = layer_types(
            layer, codes, absmax, nested_absmax, offset
        )
    layout = _layout(codes, absmax, shape, quant_type, blocksize)
    if absmax.dtype not in (jnp.uint8, jnp.float32):
        raise ValueError(
            f"absmax has dtype {absmax.dtype}; "
            "expected float32, or uint8 codes of double quantization"
        )
    if absmax.shape != (layout.blocks,):
        raise ValueError(
            f"absmax has shape {absmax.shape}; expected ({layout.blocks},): one per block of "
            f"{layout.blocksize} elements of a weight of shape {layout.shape}"
        )
    _check_nested(layout, nested_absmax, offset)
    return layout


def _layout(
    codes: Any, absmax: Any, shape: tuple[int, ...] | None, quant_type: str, blocksize: int
) -> Layout:
    """What codes hold, by their types: of a layer in a stack there is no more."""
    if codes.dtype != jnp.uint8:
        raise ValueError(f"codes has dtype {codes.dtype}; expected uint8, packed bytes")
    per_byte = 1 if quant_type == "int8" else 2
    if shape is None:
        # bitsandbytes keeps [bytes, 1], which does not tell n from k.
        if codes.ndim < 2 or (codes.shape[-1] == 1 and per_byte == 2):
            raise ValueError(
                f"codes has shape {codes.shape} and shape= is not given; "
                "expected codes [n, k/2], or flat bytes together with shape=(n, k)"
            )
        shape = (*codes.shape[:-1], codes.shape[-1] * per_byte)
    layout = Layout(shape, quant_type, blocksize, double_quant=absmax.dtype == jnp.uint8)
    if math.prod(codes.shape) != layout.nbytes:
        raise ValueError(
            f"codes has shape {codes.shape}, {math.prod(codes.shape)} bytes; "
            f"expected {layout.nbytes} for a {quant_type} weight of shape {layout.shape}"
        )
    return layout


def _check_nested(layout: Layout, nested_absmax: Any, offset: Any) -> None:
    """Check the second level of quantization, which is there if the first is codes."""
    for name, value, wanted in (
        ("nested_absmax", nested_absmax, (layout.nested_blocks,)),
        ("offset", offset, ()),
    ):
        if not layout.double_quant:
            if value is not None:
                raise ValueError(
                    f"{name} is given but absmax is float32; "
                    "expected it only with uint8 absmax codes"
                )
        elif value is None:
            raise ValueError(f"{name} is missing; uint8 absmax codes need it as float32 {wanted}")
        elif jnp.shape(value) != wanted or jnp.result_type(value) != jnp.float32:
            raise ValueError(
                f"{name} is {jnp.result_type(value)} {jnp.shape(value)}; expected float32 {wanted}"
            )


def check_matmul(name: str, x: Array, contracted: int, bias: Array | None, layout: Layout) -> None:
    """Check that the activations and the bias of a matmul belong to a weight [n, k].

    `contracted` is the weight's axis that `x`'s last axis is summed over: 1 for x·Wᵀ, 0 for dy·W.
    """
    if len(layout.shape) != 2:
        raise ValueError(f"shape is {layout.shape}; expected a matrix (n, k)")
    check_array(name, x)
    check_float(f"{name}'s dtype", x.dtype)
    n = layout.shape[0]
    if x.ndim < 1 or x.shape[-1] != layout.shape[contracted]:
        raise ValueError(
            f"{name} has shape {x.shape}; expected [..., {layout.shape[contracted]}] "
            f"to go with a weight of shape {layout.shape}"
        )
    if bias is None:
        return
    check_array("bias", bias)
    if bias.shape != (n,) or not jnp.issubdtype(bias.dtype, jnp.floating):
        raise ValueError(f"bias is {bias.dtype} {bias.shape}; expected a float array ({n},)")


def check_lora(lora: LowRank, x: Array, layout: Layout) -> None:
    """Check that an adapter's `(xa, b)` belongs to x and to a weight [n, k]."""
    if not (isinstance(lora, tuple) and len(lora) == 2):
        raise ValueError(f"lora is a {type(lora).__name__}; expected a pair of arrays, (xa, b)")
    xa, b = lora
    check_array("lora's xa", xa)
    check_array("lora's b", b)
    if b.ndim != 2 or b.shape[0] != layout.shape[0] or b.shape[1] < 1:
        raise ValueError(
            f"lora's b has shape {b.shape}; expected ({layout.shape[0]}, r) "
            f"to go with a weight of shape {layout.shape}"
        )
    wanted = (*x.shape[:-1], b.shape[1])
    if xa.shape != wanted:
        raise ValueError(
            f"lora's xa has shape {xa.shape}; expected {wanted}: x's rows times b's rank"
        )
    for name, part in (("xa", xa), ("b", b)):
        if part.dtype != x.dtype:
            raise ValueError(f"lora's {name} is {part.dtype}; expected x's dtype, {x.dtype}")


def is_symbolic(x: Array) -> bool:
    """Whether `x` has a size that is known only when the program is called (`jax.export`)."""
    return any(is_symbolic_dim(size) for size in x.shape)


def rows_of(x: Array) -> int:
    """Rows of `x` when all its axes but the last are one."""
    return math.prod(x.shape[:-1])
