"""Lane programs between Pallas' own instructions: registers go in and out as Pallas arrays.

A warpgroup's array is 128 threads' registers under a *layout* that says which element is where.
`run` hands a lane program the words of its own thread and wraps the words that it returns:

- `words_type(count)`: `count` words per thread that only lane programs look into;
- a 16-bit array in `plgpu.Layout.WGMMA`: [columns / 8][half] words, row-major, of two elements
  each: lane (g, t) of warp w holds columns 8j + 2t and the next of row 16w + 8·half + g;
- a float32 array in that layout (the sums of `wgmma`): [columns / 8][half] pairs of numbers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.simt import mlir
from pallas_kernels.simt.values import Float, Word


@dataclasses.dataclass(frozen=True)
class Tile:
    """A Ref to shared memory with the transforms it was allocated with; the program sees bytes."""

    ref: Any
    transforms: tuple = ()

    @property
    def kind(self) -> plgpu.RefType:
        """As `inline_mgpu` wants it declared."""
        return plgpu.RefType(self.transforms)


def words_type(count: int) -> plgpu.ShapeDtypeStruct:
    """The type of an array that holds `count` words per thread; `count` is a multiple of 4."""
    shape = (128 * count,)
    return plgpu.ShapeDtypeStruct(shape, jnp.uint32, plgpu.Layout.WG_STRIDED(shape, vec_size=4))


def run(
    program: Callable[..., list | None],
    shared: Any,
    arguments: Sequence[Any],
    result: plgpu.ShapeDtypeStruct | None = None,
) -> Any:
    """Run `program(machine, *arguments)` in every thread of the warpgroups that get here.

    Args:
        program: a lane program; returns the words of `result`, in order.
        shared: the Ref of shared memory that the machine addresses from 0.
        arguments: Refs to global memory and `Tile`s (buffers to the program), int32 scalars (words)
            or arrays in one of the forms above (lists).
        result: the array to make of the returned words, if any.
    """
    kinds = [a.kind if isinstance(a, Tile) else _kind(a) for a in arguments]
    arguments = [a.ref if isinstance(a, Tile) else a for a in arguments]

    def emit(_: Any, shared_ref: Any, *values: Any) -> Any:
        machine = mlir.Machine(Word(machine_zero()).value, shared_ref)
        made = program(machine, *(_unwrap(machine, v) for v in values))
        return None if result is None else _wrap(made, result)

    types = (plgpu.RefType(), *kinds)
    return plgpu.inline_mgpu(arg_types=types, return_type=result)(emit)(shared, *arguments)


def machine_zero() -> ir.Value:
    """An i32 zero, where a program does not ask for its block's index."""
    return mgpu_utils.c(0, ir.IntegerType.get_signless(32))


def _kind(argument: Any) -> Any:
    if not hasattr(argument, "shape") or (hasattr(argument, "at") and _is_ref(argument)):
        return plgpu.RefType()
    if argument.shape == ():
        return plgpu.Layout.WG_SPLAT
    if argument.ndim == 1:
        return plgpu.Layout.WG_STRIDED(argument.shape, vec_size=4)
    return plgpu.Layout.WGMMA


def _is_ref(argument: Any) -> bool:
    import jax

    return "Ref" in type(jax.typeof(argument)).__name__


def _unwrap(machine: mlir.Machine, value: Any) -> Any:
    if isinstance(value, ir.Value):
        return machine.buffer(value)
    registers = list(value.registers.flat)
    if isinstance(registers[0].type, ir.VectorType):
        floats = str(registers[0].type.element_type) == "f32"
        wrap = Float if floats else Word
        size = registers[0].type.shape[0]
        values = [wrap(_element(r, i)) for r in registers for i in range(size)]
        if not floats:
            return values
        pairs = [values[i : i + 2] for i in range(0, len(values), 2)]
        return [pairs[i : i + 2] for i in range(0, len(pairs), 2)]
    return Word(registers[0])


def _wrap(words: Sequence[Word], result: plgpu.ShapeDtypeStruct) -> Any:
    layout = result.layout.to_mgpu()
    integer = jnp.issubdtype(result.dtype, jnp.integer)
    kind = mgpu_utils.dtype_to_ir_type(result.dtype)
    if integer:
        size = layout.vec_size
        groups = [words[i : i + size] for i in range(0, len(words), size)]
        registers = [_vector([w.value for w in group]) for group in groups]
    else:
        registers = [mgpu_utils.bitcast(w.value, ir.VectorType.get((2,), kind)) for w in words]
    shape = layout.registers_shape(tuple(result.shape))
    return mgpu.FragmentedArray(
        _registers=np.array(registers, dtype=object).reshape(shape),
        _layout=layout,
        _is_signed=False if integer else None,
    )


def _element(vector: ir.Value, index: int) -> ir.Value:
    return llvm.extractelement(vector, mgpu_utils.c(index, ir.IntegerType.get_signless(32)))


def _vector(values: Sequence[ir.Value]) -> ir.Value:
    i32 = ir.IntegerType.get_signless(32)
    out = llvm.mlir_undef(ir.VectorType.get((len(values),), i32))
    for i, value in enumerate(values):
        out = llvm.insertelement(out, value, arith.constant(i32, ir.IntegerAttr.get(i32, i)))
    return out
