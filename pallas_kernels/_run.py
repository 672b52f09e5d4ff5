"""From an op's checked arguments to its result: an implementation is chosen and run, on one device
or several."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from jax.typing import DTypeLike
from jaxtyping import Array

from pallas_kernels import dispatch
from pallas_kernels._arguments import Layout, check_flag, is_symbolic, rows_of
from pallas_kernels._mesh import Call, Op, Parts, over_devices
from pallas_kernels._triton_config import stack_is_addressable
from pallas_kernels.nf4_matmul.reference import add_low_rank

_FILES = {
    "xla": ("reference", "xla"),
    "triton": ("triton", "triton"),
    "mosaic_gpu": ("mosaic_sm90", "mosaic"),
    "jax_triton": ("jax_triton", "jax_triton"),
}
"""implementation -> its file in an op's folder, and how its function's name ends there."""


def kernel_of(op: str, implementation: str) -> Callable[..., Array]:
    """An op's kernel: takes its arrays and `layout`, all but "xla" `config`, and "triton"
    `interpret`; those of `nf4_dequantize` take `dtype`, too.

    Imported where it is needed: no implementation needs what another one loads (Mosaic, Pallas'
    Triton lowering, the extra [triton]).
    """
    file, ending = _FILES[implementation]
    module = importlib.import_module(f"pallas_kernels.{op}.{file}")
    kernel: Callable[..., Array] = getattr(module, f"{op}_{ending}")
    return kernel


class Asked(NamedTuple):
    """What the caller of an op says of how it is to run; see `nf4_matmul`."""

    implementation: str | None
    config: dispatch.Config | None
    interpret: bool
    fuse_lora: bool | None = None


def run(
    function: Callable[..., Array],
    parts: Parts,
    *,
    op: Op,
    layout: Layout,
    dtype: DTypeLike,
    asked: Asked,
    wider: Callable[..., Array] | None = None,
) -> Array:
    """Run one of an op's kernels.

    Args:
        function: the op itself, which is called once more on a device's part of its arrays.
        parts: its arrays, checked.
        op: what it computes.
        layout: of the weight.
        dtype: of the result.
        asked: by the caller.
        wider: the op for any number of rows, if `function` is for few.

    Raises:
        ValueError: what is asked for cannot run.
    """
    name = function.__name__
    rows, implementation = 1, asked.implementation
    if parts.x is not None and is_symbolic(parts.x):
        # Kernels are cut for a number of rows.
        implementation = implementation or "xla"
    elif parts.x is not None:
        rows = rows_of(parts.x)
    choice = dispatch.choose(
        name,
        rows,
        layout,
        implementation=implementation,
        interpret=asked.interpret,
        dtype=dtype,
    )
    if asked.fuse_lora is not None:
        check_flag("fuse_lora", asked.fuse_lora)
    fuse = choice.fuse_lora if asked.fuse_lora is None else asked.fuse_lora
    options: dict[str, Any] = {"layout": layout}
    again: dict[str, Any] = {
        "quant_type": layout.quant_type,
        "blocksize": layout.blocksize,
        "implementation": asked.implementation,
        "config": asked.config,
        "interpret": asked.interpret,
    }
    if op == "dequantize":
        options["dtype"] = again["dtype"] = dtype
    if op == "forward":
        again["fuse_lora"] = fuse
    # Without rows there is nothing to configure.
    config = dispatch.config_for(name, choice, asked.config if rows else None)
    if choice.implementation != "xla":
        options["config"] = config
    if choice.implementation == "triton":
        options["interpret"] = asked.interpret
    # A kernel or a config that was asked for is not exchanged for one that suits more rows.
    is_free = asked.config is None and asked.implementation in (None, "triton")
    if not _finds_layers(name, choice.implementation, parts.codes.size):
        parts = parts.of_layer()
    y = over_devices(
        parts if fuse else parts._replace(lora=None),
        op=op,
        layout=layout,
        whole=Call(kernel_of(name, choice.implementation), **options),
        part=None if choice.implementation == "xla" else Call(function, **again),
        wider=Call(wider or function, **again) if is_free else None,
    )
    return y if parts.lora is None or fuse else add_low_rank(y, parts.lora)


def _finds_layers(name: str, implementation: str, nbytes: int) -> bool:
    """Whether a kernel takes a stack of so many codes and the number of a weight in it."""
    if implementation == "triton":
        return stack_is_addressable(nbytes)
    return (name, implementation) == ("nf4_gemv", "mosaic_gpu")
