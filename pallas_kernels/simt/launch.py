"""Run a lane program as a Pallas kernel on the Mosaic GPU backend."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.simt import mlir


def launch(
    program: Callable[..., None],
    out_type: jax.ShapeDtypeStruct,
    *,
    grid: int,
    warps: int,
    shared_bytes: int,
    name: str,
    early: Callable[..., None] | None = None,
) -> Callable[..., jax.Array]:
    """A function of arrays that runs `program(machine, *inputs, output)` on `grid` blocks.

    Args:
        program: the lane program; its inputs and output are buffers to `machine.load` and `store`.
        out_type: shape and dtype of the one output.
        grid: blocks.
        warps: warps per block, a multiple of 4.
        shared_bytes: shared memory per block, addressed from 0.
        name: the kernel's name.
        early: a lane program of the same buffers that runs before the kernel in front of this one
            has ended, whose results it must not read. None waits with everything.
    """
    if warps % 4:
        raise ValueError(f"warps is {warps}; expected a multiple of 4 (warpgroups)")

    def body(*refs: Any) -> None:
        *buffers, shared = refs
        kinds = (plgpu.Layout.WG_SPLAT, *[plgpu.RefType()] * (1 + len(buffers)))
        cta = jax.lax.axis_index("cta").astype(jnp.int32)

        def run(program: Callable[..., None]) -> None:
            def emit(_: Any, cta: Any, shared_ref: Any, *memrefs: Any) -> None:
                machine = mlir.Machine(cta.registers.item(), shared_ref)
                program(machine, *(machine.buffer(memref) for memref in memrefs))

            plgpu.inline_mgpu(arg_types=kinds)(emit)(cta, shared, *buffers)

        if early is not None:
            plgpu.griddepcontrol_launch_dependents()
            run(early)
            plgpu.griddepcontrol_wait()
        run(program)

    body.__name__ = name
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=[plgpu.SMEM((-(-shared_bytes // 4),), jnp.uint32)],
        grid=(grid,),
        grid_names=("cta",),
        num_threads=warps // 4,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )
