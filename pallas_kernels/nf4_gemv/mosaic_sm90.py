"""x · Wᵀ for few rows on Hopper: a byte of codes becomes two weights with one look-up.

Reading the codes is all that such a product should cost, so the arithmetic per byte must fit into
the time in which the byte arrives: about 4 instructions per lane. What is done with a byte:

1. `prmt` and `ld.shared` turn it into a float16 pair (`_mosaic_decoder`);
2. a quarter of an `mma.m16n8k16` multiplies it with x and adds up in float32 (`mosaic_lanes`).

x is scaled by a power of two per warp and row, so that bfloat16 becomes float16 with all its bits,
29 binades down from the largest (`mosaic_ends`). How the work is cut: `mosaic_plan`; what a lane
loads: `mosaic_weight`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels._arguments import Layout, LowRank
from pallas_kernels._mosaic import SHARED_LIMIT, call, check_mosaic
from pallas_kernels._mosaic_decoder import lookup_tables
from pallas_kernels.nf4_gemv.mosaic_early import ask_for_first_unit
from pallas_kernels.nf4_gemv.mosaic_lanes import lane_program
from pallas_kernels.nf4_gemv.mosaic_plan import STARTS_EARLY, GemvConfig, Plan, choose_config
from pallas_kernels.nf4_matmul.reference import complete
from pallas_kernels.simt.launch import launch


def nf4_gemv_mosaic(
    x: Array,
    codes: Array,
    absmax: Array,
    nested_absmax: Array | None,
    offset: Array | None,
    bias: Array | None,
    lora: LowRank | None = None,
    layer: Array | None = None,
    *,
    layout: Layout,
    config: GemvConfig | None = None,
) -> Array:
    """`nf4_gemv` on Hopper. x: [..., k] bfloat16 or float16, at most 16 rows; see `nf4_matmul`.
    With a `layer`, W is that one of a stack.

    An adapter whose rank is no multiple of 4 (8 bytes, which a lane loads at once) is padded first.

    Raises:
        ValueError: what this kernel does not do, and which argument asks for it.
    """
    n, k = layout.shape
    rows = math.prod(x.shape[:-1])
    check_mosaic("nf4_gemv", rows, layout, x.dtype)
    config = config or choose_config(rows, n, k)
    plan = Plan(
        m=rows,
        n=n,
        k=k,
        x_dtype=str(x.dtype),
        double_quant=layout.double_quant,
        has_bias=bias is not None,
        config=config,
        quant_type=layout.quant_type,
    )
    _check_config(plan)
    weight = (codes, absmax, nested_absmax, offset)
    if plan.split == 1:
        return _call(x, weight, bias, lora, layer, plan).reshape(*x.shape[:-1], n)
    plan = dataclasses.replace(plan, has_bias=False)
    parts = _call(x, weight, None, None, layer, plan)
    total = parts.reshape(plan.split, *x.shape[:-1], n).sum(axis=0)
    return complete(total, bias, lora, x.dtype)


def _call(
    x: Array,
    weight: tuple[Array | None, ...],
    bias: Array | None,
    lora: LowRank | None,
    layer: Array | None,
    plan: Plan,
) -> Array:
    """The kernel's result, [rows, n] in x's dtype, or the parts of its sums, [split · rows, n]."""
    low: tuple[Array, ...] = ()
    if lora is not None:
        low = tuple(_pad_rank(part) for part in (lora[0].reshape(plan.m, -1), lora[1]))
        plan = dataclasses.replace(plan, rank=low[0].shape[1])
    unused = jnp.zeros((1,), jnp.float32)
    parts = [unused if part is None else part for part in weight]
    program: Callable[..., None] = _program
    early: Callable[..., None] = functools.partial(_early, plan)
    number: tuple[Array, ...] = ()
    if layer is None:
        parts = [part.reshape(-1) for part in parts]
    else:
        number = (layer.reshape(1).astype(jnp.int32),)
        parts = [part.reshape(len(part), -1) for part in parts]
        sizes = [part.nbytes // len(part) for part in parts]
        program = functools.partial(_program_in_stack, sizes)
        early = _nothing
    inputs = (
        *number,
        x.reshape(plan.m, plan.k),
        *parts,
        unused if bias is None else bias.astype(jnp.float32),
        jnp.asarray(lookup_tables(plan.quant_type)),
        *low,
    )
    kernel = launch(
        functools.partial(program, plan),
        jax.ShapeDtypeStruct((plan.split * plan.m, plan.n), plan.out_dtype),
        grid=plan.grid,
        warps=plan.config.warps,
        shared_bytes=plan.shared_bytes,
        name="nf4_gemv",
        early=early if plan.config.early and STARTS_EARLY else None,
    )
    return call(kernel, *inputs)


def _check_config(plan: Plan) -> None:
    allowed = (1, 2, 4) if plan.m == 1 else (1,)
    if plan.config.segments not in allowed:
        raise ValueError(
            f"config has segments={plan.config.segments}; "
            f"expected one of {allowed} for {plan.m} rows of x"
        )
    if plan.shared_bytes > SHARED_LIMIT:
        raise ValueError(
            f"config is {plan.config}, which for {plan.m} rows of {plan.k} takes "
            f"{plan.shared_bytes} bytes of shared memory; expected at most {SHARED_LIMIT}: "
            "take fewer warps or tiles"
        )


def _pad_rank(matrix: Array) -> Array:
    """Zeros behind the last column until there are a multiple of 4."""
    return jnp.pad(matrix, ((0, 0), (0, -matrix.shape[1] % 4)))


def _early(plan, m, *buffers):
    ask_for_first_unit(m, plan, *buffers)


def _nothing(m, *buffers):
    """Which weight of a stack is read may be the result of the kernel in front."""


def _program(plan, m, *buffers):
    lane_program(m, plan, *buffers)


def _program_in_stack(sizes, plan, m, layer, x, *buffers):
    """`sizes`: bytes of one weight's part of each of the stacks that come first in `buffers`."""
    (number,) = m.load(layer, m.word(0))
    weight = [m.part(buffers[i], number, size) for i, size in enumerate(sizes)]
    lane_program(m, plan, x, *weight, *buffers[len(sizes) :])
